"""Where a run stands on one rank: batches, lane states, counts, and how to undo the last 1,024 batches."""

from __future__ import annotations

import copy
import pickle
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from midstream._state import State, encode
from midstream.checkpoint import Canonical
from midstream.core import FORMAT, I64, PARTS, Dataset, bind
from midstream.errors import Origin
from midstream.lanes import Topology
from midstream.nodes.batch import Batch
from midstream.readers import BATCH, ERROR, Out, Plan, source_of

__all__ = ["Facts", "Position", "Tally"]

_LOG_BATCHES = 1024
_LOG_BYTES = 64 << 20


class Tally:
    """Counts of one lane (random access: of one rank), over the whole run."""

    __slots__ = ("events", "rows", "samples", "tokens")

    def __init__(self, num_sources: int, lane: Mapping[str, Any] | None = None) -> None:
        self.samples = np.zeros(num_sources, dtype=np.int64)
        self.rows = np.zeros(num_sources, dtype=np.int64)
        self.tokens = np.zeros(num_sources, dtype=np.int64)
        self.events: dict[str, int] = {}
        if lane is not None:
            for counts, found in (
                (self.samples, lane["samples"]),
                (self.rows, lane["rows"]),
                (self.tokens, lane.get("tokens", [])),
            ):
                known = min(num_sources, len(found))
                counts[:known] = found[:known]
            self.events = dict(lane["events"])

    def plus(self, origins: I64 | None, events: Mapping[str, int] | None) -> Tally:
        """The counts after a batch, and what was dropped on the way to it. These stay as they are."""
        other = copy.copy(self)
        if origins is not None and len(origins):
            size = len(self.samples)
            source, part, tokens = origins[:, 0], origins[:, 3], origins[:, 4]
            other.rows = self.rows + np.bincount(source[part == 0], minlength=size)
            if tokens.any():
                np.add.at(counted := self.tokens.copy(), source, tokens)
                other.tokens = counted
                source = source[(tokens == 0) | (part % PARTS == 0)]  # further pieces of a document are no samples
            other.samples = self.samples + np.bincount(source, minlength=size)
        if events:
            other.events = dict(self.events)
            for key, count in events.items():
                other.events[key] = other.events.get(key, 0) + count
        return other


class Entry(NamedTuple):
    """How to undo one delivery: what was there before it.

    Attributes:
        number: Counts the deliveries.
        step: Batches handed out before it.
        origins: Of the batch, for `Position.trace`; None when it was none.
    """

    number: int
    step: int
    passed: int
    told: dict[int, int]
    lane: int
    state: str | None
    tally: Tally | None
    origins: I64 | None


class Facts:
    """What a position has to know of its loader's pipeline. No way back to the loader: no cycle keeps workers alive."""

    def __init__(self, pipeline: Dataset) -> None:
        self.pipeline, self.place = pipeline, bind(pipeline)
        self.names = self.place.names
        self._spec: bytes | None = None

    def spec(self) -> dict[str, Any]:
        """The pipeline as data, fresh each time: made once, and copied by way of bytes, which is fastest."""
        if self._spec is None:
            self._spec = pickle.dumps(self.pipeline.spec())
        return pickle.loads(self._spec)  # type: ignore[no-any-return]

    def dropped_rows(self) -> int:
        """Rows that a ``.batch(n, drop_last=True)`` at the end of a sized pipeline leaves out each epoch."""
        node = self.pipeline
        if not (isinstance(node, Batch) and node.drop_last and node.random_access):
            return 0
        return (node.source.length() or 0) % node.batch_size


class Position:
    """The position of a run within one epoch, on one rank.

    A delivery first appends to ``log`` how to undo it, then changes the fields, and last of all ``applied``: whoever asks for
    the state at any point between, a signal handler say, gets the state before.
    """

    def __init__(
        self,
        facts: Facts,
        topology: Topology,
        num_lanes: int,
        epoch: int,
        turns: int | None,
        canonical: Canonical | None = None,
        tallies: dict[int, Tally] | None = None,
    ) -> None:
        self.facts, self.topology, self.num_lanes, self.epoch, self.turns = facts, topology, num_lanes, epoch, turns
        self.num_sources = len(facts.names)
        self.own = range(topology.rank, num_lanes, topology.world_size)
        self.start = canonical.batches if canonical is not None else 0
        self.steps = self.first_step = canonical.steps_done if canonical is not None else 0
        self.passed = 0  # batch numbers this rank is done with since `start`
        self.told: dict[int, int] = {}  # random access: errors already raised, by batch number; replaced, never changed
        self.told_before: dict[int, int] = {}
        self.states: dict[int, str] = {}
        self.tallies: dict[int, Tally] = tallies if tallies is not None else {}
        self.decoded: dict[int, Any] = {}
        if canonical is not None:
            for index, lane in canonical.lanes.items():
                if lane is None:
                    continue
                if lane.get("told") is not None:
                    self.told_before[lane["told"][0]] = lane["told"][1]
                if index not in self.own:
                    continue
                self.tallies[index] = Tally(self.num_sources, lane)
                if lane.get("lane") is not None:
                    self.states[index], self.decoded[index] = encode(lane["lane"]), lane["lane"]
        for number, errors in self.told_before.items():
            if number >= self.start and (number - topology.rank) % topology.world_size == 0:
                self.told = {**self.told, number: errors}
        self.complete = False
        self.log: deque[Entry] = deque()
        self.log_bytes = 0
        self.applied = 0  # number of the last delivery that is done: assigned last

    def plan(self) -> Plan:
        """Where workers continue."""
        return Plan(self.start, self.turns, self.told_before, self.decoded)

    def apply(self, number: int, lane: int, out: Out, *, last: bool = False) -> None:
        """Count one thing that came out, and move on; with ``last`` the epoch is complete after it."""
        key = lane if lane >= 0 else self.topology.rank
        events = out.notes[0] if out.notes is not None else None
        if out.kind == ERROR:
            source = source_of(self.facts.place, out.payload)
            events = dict(events or {})
            name = f"failed {out.payload.error_type}|{out.payload.node}|{source}"
            events[name] = events.get(name, 0) + 1
        is_batch = out.kind == BATCH
        last = last or (out.final and self.turns is not None and self.passed + 1 >= self.turns)
        if last and not self.complete:
            events = {**(events or {}), **self._left_over()}
        before, state = self.tallies.get(key), self.states.get(key)
        after = (before or Tally(self.num_sources)).plus(out.origins, events)
        told = self.told
        if lane < 0 and out.final:
            told = {key: errors for key, errors in told.items() if key != number} if told else told
        elif lane < 0 and out.kind == ERROR:
            told = {**told, number: told.get(number, 0) + 1}
        entry = Entry(self.applied + 1, self.steps, self.passed, self.told, key, state, before, out.origins)
        self.log.append(entry)
        self.tallies[key] = after
        if out.state is not None:
            self.states[key] = out.state
        self.told = told
        self.passed += out.final if lane < 0 else is_batch  # a drained lane passes no batch
        self.steps += is_batch
        self.complete = last
        self.applied = entry.number
        self.log_bytes += out.origins.nbytes if out.origins is not None else 0
        while len(self.log) > _LOG_BATCHES or (self.log_bytes > _LOG_BYTES and len(self.log) > 64):
            old = self.log.popleft()
            self.log_bytes -= old.origins.nbytes if old.origins is not None else 0

    def undo_to(self, applied: int) -> None:
        """Take back every delivery after number ``applied``, and one that was interrupted half-way."""
        self.applied = applied
        while self.log and self.log[-1].number > applied:
            entry = self.log[-1]
            self.complete = False
            self.steps, self.passed, self.told = entry.step, entry.passed, entry.told
            _put(self.states, entry.lane, entry.state)
            _put(self.tallies, entry.lane, entry.tally)
            self.log.pop()

    def _left_over(self) -> dict[str, int]:
        """What a sized epoch never delivers: rows of a last batch that ``drop_last`` leaves out, told by rank 0."""
        rows = self.facts.dropped_rows() if self.topology.rank == 0 else 0
        return {f"dropped|{self.facts.place.path}|{0 if self.num_sources == 1 else -1}": rows} if rows else {}

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
        steps, passed, told, complete = self.steps, self.passed, self.told, self.complete
        states, tallies = dict(self.states), dict(self.tallies)
        oldest = log[0].step if log else steps

        def undo(entry: Entry) -> None:
            nonlocal steps, passed, told, complete
            steps, passed, told, complete = entry.step, entry.passed, entry.told, False
            _put(states, entry.lane, entry.state)
            _put(tallies, entry.lane, entry.tally)

        while log and log[-1].number > applied:  # half-way through a delivery: not there yet
            undo(log.pop())
        if step is not None and step != steps:
            if not oldest <= step <= steps:
                raise ValueError(
                    f"the state after batch {step} of epoch {self.epoch} is not kept; there are those after batch {oldest} "
                    f"to {steps}"
                )
            while log and log[-1].step >= step:
                undo(log.pop())
        if complete:
            return self._render(self.epoch + 1, 0, 0, {}, tallies, {})
        return self._render(self.epoch, passed, steps, states, tallies, told)

    def _render(
        self,
        epoch: int,
        passed: int,
        steps: int,
        states: Mapping[int, str],
        tallies: Mapping[int, Tally],
        told: Mapping[int, int],
    ) -> State:
        fresh = epoch != self.epoch
        told_in: dict[int, list[int]] = {}
        for number, errors in sorted(told.items(), reverse=True):
            index = number % self.num_lanes
            told_in[index if index in self.own else self.topology.rank] = [number, errors]
        leaves = {}
        for index in self.own:
            text, tally = states.get(index), tallies.get(index)
            if text is None and index not in told_in and (tally is None or not (tally.samples.any() or tally.events)):
                leaves[f"{index:04d}"] = ""
                continue
            tally = tally or Tally(self.num_sources)
            leaf: dict[str, State] = {
                "samples": tally.samples.tolist(),
                "rows": tally.rows.tolist(),
                "events": tally.events,
            }
            if tally.tokens.any():
                leaf["tokens"] = tally.tokens.tolist()
            if index in told_in:
                leaf["told"] = told_in[index]
            body = encode(leaf)
            leaves[f"{index:04d}"] = body if text is None else f'{body[:-1]},"lane":{text}}}'
        return {
            "midstream": FORMAT,
            "fingerprint": self.facts.pipeline.fingerprint,
            "spec": self.facts.spec(),
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
            if entry.origins is not None and entry.step == wanted - 1:
                names = self.facts.names
                return [Origin(names[source], *others) for source, *others in entry.origins.tolist()]
        kept = [entry.step + 1 for entry in self.log if entry.origins is not None]
        span = f"{kept[0]} to {kept[-1]}" if kept else "none yet"
        raise ValueError(f"batch {wanted} of epoch {self.epoch} is not kept; kept are {span}")


def _put(values: dict[int, Any], key: int, value: Any) -> None:
    """Set a value, or remove it where there was none."""
    if value is None:
        values.pop(key, None)
    else:
        values[key] = value
