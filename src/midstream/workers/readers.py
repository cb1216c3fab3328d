"""What runs in a loader's worker processes (or in the main process without workers): lanes, one envelope a turn.

An envelope is ``(batch number, lane, what came out)``. What comes out of a turn is at most one
batch, and before it the failures met on the way, each with the state after it, so that the main
process can publish state and hand out in step.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
from collections.abc import Iterable
from collections.abc import Iterator as Iter
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from midstream.checkpoint.spec import Paths, short_value
from midstream.common.plain_state import Fragment, encode
from midstream.distributed.topology import Topology, first_batch, slots
from midstream.errors import CheckpointError, MidstreamError, SourceError
from midstream.nodes.mix.weight_changes import LaneEdits
from midstream.pipeline.breadcrumbs import Trail
from midstream.pipeline.cursor import Cursor, TrackingCursor
from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.iterator import Lane
from midstream.pipeline.ledger import Ledger
from midstream.pipeline.node import BoundNode, Node, bind
from midstream.pipeline.passes import epoch_key
from midstream.pipeline.rows import Item, as_origin_array
from midstream.pipeline.single_lane import LaneOutput
from midstream.transport.arena import Arena
from midstream.transport.bundles import Bundler
from midstream.transport.once import Once
from midstream.transport.packing import use_arena
from midstream.workers.messages import (
    BATCH,
    ERROR,
    NOTHING,
    Message,
    Plan,
    fatal_message,
    pack_message,
    source_of,
)

_ERRORS_A_TURN = 1000


class Runner(IterableDataset[Any]):
    """What a loader's worker processes iterate: the pipeline at one topology.

    ``shared`` holds epoch and generation where workers live on: a plan is for one generation only,
    so that a worker that was forked with one does not follow it again in the next epoch. ``crumbs``
    is the table of `midstream.pipeline.breadcrumbs`, ``totals`` that of
    `midstream.transport.bundles`.
    """

    def __init__(
        self,
        dataset: Node,
        paths: Paths,
        topology: Topology,
        lanes: int,
        epoch: int,
        plan: Plan,
        next_turns: int | None,
    ) -> None:
        self.dataset, self.topology, self.lanes = dataset, topology, lanes
        self._once = Once(dataset)
        self.epoch, self.generation, self.plan, self.next_turns = epoch, 0, plan, next_turns
        self.shared: torch.Tensor | None = None
        self.crumbs: torch.Tensor | None = None
        self.arena: Arena | None = None
        self.totals: torch.Tensor | None = None
        self.edits: dict[
            str, list[dict[str, float]]
        ] = {}  # streams: weights set on the way, by mix
        self.paths = paths
        self.frozen = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "dataset": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.dataset = self._once.value

    def __iter__(self) -> Iter[Any]:
        worker = get_worker_info()
        if worker is not None and not self.frozen:
            gc.freeze()  # what a fork inherited: collecting it here would run the parent's destructors and copy its pages
            self.frozen = True
        if (
            worker is not None
            and self.arena is not None
            and multiprocessing.parent_process() is not None
        ):
            use_arena(self.arena, worker.id)
        epoch, plan = self.epoch, self.plan
        if self.shared is not None:
            epoch, generation = self.shared.tolist()
            if generation != self.generation:
                plan = Plan(0, self.next_turns, {}, {})
        if worker is None:
            return self.read(0, epoch, plan)
        assert self.totals is not None
        return Bundler(self.read(worker.id, epoch, plan), pack_message, worker.id, self.totals)

    def read(self, worker: int, epoch: int, plan: Plan) -> Iter[Any]:
        """The envelopes of one reader of `Topology.readers`."""
        kind = _RandomReader if self.dataset.random_access else _StreamReader
        return kind(self, worker, epoch, plan)

    def bind(self, worker: int) -> BoundNode:
        """The pipeline's places; in a worker, with the trail it leaves."""
        bound = bind(self.dataset)
        if self.crumbs is not None:
            trail = Trail(self.crumbs[worker].numpy())
            for each in bound.walk():
                each.trail = trail
        return bound


class _RandomReader:
    """Makes every W-th batch of its rank, wherever the run continues; from the last one on, the
    first ones again (pad).
    """

    def __init__(self, runner: Runner, worker: int, epoch: int, plan: Plan) -> None:
        topology = runner.topology
        self.stride = topology.world_size * topology.readers
        self.batch = (
            first_batch(plan.start, topology.rank, topology.world_size)
            + worker * topology.world_size
        )
        self.turn, self.readers, self.turns = worker, topology.readers, plan.turns
        self.told, self.ahead = plan.told, plan.ahead
        self.bound, self.epoch = runner.bind(worker), epoch
        self.total = runner.dataset.length()
        self.ledger = Ledger(tracks=True)
        self.cursor = self._cursor(self.batch)
        self.broken: Message | None = None

    def _cursor(self, batch: int) -> Cursor:
        self.ledger.marks.clear()  # what comes by is new: nothing is replayed here
        lane = Lane(batch, self.stride, 1, self.ledger)
        kind = TrackingCursor if self.bound.tracking else Cursor
        return kind(self.bound, lane, int(epoch_key(self.epoch)[0]), self.epoch)

    def __iter__(self) -> _RandomReader:
        return self

    def __next__(self) -> tuple[int, int, list[Message]]:
        if self.turns is not None and self.turn >= self.turns:
            raise StopIteration
        number = self.batch
        self.turn += self.readers
        self.batch += self.stride
        if number in self.ahead:
            self.cursor = self._cursor(self.batch)
            return -1, -1, []
        if self.total and number >= self.total and self.turns is not None:
            self.cursor = self._cursor(number % self.total)  # a rank's last turn
        outs = [self.broken] if self.broken is not None else self._make(self.told.get(number, 0))
        if self.bound.trail is not None:
            self.bound.trail.clear()
        return number, -1, outs

    def _make(self, told: int) -> list[Message]:
        cursor = self.cursor
        before = cursor.number
        outs: list[Message] = []
        errors = 0
        while True:
            try:
                sample, origins = next(cursor)
            except StopIteration:
                return [*outs, Message(NOTHING, final=True)]
            except Exception as error:
                self.broken = fatal_message(error)
                return [*outs, self.broken]
            done = cursor.number > before
            if type(sample) is not FailedSample:
                origins = as_origin_array(origins)
                return [*outs, Message(BATCH, sample, origins, True, None, self.ledger.take())]
            failure = sample.errors[0]
            if failure.quiet:
                self.ledger.failed(failure, source_of(self.bound, failure))
                if done:
                    return [*outs, Message(NOTHING, None, None, True, None, self.ledger.take())]
                continue
            errors += 1
            if errors > told:
                # What was skipped before it is told with the batch: a resume makes the whole batch
                # again.
                outs.append(
                    Message(ERROR, failure, None, done, None, self.ledger.take() if done else None)
                )
            elif done:
                outs.append(Message(NOTHING, None, None, True, None, self.ledger.take()))
            if done:
                return outs


class LaneReader:
    """A stream lane in its worker: what an earlier epoch left over of it, then the epoch in
    progress.
    """

    __slots__ = (
        "dealt",
        "delivery",
        "done",
        "epoch",
        "index",
        "lane",
        "last_epoch",
        "marks",
        "paths",
        "bound",
        "resumed",
        "rounds",
    )

    def __init__(
        self,
        bound: BoundNode,
        paths: Paths,
        index: int,
        num_lanes: int,
        epoch: int,
        state: Any,
        edits: Any = None,
    ) -> None:
        self.bound, self.paths, self.index, self.last_epoch = bound, paths, index, epoch
        self.marks: dict[
            str, str
        ] = {}  # by number of the node, as text: of hundreds of them, few move at a time
        self.dealt = 0 if state is None else state.get("dealt", 0)
        placed = None if state is None else state.get("edits")
        self.lane = Lane(
            index,
            num_lanes,
            1,
            Ledger(tracks=True),
            self.dealt,
            LaneEdits(edits, placed) if edits else None,
        )
        self.rounds, self.done = 0, False
        self.epoch = epoch if state is None else state["epoch"]
        self.delivery, self.resumed = self._delivery(), False
        if state is not None:
            self.rounds, self.done = state["rounds"], state["done"]
            self._mark(state["marks"])
            if not self.done and state["state"] is not None:
                self.delivery.iterator.load(state["state"])
                self.resumed = True

    def _delivery(self) -> LaneOutput:
        return LaneOutput(self.bound, self.lane, int(epoch_key(self.epoch)[0]), self.epoch)

    def next(self) -> Item:
        """The next batch with its origins, or a `SampleFailure`."""
        while True:
            try:
                item = self.delivery.next()
                self.resumed = False
                return item
            except MidstreamError:
                raise
            except StopIteration:
                if self.epoch >= self.last_epoch:
                    self.done = True
                    raise
                self.epoch += 1
                self.dealt, self.lane = 0, dataclasses.replace(self.lane, dealt=0)
                self._mark({})
                if self.lane.edits is not None:
                    self.lane.edits.forget()
                self.delivery = self._delivery()
            except Exception as error:
                if not self.resumed:
                    raise
                raise CheckpointError(
                    f"lane {self.index} cannot go on from its state ({type(error).__name__}:"
                    f" {error}). The state is damaged, or the data is not what it was."
                ) from error

    def _mark(self, marks: dict[str, list[int]]) -> None:
        """Begin with these marks."""
        self.lane.ledger.marks, self.lane.ledger.moved, self.marks = marks, set(marks), {}

    def _marks(self) -> Iterable[str]:
        """The entries of the marks, as canonical JSON."""
        ledger, texts = self.lane.ledger, self.marks
        known = len(texts)
        for mark in ledger.moved:
            short = self.paths.short_mark(mark)
            texts[short] = f"{encode(short)}:{encode(short_value(ledger.marks[mark], self.epoch))}"
        ledger.moved.clear()
        if len(texts) > known:
            texts = self.marks = dict(sorted(texts.items()))
        return texts.values()

    def state(self) -> str:
        """The lane's part of the checkpoint, as canonical JSON."""
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "rounds": self.rounds,
            "done": self.done,
            "state": None if self.done else self.delivery.iterator.snapshot(),
            "marks": {} if self.done else Fragment(f"{{{','.join(self._marks())}}}"),
        }
        if self.dealt:
            state["dealt"] = self.dealt
        if self.lane.edits is not None and not self.done:
            state["edits"] = self.lane.edits.state()
        return encode(state)


class _StreamReader:
    """Runs this worker's lanes in turn, one batch each."""

    def __init__(self, runner: Runner, worker: int, epoch: int, plan: Plan) -> None:
        bound = self.bound = runner.bind(worker)
        self.lanes = runner.lanes
        mine = slots(runner.topology, runner.lanes, worker)
        self.runs = [
            (
                None
                if index < 0
                else LaneReader(
                    bound,
                    runner.paths,
                    index,
                    runner.lanes,
                    epoch,
                    plan.lanes.get(index),
                    runner.edits,
                )
            )
            for index in mine
        ]
        # All lanes of the rank count, not only this worker's: the turns of all workers start in the
        # same round.
        rank_lanes = range(runner.topology.rank, runner.lanes, runner.topology.world_size)
        states = [plan.lanes.get(index) for index in rank_lanes]
        live = [
            0 if state is None else state["rounds"]
            for state in states
            if state is None or not state["done"]
        ]
        self.round = min(live, default=0)
        self.slot = 0

    def __iter__(self) -> _StreamReader:
        return self

    def __next__(self) -> tuple[int, int, list[Message]]:
        if all(run is None or run.done for run in self.runs):
            raise StopIteration
        run = self.runs[self.slot]
        round_ = self.round
        self.slot += 1
        if self.slot == len(self.runs):
            self.slot, self.round = 0, round_ + 1
        if run is None or run.done or run.rounds > round_:
            return -1, -1, []
        number, outs = run.rounds * self.lanes + run.index, self._make(run)
        if self.bound.trail is not None:
            self.bound.trail.clear()
        return number, run.index, outs

    def _make(self, run: LaneReader) -> list[Message]:
        outs: list[Message] = []
        ledger = run.lane.ledger
        while len(outs) < _ERRORS_A_TURN:
            try:
                sample, origins = run.next()
            except StopIteration:
                return [*outs, Message(NOTHING, None, None, True, run.state(), ledger.take())]
            except Exception as error:
                return [*outs, fatal_message(error)]
            if type(sample) is not SampleFailure:
                run.rounds += 1
                origins = as_origin_array(origins)
                return [*outs, Message(BATCH, sample, origins, True, run.state(), ledger.take())]
            outs.append(Message(ERROR, sample, None, False, run.state(), ledger.take()))
        # One turn is one batch, or the turns of the workers would no longer be in step.
        return [
            *outs,
            fatal_message(
                SourceError(
                    f"{len(outs):,} samples in a row failed in lane {run.index}; the last:"
                    f" {sample.message}"
                )
            ),
        ]
