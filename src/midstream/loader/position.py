"""Where a run stands on one rank: batches, lane states, counts, and how to undo the last 1,024
batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from midstream.checkpoint.read import RunState
from midstream.checkpoint.write import lane_text, with_node_numbers
from midstream.common.plain_state import FORMAT, Fragment, State, decode, encode
from midstream.distributed.topology import Topology, first_batch
from midstream.errors import Origin
from midstream.loader.counts import END, LaneCounts
from midstream.loader.running_pipeline import RunningPipeline
from midstream.metrics.tracked import History, Tracked, decode_tracked, encode_tracked, join_tracked
from midstream.pipeline import describe
from midstream.pipeline.ledger import add_counts, failed_in
from midstream.pipeline.rows import I64
from midstream.workers.messages import BATCH, ERROR, NOTHING, Message, Plan, source_of

_LOG_BATCHES = 1024

_LOG_BYTES = 64 << 20


class Undo(NamedTuple):
    """How to undo one delivery: what was there before it.

    Attributes:
        number: Counts the deliveries.
        step: Batches handed out before it.
        passed: Turns of this rank that were over before it.
        told: Random access: errors already raised, by batch number.
        lane: Whose state and counts it changed.
        padded: Whether the batch was a repeat that only fills up the last round.
        origins: Of the batch, for `Position.trace`; None when it was none.
    """

    number: int
    step: int
    passed: int
    told: dict[int, int]
    lane: int
    state: str | None
    tally: LaneCounts | None
    origins: I64 | None
    padded: bool = False


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

    A delivery first appends to ``log`` how to undo it, then changes the fields, and last of all
    ``applied``: whoever asks for the state at any point between, a signal handler say, gets the
    state before.
    """

    def __init__(
        self,
        facts: RunningPipeline,
        topology: Topology,
        num_lanes: int,
        epoch: int,
        turns: int | None,
        run_state: RunState | None = None,
        tallies: dict[int, LaneCounts] | None = None,
        tracked: Tracked | None = None,
        *,
        even: bool = True,
        keep: bool = False,
    ) -> None:
        """A position.

        Args:
            facts: Of the pipeline.
            topology: Ranks and workers.
            num_lanes: Of the run.
            epoch: The epoch in progress.
            turns: Batch numbers of this rank from the start on; None when only reading tells.
            canonical: The state to go on from.
            tallies: The counts to go on from, where there is no such state.
            tracked: The metrics, likewise.
            even: Whether all ranks come to the end of the epoch at the same step.
            keep: Whether what a lane has not delivered when the epoch ends is kept for the next one
            (``sync_end``).
        """
        self.facts, self.topology, self.num_lanes, self.epoch, self.turns = (
            facts,
            topology,
            num_lanes,
            epoch,
            turns,
        )
        self.by_position = (
            facts.pipeline.random_access
        )  # asked once: it looks at the whole pipeline
        self.even, self.keep = even, keep and not self.by_position
        self.num_sources = len(facts.names)
        self.total = facts.running.length() if facts.running.random_access else None
        self.own = range(topology.rank, num_lanes, topology.world_size)
        self.start = run_state.batches if run_state is not None else 0
        self.first = first_batch(self.start, topology.rank, topology.world_size)
        self.steps = self.first_step = run_state.steps_done if run_state is not None else 0
        self.passed = 0  # random access: turns of this rank that are over since `start`
        self.told: dict[
            int, int
        ] = {}  # random access: errors already raised, by batch number; replaced, never changed
        self.told_before: dict[int, int] = {}
        self.ahead: frozenset[int] = (
            frozenset()
        )  # random access: batches of this rank that were done before their turn
        self.done: Sequence[int] = ()  # the same of all ranks
        self.states: dict[int, str] = {}
        self.tallies: dict[int, LaneCounts] = {
            index: tally.settled(True) for index, tally in (tallies or {}).items()
        }
        known: Tracked = tracked or {}  # of this rank over the whole run
        self.decoded: dict[int, Any] = {}
        if run_state is not None:
            mine = [
                lane
                for index, lane in run_state.lanes.items()
                if lane is not None and index in self.own
            ]
            known = join_tracked(
                decode_tracked(lane["tracked"]) for lane in mine if "tracked" in lane
            )
            self.done = run_state.done_early
            self.ahead = frozenset(n for n in run_state.done_early if self._mine(n))
            self.told_before = dict(run_state.raised)
            for index, lane in run_state.lanes.items():
                if lane is None or index not in self.own:
                    continue
                # Rank 0 was through before the others: it comes to the end again, on what may be
                # another number of ranks.
                again = lane.get("at", [0])[-1] and not run_state.over and not run_state.finished
                self.tallies[index] = LaneCounts(self.num_sources, lane).settled(not again)
                if lane.get("lane") is not None:
                    self.states[index] = encode(with_node_numbers(lane["lane"], facts.paths))
                    self.decoded[index] = lane["lane"]
        for number, errors in self.told_before.items():
            if number >= self.start and self._mine(number):
                self.told = {**self.told, number: errors}
        self.history = History(known)
        self.passed = self._skip_ahead(0)
        fewest = (
            0 if turns is None or run_state is None else self._fewest_ahead(run_state.done_early, turns)
        )
        self.most = (
            None if turns is None else turns - fewest
        )  # random access: of the rank that comes to its end last
        self.complete = False
        self.log: deque[Undo] = deque()
        self.log_bytes = 0
        self.applied = 0  # number of the last delivery that is done: assigned last
        self._rendered: tuple[int, dict[str, str]] | None = (
            None  # lanes as text, after the delivery of that number
        )

    def _mine(self, number: int) -> bool:
        return (number - self.topology.rank) % self.topology.world_size == 0

    def _fewest_ahead(self, ahead: Sequence[int], turns: int) -> int:
        """How many batches were done before their turn by the rank that did fewest: that rank comes
        to its end last.
        """
        start, ranks = self.start, self.topology.world_size
        counts = [0] * ranks
        for number in ahead:
            counts[number % ranks] += number < start + turns * ranks
        return min(counts)

    def _skip_ahead(self, passed: int) -> int:
        """The next turn whose batch is not done already."""
        while self.ahead and self.first + passed * self.topology.world_size in self.ahead:
            passed += 1
        return passed

    def plan(self) -> Plan:
        """Where workers continue."""
        return Plan(self.start, self.turns, self.told_before, self.decoded, self.ahead)

    def apply(
        self, number: int, lane: int, out: Message, *, last: bool = False, skipped: bool = False
    ) -> None:
        """Count one thing that came out, and move on; with ``last`` the epoch is complete after it.

        A batch that is ``skipped`` is not handed out.
        """
        random_access = lane < 0
        key = self._leaf(self.topology.rank) if random_access else lane
        padded = random_access and self.total is not None and number >= self.total
        events = out.notes.events if out.notes is not None else None
        if out.kind == ERROR:
            source = source_of(self.facts.bound, out.payload)
            events = dict(events or {})
            name = f"failed {out.payload.error_type}|{out.payload.node}|{source}"
            events[name] = events.get(name, 0) + 1
        if padded:
            events = self._padding(out.origins)
        is_batch = out.kind == BATCH
        passed = self.passed
        if random_access and out.final:
            passed = self._skip_ahead((number - self.first) // self.topology.world_size + 1)
        last = last or (self.turns is not None and passed >= self.turns)
        if last:
            events = add_counts(events or {}, self._left_over(passed))
            if (
                self.complete
            ):  # a batch that was taken for left over, until it turned out to be lost to errors
                events = add_counts(
                    events, {key: -count for key, count in self._left_over(self.passed).items()}
                )
        before, state = self.tallies.get(key), self.states.get(key)
        after = before or LaneCounts(self.num_sources)
        if skipped and not padded:
            after = after.passed_over(out.origins, events, self.facts.bound.path)
        else:
            after = after.plus(None if padded else out.origins, events)
        told = self.told
        if random_access and out.final:
            told = {key: errors for key, errors in told.items() if key != number} if told else told
        elif random_access and out.kind == ERROR:
            told = {**told, number: told.get(number, 0) + 1}
        entry = Undo(
            self.applied + 1,
            self.steps,
            self.passed,
            self.told,
            key,
            state,
            before,
            out.origins,
            padded and is_batch,
        )
        self.log.append(entry)
        self.tallies[key] = after
        if out.state is not None:
            self.states[key] = out.state
        if (
            out.notes is not None
            and out.notes.tracked
            and not (random_access and (padded or skipped))
        ):
            self.history.add(entry.number, out.notes.tracked)
        self.told = told
        self.passed = passed
        self.steps += is_batch
        self.complete = last
        self.applied = entry.number
        self.log_bytes += out.origins.nbytes if out.origins is not None else 0
        while len(self.log) > _LOG_BATCHES or (self.log_bytes > _LOG_BYTES and len(self.log) > 64):
            old = self.log.popleft()
            self.log_bytes -= old.origins.nbytes if old.origins is not None else 0
        self.history.settle(entry.number, self.log[0].number)

    def finish(self) -> None:
        """The epoch is over and there was nothing more to hand out."""
        if not self.complete:
            self.apply(-1, self._leaf(self.topology.rank), Message(NOTHING), last=True)

    def _leaf(self, number: int) -> int:
        """The leaf of this rank where something about batch ``number`` is kept: where its lane's
        next owner finds it.
        """
        index = number % self.num_lanes
        return index if index in self.own or not self.own else self.own[0]

    def undo_to(self, applied: int) -> None:
        """Take back every delivery after number ``applied``, and one that was interrupted half-way."""
        self.applied, self._rendered = applied, None
        self.history.undo_to(applied)
        while self.log and self.log[-1].number > applied:
            entry = self.log[-1]
            self.complete = False
            self.steps, self.passed, self.told = entry.step, entry.passed, entry.told
            _put(self.states, entry.lane, entry.state)
            _put(self.tallies, entry.lane, entry.tally)
            self.log.pop()

    def _left_over(self, passed: int) -> dict[str, int]:
        """What a sized epoch never delivers: batches that do not go round and rows that ``drop_last`` drops, told by rank 0;
        batches that this rank had not made when the others came to their end (``sync_end``)."""
        if self.total is None or self.turns is None:
            return {}
        rows = max(0, self.turns - passed) * (self.facts.pipeline.batch_rows or 1)
        if self.topology.rank == 0:
            first = self.start + self.turns * self.topology.world_size if self.even else self.total
            rows += self.facts.left_out(min(first, self.total))
            for number in self.done:
                if (
                    first <= number < self.total
                ):  # lost to errors, by a rank of another topology, and told as that
                    rows -= self.facts.left_out(number) - self.facts.left_out(number + 1)
        path = f"{self.facts.bound.path}{END if self.topology.world_size > 1 else '|'}"
        return {f"dropped|{path}{0 if self.num_sources == 1 else -1}": rows} if rows else {}

    def _padding(self, origins: I64 | None) -> dict[str, int]:
        """Samples of a batch that is a repeat, by source."""
        counts = (
            np.bincount(origins[:, 0], minlength=self.num_sources).tolist()
            if origins is not None
            else []
        )
        return {
            f"padded|{self.facts.bound.path}|{source}": count
            for source, count in enumerate(counts)
            if count
        }

    def seen(self) -> int:
        """Samples of this rank over the whole run, failed ones included."""
        return sum(
            int(tally.rows.sum()) + failed_in(tally.events) for tally in self.tallies.values()
        )

    def totals(self) -> dict[str, int]:
        """All events counted so far on this rank."""
        events: dict[str, int] = {}
        for tally in self.tallies.values():
            for key, count in tally.events.items():
                events[key] = events.get(key, 0) + count
        return events

    def state_at(self, step: int | None) -> State:
        """The state after batch ``step`` of this epoch, or now."""
        applied, log = self.applied, list(self.log)
        whole, number = log.copy(), log[-1].number if log else applied
        steps, passed, told, complete = self.steps, self.passed, self.told, self.complete
        states, tallies = dict(self.states), dict(self.tallies)
        oldest = log[0].step if log else steps

        def undo(entry: Undo) -> None:
            nonlocal steps, passed, told, complete, number
            number = entry.number - 1
            steps, passed, told, complete = entry.step, entry.passed, entry.told, False
            _put(states, entry.lane, entry.state)
            _put(tallies, entry.lane, entry.tally)

        while log and log[-1].number > applied:  # half-way through a delivery: not there yet
            undo(log.pop())
        if step is not None and step != steps:
            if not oldest <= step <= steps:
                raise ValueError(
                    f"the state after batch {step} of epoch {self.epoch} is not kept; there are"
                    f" those after batch {oldest} to {steps}"
                )
            while log and log[-1].step >= step:
                undo(log.pop())
        return self._render(passed, steps, states, tallies, told, complete, number, whole)

    @property
    def tracked(self) -> Tracked:
        """Metrics of this rank over the whole run."""
        return self.history.at(self.applied)

    @property
    def left_over(self) -> bool:
        """Whether lanes have something left that comes first in the next epoch."""
        return (
            self.keep
            and self.complete
            and any(self._kept(self.states.get(index)) for index in self.own)
        )

    @property
    def together(self) -> bool:
        """Whether the other ranks come to the end of the epoch at the same step as this one."""
        lost = self.most is not None and self.steps - self.first_step < self.most
        return self.topology.world_size == 1 or (self.even and not lost)

    def _render(
        self,
        passed: int,
        steps: int,
        states: Mapping[int, str],
        tallies: Mapping[int, LaneCounts],
        told: Mapping[int, int],
        complete: bool,
        number: int,
        log: Sequence[Undo],
    ) -> State:
        """The canonical state. A complete epoch is the start of the next, where the other ranks are
        there too.
        """
        ranks, over = self.topology.world_size, complete and self.together
        epoch, batches, changes = (
            self.epoch,
            self.start + (steps - self.first_step) * ranks,
            self.facts.changes,
        )
        extra: dict[int, dict[str, State]] = {}
        if over:
            epoch, batches, steps, changes = self.epoch + 1, 0, 0, changes.lasting
            states = (
                {index: self._kept(states.get(index)) for index in self.own} if self.keep else {}
            )
        elif self.total is not None or self.by_position:
            done = [
                self.first + turn * ranks for turn in range((batches - self.start) // ranks, passed)
            ]
            if ranks == 1:
                batches, done = self.start + passed, []
            elif self.total is not None:
                batches = min(batches, self.total)
            done += sorted(n for n in self.ahead if n >= self.first + passed * ranks)
            for leaf, numbers in self._by_leaf(done).items():
                extra.setdefault(leaf, {})["ahead"] = to_ranges(numbers)
            for batch, errors in sorted(told.items(), reverse=True):
                extra.setdefault(self._leaf(batch), {})["told"] = [batch, errors]
        if self.own:
            extra.setdefault(self.own[0], {})["at"] = [
                epoch,
                batches,
                steps,
                int(complete and not over),
            ]
            if tracked := self.history.at(number):
                extra[self.own[0]]["tracked"] = Fragment(encode_tracked(tracked))
        if over:
            leaves = {
                f"{index:04d}": self._leaf_text(states.get(index), tallies.get(index))
                for index in self.own
            }
        else:
            leaves = self._leaf_texts(states, tallies, number, log)
        for index, more in extra.items() if self.own else ():
            leaves[f"{index:04d}"] = self._leaf_text(states.get(index), tallies.get(index), more)
        return {
            "midstream": FORMAT,
            "fingerprint": describe.fingerprint(self.facts.pipeline),
            "spec": self.facts.spec,
            "epoch": epoch,
            "batches": batches,
            "steps_done": steps,
            "num_lanes": self.num_lanes,
            **changes.texts,
            "lanes": leaves,
        }

    def _leaf_texts(
        self,
        states: Mapping[int, str],
        tallies: Mapping[int, LaneCounts],
        number: int,
        log: Sequence[Undo],
    ) -> dict[str, str]:
        """All lanes as text after delivery ``number``: of those rendered before, only what changed
        since is made anew.
        """
        if self._rendered is not None:
            before, kept = self._rendered
            first, last = min(before, number), max(before, number)
            if first == last or (log and log[0].number <= first + 1):
                leaves = kept.copy()
                changed = set()
                for entry in reversed(log):
                    if entry.number <= first:
                        break
                    if entry.number <= last:
                        changed.add(entry.lane)
                for index in changed if self.own else ():
                    leaves[f"{index:04d}"] = self._leaf_text(states.get(index), tallies.get(index))
                self._rendered = number, leaves
                return leaves.copy()
        leaves = {
            f"{index:04d}": self._leaf_text(states.get(index), tallies.get(index))
            for index in self.own
        }
        self._rendered = number, leaves
        return leaves.copy()

    def _leaf_text(
        self, text: str | None, tally: LaneCounts | None, more: Mapping[str, State] | None = None
    ) -> str:
        """One lane's part of the checkpoint, "" where there is nothing to say."""
        if not text and not more and (tally is None or not (tally.samples.any() or tally.events)):
            return ""
        tally = tally or LaneCounts(self.num_sources)
        return lane_text(
            {**tally.texts(), "events": tally.events, **(more or {})}, self.facts.paths, text
        )

    def _by_leaf(self, numbers: list[int]) -> dict[int, list[int]]:
        leaves: dict[int, list[int]] = {}
        for number in numbers:
            leaves.setdefault(self._leaf(number), []).append(number)
        return leaves

    def _kept(self, state: str | None) -> str:
        """A lane's state as the next epoch begins: nothing when it was through, else what it has
        left, to come first.
        """
        lane = (
            decode(state)
            if state is not None
            else {"epoch": self.epoch, "done": False, "state": None, "marks": {}}
        )
        return "" if lane["done"] else encode({**lane, "rounds": 0})

    def trace(self, step: int | None) -> Trace:
        """Origins of the samples of batch number ``step`` (from 1), or of the last one."""
        wanted = self.steps if step is None else step
        for entry in reversed(self.log):
            if entry.origins is not None and entry.step == wanted - 1:
                names = self.facts.names
                trace = Trace(
                    Origin(names[source], *others) for source, *others in entry.origins.tolist()
                )
                trace.padded = entry.padded
                return trace
        kept = [entry.step + 1 for entry in self.log if entry.origins is not None]
        span = f"{kept[0]} to {kept[-1]}" if kept else "none yet"
        raise ValueError(f"batch {wanted} of epoch {self.epoch} is not kept; kept are {span}")


def to_ranges(numbers: list[int]) -> list[list[int]]:
    """Ascending numbers as ``[first, stride, count]``.

    >>> to_ranges([3, 5, 7, 8])
    [[3, 2, 3], [8, 1, 1]]
    """
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and (
            ranges[-1][2] == 1 or number == ranges[-1][0] + ranges[-1][1] * ranges[-1][2]
        ):
            first, _, count = ranges[-1]
            ranges[-1] = [first, number - first if count == 1 else ranges[-1][1], count + 1]
        else:
            ranges.append([number, 1, 1])
    return ranges


def _put(values: dict[int, Any], key: int, value: Any) -> None:
    """Set a value, or remove it where there was none."""
    if value is None:
        values.pop(key, None)
    else:
        values[key] = value
