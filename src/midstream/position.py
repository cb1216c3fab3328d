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
from midstream.core import FORMAT, I64, Dataset, bind
from midstream.errors import Origin
from midstream.lanes import Topology, first_batch
from midstream.nodes.batch import Batch
from midstream.readers import BATCH, ERROR, Out, Plan, source_of

__all__ = ["Facts", "Position", "Tally"]

_LOG_BATCHES = 1024
_LOG_BYTES = 64 << 20


class Tally:
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

    def copy(self) -> Tally:
        """An independent copy."""
        other = copy.copy(self)
        other.samples, other.rows, other.events = self.samples.copy(), self.rows.copy(), dict(self.events)
        return other


class Entry(NamedTuple):
    """How to undo one delivery: what was there before it, and what it counted."""

    step: int
    is_batch: bool
    passed: int
    told: tuple[int, int] | None
    lane: int
    state: str | None
    origins: I64 | None
    events: dict[str, int] | None


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

    A delivery first appends to ``log`` how to undo it, then changes the fields, and last of all ``steps``: a signal
    handler that asks for the state at any point between gets the state before.
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
        self.told: tuple[int, int] | None = None
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
        mine = self.told_before.get(first_batch(self.start, topology.rank, topology.world_size))
        if mine:
            self.told = (first_batch(self.start, topology.rank, topology.world_size), mine)
        self.complete = False
        self.log: deque[Entry] = deque()
        self.log_bytes = 0

    def plan(self) -> Plan:
        """Where workers continue."""
        return Plan(self.start, self.turns, self.told_before, self.decoded)

    def apply(self, number: int, lane: int, out: Out) -> None:
        """Count one thing that came out, and move on."""
        key = lane if lane >= 0 else self.topology.rank
        events = out.notes[0] if out.notes is not None else None
        if out.kind == ERROR:
            source = source_of(self.facts.place, out.payload)
            events = dict(events or {})
            name = f"failed {out.payload.error_type}|{out.payload.node}|{source}"
            events[name] = events.get(name, 0) + 1
        if out.final and self.turns is not None and self.passed + 1 >= self.turns:
            events = {**(events or {}), **self._left_over()}
        tally = self.tallies.get(key)
        if tally is None:
            tally = self.tallies[key] = Tally(self.num_sources)
        is_batch = out.kind == BATCH
        entry = Entry(self.steps, is_batch, self.passed, self.told, key, self.states.get(key), out.origins, events)
        self.log.append(entry)
        self.log_bytes += out.origins.nbytes if out.origins is not None else 0
        tally.add(out.origins, events)
        if out.state is not None:
            self.states[key] = out.state
        if lane < 0:
            if out.final:
                self.told = None
            elif out.kind == ERROR:
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
        steps, complete = self.steps, self.complete
        if step is not None and step != steps:
            oldest = min((entry.step for entry in self.log), default=steps)
            if not oldest <= step <= steps:
                raise ValueError(
                    f"the state after batch {step} of epoch {self.epoch} is not kept; there are those after batch {oldest} "
                    f"to {steps}"
                )
        if complete and step in (None, steps):
            lanes: dict[int, tuple[str | None, Tally]] = {index: (None, tally) for index, tally in self.tallies.items()}
            return self._render(self.epoch + 1, 0, 0, lanes, None)
        passed, told, states = self.passed, self.told, dict(self.states)
        undone: dict[int, Tally] = {}
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
            lanes.setdefault(index, (text, Tally(self.num_sources)))
        return self._render(self.epoch, passed, done, lanes, told)

    def _render(
        self,
        epoch: int,
        passed: int,
        steps: int,
        lanes: Mapping[int, tuple[str | None, Tally]],
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
            tally = tally or Tally(self.num_sources)
            leaf: dict[str, State] = {
                "samples": tally.samples.tolist(),
                "rows": tally.rows.tolist(),
                "events": tally.events,
            }
            if is_told and told is not None:
                leaf["told"] = list(told)
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
            if entry.is_batch and entry.step == wanted - 1:
                assert entry.origins is not None
                names = self.facts.names
                return [Origin(names[s], p, r, part) for s, p, r, part in entry.origins.tolist()]
        kept = [entry.step + 1 for entry in self.log if entry.is_batch]
        span = f"{kept[0]} to {kept[-1]}" if kept else "none yet"
        raise ValueError(f"batch {wanted} of epoch {self.epoch} is not kept; kept are {span}")
