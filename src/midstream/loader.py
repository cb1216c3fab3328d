"""The DataLoader: lanes run in torchdata's worker processes, and the main process owns position and epoch.

    worker     _Reader        runs its lanes; each turn makes one envelope: batch number, lane, and what came out
    main       _Epoch         position, lane states, counts, and an undo log of the last 1,024 batches
               _LoaderIterator  takes envelopes apart: publish the state, then hand out the batch or raise

The only file that knows torchdata exists. It is long because the rules of epochs, loading and undoing have to be read
together.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator as Iter, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data.dataloader import _InfiniteConstantSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from midstream._state import State, encode
from midstream.checkpoint import Canonical, diff_specs, merge_states, parse
from midstream.core import (
    FORMAT,
    I64,
    Cursor,
    Dataset,
    Delivery,
    Failure,
    Hole,
    Lane,
    Ledger,
    Place,
    as_origin_array,
    bind,
    check_limits,
    epoch_key,
)
from midstream.errors import CheckpointError, MidstreamError, Origin, WorkerError, bullet_list
from midstream.lanes import Topology, batches_of_rank, choose_lanes, current_topology, first_batch, slots
from midstream.nodes.batch import collate
from midstream.progress import Progress, progress
from midstream.sources import from_dataset

__all__ = ["DataLoader"]

log = logging.getLogger("midstream")

_LOG_BATCHES = 1024
_LOG_BYTES = 64 << 20
_ERRORS_A_TURN = 64

_BATCH, _ERROR, _FATAL, _NOTHING = range(4)


class _Out(NamedTuple):
    """One thing that a turn made.

    Attributes:
        kind: A batch, a failure to raise, an error that ends the run, or nothing (counts and states only).
        payload: The batch, the `Failure`, or the error.
        origins: int64 [m, 4], or None.
        final: Whether the turn's batch number is done with after this.
        state: Streams: the lane's state as canonical JSON, or None when it did not change.
        notes: Events, notices and limits from the lane's ledger, or None.
    """

    kind: int
    payload: Any = None
    origins: I64 | None = None
    final: bool = False
    state: str | None = None
    notes: tuple[dict[str, int], list[tuple[str, str]], dict[str, int]] | None = None


def _take_notes(ledger: Ledger) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]] | None:
    return ledger.take() if ledger.events or ledger.notices else None


# ---------------------------------------------------------------------------------------------------------------------
# In the worker
# ---------------------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Where a run continues.

    Attributes:
        start: The first batch not delivered yet, over all ranks (random access).
        turns: Batches this rank makes from there; None: as many as there are.
        told: Errors already raised, by batch number.
        lanes: Streams: the decoded lane states by number.
    """

    start: int
    turns: int | None
    told: dict[int, int]
    lanes: dict[int, Any]


class _Runner(IterableDataset[Any]):
    """What a loader's worker processes iterate: the pipeline at one topology.

    ``shared`` holds epoch and generation where workers live on: a plan is for one generation only, so that a worker that
    was forked with one does not follow it again in the next epoch.
    """

    def __init__(
        self, dataset: Dataset, topology: Topology, lanes: int, epoch: int, plan: _Plan, next_turns: int | None
    ) -> None:
        self.dataset, self.topology, self.lanes = dataset, topology, lanes
        self.epoch, self.generation, self.plan, self.next_turns = epoch, 0, plan, next_turns
        self.shared: torch.Tensor | None = None

    def __iter__(self) -> Iter[Any]:
        worker = get_worker_info()
        epoch, plan = self.epoch, self.plan
        if self.shared is not None:
            epoch, generation = self.shared.tolist()
            if generation != self.generation:
                plan = _Plan(0, self.next_turns, {}, {})
        index = worker.id if worker is not None else 0
        if self.dataset.random_access:
            return _RandomReader(self, index, epoch, plan)
        return _StreamReader(self, index, epoch, plan)


class _RandomReader:
    """Makes every W-th batch of its rank, wherever the run continues."""

    def __init__(self, runner: _Runner, worker: int, epoch: int, plan: _Plan) -> None:
        topology = runner.topology
        self.stride = topology.world_size * topology.readers
        self.batch = first_batch(plan.start, topology.rank, topology.world_size) + worker * topology.world_size
        self.turn, self.readers, self.turns, self.told = worker, topology.readers, plan.turns, plan.told
        self.place = bind(runner.dataset)
        self.ledger = Ledger()
        lane = Lane(self.batch, self.stride, 1, self.ledger)
        self.cursor = Cursor(self.place, lane, int(epoch_key(epoch)[0]), epoch)
        self.broken: _Out | None = None

    def __iter__(self) -> _RandomReader:
        return self

    def __next__(self) -> tuple[int, int, list[_Out]]:
        if self.turns is not None and self.turn >= self.turns:
            raise StopIteration
        number = self.batch
        outs = [self.broken] if self.broken is not None else self._make(self.told.get(number, 0))
        self.turn += self.readers
        self.batch += self.stride
        return number, -1, outs

    def _make(self, told: int) -> list[_Out]:
        cursor = self.cursor
        before = cursor.number
        outs: list[_Out] = []
        errors = 0
        while True:
            try:
                sample, origins = next(cursor)
            except StopIteration:
                return [*outs, _Out(_NOTHING, final=True)]
            except Exception as error:
                self.broken = _fatal(error)
                return [*outs, self.broken]
            done = cursor.number > before
            if type(sample) is not Hole:
                origins = as_origin_array(origins)
                return [*outs, _Out(_BATCH, sample, origins, True, None, _take_notes(self.ledger))]
            failure = sample.errors[0]
            if failure.quiet:
                self.ledger.failed(failure, _source_of(self.place, failure))
                if done:
                    return [*outs, _Out(_NOTHING, None, None, True, None, _take_notes(self.ledger))]
                continue
            errors += 1
            if errors > told:
                outs.append(_Out(_ERROR, failure, None, done, None, _take_notes(self.ledger)))
            elif done:
                outs.append(_Out(_NOTHING, None, None, True, None, _take_notes(self.ledger)))
            if done:
                return outs


class _LaneRun:
    """A stream lane in its worker."""

    __slots__ = ("delivery", "done", "index", "lane", "rounds")

    def __init__(self, place: Place, index: int, num_lanes: int, epoch: int, state: Any) -> None:
        self.index, self.lane = index, Lane(index, num_lanes, 1, Ledger())
        self.delivery = Delivery(place, self.lane, int(epoch_key(epoch)[0]), epoch)
        self.rounds, self.done = 0, False
        if state is not None:
            self.rounds, self.done = state["rounds"], state["done"]
            self.lane.ledger.marks = state["marks"]
            self.delivery.iterator.load(state["state"])

    def state(self) -> str:
        """The lane's part of the checkpoint, as canonical JSON."""
        return encode(
            {
                "rounds": self.rounds,
                "done": self.done,
                "state": None if self.done else self.delivery.iterator.snapshot(),
                "marks": {} if self.done else self.lane.ledger.marks,
            }
        )


class _StreamReader:
    """Runs this worker's lanes in turn, one batch each."""

    def __init__(self, runner: _Runner, worker: int, epoch: int, plan: _Plan) -> None:
        place = bind(runner.dataset)
        self.place = place
        self.lanes = runner.lanes
        mine = slots(runner.topology, runner.lanes, worker)
        self.runs = [
            None if index < 0 else _LaneRun(place, index, runner.lanes, epoch, plan.lanes.get(index)) for index in mine
        ]
        # All lanes of the rank count, not only this worker's: the turns of all workers start in the same round.
        rank_lanes = range(runner.topology.rank, runner.lanes, runner.topology.world_size)
        states = [plan.lanes.get(index) for index in rank_lanes]
        live = [0 if state is None else state["rounds"] for state in states if state is None or not state["done"]]
        self.round = min(live, default=0)
        self.slot = 0

    def __iter__(self) -> _StreamReader:
        return self

    def __next__(self) -> tuple[int, int, list[_Out]]:
        if all(run is None or run.done for run in self.runs):
            raise StopIteration
        run = self.runs[self.slot]
        round_ = self.round
        self.slot += 1
        if self.slot == len(self.runs):
            self.slot, self.round = 0, round_ + 1
        if run is None or run.done or run.rounds > round_:
            return -1, -1, []
        return run.rounds * self.lanes + run.index, run.index, self._make(run)

    def _make(self, run: _LaneRun) -> list[_Out]:
        outs: list[_Out] = []
        ledger = run.lane.ledger
        while len(outs) < _ERRORS_A_TURN:
            try:
                sample, origins = run.delivery.next()
            except StopIteration:
                run.done = True
                return [*outs, _Out(_NOTHING, None, None, True, run.state(), _take_notes(ledger))]
            except Exception as error:
                return [*outs, _fatal(error)]
            if type(sample) is not Failure:
                run.rounds += 1
                origins = as_origin_array(origins)
                return [*outs, _Out(_BATCH, sample, origins, True, run.state(), _take_notes(ledger))]
            outs.append(_Out(_ERROR, sample, None, False, run.state(), _take_notes(ledger)))
        return outs


def _source_of(place: Place, failure: Failure) -> int:
    return place.names.index(failure.origin.source) if failure.origin is not None else -1


def _fatal(error: Exception) -> _Out:
    """An error that is no sample's: shipped whole where it can be, else as text."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        data = b""
    return _Out(_FATAL, (f"{type(error).__name__}: {error}", text, data))


def _identity(item: Any) -> Any:
    return item


# ---------------------------------------------------------------------------------------------------------------------
# In the main process
# ---------------------------------------------------------------------------------------------------------------------


class _Tally:
    """Counts of one lane (random access: of one rank), over the whole run."""

    __slots__ = ("events", "rows", "samples")

    def __init__(self, num_sources: int, lane: Mapping[str, Any] | None = None) -> None:
        self.samples = np.zeros(num_sources, dtype=np.int64)
        self.rows = np.zeros(num_sources, dtype=np.int64)
        self.events: dict[str, int] = {}
        if lane is not None:
            known = min(num_sources, len(lane["samples"]), len(lane["rows"]))
            self.samples[:known], self.rows[:known] = lane["samples"][:known], lane["rows"][:known]
            self.events = dict(lane["events"])

    def add(self, origins: I64 | None, events: Mapping[str, int] | None, sign: int = 1) -> None:
        """Count (or, with sign -1, uncount) a batch and what was dropped on the way to it."""
        if origins is not None and len(origins):
            size = len(self.samples)
            self.samples += sign * np.bincount(origins[:, 0], minlength=size)
            self.rows += sign * np.bincount(origins[origins[:, 3] == 0, 0], minlength=size)
        for key, count in (events or {}).items():
            value = self.events.get(key, 0) + sign * count
            if value:
                self.events[key] = value
            else:
                self.events.pop(key, None)

    def copy(self) -> _Tally:
        """An independent copy."""
        other = copy.copy(self)
        other.samples, other.rows, other.events = self.samples.copy(), self.rows.copy(), dict(self.events)
        return other


class _Entry(NamedTuple):
    """How to undo one delivery: what was there before it, and what it counted."""

    step: int
    is_batch: bool
    passed: int
    told: tuple[int, int] | None
    lane: int
    state: str | None
    origins: I64 | None
    events: dict[str, int] | None


class _Epoch:
    """The position of a run within one epoch, on one rank.

    A delivery first appends to ``log`` how to undo it, then changes the fields, and last of all ``steps``: a signal
    handler that asks for the state at any point between gets the state before.
    """

    def __init__(
        self,
        loader: DataLoader,
        topology: Topology,
        num_lanes: int,
        epoch: int,
        canonical: Canonical | None = None,
        tallies: dict[int, _Tally] | None = None,
    ) -> None:
        self.loader, self.topology, self.num_lanes, self.epoch = loader, topology, num_lanes, epoch
        self.random = loader._pipeline.random_access
        self.num_sources = len(loader._place.names)
        self.own = range(topology.rank, num_lanes, topology.world_size)
        self.start = canonical.batches if canonical is not None else 0
        self.steps = self.first_step = canonical.steps_done if canonical is not None else 0
        self.passed = 0  # batch numbers this rank is done with since `start`
        self.told: tuple[int, int] | None = None
        self.told_before: dict[int, int] = {}
        self.states: dict[int, str] = {}
        self.tallies: dict[int, _Tally] = tallies if tallies is not None else {}
        self.decoded: dict[int, Any] = {}
        if canonical is not None:
            for index, lane in canonical.lanes.items():
                if lane is None:
                    continue
                if lane.get("told") is not None:
                    self.told_before[lane["told"][0]] = lane["told"][1]
                if index not in self.own:
                    continue
                self.tallies[index] = _Tally(self.num_sources, lane)
                if lane.get("lane") is not None:
                    self.states[index], self.decoded[index] = encode(lane["lane"]), lane["lane"]
        mine = self.told_before.get(first_batch(self.start, topology.rank, topology.world_size))
        if mine:
            self.told = (first_batch(self.start, topology.rank, topology.world_size), mine)
        self.turns = loader._turns(topology, self.start)
        self.complete = False
        self.log: deque[_Entry] = deque()
        self.log_bytes = 0

    def plan(self) -> _Plan:
        """Where workers continue."""
        return _Plan(self.start, self.turns, self.told_before, self.decoded)

    def apply(self, number: int, lane: int, out: _Out) -> None:
        """Count one thing that came out, and move on."""
        key = lane if lane >= 0 else self.topology.rank
        events = out.notes[0] if out.notes is not None else None
        if out.kind == _ERROR:
            source = _source_of(self.loader._place, out.payload)
            events = dict(events or {})
            name = f"failed {out.payload.error_type}|{out.payload.node}|{source}"
            events[name] = events.get(name, 0) + 1
        tally = self.tallies.get(key)
        if tally is None:
            tally = self.tallies[key] = _Tally(self.num_sources)
        is_batch = out.kind == _BATCH
        entry = _Entry(self.steps, is_batch, self.passed, self.told, key, self.states.get(key), out.origins, events)
        self.log.append(entry)
        self.log_bytes += out.origins.nbytes if out.origins is not None else 0
        tally.add(out.origins, events)
        if out.state is not None:
            self.states[key] = out.state
        if lane < 0:
            if out.final:
                self.told = None
            elif out.kind == _ERROR:
                known = self.told[1] if self.told is not None and self.told[0] == number else 0
                self.told = (number, known + 1)
        if out.final:
            self.passed += 1
        if is_batch:
            self.steps += 1
        while len(self.log) > _LOG_BATCHES or (self.log_bytes > _LOG_BYTES and len(self.log) > 64):
            old = self.log.popleft()
            self.log_bytes -= old.origins.nbytes if old.origins is not None else 0
        if self.turns is not None and self.passed >= self.turns:
            self.complete = True

    def totals(self) -> dict[str, int]:
        """All events counted so far on this rank."""
        events: dict[str, int] = {}
        for tally in self.tallies.values():
            for key, count in tally.events.items():
                events[key] = events.get(key, 0) + count
        return events

    def state_at(self, step: int | None) -> State:
        """The state after batch ``step`` of this epoch, or now."""
        steps, complete = self.steps, self.complete
        if step is not None and step != steps:
            oldest = min((entry.step for entry in self.log), default=steps)
            if not oldest <= step <= steps:
                raise ValueError(
                    f"the state after batch {step} of epoch {self.epoch} is not kept; there are those after batch {oldest} "
                    f"to {steps}"
                )
        if complete and step in (None, steps):
            lanes = {index: (None, tally) for index, tally in self.tallies.items()}
            return self._render(self.epoch + 1, 0, 0, lanes, None)
        passed, told, states = self.passed, self.told, dict(self.states)
        undone: dict[int, _Tally] = {}
        for entry in reversed(self.log):
            if step is None or step == steps or entry.step < step:
                break
            passed, told = entry.passed, entry.told
            if entry.state is None:
                states.pop(entry.lane, None)
            else:
                states[entry.lane] = entry.state
            if entry.lane not in undone:
                undone[entry.lane] = self.tallies[entry.lane].copy()
            undone[entry.lane].add(entry.origins, entry.events, -1)
        done = steps if step is None else step
        lanes = {index: (states.get(index), undone.get(index) or tally) for index, tally in self.tallies.items()}
        for index, text in states.items():
            lanes.setdefault(index, (text, _Tally(self.num_sources)))
        return self._render(self.epoch, passed, done, lanes, told)

    def _render(
        self,
        epoch: int,
        passed: int,
        steps: int,
        lanes: Mapping[int, tuple[str | None, _Tally]],
        told: tuple[int, int] | None,
    ) -> State:
        fresh = epoch != self.epoch
        leaves = {}
        for index in self.own:
            text, tally = lanes.get(index, (None, None))
            is_told = told is not None and index == self.topology.rank
            if text is None and not is_told and (tally is None or not (tally.samples.any() or tally.events)):
                leaves[f"{index:04d}"] = ""
                continue
            tally = tally or _Tally(self.num_sources)
            leaf: dict[str, State] = {
                "samples": tally.samples.tolist(),
                "rows": tally.rows.tolist(),
                "events": tally.events,
            }
            if is_told and told is not None:
                leaf["told"] = list(told)
            body = encode(leaf)
            leaves[f"{index:04d}"] = body if text is None else f'{body[:-1]},"lane":{text}}}'
        spec = self.loader._spec
        return {
            "midstream": FORMAT,
            "fingerprint": self.loader._pipeline.fingerprint,
            "spec": copy.deepcopy(spec),
            "epoch": epoch,
            "batches": 0 if fresh else self.start + passed * self.topology.world_size,
            "steps_done": steps,
            "num_lanes": self.num_lanes,
            "lanes": leaves,
        }

    def trace(self, step: int | None) -> list[Origin]:
        """Origins of the samples of batch number ``step`` (from 1), or of the last one."""
        wanted = self.steps if step is None else step
        for entry in reversed(self.log):
            if entry.is_batch and entry.step == wanted - 1:
                assert entry.origins is not None
                names = self.loader._place.names
                return [Origin(names[s], p, r, part) for s, p, r, part in entry.origins.tolist()]
        kept = [entry.step + 1 for entry in self.log if entry.is_batch]
        span = f"{kept[0]} to {kept[-1]}" if kept else "none yet"
        raise ValueError(f"batch {wanted} of epoch {self.epoch} is not kept; kept are {span}")


class _LoaderIterator:
    """One pass over the loader."""

    def __init__(self, loader: DataLoader, epoch: _Epoch, inner: Iter[Any]) -> None:
        self._loader, self._epoch, self._inner = loader, epoch, inner
        self._ready: deque[tuple[int, int, _Out]] = deque()
        self._loud = 0  # how many of `_ready` are handed out or raised
        self._hold = epoch.turns is None and not loader._pipeline.infinite
        self._ended = False
        self._broken: BaseException | None = None

    def __iter__(self) -> _LoaderIterator:
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        epoch = self._epoch
        if self._loader._active is not self:
            raise RuntimeError(
                "this iterator was left behind: the loader was iterated again, closed, or a state was loaded after it was "
                "made. Use the newest one."
            )
        if self._broken is not None:
            raise self._broken
        if epoch.complete:
            self._drain()
            raise StopIteration
        try:
            self._fetch(1)
            if self._hold:
                self._fetch(2)
        except StopIteration:
            self._ended = True
        except Exception as error:
            self._broken = self._explain(error)
            if not self._loud:
                raise self._broken from error
        while self._ready:
            number, lane, out = self._ready.popleft()
            if out.notes is not None:
                self._tell(out)
            if out.kind == _FATAL:
                self._broken = self._rebuild(out.payload)
                raise self._broken
            epoch.apply(number, lane, out)
            if out.notes is not None and out.notes[2]:
                self._limits(out.notes[2])
            if out.kind == _NOTHING:
                continue
            self._loud -= 1
            if self._ended and not self._loud:
                self._finish()
            if out.kind == _ERROR:
                raise out.payload.error()
            return out.payload
        self._finish()
        raise StopIteration

    def _fetch(self, loud: int) -> None:
        """Take envelopes until so many things to hand out are ready."""
        while self._loud < loud and not self._ended:
            number, lane, outs = next(self._inner)
            for out in outs:
                self._ready.append((number, lane, _Out(*out)))
                self._loud += out[0] != _NOTHING

    def _finish(self) -> None:
        """Nothing more will come: count what is left and close the epoch."""
        while self._ready:
            number, lane, out = self._ready.popleft()
            if out.notes is not None:
                self._tell(out)
            self._epoch.apply(number, lane, out)
        self._epoch.complete = True

    def _drain(self) -> None:
        """Let the workers end by themselves."""
        if not self._ended and not self._hold:
            self._ended = True
            with contextlib.suppress(StopIteration):
                while True:
                    next(self._inner)

    def _tell(self, out: _Out) -> None:
        assert out.notes is not None
        for key, text in out.notes[1]:
            if key not in self._loader._noticed:
                self._loader._noticed.add(key)
                warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _limits(self, limits: Mapping[str, int]) -> None:
        try:
            check_limits(self._epoch.totals(), limits)
        except MidstreamError as error:
            self._broken = error
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
            f"reading failed, and not on one sample alone: {summary}\nThe position stays at the last batch handed out; after "
            f"mending the cause, load a checkpoint or iterate the loader again.\nOriginal traceback:\n{text}"
        )

    def _explain(self, error: Exception) -> BaseException:
        """What torch raises when a worker died."""
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            return WorkerError(
                f"{error}\nThe position stays at the last batch handed out (batch {self._epoch.steps} of epoch "
                f"{self._epoch.epoch}); iterate the loader's last state again, or load a checkpoint."
            )
        return error


class DataLoader(StatefulDataLoader):
    """A drop-in ``torch.utils.data.DataLoader`` that resumes mid-stream, exactly.

    Takes a midstream dataset, or map-style data as torch does. The sequence of batches depends on the dataset, its seed,
    the epoch, the batch size and the number of lanes; never on workers or start method.

    ``state_dict()`` is legal at any time and costs microseconds; ``load_state_dict()`` takes a state saved with any number
    of workers. The epoch in progress is `epoch`:

        for epoch in range(loader.epoch, num_epochs):
            for batch in loader:
                ...

    Args:
        dataset: A midstream dataset, or map-style data (with ``__len__`` and ``__getitem__``), which is lifted to
            ``from_dataset(data)``. With a ``sampler``, ``batch_sampler`` or ``generator``, and for other iterables, the
            arguments go to torchdata's ``StatefulDataLoader`` unchanged, and only its promises hold.
        batch_size: Samples per batch; None for none. Left alone where the pipeline already ends in ``.batch``.
        shuffle: Shuffle with the seed ``torch.initial_seed()``, which is kept in the checkpoint.
        lanes: Into how many logical sub-streams the run is divided; fixed by the first run (48, or what the sources and
            ranks need).
        rank: Of this process among ``world_size``; left out, ``torch.distributed`` or the environment says.
        world_size: Number of data-parallel ranks.
        remainder: What happens to the last batches of a sized pipeline that do not go round all ranks: ``"drop"`` or
            ``"uneven"`` (some ranks make one more).
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
        remainder: Literal["drop", "uneven"] = "drop",
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
        own = {"lanes": lanes, "rank": rank, "world_size": world_size, "remainder": remainder, "shuffle": shuffle}
        self._foreign = not _ours(dataset, sampler, batch_sampler, generator)
        self._active: _LoaderIterator | None = None
        if self._foreign:
            with _quiet_vital():
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
        for name, value in (("sampler", sampler), ("batch_sampler", batch_sampler), ("generator", generator)):
            if value is not None:
                raise ValueError(
                    f"a midstream pipeline has its own order, so {name} does not apply: shuffle with .shuffle(seed), weigh "
                    f"with midstream.interleave"
                )
        if not in_order:
            raise ValueError("in_order=False hands out batches by chance, so no position could be saved; leave it True")
        if remainder not in ("drop", "uneven"):
            raise ValueError(f"remainder is 'drop' or 'uneven'; found {remainder!r}")
        if lanes is not None and (isinstance(lanes, bool) or not isinstance(lanes, int) or lanes < 1):
            raise ValueError(f"lanes is an integer of at least 1; found {lanes!r}")
        source = dataset if isinstance(dataset, Dataset) else from_dataset(dataset)
        pipeline, batch_size, drop_last, collate_fn, self._seed_from_torch = _pipeline(
            source, batch_size, shuffle, drop_last, collate_fn, torch.initial_seed()
        )
        with _quiet_vital():
            super().__init__(source, None, collate_fn=collate_fn, **common)
        # torch refuses to set these after its constructor, and has other uses for them inside it.
        self.__dict__.update(own, batch_size=batch_size, drop_last=drop_last, collate_fn=collate_fn)
        self._set_pipeline(pipeline)
        self._noticed: set[str] = set()
        self._next_epoch = 0
        self._loaded: tuple[Canonical, dict[str, Any]] | None = None
        self._ever_loaded = False
        self._current: _Epoch | None = None
        self._runner: _Runner | None = None
        self._warned_restart = False

    def _set_pipeline(self, pipeline: Dataset) -> None:
        self._pipeline = pipeline
        self._place = bind(pipeline)
        self._spec_made: dict[str, Any] | None = None

    @property
    def _spec(self) -> dict[str, Any]:
        if self._spec_made is None:
            self._spec_made = self._pipeline.spec()
        return self._spec_made

    # -- topology -----------------------------------------------------------------------------------------------------

    def _topology(self) -> Topology:
        return current_topology(self.rank, self.world_size, self.num_workers)

    def _num_lanes(self, topology: Topology) -> int:
        if self._current is not None:
            return self._current.num_lanes
        return choose_lanes(self.lanes, topology, self._pipeline.max_lanes())

    def _turns(self, topology: Topology, start: int) -> int | None:
        """Batches this rank makes from ``start`` on; None when only reading tells."""
        if not self._pipeline.random_access:
            return None
        total = self._pipeline.length()
        if total is None:
            return None
        remainder = self.remainder if topology.world_size > 1 else "uneven"
        return batches_of_rank(total, start, topology.rank, topology.world_size, remainder)

    def _check_topology(self, topology: Topology, num_lanes: int) -> None:
        """Refuse ranks and workers that could never get data, before they wait for it."""
        ranks, readers = topology.world_size, topology.readers
        if self._pipeline.random_access:
            total = self._pipeline.length()
            if total is not None and 0 < total < ranks * readers:
                raise ValueError(
                    f"{topology} cannot be served: the pipeline has {total} batches in all, so some would never get one "
                    f"({self._sources_in_words()}). Use fewer ranks or workers, or a smaller batch_size."
                )
            return
        full, reason = self._pipeline.full_lanes(num_lanes, 1)
        limit = self._pipeline.max_lanes()
        most = -(-num_lanes // ranks)
        if readers > most:
            why = limit[1] if limit is not None else f"lanes={num_lanes} was asked for. Give more lanes or use fewer workers"
            raise ValueError(
                f"{topology} cannot be served: there are {num_lanes} lanes, at most {most} for each rank, and a worker "
                f"without a lane would never get data; {why}."
            )
        for worker in range(readers):
            mine = [lane for lane in slots(topology, num_lanes, worker) if lane >= 0]
            if full and all(lane >= full for lane in mine):
                raise ValueError(
                    f"{topology} cannot be served: only {full} of {num_lanes} lanes have any data ({reason}), and rank "
                    f"{topology.rank} worker {worker} runs none of those ({self._sources_in_words()}). Use fewer ranks or "
                    f"workers, a smaller batch_size, or lanes={max(1, full - full % ranks)}."
                )

    def _sources_in_words(self) -> str:
        parts = []
        for place in self._place.walk():
            if place.source >= 0:
                parts.append(f"{place.names[place.source]}: {place.node.summary()}")
        return "; ".join(parts)

    # -- iterating ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches of an epoch on this rank.

        Raises:
            TypeError: If only reading tells, or there is no end.
        """
        if self._foreign:
            return super().__len__()
        topology = self._topology()
        current = self._current
        if current is not None and current.turns is not None and not current.complete:
            return current.first_step + current.turns
        if current is None and self._loaded is not None:
            turns = self._turns(topology, self._loaded[0].batches)
            if turns is not None:
                return self._loaded[0].steps_done + turns
        turns = self._turns(topology, 0)
        if turns is None:
            len(self._pipeline)  # raises, saying why
            raise TypeError(f"the length of this pipeline is known only by reading it:\n{self._pipeline!r}")
        return turns

    def __iter__(self) -> Any:
        if self._foreign:
            return super().__iter__()
        topology = self._topology()
        epoch, reuse = self._begin(topology)
        self._check_topology(topology, epoch.num_lanes)
        runner = self._runner
        if reuse and runner is not None:
            runner.epoch = epoch.epoch
        else:
            super().load_state_dict({})
            runner = _Runner(self._pipeline, topology, epoch.num_lanes, epoch.epoch, epoch.plan(), self._turns(topology, 0))
            if self.persistent_workers and self.num_workers > 0:
                runner.shared = torch.zeros(2, dtype=torch.int64).share_memory_()
            self._runner = runner
        if runner.shared is not None:
            runner.shared[0] = epoch.epoch
            runner.shared[1] += 1
            if not reuse:
                runner.generation = int(runner.shared[1])
        with self._engine(runner):
            inner = super().__iter__()
        self._current, self._loaded = epoch, None
        self._next_epoch = epoch.epoch
        self._active = _LoaderIterator(self, epoch, inner)
        return self._active

    def _begin(self, topology: Topology) -> tuple[_Epoch, bool]:
        """The epoch to iterate, and whether living workers may go on with it from its start."""
        current = self._current
        alive = self.persistent_workers and self.num_workers > 0 and self._iterator is not None
        if self._loaded is not None:
            canonical = self._loaded[0]
            return _Epoch(self, topology, canonical.num_lanes, canonical.epoch, canonical), False
        if current is None:
            return _Epoch(self, topology, self._num_lanes(topology), self._next_epoch), False
        same = alive and self._runner is not None and self._runner.topology == topology
        if current.complete:
            following = current.epoch + 1 if self._next_epoch == current.epoch else self._next_epoch
            return _Epoch(self, topology, current.num_lanes, following, tallies=current.tallies), same
        if self._next_epoch == current.epoch:
            if self._pipeline.infinite or (self._pipeline.random_access and self._pipeline.length() is None):
                canonical = parse(current.state_at(None))
                return _Epoch(self, topology, current.num_lanes, current.epoch, canonical), False
            if current.steps > 0 and not self._warned_restart:
                self._warned_restart = True
                warnings.warn(
                    f"the loader was left after batch {current.steps} of epoch {current.epoch} and is iterated again: the "
                    f"epoch starts over. To begin the next one call loader.set_epoch({current.epoch + 1}); to go on where "
                    f"it was, load its state_dict().",
                    UserWarning,
                    stacklevel=4,
                )
        return _Epoch(self, topology, current.num_lanes, self._next_epoch, tallies=current.tallies), same

    @contextlib.contextmanager
    def _engine(self, runner: _Runner) -> Iter[None]:
        """What torchdata sees while it builds its iterator: our runner, one envelope at a time, nothing global drawn."""
        inside = {
            "dataset": runner,
            "collate_fn": _identity,
            "batch_size": None,
            "drop_last": False,
            "snapshot_every_n_steps": 0,  # our envelopes carry the state; torchdata's would cost and hold nothing
            "generator": torch.Generator().manual_seed(runner.epoch),
        }
        outside = {name: self.__dict__[name] for name in inside}
        self.__dict__.update(inside)
        try:
            yield
        finally:
            self.__dict__.update(outside)

    def close(self) -> None:
        """Shut the workers down. The position stays; iterating again starts new ones."""
        iterator, self._iterator = self._iterator, None
        self._active = None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    # -- epochs -------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch in progress, or the next one when none is. After the last batch of epoch e it is e + 1."""
        if self._foreign:
            raise TypeError(_FOREIGN.format("epoch"))
        if self._loaded is not None:
            return self._loaded[0].epoch
        if self._current is not None and self._next_epoch == self._current.epoch:
            return self._current.epoch + self._current.complete
        return self._next_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next ``iter()``.

        A hint that may be given again and again: the epoch in progress changes nothing, a loaded state that waits is
        kept, and after a load an earlier epoch is ignored with a warning (some trainers count from 0 again).
        """
        if self._foreign:
            for part in (self.sampler, getattr(self.batch_sampler, "sampler", None), self.dataset):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            return
        if isinstance(epoch, bool) or not isinstance(epoch, (int, np.integer)) or epoch < 0:
            raise ValueError(f"epoch is an integer of at least 0; found {epoch!r}")
        epoch = int(epoch)
        if self._loaded is not None:
            if epoch != self._loaded[0].epoch:
                log.info("set_epoch(%d) is ignored: a loaded state of epoch %d waits", epoch, self._loaded[0].epoch)
            return
        now = self.epoch
        if epoch == now:
            return
        if self._ever_loaded and epoch < now:
            warnings.warn(
                f"set_epoch({epoch}) is ignored: this run was resumed and is in epoch {now}. The epoch comes from the "
                f"checkpoint; count from loader.epoch.",
                UserWarning,
                stacklevel=2,
            )
            return
        if self._current is not None and epoch == self._current.epoch:
            # Again an epoch that is complete: forget that it is.
            self._current = _Epoch(
                self, self._current.topology, self._current.num_lanes, epoch, tallies=self._current.tallies
            )
        self._next_epoch = epoch

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state after the batch last handed out: plain values, fresh each time. Starts no worker.

        Returns:
            See `midstream.checkpoint` for the format. After the last batch of epoch e it is the state before the first
            of e + 1.
        """
        if self._foreign:
            return super().state_dict()  # type: ignore[no-any-return]
        loaded = self._loaded
        if loaded is not None:
            return copy.deepcopy(loaded[1])
        current = self._current
        if current is None or (self._next_epoch not in (current.epoch, current.epoch + current.complete)):
            topology = self._topology()
            tallies = current.tallies if current is not None else None
            current = _Epoch(self, topology, self._num_lanes(topology), self._next_epoch, tallies=tallies)
        return current.state_at(None)  # type: ignore[no-any-return]

    def state_at(self, step: int) -> dict[str, Any]:
        """The state after batch ``step`` of the epoch last iterated (what was trained, say, where more was fetched).

        Args:
            step: Batches of the epoch that count as done, counted like `state_dict`'s ``steps_done``.

        Raises:
            ValueError: If it is older than the last 1,024 batches, or not reached yet.
        """
        self._no_foreign("state_at")
        if self._current is None or self._loaded is not None:
            state = self.state_dict()
            if step != state["steps_done"]:
                raise ValueError(f"nothing was handed out yet, so there is only the state after batch {state['steps_done']}")
            return state
        return self._current.state_at(step)  # type: ignore[no-any-return]

    def load_state_dict(self, state: Any) -> None:
        """Continue from ``state`` with the next ``iter()``. An iterator that is in use is left behind.

        Args:
            state: What ``state_dict()`` returned with any number of workers, a list of the states of all ranks, or what
                `midstream.merge_states` made of them. ``{}`` changes nothing.

        Raises:
            CheckpointError: If it is damaged, incomplete, or of another pipeline; then nothing was loaded.
        """
        if self._foreign:
            super().load_state_dict(state)
            return
        if isinstance(state, dict) and not state:
            return
        merged = merge_states(state) if isinstance(state, (list, tuple)) else state
        canonical = parse(merged)
        pipeline = self._pipeline
        if canonical.fingerprint != pipeline.fingerprint and self._seed_from_torch:
            pipeline = _with_seed(pipeline, canonical.spec)
        if canonical.fingerprint != pipeline.fingerprint:
            raise CheckpointError(
                f"this state was saved by another pipeline (saved → here):"
                f"{bullet_list(diff_specs(canonical.spec, pipeline.spec()))}\nBuild the pipeline as it was, or start afresh."
            )
        topology = self._topology()
        self._check_lanes(canonical, topology)
        if pipeline is not self._pipeline:
            self._set_pipeline(pipeline)
        own = {f"{index:04d}" for index in range(topology.rank, canonical.num_lanes, topology.world_size)}
        kept = {key: value for key, value in merged.items() if key != "lanes"}
        kept["lanes"] = {key: value for key, value in merged["lanes"].items() if key in own}
        super().load_state_dict({})
        self._active = None
        self._current, self._runner = None, None
        self._next_epoch, self._ever_loaded = canonical.epoch, True
        self._loaded = (canonical, copy.deepcopy(kept))

    def _check_lanes(self, canonical: Canonical, topology: Topology) -> None:
        """All lanes of this rank must be there, and of this run's number."""
        if self.lanes is not None and self.lanes != canonical.num_lanes:
            raise CheckpointError(
                f"this state has {canonical.num_lanes} lanes, and the loader was made with lanes={self.lanes}. The number "
                f"is fixed by the first run; leave lanes out or give lanes={canonical.num_lanes}."
            )
        missing = [
            index
            for index in range(topology.rank, canonical.num_lanes, topology.world_size)
            if index not in canonical.lanes
        ]
        if missing:
            raise CheckpointError(
                f"this state has {len(canonical.lanes)} of {canonical.num_lanes} lanes, and rank {topology.rank} of "
                f"{topology.world_size} needs {len(missing)} others (lane {missing[0]}, say). It is the state of one rank of "
                f"several: give a list of the states of all ranks."
            )

    def progress(self) -> Progress:
        """How far this rank has come, per source: samples, epochs, failures, counted as delivered."""
        self._no_foreign("progress")
        return progress(self.state_dict())

    def trace(self, step: int | None = None) -> list[Origin]:
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
            raise TypeError(_FOREIGN.format(what))


_FOREIGN = (
    "{} is for midstream pipelines; this loader passes its arguments to torchdata's StatefulDataLoader unchanged. Give it a "
    "midstream dataset, or map-style data without sampler and generator."
)


def _ours(dataset: Any, sampler: Any, batch_sampler: Any, generator: Any) -> bool:
    """Whether midstream runs this, or torchdata alone."""
    if isinstance(dataset, Dataset):
        return True
    mapped = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, dict)
    if mapped and not isinstance(dataset, IterableDataset) and sampler is None and batch_sampler is None and generator is None:
        return True
    what = type(dataset).__name__ if not mapped else "a sampler, batch_sampler or generator"
    log.warning(
        "DataLoader passes %s to torchdata's StatefulDataLoader unchanged: resume holds for the same number of workers, as far "
        "as the dataset itself can. Wrap data with midstream.from_dataset or from_iterable for exact resume anywhere.",
        what,
    )
    return False


def _pipeline(
    source: Dataset,
    batch_size: int | None,
    shuffle: bool | None,
    drop_last: bool,
    collate_fn: Callable[[list[Any]], Any] | None,
    seed: int,
) -> tuple[Dataset, int | None, bool, Callable[[list[Any]], Any] | None, bool]:
    """The pipeline a loader runs: the source, shuffled and batched as the arguments say."""
    rows = source.batch_rows
    if rows is not None:
        if shuffle:
            raise ValueError(
                f"shuffle=True on top of a pipeline that already ends in .batch would mix whole batches; shuffle before it: "
                f"....shuffle(seed).batch({rows})"
            )
        if batch_size not in (None, 1, rows):
            raise ValueError(
                f"batch_size={batch_size} on top of a pipeline that already ends in .batch({rows}); leave batch_size out, or "
                f"take the .batch out of the pipeline"
            )
        if drop_last:
            raise ValueError(f"the pipeline already ends in .batch({rows}); give drop_last there: .batch({rows}, drop_last=True)")
        if collate_fn is not None:
            raise ValueError(f"the pipeline already ends in .batch({rows}); give collate_fn there: .batch({rows}, collate_fn=...)")
        return source, rows, False, None, False
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size is an integer of at least 1, or None; found {batch_size!r}")
    pipeline = source.shuffle(seed) if shuffle else source
    if batch_size is None:
        if drop_last:
            raise ValueError("drop_last goes with a batch_size")
        return pipeline if collate_fn is None else pipeline.map(collate_fn), None, False, collate_fn, bool(shuffle)
    collate_fn = collate_fn or collate
    return pipeline.batch(batch_size, drop_last=drop_last, collate_fn=collate_fn), batch_size, drop_last, collate_fn, bool(shuffle)


def _with_seed(pipeline: Dataset, spec: State) -> Dataset:
    """The pipeline with the shuffle seed of a checkpoint, where torch's seed had been taken."""
    import dataclasses

    if pipeline.kind == "shuffle":
        seed = spec.get("seed")
        return dataclasses.replace(pipeline, seed=seed) if type(seed) is int else pipeline  # type: ignore[type-var]
    child = pipeline.inputs().get("")
    below = spec.get("inputs", {}).get("")
    if child is None or not isinstance(below, dict):
        return pipeline
    return dataclasses.replace(pipeline, source=_with_seed(child, below))  # type: ignore[type-var]


@contextlib.contextmanager
def _quiet_vital() -> Iter[None]:
    """torchdata calls torch.set_vital, which torch 2.13 deprecates with a warning at every construction."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        yield


