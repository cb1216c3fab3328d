"""The position of a run on one rank: batches, lane states and counts, and how to undo the last ones.

Rendering a position as a checkpoint is in loader/render.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from midstream.checkpoint.read import RunState
from midstream.checkpoint.write import with_node_numbers
from midstream.common.plain_state import encode
from midstream.distributed.topology import Topology, first_batch
from midstream.errors import Origin
from midstream.loader.counts import END, LaneCounts
from midstream.loader.running_pipeline import RunningPipeline
from midstream.metrics.tracked import TotalsHistory, Tracked, decode_tracked, merge_tracked
from midstream.pipeline.ledger import add_counts, failed_in
from midstream.pipeline.rows import I64
from midstream.pipeline.single_lane import source_of
from midstream.workers.messages import BATCH, ERROR, NOTHING, Message, Plan

_LOG_MESSAGES = 1024
_LOG_BYTES = 64 << 20


class Undo(NamedTuple):
    """How to undo one message: what was there before it.

    Attributes:
        number: Counts the messages.
        step: Batches handed out before it.
        passed: Turns of this rank that were over before it.
        raised: Random access: errors already raised, by batch number.
        lane: Whose state and counts it changed.
        state: The state of this lane before it.
        counts: The counts of this lane before it.
        origins: Of the batch, for `Position.trace`; None where there was no batch.
        padded: Whether the batch was a repeat that only fills up the last round.
    """

    number: int
    step: int
    passed: int
    raised: dict[int, int]
    lane: int
    state: str | None
    counts: LaneCounts | None
    origins: I64 | None
    padded: bool = False


class Snapshot(NamedTuple):
    """A position at one moment.

    Attributes:
        passed: Turns of this rank that were over.
        steps: Batches handed out.
        states: The state of each lane, as text.
        counts: The counts of each lane.
        raised: Random access: errors already raised, by batch number.
        complete: Whether the epoch was complete.
        number: The number of the last message.
        log: How to undo the last messages, later ones included.
    """

    passed: int
    steps: int
    states: dict[int, str]
    counts: dict[int, LaneCounts]
    raised: dict[int, int]
    complete: bool
    number: int
    log: list[Undo]


class Trace(list[Origin]):
    """The origins of a batch's samples.

    Attributes:
        padded: Whether the batch is a repeat, made by ``remainder="pad"`` so that every rank gets
            as many.
    """

    padded: bool = False

    def __repr__(self) -> str:
        return f"{super().__repr__()}{' (padded)' if self.padded else ''}"


class Position:
    """The position of a run within one epoch, on one rank.

    A message first appends to ``log`` how to undo it, then changes the fields, and last of all
    ``applied``. Whoever asks for the state in between, a signal handler for example, gets the state
    before the message.

    Args:
        pipeline: The pipeline that runs.
        topology: Ranks and workers.
        num_lanes: Of the run.
        epoch: The epoch in progress.
        turns: Batches that this rank makes from the start on; None: unknown before reading.
        run_state: The state to continue from.
        counts: The counts to continue from, where there is no such state.
        tracked: The metrics, likewise.
        even: Whether all ranks come to the end of the epoch at the same step.
        keep: Whether what a lane has not delivered when the epoch ends is kept for the next one
            (``sync_end``).

    Attributes:
        by_position: Whether the pipeline has random access.
        own: The lanes of this rank.
        start: The first batch of all ranks that was not delivered when this position began.
        first: The first batch of this rank from there on.
        steps: Batches handed out in this epoch; ``first_step`` when this position began.
        passed: Random access: turns of this rank that are over since ``start``.
        raised: Random access: errors already raised, by batch number. Replaced, never changed.
        done_early: Random access: batches of this rank that were done before their turn.
        all_done_early: The same of all ranks.
        states: The state of each lane of a stream, as text.
        counts: The counts of each lane.
        most: Random access: turns of the rank that comes to its end last.
        complete: Whether the epoch is over.
        applied: The number of the last message that is done. Assigned last.
        rendered: Number of a message, and all lanes as text after it: kept by loader/render.py.
    """

    def __init__(
        self,
        pipeline: RunningPipeline,
        topology: Topology,
        num_lanes: int,
        epoch: int,
        turns: int | None,
        run_state: RunState | None = None,
        counts: dict[int, LaneCounts] | None = None,
        tracked: Tracked | None = None,
        *,
        even: bool = True,
        keep: bool = False,
    ) -> None:
        self.pipeline, self.topology, self.num_lanes = pipeline, topology, num_lanes
        self.epoch, self.turns = epoch, turns
        self.by_position = (
            pipeline.original.random_access
        )  # asked once: it walks the whole pipeline
        self.even, self.keep = even, keep and not self.by_position
        self.num_sources = len(pipeline.names)
        self.total = pipeline.node.length() if pipeline.node.random_access else None
        self.own = range(topology.rank, num_lanes, topology.world_size)
        self.start = run_state.batches if run_state is not None else 0
        self.first = first_batch(self.start, topology.rank, topology.world_size)
        self.steps = self.first_step = run_state.steps_done if run_state is not None else 0
        self.raised: dict[int, int] = {}
        self.raised_before: dict[int, int] = {}
        self.done_early: frozenset[int] = frozenset()
        self.all_done_early: Sequence[int] = ()
        self.states: dict[int, str] = {}
        self.decoded: dict[int, Any] = {}
        self.counts = {
            index: each.with_ends_resolved(True) for index, each in (counts or {}).items()
        }
        if run_state is not None:
            tracked = self._continue_from(run_state)
        self.history = TotalsHistory(tracked or {})  # metrics of this rank over the whole run
        self.passed = self._skip_done(0)
        self.most = turns
        if turns is not None and run_state is not None:
            self.most = turns - self._fewest_done_early(run_state.done_early, turns)
        self.complete = False
        self.log: deque[Undo] = deque()
        self.log_bytes = 0
        self.applied = 0
        self.rendered: tuple[int, dict[str, str]] | None = None

    def _continue_from(self, run_state: RunState) -> Tracked:
        """Take over lanes and counts of a state; returns the metrics of this rank."""
        self.all_done_early = run_state.done_early
        self.done_early = frozenset(n for n in run_state.done_early if self._is_own(n))
        self.raised_before = dict(run_state.raised)
        self.raised = {
            number: errors
            for number, errors in self.raised_before.items()
            if number >= self.start and self._is_own(number)
        }
        tracked = []
        for index, lane in run_state.lanes.items():
            if lane is None or index not in self.own:
                continue
            # When this was saved, this rank had finished the epoch and others had not. It will
            # reach the end again, so its end-of-epoch counts must not be kept.
            again = lane.get("at", [0])[-1] and not run_state.over and not run_state.finished
            self.counts[index] = LaneCounts(self.num_sources, lane).with_ends_resolved(not again)
            if lane.get("lane") is not None:
                self.states[index] = encode(with_node_numbers(lane["lane"], self.pipeline.paths))
                self.decoded[index] = lane["lane"]
            if "tracked" in lane:
                tracked.append(decode_tracked(lane["tracked"]))
        return merge_tracked(tracked)

    def _is_own(self, batch: int) -> bool:
        return (batch - self.topology.rank) % self.topology.world_size == 0

    def _fewest_done_early(self, done_early: Sequence[int], turns: int) -> int:
        """The smallest number of batches that a rank did before their turn.

        That rank comes to its end last.
        """
        start, ranks = self.start, self.topology.world_size
        counts = [0] * ranks
        for number in done_early:
            counts[number % ranks] += number < start + turns * ranks
        return min(counts)

    def _skip_done(self, passed: int) -> int:
        """The next turn whose batch is not done already."""
        ranks = self.topology.world_size
        while self.done_early and self.first + passed * ranks in self.done_early:
            passed += 1
        return passed

    def plan(self) -> Plan:
        """Where readers continue."""
        return Plan(self.start, self.turns, self.raised_before, self.decoded, self.done_early)

    def recording_lane(self, batch: int) -> int:
        """The lane of this rank whose text records early or failed batches, for batch ``batch``.

        The next owner of that lane finds it there.
        """
        index = batch % self.num_lanes
        return index if index in self.own or not self.own else self.own[0]

    # -- forward ---------------------------------------------------------------------------------

    def apply(
        self, number: int, lane: int, message: Message, *, last: bool = False, skipped: bool = False
    ) -> None:
        """Count a message, and move on.

        Args:
            number: The batch that the message belongs to.
            lane: The lane that made it; -1 for random access.
            message: The message.
            last: Whether the epoch is complete after it.
            skipped: Whether its batch is passed over, not handed out.
        """
        random_access = lane < 0
        key = self.recording_lane(self.topology.rank) if random_access else lane
        padded = random_access and self.total is not None and number >= self.total
        is_batch = message.kind == BATCH
        passed = self.passed
        if random_access and message.final:
            passed = self._skip_done((number - self.first) // self.topology.world_size + 1)
        last = last or (self.turns is not None and passed >= self.turns)
        events: Mapping[str, int] | None = None
        if message.notes is not None:
            events = message.notes.events
        if last or padded or message.kind == ERROR:
            events = self._more_events(events, message, padded, last, passed)
        before = self.counts.get(key)
        after = before or LaneCounts(self.num_sources)
        if skipped and not padded:
            after = after.passed_over(message.origins, events, self.pipeline.bound.path)
        else:
            after = after.plus(None if padded else message.origins, events)
        entry = Undo(
            self.applied + 1,
            self.steps,
            self.passed,
            self.raised,
            key,
            self.states.get(key),
            before,
            message.origins,
            padded and is_batch,
        )
        self.log.append(entry)
        self.counts[key] = after
        if message.state is not None:
            self.states[key] = message.state
        notes = message.notes
        if notes is not None and notes.tracked and not (random_access and (padded or skipped)):
            self.history.add(entry.number, notes.tracked)
        if random_access and (self.raised or message.kind == ERROR):
            self.raised = self._raised_after(number, message)
        self.passed = passed
        self.steps += is_batch
        self.complete = last
        self.applied = entry.number
        self._trim(entry)

    def _more_events(
        self,
        events: Mapping[str, int] | None,
        message: Message,
        padded: bool,
        last: bool,
        passed: int,
    ) -> Mapping[str, int] | None:
        """The events of a failure, of a repeat or of the last message of an epoch."""
        if message.kind == ERROR:
            failure = message.payload
            source = source_of(self.pipeline.bound, failure)
            name = f"failed {failure.error_type}|{failure.node}|{source}"
            events = add_counts(events or {}, {name: 1})
        if padded:
            events = self._padding(message.origins)
        if last:
            events = add_counts(events or {}, self._left_out(passed))
            if self.complete:
                # A batch was counted as left out until it turned out to be lost to errors.
                counted = self._left_out(self.passed)
                events = add_counts(events, {key: -count for key, count in counted.items()})
        return events

    def _raised_after(self, number: int, message: Message) -> dict[int, int]:
        """The errors already raised, by batch, after a message."""
        raised = self.raised
        if message.final:
            return {key: n for key, n in raised.items() if key != number}
        if message.kind == ERROR:
            return {**raised, number: raised.get(number, 0) + 1}
        return raised

    def _trim(self, entry: Undo) -> None:
        """Forget the oldest messages, by number and size."""
        log = self.log
        self.log_bytes += entry.origins.nbytes if entry.origins is not None else 0
        while len(log) > _LOG_MESSAGES or (self.log_bytes > _LOG_BYTES and len(log) > 64):
            old = log.popleft()
            self.log_bytes -= old.origins.nbytes if old.origins is not None else 0
        self.history.finish(entry.number, log[0].number)

    def finish(self) -> None:
        """The epoch is over, and there was nothing more to hand out."""
        if not self.complete:
            self.apply(-1, self.recording_lane(self.topology.rank), Message(NOTHING), last=True)

    def _left_out(self, passed: int) -> dict[str, int]:
        """Rows of a sized epoch that are never delivered, as an event.

        Rank 0 counts the batches that do not go round all ranks, and the rows that ``drop_last``
        drops. Every rank counts the batches that it had not made when the others came to their end
        (``sync_end``).
        """
        if self.total is None or self.turns is None:
            return {}
        pipeline, ranks = self.pipeline, self.topology.world_size
        rows = max(0, self.turns - passed) * (pipeline.original.batch_rows or 1)
        if self.topology.rank == 0:
            first = self.start + self.turns * ranks if self.even else self.total
            rows += pipeline.left_out(min(first, self.total))
            for number in self.all_done_early:
                # Lost to errors by a rank of another topology, and counted as that.
                if first <= number < self.total:
                    rows -= pipeline.left_out(number) - pipeline.left_out(number + 1)
        path = f"{pipeline.bound.path}{END if ranks > 1 else '|'}"
        return {f"dropped|{path}{0 if self.num_sources == 1 else -1}": rows} if rows else {}

    def _padding(self, origins: I64 | None) -> dict[str, int]:
        """Samples of a batch that is a repeat, by source, as events."""
        if origins is None:
            return {}
        counts = np.bincount(origins[:, 0], minlength=self.num_sources).tolist()
        path = self.pipeline.bound.path
        return {f"padded|{path}|{source}": count for source, count in enumerate(counts) if count}

    # -- back ------------------------------------------------------------------------------------

    def undo_to(self, applied: int) -> None:
        """Undo every message after number ``applied``, also one that was interrupted half-way."""
        self.applied, self.rendered = applied, None
        self.history.undo_to(applied)
        while self.log and self.log[-1].number > applied:
            entry = self.log[-1]
            self.complete = False
            self.steps, self.passed, self.raised = entry.step, entry.passed, entry.raised
            _put(self.states, entry.lane, entry.state)
            _put(self.counts, entry.lane, entry.counts)
            self.log.pop()

    def at(self, step: int | None) -> Snapshot:
        """The position after batch ``step`` of this epoch, or now.

        Raises:
            ValueError: If it is older than the log, or not reached yet.
        """
        applied, log = self.applied, list(self.log)
        whole, number = log.copy(), log[-1].number if log else applied
        steps, passed, raised, complete = self.steps, self.passed, self.raised, self.complete
        states, counts = dict(self.states), dict(self.counts)
        oldest = log[0].step if log else steps

        def undo(entry: Undo) -> None:
            nonlocal steps, passed, raised, complete, number
            number = entry.number - 1
            steps, passed, raised, complete = entry.step, entry.passed, entry.raised, False
            _put(states, entry.lane, entry.state)
            _put(counts, entry.lane, entry.counts)

        while log and log[-1].number > applied:  # in the middle of a message: not there yet
            undo(log.pop())
        if step is not None and step != steps:
            if not oldest <= step <= steps:
                raise ValueError(
                    f"the state after batch {step} of epoch {self.epoch} is not kept; there are"
                    f" those after batch {oldest} to {steps}"
                )
            while log and log[-1].step >= step:
                undo(log.pop())
        return Snapshot(passed, steps, states, counts, raised, complete, number, whole)

    # -- what there is to know -------------------------------------------------------------------

    def seen(self) -> int:
        """Samples of this rank over the whole run, failed ones included."""
        return sum(int(each.rows.sum()) + failed_in(each.events) for each in self.counts.values())

    def totals(self) -> dict[str, int]:
        """All events counted so far on this rank."""
        events: dict[str, int] = {}
        for each in self.counts.values():
            for key, count in each.events.items():
                events[key] = events.get(key, 0) + count
        return events

    @property
    def tracked(self) -> Tracked:
        """Metrics of this rank over the whole run."""
        return self.history.after(self.applied)

    @property
    def together(self) -> bool:
        """Whether the other ranks come to the end of the epoch at the same step as this one."""
        lost = self.most is not None and self.steps - self.first_step < self.most
        return self.topology.world_size == 1 or (self.even and not lost)

    def trace(self, step: int | None) -> Trace:
        """Origins of the samples of batch number ``step`` (from 1), or of the last one."""
        wanted = self.steps if step is None else step
        for entry in reversed(self.log):
            if entry.origins is not None and entry.step == wanted - 1:
                names = self.pipeline.names
                trace = Trace(
                    Origin(names[source], *others) for source, *others in entry.origins.tolist()
                )
                trace.padded = entry.padded
                return trace
        kept = [entry.step + 1 for entry in self.log if entry.origins is not None]
        span = f"{kept[0]} to {kept[-1]}" if kept else "none yet"
        raise ValueError(f"batch {wanted} of epoch {self.epoch} is not kept; kept are {span}")


def _put(values: dict[int, Any], key: int, value: Any) -> None:
    """Set a value, or remove it where there was none."""
    if value is None:
        values.pop(key, None)
    else:
        values[key] = value
