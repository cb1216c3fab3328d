"""The DataLoader: lanes run in torchdata's worker processes, and the main process owns position and epoch.

    readers.py    in the worker: runs its lanes; each turn makes one envelope
    position.py   in the main process: batches, lane states, counts, and an undo log
    here          `_LoaderIterator` takes envelopes apart: publish the state, then hand out the batch or raise;
                  `DataLoader` has the rules of arguments, topology, epochs and loading

The only file that knows torchdata exists. It is long because those rules have to be read together.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import pickle
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Iterator as Iter
from html import escape
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data.dataloader import _InfiniteConstantSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from midstream.changes.adopt import adopt
from midstream.changes.excluded import require_excludable, with_excluded
from midstream.changes.running import running
from midstream.changes.weights import with_weights
from midstream.checkpoint.changes import NO_CHANGES, Changes
from midstream.checkpoint.differences import diff_specs
from midstream.checkpoint.merge import agreed, merge_states
from midstream.checkpoint.progress import Progress, progress
from midstream.checkpoint.read import RunState, parse
from midstream.checkpoint.write import to_state
from midstream.common.tables import MONO
from midstream.common.validation import require_int
from midstream.dataset import Dataset
from midstream.distributed.agreement import Agreement
from midstream.distributed.topology import (
    Topology,
    batches_of_rank,
    choose_lanes,
    current_topology,
    slots,
)
from midstream.errors import (
    CheckpointError,
    MidstreamError,
    Origin,
    SourceError,
    WorkerError,
    bullet_list,
)
from midstream.loader.arguments import (
    PASSED_THROUGH,
    build_pipeline,
    runs_here,
    shuffle_seed,
    spec_seed,
    with_seed,
)
from midstream.loader.position import Position, Trace
from midstream.loader.running_pipeline import RunningPipeline
from midstream.loader.trainers import (
    LIGHTNING_ALONE,
    AccelerateIterator,
    EpochHint,
    asked_by,
    not_registered,
)
from midstream.pipeline import describe
from midstream.pipeline.breadcrumbs import describe_trail, new_table
from midstream.pipeline.ledger import RecentFailures, add_counts, check_limits, failed_in
from midstream.pipeline.node import Node
from midstream.pipeline.passes import require_epochs
from midstream.sources import from_dataset
from midstream.transport.arena import Arena
from midstream.transport.bundles import MOST, Unbundler, begin_anew, new_totals
from midstream.transport.parcel import Parcel
from midstream.workers.liveness import exit_status, lost_in
from midstream.workers.messages import (
    BATCH,
    ERROR,
    FATAL,
    NOTHING,
    Message,
    collate_nothing,
    unpack_message,
)
from midstream.workers.processes import (
    InnerLoader,
    is_usable,
    quiet_vital,
    start_processes,
    starts_slowly,
)
from midstream.workers.readers import Runner
from midstream.workers.signals import Context, WorkerInit
from midstream.workers.threads import Launch, ThreadReaders

log = logging.getLogger("midstream")

_FAILED = -1
"""What a rank tells the others instead of a number of batches when it cannot go on."""


class _Token:
    """Tells the iterator in use from those left behind; a copy of a loader has none in use."""

    __slots__ = ("iterator",)

    def __init__(self, iterator: _LoaderIterator | None = None) -> None:
        self.iterator: Callable[[], _LoaderIterator | None] = lambda: None
        if iterator is not None:
            self.iterator = weakref.ref(iterator)

    def __reduce__(self) -> tuple[type[_Token], tuple[()]]:
        return _Token, ()


class _LoaderIterator:
    """One pass over the loader."""

    def __init__(self, loader: DataLoader, epoch: Position, inner: Iter[Any]) -> None:
        self._loader, self._epoch, self._inner = loader, epoch, inner
        self._crumbs = loader._runner.crumbs if loader._runner is not None else None
        self._token = loader._active = _Token(self)
        self._over = False  # whether `DataLoader.skip` went on into the next epoch
        self._ready: deque[tuple[int, int, Message]] = deque()
        self._loud = 0  # how many of `_ready` are handed out or raised
        self._agreement = loader._agreement(epoch.topology)
        self._hold = (
            epoch.turns is None and not loader._pipeline.infinite
        ) or self._agreement is not None
        self._asked = False  # whether the ranks were asked in this pass
        self._least: int | None = (
            None  # how many more batches every rank has, as agreed for the delivery in progress
        )
        self._late: list[Message] = []
        self._dead_known = False
        self._ended = False
        self._broken: BaseException | None = None
        self._windows = RecentFailures()
        self._windows.begin(epoch.totals())
        self._settled = False  # whether the call in progress has come to its result
        self._taken: list[
            tuple[int, int, Message]
        ] = []  # what the call in progress took of `_ready`

    def __iter__(self) -> _LoaderIterator:
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        if self._loader._active is not self._token and self._loader._renewed is self._token:
            self._loader._renewed = None
            self.__dict__.update(self._loader._iterate().__dict__)  # goes on under other weights
            self._token.iterator = weakref.ref(self)
        if self._loader._active is not self._token:
            raise RuntimeError(
                "this iterator was left behind: the loader was iterated again, closed, or a state"
                " was loaded after it was made. Use the newest one."
            )
        applied = self._epoch.applied
        self._settled = False
        self._taken.clear()
        try:
            return self._deliver()
        except BaseException as error:
            if self._settled:
                raise
            # A dead worker is told here, and Ctrl-C may raise anywhere: then nothing was handed
            # out.
            self._epoch.undo_to(applied)
            self._ready.extendleft(reversed(self._taken))
            self._loud = sum(out.kind != NOTHING for _, _, out in self._ready)
            if not isinstance(
                error, Exception
            ):  # Ctrl-C: an envelope may have been lost on its way here
                self._broken = RuntimeError(
                    "reading was interrupted. To go on:"
                    " loader.load_state_dict(loader.state_dict()), and iterate again"
                )
            elif not isinstance(error, StopIteration):
                explained = self._explain(error)
                if explained is not error:
                    self._broken = explained
                    raise explained from error
            raise

    def _deliver(self) -> Any:
        """The next batch, or the next error."""
        epoch = self._epoch
        if self._broken is not None and not self._ready:
            raise self._explain(self._broken)
        if epoch.complete:
            while self._late:
                late = self._late.pop()
                self._tell(late)
                if late.notes is not None:
                    self._limits(late, counted=True)
            self._drain()
            self._settled = True
            raise StopIteration
        self._refill()
        while self._loud:
            # Whatever may raise comes before the delivery is taken and counted, so that nothing is
            # lost with it.
            number, lane, out = self._ready[0]
            if out.notes is not None:
                self._tell(out)
                self._limits(out)
            if out.kind == FATAL:
                self._tell_others()
                self._broken = self._rebuild(out.payload)
                self._ready.clear()
                self._loud = 0
                self._settled = True
                raise self._broken
            loud = out.kind != NOTHING
            last = loud and self._ended and self._loud == 1
            if self._agreement is not None:
                if out.kind == BATCH and not self._agree():
                    break
                last = out.kind == BATCH and self._least == 1
            epoch.apply(
                number, lane, out, last=last, skipped=self._loader._skipping and out.kind == BATCH
            )
            self._least = None
            self._taken.append(self._ready.popleft())
            self._loud -= loud
            if not loud:
                continue
            if last and self._ended:
                self._count_rest()
            if out.kind == ERROR:
                if self._loader._skipping:
                    log.info("skip: passed over a failure: %s", out.payload.message)
                    if last:
                        break
                    self._refill()
                    continue
                failed = out.payload.error()
                self._settled = True
                raise failed
            return out.payload
        if self._broken is not None:
            self._broken = self._explain(self._broken)
            self._tell_others()
            self._settled = True
            raise self._broken
        if self._agreement is None or self._agree() or self._ended:
            self._count_rest()
        epoch.finish()
        return self._deliver()  # which ends, after what is left to tell

    def _fetch(self, loud: int) -> None:
        """Take envelopes until so many things to hand out are ready."""
        while not self._ended:
            if self._loud >= loud and (self._agreement is None or self._in_hand() >= loud):
                break
            arrived = next(self._inner)
            if type(arrived) is Parcel and arrived.notice:
                self._loader._no_memory(arrived.notice)
            number, lane, outs = unpack_message(arrived)
            for out in outs:
                self._ready.append((number, lane, out))
                self._loud += out.kind != NOTHING

    def _refill(self) -> None:
        """Take what the next delivery needs; an error is told when what came before it is handed
        out.
        """
        try:
            if self._broken is None:
                self._fetch(2 if self._hold else 1)
        except StopIteration:
            self._ended = True
        except Exception as error:
            self._broken = error

    def _in_hand(self) -> int:
        """Batches that are ready; what will fail counts too, it is told in its turn."""
        return sum(out.kind in (BATCH, FATAL) for _, _, out in self._ready) + (
            self._broken is not None
        )

    def _tell_others(self) -> None:
        """Let the other ranks know that this one cannot go on, where they would wait for it."""
        if self._agreement is not None and self._least is None:
            self._least = _FAILED
            if self._asked:
                self._agreement.least(_FAILED)
            else:
                self._agreement.all(_FAILED)

    def _agree(self) -> bool:
        """Whether every rank has a batch to hand out now; sets `_least`, which is 1 when it is the
        last for some rank.
        """
        assert self._agreement is not None
        if self._least is None:
            have = min(2, self._in_hand())
            if self._asked:
                self._least = self._agreement.least(have)
            else:
                found = self._agreement.all(have)
                self._asked, self._least = True, min(found)
                empty = [rank for rank, count in enumerate(found) if count == 0]
                if empty and self._epoch.steps == 0 and self._least >= 0:
                    names = ", ".join(f"rank {rank}" for rank in empty[:8])
                    self._broken = SourceError(
                        f"{names} of {len(found)} {'have' if len(empty) > 1 else 'has'} no data in"
                        f" epoch {self._epoch.epoch}: no rank could take a step"
                        f" ({self._loader._sources_in_words()}). Use fewer ranks, or give the"
                        " sources more shards or rows."
                    )
                    self._settled = True
                    raise self._broken
            if self._least < 0:
                self._broken = WorkerError(
                    "another rank cannot go on reading; its own error says why"
                )
                self._settled = True
                raise self._broken
        return self._least > 0

    def _count_rest(self) -> None:
        """Nothing more will be handed out: count what was dropped at the end."""
        while self._ready and self._ready[0][2].kind == NOTHING:
            number, lane, out = self._ready[0]
            self._epoch.apply(number, lane, out, last=True)
            self._taken.append(self._ready.popleft())
            self._late.append(
                out
            )  # a warning that someone turned into an error must not cost the batch in hand

    def _drain(self) -> None:
        """Let the workers end by themselves."""
        if not self._ended and not self._hold:
            self._ended = True
            with contextlib.suppress(StopIteration):
                while True:
                    next(self._inner)

    def _tell(self, out: Message) -> None:
        for key, text in out.notes.notices if out.notes is not None else ():
            if key not in self._loader._noticed:
                self._loader._noticed.add(key)
                warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _limits(self, out: Message, *, counted: bool = False) -> None:
        """Were too many samples skipped? With ``counted`` what it tells is in the position already."""
        assert out.notes is not None
        events, limits = out.notes.events, out.notes.limits
        if not limits:
            return
        totals = self._epoch.totals()
        after = totals if counted else add_counts(totals, events)
        try:
            check_limits(
                after,
                limits,
                self._windows,
                self._epoch.seen() + (0 if counted else failed_in(events)),
            )
        except MidstreamError as error:
            self._broken = error
            self._tell_others()
            raise

    def _rebuild(self, payload: tuple[str, str, bytes]) -> BaseException:
        summary, text, data = payload
        if data:
            try:
                error = pickle.loads(data)
                if isinstance(error, MidstreamError):
                    error.__cause__ = None
                    return error
            except Exception:
                pass
        return WorkerError(
            f"reading failed, and not on one sample alone: {summary}\nThe position stays at the"
            " last batch handed out; after mending the cause, load a checkpoint or iterate the"
            f" loader again.\nOriginal traceback:\n{text}"
        )

    def _explain(self, error: BaseException) -> BaseException:
        """What torch raises when a worker died, with what is known of it; any other error as it is."""
        if isinstance(error, MidstreamError):
            return error
        dead, lost = [], lost_in(error)
        known = self._dead_known or lost is not None
        for number, worker in enumerate(getattr(self._inner, "_workers", [])):
            # A batch of a dead worker that cannot be received any more may be noticed before the
            # death is.
            worker.join(0 if known else 0.2)
            if worker.exitcode not in (None, 0) or (lost is not None and number in lost.numbers):
                crumbs = self._crumbs[number].numpy() if self._crumbs is not None else None
                hand = describe_trail(crumbs, self._epoch.facts.names) if crumbs is not None else ""
                what = (
                    f"{exit_status(worker.exitcode)}{f' while working on {hand}' if hand else ''}"
                )
                dead.append(f"worker {number} (pid {worker.pid}) {what}")
        self._dead_known = True
        if dead or (isinstance(error, RuntimeError) and "DataLoader worker" in str(error)):
            return WorkerError(
                f"{'; '.join(dead) or error}.\nThe position is after the last batch handed out"
                f" (batch {self._epoch.steps} of epoch {self._epoch.epoch}). To go on from there:"
                " loader.load_state_dict(loader.state_dict()), and iterate again. A worker killed"
                " by SIGKILL often ran out of memory; SIGBUS is a full /dev/shm."
            )
        return error


class DataLoader(StatefulDataLoader):  # type: ignore[misc]
    """A drop-in ``torch.utils.data.DataLoader`` that resumes mid-stream, exactly.

    Takes a midstream dataset, or map-style data as torch does. The sequence of batches depends on
    the dataset, its seed, the epoch, the batch size and the number of lanes; never on workers or
    start method.

    ``state_dict()`` is legal at any time and costs microseconds; ``load_state_dict()`` takes a
    state saved with any number of workers. Worker processes do nothing on SIGINT, SIGTERM, SIGUSR1
    and SIGUSR2, and end with the main process. The epoch in progress is `epoch`:

        for epoch in range(loader.epoch, num_epochs):
            for batch in loader:
                ...

    Args:
        dataset: A midstream dataset, or map-style data (with ``__len__`` and ``__getitem__``),
            which is lifted to ``from_dataset(data)``. With a ``sampler``, ``batch_sampler`` or
            ``generator``, and for other iterables, the arguments go to torchdata's
            ``StatefulDataLoader`` unchanged, and only its promises hold.
        batch_size: Samples per batch; None for none. Left alone where the pipeline already ends in
            ``.batch``.
        shuffle: Shuffle with the seed ``torch.initial_seed()``, which is kept in the checkpoint.
        lanes: Into how many logical sub-streams the run is divided; fixed by the first run (48, or
            what the sources and ranks need).
        rank: Of this process among ``world_size``; left out, ``torch.distributed`` or the
            environment says.
        world_size: Number of data-parallel ranks.
        remainder: What happens to the last batches of a sized pipeline that do not go round all
            ranks: ``"drop"`` (counted in `progress`), ``"pad"`` (the first batches again, marked in
            `trace`), or ``"uneven"`` (some ranks make one more).
        strict_order: Refuse a number of ranks that does not divide the lanes of a stream, where
            only exactly-once can be kept, not the order.
        sync_end: End the epoch of a stream on all ranks at the same step; what is left on some is
            in the state and comes first in the next epoch. True, or the process group of the
            data-parallel ranks (any backend that takes CPU tensors): one all-reduce of a number
            before each batch.
        worker_type: ``"process"``, or ``"thread"``: the ``num_workers`` readers are threads of this
            process. Right where reading waits or works outside the GIL; see
            `midstream.workers.threads`. Order and checkpoints are the same.
        prefetch_factor: Batches that each worker has ready (2); up to eight times as many where
            they are small and quickly made. With ``num_workers=0`` it may be given too: then one
            thread reads so many ahead while the model trains.
        collate_fn, drop_last, num_workers, ...: As in torch. ``in_order=False`` is refused.

    Raises:
        ValueError: On arguments that contradict each other or the pipeline.

    >>> import midstream as ms
    >>> loader = ms.DataLoader(ms.from_dataset(range(10)).shuffle(seed=1), batch_size=4)
    >>> batches = iter(loader)
    >>> first = next(batches)
    >>> state = loader.state_dict()
    >>> rest = list(batches)
    >>> loader.load_state_dict(state)
    >>> all(a.equal(b) for a, b in zip(loader, rest)), len(loader)
    (True, 3)
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        snapshot_every_n_steps: int | None = 1,
        lanes: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        remainder: Literal["drop", "pad", "uneven"] = "drop",
        strict_order: bool = False,
        sync_end: Any = False,
        worker_type: Literal["process", "thread"] = "process",
    ) -> None:
        if isinstance(sampler, _InfiniteConstantSampler):
            sampler = None  # what torch puts in place of none, seen by whoever rebuilds a loader from its attributes
        common: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "timeout": timeout,
            "worker_init_fn": worker_init_fn,
            "multiprocessing_context": multiprocessing_context,
            "prefetch_factor": prefetch_factor,
            "persistent_workers": persistent_workers,
            "pin_memory_device": pin_memory_device,
            "in_order": in_order,
            "snapshot_every_n_steps": snapshot_every_n_steps,
        }
        own = {
            "lanes": lanes,
            "rank": rank,
            "world_size": world_size,
            "remainder": remainder,
            "strict_order": strict_order,
            "sync_end": sync_end,
            "shuffle": shuffle,
            "worker_type": worker_type,
        }
        if worker_type not in ("process", "thread"):
            raise ValueError(f"worker_type is 'process' or 'thread'; found {worker_type!r}")
        self._foreign = not runs_here(dataset, sampler, batch_sampler, generator)
        self._active: _Token | None = (
            None  # the token of the iterator in use; the iterator itself would make a cycle
        )
        self._renewed: _Token | None = (
            None  # the token of one that starts reading again at its next batch
        )
        self._guided = False  # an adapter says what was trained
        self._trained: tuple[Position, int] | None = None  # what it said
        self._placed: bool | None = (
            None  # prepared by Accelerate: whether it wants batches on the device
        )
        if self._foreign:
            if worker_type == "thread":
                raise TypeError(PASSED_THROUGH.format("worker_type='thread'"))
            with quiet_vital():
                super().__init__(
                    dataset,
                    batch_size,
                    shuffle,
                    sampler,
                    batch_sampler,
                    collate_fn=collate_fn,
                    drop_last=drop_last,
                    generator=generator,
                    **common,
                )
            self.__dict__.update(own)
            return
        for name, value in (
            ("sampler", sampler),
            ("batch_sampler", batch_sampler),
            ("generator", generator),
        ):
            if value is not None:
                raise ValueError(
                    f"a midstream pipeline has its own order, so {name} does not apply: shuffle"
                    " with .shuffle(seed), weigh with midstream.interleave"
                )
        if not in_order:
            raise ValueError(
                "in_order=False hands out batches by chance, so no position could be saved; leave"
                " it True"
            )
        if remainder not in ("drop", "pad", "uneven"):
            raise ValueError(f"remainder is 'drop', 'pad' or 'uneven'; found {remainder!r}")
        if lanes is not None and (
            isinstance(lanes, bool) or not isinstance(lanes, int) or lanes < 1
        ):
            raise ValueError(f"lanes is an integer of at least 1; found {lanes!r}")
        if worker_type == "thread" and multiprocessing_context is not None:
            raise ValueError(
                "worker_type='thread' starts no process, so multiprocessing_context does not apply"
            )
        if num_workers == 0 and prefetch_factor is not None:
            if (
                isinstance(prefetch_factor, bool)
                or not isinstance(prefetch_factor, int)
                or prefetch_factor < 1
            ):
                raise ValueError(
                    f"prefetch_factor is an integer of at least 1; found {prefetch_factor!r}"
                )
            own["prefetch_factor"] = prefetch_factor
            common["prefetch_factor"] = None  # torch knows it of processes alone
        source = dataset if isinstance(dataset, Dataset) else from_dataset(dataset)
        pipeline, batch_size, drop_last, collate_fn, self._seed_from_torch = build_pipeline(
            source, batch_size, shuffle, drop_last, collate_fn, torch.initial_seed()
        )
        with quiet_vital():
            super().__init__(source, None, collate_fn=collate_fn, **common)
        # torch refuses to set these after its constructor, and has other uses for them inside it.
        self.__dict__.update(own, batch_size=batch_size, drop_last=drop_last, collate_fn=collate_fn)
        self._changes = NO_CHANGES
        self._skipping = False
        self.__dict__["sampler"] = EpochHint(self)
        self._set_pipeline(pipeline.node)
        require_epochs(self._facts.bound)
        if self._in_threads:
            for bound in self._facts.bound.walk():
                if getattr(bound.node, "isolate_rng", False):
                    raise ValueError(
                        f"{bound.path} has isolate_rng=True, which sets the global random"
                        " generators while its function runs. In a thread the training loop and"
                        " other readers would draw from them meanwhile: use with_rng=True there,"
                        " or read with worker_type='process' or without prefetch_factor."
                    )
        self._noticed: set[str] = set()
        self._together: Agreement | None = None
        self._resumed_at = (0, 0, 0)
        self._next_epoch = 0
        self._loaded: tuple[RunState, dict[str, Any]] | None = None
        self._ever_loaded = False
        self._current: Position | None = None
        self._runner: Runner | None = None
        self._warned_restart = False
        self._started: tuple[Any, Position, Any] | None = None

    def _set_pipeline(self, pipeline: Node) -> None:
        self._pipeline, self._facts = (
            pipeline,
            RunningPipeline(pipeline, self._changes),
        )

    def _epoch_from(
        self, topology: Topology, num_lanes: int, epoch: int, before: Position | None = None
    ) -> Position:
        """The position at the start of an epoch, with the counts of the one before."""
        facts = self._facts_of(self._changes, epoch)
        turns = self._turns(topology, 0, facts)
        return Position(
            facts,
            topology,
            num_lanes,
            epoch,
            turns,
            None,
            dict(before.tallies) if before is not None else None,
            before.tracked if before is not None else None,
            even=self._even(topology, 0, facts),
            keep=self._synced,
        )

    def _epoch_at(self, topology: Topology, run_state: RunState) -> Position:
        """The position of a checked state."""
        start, facts = run_state.batches, self._facts_of(run_state.changes, run_state.epoch)
        turns, even = self._turns(topology, start, facts), self._even(topology, start, facts)
        return Position(
            facts,
            topology,
            run_state.num_lanes,
            run_state.epoch,
            turns,
            run_state,
            even=even,
            keep=self._synced,
        )

    def _facts_of(self, changes: Changes, epoch: int) -> RunningPipeline:
        if changes.adopted is None and not changes.weights_changed_in(epoch):
            return self._facts
        return RunningPipeline(self._pipeline, changes, epoch)

    # -- topology -----------------------------------------------------------------------------------------------------

    def _topology(self) -> Topology:
        return current_topology(self.rank, self.world_size, self.num_workers)

    def _num_lanes(self, topology: Topology) -> int:
        if self._current is not None:
            return self._current.num_lanes
        asked = self.lanes
        if asked is not None and asked < topology.world_size and self._pipeline.random_access:
            asked = None  # lanes only keep counts there, and every rank needs one
        return choose_lanes(asked, topology, self._pipeline.max_lanes())

    def _turns(
        self, topology: Topology, start: int, facts: RunningPipeline | None = None
    ) -> int | None:
        """Batches this rank makes from ``start`` on; None when only reading tells."""
        pipeline = (facts or self._facts).running
        if not pipeline.random_access:
            return None
        total = pipeline.length()
        if total is None:
            return None
        remainder = self.remainder if topology.world_size > 1 else "uneven"
        return batches_of_rank(total, start, topology.rank, topology.world_size, remainder)

    def _agreement(self, topology: Topology) -> Agreement | None:
        """How the ranks end together, where ``sync_end`` asks for it; made once, by all ranks at
        their first ``iter()``.
        """
        if not self._synced or topology.world_size == 1:
            return None
        if self._together is None:
            self._together = Agreement(self.sync_end, topology.world_size)
        return self._together

    @property
    def _synced(self) -> bool:
        return self.sync_end is not False and self.sync_end is not None

    def _even(self, topology: Topology, start: int, facts: RunningPipeline | None = None) -> bool:
        """Whether all ranks come to the end of the epoch at the same step."""
        if topology.world_size == 1 or self._synced:
            return True
        pipeline = (facts or self._facts).running
        total = pipeline.length() if pipeline.random_access else None
        if total is None:
            return pipeline.infinite
        return self.remainder != "uneven" or (total - start) % topology.world_size == 0

    def _check_topology(self, topology: Topology, num_lanes: int) -> None:
        """Refuse ranks and workers that could never get data, before they wait for it."""
        ranks, readers = topology.world_size, topology.readers
        if num_lanes < ranks:
            raise ValueError(
                f"{topology} cannot be served: the run has {num_lanes} lanes, and rank"
                f" {topology.rank} of {ranks}"
                f" {'gets none of them' if topology.rank >= num_lanes else 'is one of more'}. A"
                f" rank without data could never take a step: use at most {num_lanes} ranks, or"
                " start the run with more lanes."
            )
        if self._pipeline.random_access:
            total = self._pipeline.length()
            if total is None or total == 0:
                return
            if total < ranks and (
                self.remainder == "drop" or (self.remainder == "uneven" and topology.rank >= total)
            ):
                who = (
                    "no rank would get one"
                    if self.remainder == "drop"
                    else f"rank {topology.rank} would never get one"
                )
                raise ValueError(
                    f"{topology} cannot be served: the pipeline has {total} batches in all, and"
                    f" with remainder={self.remainder!r} {who} ({self._sources_in_words()}). Use"
                    " fewer ranks, a smaller batch_size, or remainder='pad'."
                )
            if total < ranks * readers:
                log.info("%s for %d batches: some workers have nothing to do", topology, total)
            return
        if num_lanes % ranks:
            kept = (
                f"{num_lanes} lanes are dealt to {ranks} ranks, {num_lanes // ranks} or"
                f" {num_lanes // ranks + 1} each"
            )
            fitting = [divisor for divisor in range(1, num_lanes + 1) if num_lanes % divisor == 0]
            if self.strict_order:
                raise ValueError(
                    f"{topology} cannot keep the order: {kept}, and strict_order=True asks for the"
                    " order of every other topology. Numbers of ranks that keep it:"
                    f" {', '.join(map(str, fitting[:20]))}."
                )
            self._notice(
                "dealing",
                f"{kept}: every sample comes exactly once, but batches come in another order than"
                " on a number of ranks that divides the lanes"
                f" ({', '.join(map(str, fitting[:20]))}), and a rank with more lanes has more"
                " batches. strict_order=True makes this an error.",
            )
        if ranks > 1 and not self._pipeline.infinite and not self._synced:
            log.info(
                "only reading tells how many batches each of the %d ranks has: they may end their"
                " epochs at different steps. sync_end=True ends them at the same one and keeps what"
                " is left for the next epoch.",
                ranks,
            )
        full, reason = self._pipeline.full_lanes(num_lanes, 1)
        limit = self._pipeline.max_lanes()
        fewest = num_lanes // ranks
        if readers > fewest:
            why = (
                limit[1]
                if limit is not None
                else (
                    f"lanes={num_lanes} was asked for, or is the checkpoint's. Use fewer workers,"
                    " or start with more lanes"
                )
            )
            raise ValueError(
                f"{topology} cannot be served: there are {num_lanes} lanes, {fewest} for some rank,"
                f" and a worker without a lane would never get data; {why}."
            )
        # The same on every rank, so that none is left waiting for one that was refused.
        for rank in range(ranks) if 0 < full < num_lanes else ():
            for worker in range(readers):
                if all(
                    lane < 0 or lane >= full
                    for lane in slots(topology._replace(rank=rank), num_lanes, worker)
                ):
                    raise ValueError(
                        f"{topology} cannot be served: only {full} of {num_lanes} lanes have any"
                        f" data ({reason}), and rank {rank} worker {worker} runs none of those"
                        f" ({self._sources_in_words()}). Use fewer ranks or workers, a smaller"
                        f" batch_size, or lanes={max(1, full - full % ranks)}."
                    )

    def _notice(self, key: str, text: str) -> None:
        """Warn once."""
        if key not in self._noticed:
            self._noticed.add(key)
            warnings.warn(text, RuntimeWarning, stacklevel=5)

    def _sources_in_words(self) -> str:
        parts = []
        for bound in self._facts.bound.walk():
            if bound.source >= 0:
                parts.append(f"{bound.names[bound.source]}: {bound.node.summary()}")
        return "; ".join(parts)

    # -- iterating ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches of an epoch on this rank.

        Raises:
            TypeError: If only reading tells, or there is no end.
        """
        if self._foreign:
            return int(super().__len__())
        topology = self._topology()
        current = self._current
        if current is not None and current.turns is not None and not current.complete:
            return current.first_step + current.turns
        if current is None and self._loaded is not None:
            turns = self._turns(
                topology,
                self._loaded[0].batches,
                self._facts_of(self._loaded[0].changes, self.epoch),
            )
            if turns is not None and not self._loaded[0].finished:
                return self._loaded[0].steps_done + turns
        turns = self._turns(topology, 0)
        if turns is None:
            len(Dataset(self._pipeline))  # raises, saying why
            raise TypeError(
                "the length of this pipeline is known only by reading"
                f" it:\n{describe.tree(self._pipeline)}"
            )
        return turns

    def __iter__(self) -> Any:
        if self._foreign:
            return super().__iter__()
        batches = self._iterate()
        if self._placed is None:
            return batches
        last, samples = (
            lambda: batches._epoch.complete,
            lambda: self._samples_of_last_round(batches._epoch),
        )
        return AccelerateIterator(self, batches, last, samples, self._placed)

    def _iterate(self) -> _LoaderIterator:
        if self._started_for_now():
            assert self._started is not None
            (_, epoch, inner), self._started = self._started, None
            if isinstance(inner, Launch):
                inner = self._iterator = inner.result()
        else:
            self._drop_started()
            epoch, inner = self._open()
        self._current, self._loaded, self._trained = epoch, None, None
        self._next_epoch = epoch.epoch
        if self._runner is not None and self._runner.totals is not None:
            most = 1 if any(bound.node.may_wait for bound in epoch.facts.bound.walk()) else MOST
            inner = Unbundler(
                inner, self.num_workers, self.prefetch_factor, self._runner.totals, most
            )
        return _LoaderIterator(self, epoch, inner)

    def start(self) -> None:
        """Start the workers now, so that they read while the model loads; the next ``iter()`` goes on with them.

        Changes no state, and nothing of what is handed out. Does nothing while an epoch is in
        progress, without workers, and when they are started already; a state that is loaded
        afterwards starts others. With several ranks and a seed that they have to agree on
        (``shuffle=True`` without a seed), all of them have to call it.

        >>> import midstream as ms
        >>> loader = ms.DataLoader(ms.from_dataset(range(6)), batch_size=3, num_workers=1, worker_type="thread")
        >>> loader.start()
        >>> [batch.tolist() for batch in loader]
        [[0, 1, 2], [3, 4, 5]]
        """
        self._no_foreign("start")
        if self.num_workers == 0 and not self._in_threads:
            return
        if self._current is not None and not self._current.complete and self._loaded is None:
            return
        if self._started_for_now():
            return
        self._drop_started()
        epoch, inner = self._open(early=True)
        self._started = self._standing(), epoch, inner

    def _started_for_now(self) -> bool:
        """Whether workers were started early, and are the right ones still."""
        if self._started is None:
            return False
        (*objects, topology), _, _ = self._started
        return (
            all(a is b for a, b in zip(objects, self._standing())) and topology == self._topology()
        )

    def _standing(self) -> tuple[Any, ...]:
        """What the readers of the next epoch depend on."""
        return (
            self._loaded,
            self._current,
            self._pipeline,
            self._iterator,
            self._next_epoch,
            self._topology(),
        )

    def _drop_started(self) -> None:
        started, self._started = self._started, None
        if started is not None:
            self._shut(started[2])
            self._iterator = None  # persistent workers were among them

    @property
    def _in_threads(self) -> bool:
        """Whether threads of this process read."""
        if self.num_workers == 0:
            return bool(self.prefetch_factor)
        return bool(self.worker_type == "thread")

    def _open(self, early: bool = False) -> tuple[Position, Any]:
        """The epoch to iterate, and its envelopes: its readers run from here on.

        Called early, it does not wait for processes that take long to come up.
        """
        topology = self._topology()
        if self._seed_from_torch and topology.world_size > 1 and not self._ever_loaded:
            self._agree_on_seed()
        epoch, reuse = self._begin(topology)
        self._check_topology(topology, epoch.num_lanes)
        runner = self._runner
        if reuse and runner is not None:
            runner.epoch = epoch.epoch
        else:
            self._let_go()
            facts = epoch.facts
            runner = Runner(
                facts.running,
                facts.paths,
                topology,
                epoch.num_lanes,
                epoch.epoch,
                epoch.plan(),
                self._turns(topology, 0),
            )
            if self.num_workers > 0 and not self._in_threads:
                if self.persistent_workers:
                    runner.shared = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
                runner.crumbs = new_table(self.num_workers)
                runner.totals = new_totals(self.num_workers, self.prefetch_factor)
                runner.arena = self._arena()
            runner.edits = self._changes.weights_set()
            self._runner = runner
        if reuse and runner.totals is not None:
            begin_anew(runner.totals)
        if runner.shared is not None:
            runner.shared[0] = epoch.epoch
            runner.shared[1] += 1
            if not reuse:
                runner.generation = int(runner.shared[1])
        if self._in_threads:
            inner: Any = ThreadReaders(
                runner,
                topology.readers,
                self.prefetch_factor or 2,
                self.timeout,
                self.worker_init_fn if self.num_workers else None,
                self.pin_memory,
            )
            self._iterator = inner
        elif self.num_workers == 0 and not self.pin_memory:
            # In this process, and nothing of torchdata between: what it keeps count of, a batch,
            # costs more than the batch.
            self._iterator = inner = runner.read(0, runner.epoch, runner.plan)
        else:
            double = self._double(runner)
            if (
                early
                and double.multiprocessing_context is not None
                and starts_slowly(double.multiprocessing_context)
            ):
                return epoch, Launch(lambda: start_processes(double))
            self._iterator = inner = start_processes(double)
        return epoch, inner

    def _let_go(self) -> None:
        """Other readers will be needed."""
        if not is_usable(self._iterator):
            # Now: an error that is kept keeps them too, and what the collector meets waits long.
            self._shut(self._iterator)
        super().load_state_dict({})

    def _arena(self) -> Arena | None:
        """Shared memory for batches: bundles that are ready and one in the making, and what the
        training holds on to.
        """
        try:
            return Arena(self.num_workers, (self.prefetch_factor + 1) * MOST + 4)
        except (OSError, ValueError) as error:
            self._no_memory(
                f"no shared memory for batches ({error}): they go through a pipe, which is slower."
            )
            return None

    def _no_memory(self, text: str) -> None:
        if "memory" not in self._noticed:
            self._noticed.add("memory")
            log.warning("%s", text)

    def _agree_on_seed(self) -> None:
        """torch's seed may differ between ranks, and then each would shuffle in its own order: rank
        0's is taken.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError(
                "shuffle=True takes its seed from torch, and several ranks cannot agree on one"
                " without torch.distributed. Shuffle with a seed of your own:"
                " DataLoader(midstream.from_dataset(data).shuffle(seed), ...)"
            )
        seed = [shuffle_seed(self._pipeline)]
        torch.distributed.broadcast_object_list(seed, src=0)
        if seed[0] != shuffle_seed(self._pipeline):
            self._set_pipeline(with_seed(self._pipeline, seed[0]))
        self._seed_from_torch = False  # agreed once

    def _begin(self, topology: Topology) -> tuple[Position, bool]:
        """The epoch to iterate, and whether living workers may go on with it from its start."""
        current = self._current
        in_processes = self.num_workers > 0 and not self._in_threads
        alive = (
            self.persistent_workers
            and in_processes
            and self._iterator is not None
            and is_usable(self._iterator)
        )
        if self._loaded is not None:
            run_state = self._loaded[0]
            at = self._epoch_at(topology, run_state)
            if run_state.finished:
                return self._epoch_from(topology, at.num_lanes, at.epoch + 1, at), False
            return at, False
        if current is None:
            return self._epoch_from(topology, self._num_lanes(topology), self._next_epoch), False
        runner = self._runner
        same = (
            alive
            and runner is not None
            and runner.topology == topology
            and runner.dataset is self._facts.running
        )
        if (
            current.complete
            and current.left_over
            and self._next_epoch in (current.epoch, current.epoch + 1)
        ):
            return self._epoch_at(topology, parse(current.state_at(None))), False
        if current.complete:
            following = current.epoch + 1 if self._next_epoch == current.epoch else self._next_epoch
            return self._epoch_from(topology, current.num_lanes, following, current), same
        if self._next_epoch == current.epoch:
            if self._trained is not None and self._trained[0] is current:
                return self._epoch_at(topology, parse(current.state_at(self._trained[1]))), False
            if self._endless:
                return self._epoch_at(topology, parse(current.state_at(None))), False
            if current.steps > 0 and not self._warned_restart:
                self._warned_restart = True
                warnings.warn(
                    f"the loader was left after batch {current.steps} of epoch {current.epoch} and"
                    " is iterated again: the epoch starts over. To begin the next one call"
                    f" loader.set_epoch({current.epoch + 1}); to go on where it was, load its"
                    " state_dict().",
                    UserWarning,
                    stacklevel=4,
                )
        return self._epoch_from(topology, current.num_lanes, self._next_epoch, current), same

    def _double(self, runner: Runner) -> InnerLoader:
        """This loader as torchdata is to see it: our runner, one envelope at a time, nothing global
        drawn.
        """
        double = object.__new__(InnerLoader)
        double.__dict__.update(
            self.__dict__,
            dataset=runner,
            collate_fn=collate_nothing,
            batch_size=None,
            drop_last=False,
            snapshot_every_n_steps=0,  # our envelopes carry the state; torchdata's would cost and hold nothing
            generator=torch.Generator().manual_seed(runner.epoch),
        )
        if self.num_workers > 0 and os.name == "posix":
            double.__dict__["worker_init_fn"] = WorkerInit(self.worker_init_fn)
            double.multiprocessing_context = Context(
                self.multiprocessing_context or torch.multiprocessing
            )
        return double

    def close(self) -> None:
        """Shut the workers down. The position stays; iterating again starts new ones."""
        self._drop_started()
        iterator: Any = self._iterator
        self._iterator = None
        self._active = self._renewed = None
        self._shut(iterator)

    def _shut(self, iterator: Any) -> None:
        if isinstance(iterator, Launch):
            with contextlib.suppress(Exception):  # nobody will read there
                self._shut(iterator.result())
        elif iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    # -- epochs -------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch in progress, or the next one when none is. After the last batch of epoch e it
        is e + 1.
        """
        if self._foreign:
            raise TypeError(PASSED_THROUGH.format("epoch"))
        if self._loaded is not None:
            return self._loaded[0].epoch + self._loaded[0].finished
        if self._current is not None and self._next_epoch == self._current.epoch:
            return self._current.epoch + self._current.complete
        return self._next_epoch

    @property
    def _endless(self) -> bool:
        runs = (self._current.facts if self._current is not None else self._facts).running
        return runs.infinite or (runs.random_access and runs.length() is None)

    @property
    def _epoch_in_use(self) -> int:
        """The epoch in progress, though its last batch may be out."""
        current = self._current
        return (
            current.epoch
            if current is not None and self._next_epoch == current.epoch
            else self.epoch
        )

    @property
    def _left_midway(self) -> bool:
        """Whether batches of a finite epoch were handed out, and not all."""
        current = self._current
        return (
            current is not None
            and not self._endless
            and not current.complete
            and current.steps > current.first_step
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next ``iter()``.

        A hint that may be given again and again: the epoch in progress changes nothing, a loaded
        state that waits is kept, and after a load an earlier epoch is ignored with a warning (some
        trainers count from 0 again).
        """
        if self._foreign:
            for part in (self.sampler, getattr(self.batch_sampler, "sampler", None), self.dataset):
                if part is not None and hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            return
        if isinstance(epoch, bool) or not isinstance(epoch, (int, np.integer)) or epoch < 0:
            raise ValueError(f"epoch is an integer of at least 0; found {epoch!r}")
        epoch = int(epoch)
        if self._loaded is not None:
            if epoch != self.epoch:
                log.info(
                    "set_epoch(%d) is ignored: a loaded state of epoch %d waits", epoch, self.epoch
                )
            return
        now = self.epoch
        if epoch == now:
            return
        if self._ever_loaded and epoch < now:
            warnings.warn(
                f"set_epoch({epoch}) is ignored: this run was resumed and is in epoch {now}. The"
                " epoch comes from the checkpoint; count from loader.epoch.",
                UserWarning,
                stacklevel=2,
            )
            return
        if self._current is not None and epoch == self._current.epoch:
            # Again an epoch that is complete: forget that it is.
            self._current = self._epoch_from(
                self._current.topology, self._current.num_lanes, epoch, self._current
            )
        self._next_epoch = epoch

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state after the batch last handed out: plain values, fresh each time. Starts no worker.

        Returns:
            See `midstream.checkpoint` for the format. After the last batch of epoch e it is the
            state before the first of e + 1.
        """
        if self._foreign:
            return super().state_dict()  # type: ignore[no-any-return]
        if not self._guided and asked_by(
            sys._getframe(1), ".utilities.combined_loader", "_state_dicts"
        ):
            self._notice("lightning", LIGHTNING_ALONE)
        loaded = self._loaded
        if loaded is not None:
            return copy.deepcopy(loaded[1])
        current = self._current
        if current is None or (
            self._next_epoch not in (current.epoch, current.epoch + current.complete)
        ):
            topology = self._topology()
            fresh = self._current is None
            current = self._epoch_from(
                topology, self._num_lanes(topology), self._next_epoch, current
            )
            if fresh and (current.num_lanes % topology.world_size or not current.even):
                # torch.distributed.checkpoint loads the keys that are here, and this rank may need
                # others' lanes.
                state = current.state_at(None)
                every = {f"{index:04d}": "" for index in range(current.num_lanes)}
                return {**state, "lanes": {**every, **state["lanes"]}}
        return current.state_at(None)  # type: ignore[no-any-return]

    def _alone(self, state: dict[str, Any]) -> bool:
        """Whether a state says that this rank is at its end of the epoch, and others perhaps are
        not.
        """
        return parse(state).finished

    def state_at(self, step: int) -> dict[str, Any]:
        """The state after batch ``step`` of the epoch last iterated (what was trained, say, where more was fetched).

        Args:
            step: Batches of the epoch that count as done, counted like `state_dict`'s
                ``steps_done``.

        Raises:
            ValueError: If it is older than the last 1,024 batches, or not reached yet.
        """
        self._no_foreign("state_at")
        if self._current is None or self._loaded is not None:
            state = self.state_dict()
            if step != state["steps_done"]:
                raise ValueError(
                    "nothing was handed out yet, so there is only the state after batch"
                    f" {state['steps_done']}"
                )
            return state
        return self._current.state_at(step)  # type: ignore[no-any-return]

    def load_state_dict(self, state: Any, strict: bool = True) -> None:
        """Continue from ``state`` with the next ``iter()``. An iterator that is in use is left behind.

        Args:
            state: What ``state_dict()`` returned with any number of workers, a list of the states
                of all ranks, or what `midstream.merge_states` made of them. ``{}`` changes nothing.
                The batch size may be another one: random access continues at the position; in a
                stream every sample still comes exactly once, in another order.
            strict: False: go on though a mix right below the batch has other weights, new inputs
                (which begin at their beginning) or lacks some (which are dropped). What else
                differs is an error all the same.

        Raises:
            CheckpointError: If it is damaged, incomplete, or of another pipeline; then nothing was
            loaded.
        """
        if self._foreign:
            super().load_state_dict(state)
            return
        if isinstance(state, dict) and not state:
            return
        merged, run_state = agreed(
            merge_states(state) if isinstance(state, (list, tuple)) else state
        )
        pipeline = self._pipeline
        if run_state.fingerprint != describe.fingerprint(pipeline) and self._seed_from_torch:
            pipeline = with_seed(pipeline, spec_seed(run_state.spec))
        if run_state.fingerprint != describe.fingerprint(pipeline):
            whole = not run_state.finished
            lines = (
                adopt(run_state, pipeline, strict=strict)
                if whole
                else diff_specs(run_state.spec, describe.spec(pipeline))
            )
            if not whole:
                raise CheckpointError(
                    "this state was saved by another pipeline (saved →"
                    f" here):{bullet_list(lines)}\nOnly the states of all ranks together can go on"
                    " with this one."
                )
            merged = to_state(run_state, merged)
            if not pipeline.random_access:
                self._notice(
                    "adopted",
                    "going on with another pipeline than was saved (saved →"
                    f" here):{bullet_list(lines)}\nEvery sample still comes exactly once in this"
                    " epoch, but in another order.",
                )
            log.info("going on with another pipeline than was saved:%s", bullet_list(lines))
        # Raises what is wrong before anything is changed.
        running(pipeline, run_state.changes, run_state.epoch)
        topology = self._topology()
        self._check_lanes(run_state, topology)
        if pipeline is not self._pipeline or run_state.changes.lasting != self._changes:
            self._changes = run_state.changes.lasting
            self._set_pipeline(pipeline)
        if pipeline.random_access and run_state.num_lanes < topology.world_size:
            # Here lanes only keep counts, and every rank needs one.
            run_state.num_lanes = merged["num_lanes"] = choose_lanes(None, topology, None)
        own = [
            f"{index:04d}"
            for index in range(topology.rank, run_state.num_lanes, topology.world_size)
        ]
        merged["lanes"] = {key: merged["lanes"].get(key, "") for key in own}
        self._drop_started()
        self._let_go()
        self._active = self._renewed = self._trained = None
        self.sampler.forget()
        self._current, self._runner = None, None
        self._next_epoch, self._ever_loaded = run_state.epoch, True
        self._loaded = (run_state, merged)
        self._resumed_at = (run_state.epoch, run_state.batches, run_state.steps_done)

    def set_weights(self, mix: str, weights: Mapping[str, float]) -> None:
        """Give a mix other weights from the next batch on; what is left of a schedule no longer applies.

        The run goes on exactly: no sample is lost or comes twice, and the state holds the change,
        so that a checkpoint goes on with it in any topology, and `midstream.weights_history` tells
        it. It holds for the following epochs too. Batches that workers made ahead are made again.
        Call it on every rank, after the same step.

        Random access: the next batch over all ranks is the first by the new weights. Streams: in
        each lane, the next sample that the mix picks; what buffers above it
        (``shuffle(buffer_size=...)``, ``pack``) hold comes first. `state_at` and `trace` answer for
        the batches from here on.

        Args:
            mix: Its name (``interleave(..., name="mix")``) or path.
            weights: By the names of its datasets.

        Raises:
            ValueError: If there is no such mix, the weights do not fit it, or it cannot be done
                exactly here: the mix is below a global shuffle, say. Then nothing was changed.
        """
        self._no_foreign("set_weights")
        merged, run_state = agreed(self.state_dict())
        facts = self._facts_of(run_state.changes, run_state.epoch + run_state.finished)
        run_state.changes = with_weights(run_state, facts.bound, mix, weights)
        merged.update(run_state.changes.texts)
        self._go_on_from(run_state, merged)

    def _go_on_from(self, run_state: RunState, merged: dict[str, Any]) -> None:
        """Read anew from where the loader stands, as the state says; the iterator in use goes on
        there.
        """
        over = self._current is not None and self._current.complete and self._loaded is None
        self._changes = run_state.changes.lasting
        self._set_pipeline(self._pipeline)
        self._drop_started()
        self._let_go()
        if not over and self._active is not None:
            self._active, self._renewed = None, self._active
        self._current, self._runner = None, None
        self._next_epoch = run_state.epoch
        self._loaded = (run_state, merged)

    def skip(self, num_batches: int) -> None:
        """Pass over the next batches: the way past a loss spike. Call it on every rank, after the same step.

        They are read and not handed out: the position moves on as if they had been, into the next
        epoch where this one ends, and the state counts them (`SourceProgress.counts`: ``skipped``
        samples of each source, in no other number). A failure in one of them is counted, not
        raised. Legal at any time: in a loop its next batch is the one after them; after
        `load_state_dict` or before the first ``iter()`` the next ``iter()`` begins there.

        Args:
            num_batches: Of this rank.

        Raises:
            RuntimeError: If an epoch has no batch at all.

        >>> import midstream as ms
        >>> loader = ms.DataLoader(ms.from_dataset(range(10)), batch_size=2)
        >>> batches = iter(loader)
        >>> _ = next(batches)
        >>> loader.skip(2)
        >>> next(batches), loader.progress().sources["data"].counts
        (tensor([6, 7]), {'skipped': 4})
        """
        self._no_foreign("skip")
        require_int(num_batches, "num_batches", 0, "skip")
        token = self._active or self._renewed
        live = loop = token.iterator() if token is not None else None
        if live is not None and token is self._active and live._epoch is not self._current:
            live = None  # it came to its end, and then something was excluded, say
        if (
            live is None
            and num_batches
            and self._current is not None
            and not self._current.complete
        ):
            self.load_state_dict(
                self.state_dict()
            )  # where a loop was left, not at the start of its epoch
        iterator, made, fresh = live, None, False
        self._skipping = True
        try:
            while num_batches:
                if iterator is None:
                    iterator = made = iter(self)
                    fresh = True
                try:
                    next(iterator)
                except StopIteration:
                    if fresh:
                        raise RuntimeError(
                            "skip: the epoch has no batch that could be passed over"
                        ) from None
                    iterator = None
                    continue
                num_batches -= 1
                fresh = False
        finally:
            self._skipping = False
            if made is not None:
                if loop is not None:
                    loop._over = True
                self.load_state_dict(self.state_dict())

    def exclude(self, origins: Iterable[Any]) -> None:
        """Leave single samples out from the next batch on: their batches get shorter, and every position stays.

        An origin is one pass over its source, so that the same row comes again in the next epoch.
        The state holds them, so that a checkpoint goes on without them in any topology, and counts
        those met (`SourceProgress.counts`: ``excluded``). Batches that workers made ahead are made
        again. Call it on every rank, after the same step. `state_at` and `trace` answer for the
        batches from here on.

        Samples are what batches are made of: a row that ``pack`` made is left out as a whole, and
        counted once, when it holds a piece that is named. A batch of which nothing is left does not
        come; on a stream the lane's next one comes in its place.

        Args:
            origins: What `trace` gave, or tuples ``(source, epoch, row)`` or ``(source, epoch, row,
                part)``. At most 4,096 in a run, about 16 bytes each in every checkpoint.

        Raises:
            ValueError: If there is no such source, they become too many, or a node above the
                batches reads some of them again on a resume (a buffered shuffle of batches, say);
                then nothing was changed.
            TypeError: If something is no origin.

        >>> import midstream as ms
        >>> loader = ms.DataLoader(ms.from_dataset(range(6), name="six"), batch_size=3)
        >>> loader.exclude([("six", 0, 4)])
        >>> [batch.tolist() for batch in loader], list(map(str, loader.excluded))
        ([[0, 1, 2], [3, 5]], ['six[4]'])
        """
        self._no_foreign("exclude")
        merged, run_state = agreed(self.state_dict())
        run_state.changes = with_excluded(run_state.changes, origins, self._facts.names)
        merged.update(run_state.changes.texts)
        if run_state.changes.excluded != self._changes.excluded:
            require_excludable(self._pipeline)
            self._go_on_from(run_state, merged)

    @property
    def excluded(self) -> list[Origin]:
        """The samples that are left out."""
        self._no_foreign("excluded")
        changes = self._loaded[0].changes if self._loaded is not None else self._changes
        return list(changes.excluded)

    def _check_lanes(self, run_state: RunState, topology: Topology) -> None:
        """All lanes of this rank must be there, and of this run's number."""
        if (
            self.lanes is not None
            and self.lanes != run_state.num_lanes
            and not self._pipeline.random_access
        ):
            raise CheckpointError(
                f"this state has {run_state.num_lanes} lanes, and the loader was made with"
                f" lanes={self.lanes}. The number is fixed by the first run; leave lanes out or"
                f" give lanes={run_state.num_lanes}."
            )
        missing = [
            index
            for index in range(topology.rank, run_state.num_lanes, topology.world_size)
            if index not in run_state.lanes
        ]
        if missing:
            raise CheckpointError(
                f"this state has {len(run_state.lanes)} of {run_state.num_lanes} lanes, and rank"
                f" {topology.rank} of {topology.world_size} needs {len(missing)} others (lane"
                f" {missing[0]}, say). It is the state of one rank of several: give a list of the"
                " states of all ranks. (From torch.distributed.checkpoint: give the loader"
                f" lanes={run_state.num_lanes}, so that it asks for all.)"
            )

    def __repr__(self) -> str:
        if self._foreign:
            return f"DataLoader({type(self.dataset).__name__}, by torchdata's StatefulDataLoader)"
        return f"{_head(self)}\n{describe.tree(self._pipeline)}"

    def _repr_html_(self) -> str | None:
        if self._foreign:
            return None
        return (
            "<div><div"
            f" style='{MONO}'>{escape(_head(self))}</div>{Dataset(self._pipeline)._repr_html_()}</div>"
        )

    # -- Accelerate ---------------------------------------------------------------------------------------------------

    @property
    def _is_accelerate_prepared(self) -> bool:
        """True: ``Accelerator.prepare`` takes the loader as it is. Whether it wants batches on the
        device is known there.
        """
        if self._foreign:
            return False
        asking = sys._getframe(1)
        if asked_by(asking, "accelerate.accelerator", "prepare_data_loader"):
            wanted = asking.f_locals.get("device_placement")
            self._placed = bool(
                asking.f_locals["self"].device_placement if wanted is None else wanted
            )
        return True

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, value: bool) -> None:
        pass

    def _samples_of_last_round(self, epoch: Position) -> int:
        """What Accelerate calls the remainder: that many of the first samples, of all ranks in
        their order, are no repeats.
        """
        ranks = epoch.topology.world_size
        if ranks == 1 or epoch.total is None or epoch.turns is None or self.remainder == "uneven":
            return 0
        first = epoch.start + (epoch.turns - 1) * ranks
        repeats = max(0, first + ranks - epoch.total)
        in_order = epoch.start % ranks == 0 and not epoch.ahead
        if (samples := epoch.facts.samples(first, first + ranks)) is not None and in_order:
            return samples[0] if samples[0] < samples[1] else 0
        if repeats:
            self._notice(
                "gather",
                f"the ranks have {repeats} batches twice in the last step of epoch {epoch.epoch}"
                " (remainder='pad'), and Accelerate's gather_for_metrics can leave out only what"
                " comes last:"
                f" {'the epoch was begun on another number of ranks' if samples else 'the pipeline does not end in .batch'}."
                " Leave out yourself what a rank has where loader.trace().padded is true.",
            )
            return -1
        return 0

    @property
    def use_stateful_dataloader(self) -> bool:
        """False: ``Accelerator.save_state`` must not save this loader by itself, where all ranks
        write one file.
        """
        asking = sys._getframe(1)
        if (
            not self._foreign
            and asked_by(asking, "accelerate.checkpointing", "save_accelerator_state")
            and not_registered(self, asking)
        ):
            self._notice(
                "accelerate",
                "Accelerator.save_state saves the position in the data only of what is registered:"
                " accelerator.register_for_checkpointing(midstream.WholeRun(loader)). This"
                " checkpoint is without it, and a run that is resumed from it begins the data"
                " anew.",
            )
        return False

    def progress(self) -> Progress:
        """How far this rank has come, per source: samples, epochs, failures, counted as delivered."""
        self._no_foreign("progress")
        return progress(self.state_dict())

    def trace(self, step: int | None = None) -> Trace:
        """Origins of the samples in the batch just returned, or in batch number ``step`` of the epoch (from 1).

        Raises:
            ValueError: If that batch is not among the last 1,024.
        """
        self._no_foreign("trace")
        if self._current is None:
            raise ValueError("no batch was handed out yet")
        return self._current.trace(step)

    def _no_foreign(self, what: str) -> None:
        if self._foreign:
            raise TypeError(PASSED_THROUGH.format(what))


def _head(loader: DataLoader) -> str:
    """A loader in one line: its arguments and where it stands. Starts nothing and reads nothing."""
    words = [f"batch_size={loader.batch_size}", f"num_workers={loader.num_workers}"]
    topology = loader._topology()
    if topology.world_size > 1:
        words.append(f"rank {topology.rank} of {topology.world_size}")
    state = loader.state_dict()
    try:
        length = f" of {len(loader):,}"
    except TypeError:
        length = ""
    if not loader._pipeline.random_access:
        words.append(f"{state['num_lanes']} lanes")
    return (
        f"DataLoader({', '.join(words)}): epoch {loader.epoch}, batch"
        f" {state['steps_done']:,}{length}"
    )
