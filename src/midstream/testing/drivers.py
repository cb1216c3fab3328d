"""Makes, reads, saves and resumes loaders of any kind.

    Target      makes loaders from the dataset or function that the user gave
    Session     the loaders of all ranks of one topology, read in step with each other

midstream's loaders are read over ranks and epochs, and their samples are known by origin. Foreign
loaders are known by the content of their batches. They have ``state_dict`` and
``load_state_dict`` (torchdata, LitData), or are iterators with ``get_state`` and ``set_state``
(Grain).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import midstream as ms
from midstream.checkpoint.merge import merge_states
from midstream.checkpoint.read import parse
from midstream.dataset import Dataset
from midstream.distributed.topology import DEFAULT_LANES
from midstream.testing.content import digest, name_samples

_MANY_LANES = 4096
"""Number of lanes with which the blocks of a pipeline are counted."""

_SAME_ERRORS = 20
"""After this many errors in a row without a batch, the error is taken to repeat for ever."""


class Topology(NamedTuple):
    """A number of ranks, and of worker processes on each rank."""

    ranks: int
    workers: int

    def __str__(self) -> str:
        return f"{self.ranks}×{self.workers}"

    def words(self) -> str:
        """Returns the topology in words."""
        workers = f"{self.workers} worker{'s' * (self.workers != 1)}"
        return workers if self.ranks == 1 else f"{self.ranks} ranks with {workers} each"


class Item(NamedTuple):
    """A batch that was handed out, or an error that was raised in its place.

    Attributes:
        epoch: Its epoch.
        digest: Hash of the batch's content.
        samples: A name for each sample: its origin, or its content.
        content: Content of the first samples.
        error: Type and message of the error; empty for a batch.
        rank: The rank that handed it out.
    """

    epoch: int
    digest: str
    samples: tuple[str, ...]
    content: str = ""
    error: str = ""
    rank: int = 0

    def same(self, other: Item) -> bool:
        """Whether both are the same batch of the same rows, or the same error."""
        return self[:3] == other[:3] and self.error == other.error


class Saved(NamedTuple):
    """A checkpoint, serialized as it would be on a disk.

    Attributes:
        epoch: The epoch in progress, which foreign loaders do not save.
        states: One text or byte string per rank.
        is_midstream: Whether these are midstream's states, as JSON.
    """

    epoch: int
    states: tuple[Any, ...]
    is_midstream: bool

    def load(self) -> list[Any]:
        """Returns new copies of the states of all ranks."""
        return [
            json.loads(state) if self.is_midstream else pickle.loads(state) for state in self.states
        ]

    @property
    def num_bytes(self) -> int:
        """Size over all ranks, without the pipeline's spec, which does not grow."""
        if not self.is_midstream:
            return sum(map(len, self.states))
        return sum(len(json.dumps({**json.loads(state), "spec": ""})) for state in self.states)


@dataclass(frozen=True)
class Setup:
    """Settings for making and reading a target's loaders, the same in every process of a check.

    Attributes:
        epochs: Number of epochs to read.
        batch_size: Batch size of datasets that do not end in ``.batch``.
        lanes: Number of lanes of datasets; None: the loader chooses.
        key: Function that names a sample of a foreign loader.
    """

    epochs: int = 2
    batch_size: int = 4
    lanes: int | None = None
    key: Callable[[Any], Any] | None = None


class Target:
    """Makes the loaders that are checked.

    Args:
        given: A dataset; a function that returns one; or a function that returns a loader and takes
            any of ``num_workers``, ``rank`` and ``world_size`` by keyword.

    Raises:
        TypeError: If it is none of these.
    """

    def __init__(self, given: Any) -> None:
        if not isinstance(given, Dataset) and not callable(given):
            if any(hasattr(given, name) for name in ("load_state_dict", "set_state")):
                raise TypeError(
                    "check_resume makes the loader anew for every resume, and was given a"
                    f" {type(given).__name__} that is made already. Give a function:"
                    " check_resume(lambda num_workers: MyLoader(..., num_workers=num_workers))"
                )
            if not (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
                raise TypeError(
                    "check_resume takes a midstream dataset, or a function that returns a dataset"
                    f" or a loader; found {type(given).__name__}"
                )
            given = ms.from_dataset(given)
        self.given = given
        self.takes: frozenset[str] = frozenset()
        if not isinstance(given, Dataset):
            names = ("num_workers", "rank", "world_size")
            try:
                parameters = inspect.signature(given).parameters
            except (TypeError, ValueError):
                parameters = {}  # type: ignore[assignment]
            every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            self.takes = frozenset(name for name in names if every or name in parameters)
        self.name = getattr(given, "__qualname__", None) or (
            given.node.summary() if isinstance(given, Dataset) else repr(given)
        )

    def _call(self, topology: Topology, rank: int) -> Any:
        if isinstance(self.given, Dataset):
            return self.given
        values = {"num_workers": topology.workers, "rank": rank, "world_size": topology.ranks}
        return self.given(**{name: value for name, value in values.items() if name in self.takes})

    def probe(self) -> tuple[bool, Dataset | None]:
        """Returns whether the loaders are midstream's, and the dataset if the user gave one."""
        made = self._call(Topology(1, 0), 0)
        if isinstance(made, Dataset):
            return True, made
        return _is_midstream(made), None

    def make(self, topology: Topology, rank: int, setup: Setup) -> Any:
        """Makes the loader of a rank."""
        made = self._call(topology, rank)
        if not isinstance(made, Dataset):
            return made
        options: dict[str, Any] = (
            {} if made.batch_rows else {"batch_size": setup.batch_size, "collate_fn": list}
        )
        return ms.DataLoader(
            made,
            num_workers=topology.workers,
            rank=rank,
            world_size=topology.ranks,
            lanes=setup.lanes,
            remainder="uneven",
            **options,
        )


def fitting_lanes(
    dataset: Dataset, ranks: tuple[int, ...], workers: tuple[int, ...], batch_size: int, window: int
) -> int | None:
    """Returns a number of lanes small enough that each is stopped in its middle several times.

    Args:
        dataset: The pipeline.
        ranks: Numbers of ranks.
        workers: Numbers of worker processes.
        batch_size: Batch size, if the dataset has no batches of its own.
        window: Number of batches that are read.

    Returns:
        None for random access, which needs no lanes.
    """
    if dataset.random_access:
        return None
    step = math.lcm(*ranks)
    limit = dataset.node.max_lanes()
    blocks, _ = dataset.node.full_lanes(_MANY_LANES, 1 if dataset.batch_rows else batch_size)
    lanes = max(
        1, min(DEFAULT_LANES, window // 4, blocks // 3, *([limit[0]] if limit is not None else []))
    )
    return max(max(ranks) * max(1, *workers), step, lanes - lanes % step)


def _is_midstream(loader: Any) -> bool:
    return isinstance(loader, ms.DataLoader) and not loader.passes_through


class Step(NamedTuple):
    """One step of a session: an item of each rank that had one, or the end of an epoch.

    Attributes:
        items: The items, in the run's order.
        end: Whether the epoch ended.
    """

    items: list[Item]
    end: bool = False


class Session:
    """Loaders of all ranks of one topology, read from the start or from a checkpoint.

    Attributes:
        is_midstream: Whether they are midstream's.
        loaders: One per rank.
    """

    def __init__(
        self, target: Target, topology: Topology, setup: Setup, saved: Saved | None = None
    ) -> None:
        self.setup, self.topology = setup, topology
        self.loaders = [target.make(topology, rank, setup) for rank in range(topology.ranks)]
        self.is_midstream = _is_midstream(self.loaders[0])
        self._iterators: list[Any] | None = None
        self._errors = 0
        self._epoch = 0
        self._empty = True  # whether the epoch in progress had no batch yet
        if self.is_midstream:
            if topology.ranks > 1 and self.loaders[0].run.synced:
                raise ValueError(
                    "sync_end=True needs the real ranks, and check_resume runs all of them in one"
                    " process: let the function leave it out here, or give ranks=(1,)"
                )
            if saved is not None:
                for loader in self.loaders:
                    states = saved.load()
                    loader.load_state_dict(states if len(states) > 1 else states[0])
        elif hasattr(self.loaders[0], "load_state_dict"):
            self._kind = "state_dict"
            if saved is not None:
                self._epoch = saved.epoch
                self.loaders[0].load_state_dict(saved.load()[0])
        else:
            self._kind = "get_state"
            made = self.loaders[0]
            iterator = (
                made if hasattr(made, "__next__") or not hasattr(made, "__iter__") else iter(made)
            )
            if not hasattr(iterator, "set_state") or not hasattr(iterator, "get_state"):
                raise TypeError(
                    f"a {type(made).__name__} cannot be resumed: it has neither state_dict and"
                    " load_state_dict nor get_state and set_state"
                )
            self._iterators = [iterator]
            if saved is not None:
                self._epoch = saved.epoch
                iterator.set_state(saved.load()[0])

    def step(self) -> Step | None:
        """Reads the next batch of every rank; returns None when all epochs are over.

        Raises:
            Exception: An error of a midstream loader that is not the error of one sample.
        """
        return self._step_ours() if self.is_midstream else self._step_foreign()

    def _step_ours(self) -> Step | None:
        if self._iterators is None:
            epoch = self.loaders[0].epoch
            if epoch >= self.setup.epochs:
                return None
            self._epoch, self._empty = epoch, True
            self._iterators = [iter(loader) for loader in self.loaders]
            order = sorted(
                range(len(self.loaders)), key=lambda rank: self.loaders[rank].run.position.first
            )
            self._order = order
        items: list[Item] = []
        for rank in self._order:
            if self._iterators[rank] is None:
                continue
            while True:
                try:
                    batch = next(self._iterators[rank])
                except StopIteration:
                    self._iterators[rank] = None
                    break
                except ms.SampleError as error:
                    items.append(self._error(error, str(error.origin), rank))
                    if self._errors > 50 * _SAME_ERRORS:
                        raise
                    self._empty = False
                    if len(self.loaders) == 1:
                        return Step(items)
                    continue
                self._errors = 0
                trace = self.loaders[rank].trace()
                if not trace.padded:
                    names = tuple(map(str, trace))
                    items.append(
                        Item(self._epoch, digest(batch), names, _start(batch, None), rank=rank)
                    )
                break
        if not items and all(iterator is None for iterator in self._iterators):
            self._iterators = None
            if self.loaders[0].epoch <= self._epoch and self._empty:
                raise ValueError(f"epoch {self._epoch} has no batches, and there is no end to that")
            return Step([], end=True)
        self._empty = False
        return Step(items)

    def _step_foreign(self) -> Step | None:
        if (
            self._epoch >= (self.setup.epochs if self._kind == "state_dict" else 1)
            or self._errors > _SAME_ERRORS
        ):
            return None
        if self._iterators is None:
            _set_epoch(self.loaders[0], self._epoch)
            self._iterators = [iter(self.loaders[0])]
        try:
            batch = next(self._iterators[0])
        except StopIteration:
            self._iterators = None
            self._epoch += 1
            return Step([], end=True)
        except Exception as error:
            return Step([self._error(error)])
        self._errors = 0
        names = tuple(name_samples(batch, self.setup.key))
        return Step([Item(self._epoch, digest(batch), names, _start(batch, self.setup.key))])

    def _error(self, error: Exception, origin: str = "", rank: int = 0) -> Item:
        self._errors += 1
        lines = str(error).strip().splitlines() or [""]
        text = f"{type(error).__name__} {origin or lines[-1][:80]}".strip()
        return Item(self._epoch, "", (), error=text, rank=rank)

    def save(self) -> Saved:
        """Saves a checkpoint of all ranks.

        Raises:
            EOFError: If the loader has no state between two epochs.
        """
        if self.is_midstream:
            states = []
            for loader in self.loaders:
                state = loader.state_dict()
                text = json.dumps(state)
                if json.loads(text) != state:
                    raise TypeError(
                        "the state is not plain JSON: it changes when it is written and read"
                    )
                states.append(text)
            return Saved(self.loaders[0].epoch, tuple(states), True)
        if self._kind == "get_state":
            if self._iterators is None:
                raise EOFError
            return Saved(self._epoch, (pickle.dumps(self._iterators[0].get_state()),), False)
        return Saved(self._epoch, (pickle.dumps(self.loaders[0].state_dict()),), False)

    @property
    def stuck(self) -> bool:
        """Whether the loader raises errors only."""
        return self._errors > _SAME_ERRORS

    @property
    def stream(self) -> bool:
        """Whether a midstream pipeline is a stream, ordered until its first lane has drained."""
        return not self.loaders[0].run.pipeline.random_access

    def lanes(self) -> tuple[int, bool]:
        """Returns the number of lanes of midstream's loaders, and whether any lane has drained."""
        run_state = parse(merge_states([loader.state_dict() for loader in self.loaders]))
        drained = any(
            lane is not None and lane.get("lane", {}).get("done")
            for lane in run_state.lanes.values()
        )
        return run_state.num_lanes, drained

    def close(self) -> None:
        """Shuts the loaders down."""
        self._iterators = None
        for loader in self.loaders:
            for name in ("close", "shutdown"):
                if callable(close := getattr(loader, name, None)):
                    with contextlib.suppress(Exception):
                        close()
                    break
        self.loaders = []


def _start(batch: Any, key: Callable[[Any], Any] | None) -> str:
    text = ", ".join(name_samples(batch, key)[:3])
    return text if len(text) <= 160 else text[:159] + "…"


def _set_epoch(loader: Any, epoch: int) -> None:
    """Sets the epoch as trainers do, for loaders that do not count epochs themselves."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    elif type(loader).__module__.partition(".")[0] in ("torch", "torchdata", "midstream"):
        dataset = getattr(loader, "dataset", None)
        if dataset is not None and hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
