"""Readers: the two ways to read a pipeline for a loader, by position and by lane.

A reader makes one batch per turn. `Runner` is what worker processes iterate: it knows the topology
and makes the reader of each worker.
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
from midstream.distributed.topology import Topology, first_batch, lanes_of_worker
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
from midstream.pipeline.single_lane import LaneOutput, source_of
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
    Turn,
    fatal_message,
    pack_turn,
)

_ERRORS_A_TURN = 1000


class Runner(IterableDataset[Any]):
    """The dataset that worker processes iterate: the pipeline at one topology.

    Args:
        dataset: The pipeline that runs.
        paths: The numbers of its nodes.
        topology: Ranks and workers.
        lanes: Number of lanes of the run.
        epoch: The epoch to read.
        plan: Where to continue in it.
        next_turns: Batches of this rank in the epochs that follow; None: unknown before reading.

    Attributes:
        shared: Epoch and generation, int64 of shape [2] in shared memory, where workers live on. A
            plan is for one generation only: a worker that was started with it does not follow it
            again in the next epoch.
        crumbs: The table of `midstream.pipeline.breadcrumbs`, where processes read.
        bundle_counts: See `midstream.transport.bundles.new_counts`, likewise.
        arena: Shared memory for batches, likewise.
        edits: Streams: weights changed during the run, by mix.
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
        self.bundle_counts: torch.Tensor | None = None
        self.edits: dict[str, list[dict[str, float]]] = {}
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
            # Collecting what a fork inherited would run the parent's destructors and copy its pages.
            gc.freeze()
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
        assert self.bundle_counts is not None
        return Bundler(self.read(worker.id, epoch, plan), pack_turn, worker.id, self.bundle_counts)

    def read(self, worker: int, epoch: int, plan: Plan) -> Iter[Any]:
        """The turns of reader number ``worker``."""
        kind = _RandomReader if self.dataset.random_access else _StreamReader
        return kind(self, worker, epoch, plan)

    def announce(self, renewed: bool) -> None:
        """Publish the epoch to workers that live on.

        Args:
            renewed: Whether the workers are new: only then do they follow `plan`.
        """
        if self.shared is not None:
            self.shared[0] = self.epoch
            self.shared[1] += 1
            if renewed:
                self.generation = int(self.shared[1])

    def bind(self, worker: int) -> BoundNode:
        """The pipeline, bound; in a worker process with the trail of what it was reading."""
        bound = bind(self.dataset)
        if self.crumbs is not None:
            trail = Trail(self.crumbs[worker].numpy())
            for each in bound.walk():
                each.trail = trail
        return bound


class _RandomReader:
    """Reads by position: makes every W-th batch of its rank, wherever the run continues.

    After the last batch of the pipeline come its first ones again (``remainder="pad"``).
    """

    def __init__(self, runner: Runner, worker: int, epoch: int, plan: Plan) -> None:
        topology = runner.topology
        self.stride = topology.world_size * topology.readers
        first = first_batch(plan.start, topology.rank, topology.world_size)
        self.batch = first + worker * topology.world_size
        self.turn, self.readers, self.turns = worker, topology.readers, plan.turns
        self.raised, self.done_early = plan.raised, plan.done_early
        self.bound, self.epoch = runner.bind(worker), epoch
        self.total = runner.dataset.length()
        self.ledger = Ledger(tracks=True)
        self.cursor = self._cursor(self.batch)
        self.broken: Message | None = None

    def _cursor(self, batch: int) -> Cursor:
        self.ledger.marks.clear()  # nothing is replayed here: all that is read is new
        lane = Lane(batch, self.stride, 1, self.ledger)
        kind = TrackingCursor if self.bound.tracking else Cursor
        return kind(self.bound, lane, int(epoch_key(self.epoch)[0]), self.epoch)

    def __iter__(self) -> _RandomReader:
        return self

    def __next__(self) -> Turn:
        if self.turns is not None and self.turn >= self.turns:
            raise StopIteration
        number = self.batch
        self.turn += self.readers
        self.batch += self.stride
        if number in self.done_early:
            self.cursor = self._cursor(self.batch)
            return -1, -1, []
        if self.total and number >= self.total and self.turns is not None:
            self.cursor = self._cursor(number % self.total)  # a rank's last turn
        if self.broken is not None:
            messages = [self.broken]
        else:
            messages = self._make(self.raised.get(number, 0))
        if self.bound.trail is not None:
            self.bound.trail.clear()
        return number, -1, messages

    def _make(self, raised: int) -> list[Message]:
        """The messages of the next batch.

        Args:
            raised: How many of its errors were raised already, before a resume.
        """
        cursor = self.cursor
        before = cursor.number
        messages: list[Message] = []
        errors = 0
        while True:
            try:
                sample, origins = next(cursor)
            except StopIteration:
                return [*messages, Message(NOTHING, final=True)]
            except Exception as error:
                self.broken = fatal_message(error)
                return [*messages, self.broken]
            done = cursor.number > before
            if type(sample) is not FailedSample:
                origins = as_origin_array(origins)
                batch = Message(BATCH, sample, origins, final=True, notes=self.ledger.take())
                return [*messages, batch]
            failure = sample.errors[0]
            if failure.outcome != "raise":
                self.ledger.failed(failure, source_of(self.bound, failure))
                if done:
                    return [*messages, Message(NOTHING, final=True, notes=self.ledger.take())]
                continue
            errors += 1
            if errors > raised:
                # Samples skipped before it are reported with the batch: a resume makes the whole
                # batch again.
                report = self.ledger.take() if done else None
                messages.append(Message(ERROR, failure, final=done, notes=report))
            elif done:
                messages.append(Message(NOTHING, final=True, notes=self.ledger.take()))
            if done:
                return messages


class LaneReader:
    """Reads one lane of a stream: what an earlier epoch left over, then the epoch in progress."""

    __slots__ = (
        "bound",
        "dealt",
        "done",
        "epoch",
        "index",
        "lane",
        "last_epoch",
        "marks",
        "output",
        "paths",
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
        # By number of the node, as text: of hundreds of marks, few move at a time.
        self.marks: dict[str, str] = {}
        self.dealt = 0 if state is None else state.get("dealt", 0)
        applied = None if state is None else state.get("edits")
        self.lane = Lane(
            index,
            num_lanes,
            1,
            Ledger(tracks=True),
            self.dealt,
            LaneEdits(edits, applied) if edits else None,
        )
        self.rounds, self.done = 0, False
        self.epoch = epoch if state is None else state["epoch"]
        self.output, self.resumed = self._open(), False
        if state is not None:
            self.rounds, self.done = state["rounds"], state["done"]
            self._mark(state["marks"])
            if not self.done and state["state"] is not None:
                self.output.iterator.load(state["state"])
                self.resumed = True

    def _open(self) -> LaneOutput:
        return LaneOutput(self.bound, self.lane, int(epoch_key(self.epoch)[0]), self.epoch)

    def next(self) -> Item:
        """The next batch with its origins, or a `SampleFailure`."""
        while True:
            try:
                item = self.output.next()
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
                self.output = self._open()
            except Exception as error:
                if not self.resumed:
                    raise
                raise CheckpointError(
                    f"lane {self.index} cannot continue from its state ({type(error).__name__}:"
                    f" {error}). The state is damaged, or the data is not what it was."
                ) from error

    def _mark(self, marks: dict[str, list[int]]) -> None:
        """Take over the marks of a state."""
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
            "state": None if self.done else self.output.iterator.snapshot(),
            "marks": {} if self.done else Fragment(f"{{{','.join(self._marks())}}}"),
        }
        if self.dealt:
            state["dealt"] = self.dealt
        if self.lane.edits is not None and not self.done:
            state["edits"] = self.lane.edits.state()
        return encode(state)


class _StreamReader:
    """Reads by lane: runs the lanes of this worker in turn, one batch each."""

    def __init__(self, runner: Runner, worker: int, epoch: int, plan: Plan) -> None:
        bound = self.bound = runner.bind(worker)
        self.num_lanes = runner.lanes
        paths, edits = runner.paths, runner.edits
        self.readers: list[LaneReader | None] = [
            None
            if index < 0
            else LaneReader(
                bound, paths, index, self.num_lanes, epoch, plan.lanes.get(index), edits
            )
            for index in lanes_of_worker(runner.topology, self.num_lanes, worker)
        ]
        # All lanes of the rank count, not only this worker's: the turns of all workers start in the
        # same round.
        of_rank = range(runner.topology.rank, self.num_lanes, runner.topology.world_size)
        states = [plan.lanes.get(index) for index in of_rank]
        live = [
            0 if state is None else state["rounds"]
            for state in states
            if state is None or not state["done"]
        ]
        self.round = min(live, default=0)
        self.slot = 0

    def __iter__(self) -> _StreamReader:
        return self

    def __next__(self) -> Turn:
        if all(reader is None or reader.done for reader in self.readers):
            raise StopIteration
        reader = self.readers[self.slot]
        round_ = self.round
        self.slot += 1
        if self.slot == len(self.readers):
            self.slot, self.round = 0, round_ + 1
        if reader is None or reader.done or reader.rounds > round_:
            return -1, -1, []
        number, messages = reader.rounds * self.num_lanes + reader.index, self._make(reader)
        if self.bound.trail is not None:
            self.bound.trail.clear()
        return number, reader.index, messages

    def _make(self, reader: LaneReader) -> list[Message]:
        """The messages of the lane's next batch."""
        messages: list[Message] = []
        ledger = reader.lane.ledger
        while len(messages) < _ERRORS_A_TURN:
            try:
                sample, origins = reader.next()
            except StopIteration:
                end = Message(NOTHING, final=True, state=reader.state(), notes=ledger.take())
                return [*messages, end]
            except Exception as error:
                return [*messages, fatal_message(error)]
            if type(sample) is not SampleFailure:
                reader.rounds += 1
                origins = as_origin_array(origins)
                batch = Message(
                    BATCH, sample, origins, final=True, state=reader.state(), notes=ledger.take()
                )
                return [*messages, batch]
            messages.append(Message(ERROR, sample, state=reader.state(), notes=ledger.take()))
        # A turn ends after one batch, or the workers would get out of step.
        failure = SourceError(
            f"{len(messages):,} samples in a row failed in lane {reader.index}; the last:"
            f" {sample.message}"
        )
        return [*messages, fatal_message(failure)]
