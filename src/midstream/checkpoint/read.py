"""RunState: the state of a run, checked and decoded. The format is described in `midstream.checkpoint`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from midstream.checkpoint.changes import Changes, decode_changes, is_count
from midstream.checkpoint.spec import Paths
from midstream.common.plain_state import FORMAT, State, decode, digest, unseal
from midstream.errors import CheckpointError
from midstream.metrics.tracked import valid

_KEYS: dict[str, type] = {
    "midstream": int,
    "fingerprint": str,
    "spec": str,
    "epoch": int,
    "batches": int,
    "steps_done": int,
    "num_lanes": int,
    "rest": str,
    "lanes": dict,
}

_MAX_LANES = 1 << 24


class RunState:
    """A checked state.

    Attributes:
        lanes: The decoded lanes by number; None where a lane has nothing to say yet.
        told: Errors raised already, by batch number.
        ahead: Batches from `batches` on that are done.
        over: Whether all ranks had come to the end of the epoch that they were saved in: this is
            the start of the next.
        finished: Whether that is true of the one rank whose state this is, and nothing is known of
        the others.
    """

    def __init__(self, state: dict[str, State]) -> None:
        self.fingerprint: str = state["fingerprint"]
        self.spec: dict[str, State] = decode(state["spec"])
        self.epoch: int = state["epoch"]
        self.batches: int = state["batches"]
        self.steps_done: int = state["steps_done"]
        self.num_lanes: int = state["num_lanes"]
        self.changes: Changes = decode_changes(state)
        paths = Paths(self.spec)
        self.lanes: dict[int, dict[str, Any] | None] = {
            int(key): decode_lane(key, value, paths) for key, value in state["lanes"].items()
        }
        spoken = [lane for lane in self.lanes.values() if lane is not None]
        self.finished = False
        self.over = self._agree([lane["at"] for lane in spoken if "at" in lane])
        if self.over:
            for lane in spoken:
                for name in ("lane", "told", "ahead"):
                    lane.pop(name, None)
        self.told: dict[int, int] = dict(lane["told"] for lane in spoken if "told" in lane)
        self.ahead: list[int] = sorted(
            number
            for lane in spoken
            for first, stride, count in lane.get("ahead", ())
            for number in range(first, first + stride * count, stride)
            if number >= self.batches
        )
        for lane in spoken:
            if "lane" in lane and lane["lane"]["epoch"] > self.epoch:
                raise CheckpointError(
                    f"this state is damaged: a lane is in epoch {lane['lane']['epoch']}, the run in"
                    f" {self.epoch}"
                )

    def _agree(self, marks: list[list[int]]) -> bool:
        """Take the position from where the ranks say they stood; True when that is the start of the next epoch.

        Ranks that save after the same step stand at the same place, but for those that had come to
        their end of the epoch before the others. When all had, the next epoch begins.
        """
        if not marks:
            return False
        running = sorted({tuple(mark[:3]) for mark in marks if not mark[3]})
        ended = sorted({tuple(mark[:3]) for mark in marks if mark[3]})
        here = (self.epoch, self.batches, self.steps_done)
        all_ended = bool(ended) and running in ([], [(ended[0][0] + 1, 0, 0)])
        whole = bool(running) or len(self.lanes) == self.num_lanes
        over = all_ended and whole
        self.finished = all_ended and not whole
        if all_ended:
            agreed = (ended[0][0] + 1, 0, 0) if whole else ended[-1]
            fits = ended[0][0] == ended[-1][0]
        elif running:
            agreed = running[0]
            fits = len(running) == 1 and all(
                end[0] == agreed[0] and end[2] <= agreed[2] for end in ended
            )
        # A rank that had come to its end and saves right after a load knows where the others stood:
        # at a later step.
        later = self.finished and here[0] == agreed[0] and here[2] >= agreed[2]
        if not fits or not (later or here in (agreed, *running, *ended)):
            places = sorted({*running, *ended, here})
            shown = "; ".join(
                f"epoch {epoch}, step {step} (batch {batches})"
                for epoch, batches, step in places[:4]
            )
            raise CheckpointError(
                f"the ranks were saved at different steps: {shown}. Save all after the same one,"
                " with loader.state_at(step) of the smallest; ranks whose epochs end at different"
                " steps are kept together by sync_end=True."
            )
        self.epoch, self.batches, self.steps_done = agreed
        self.changes = self.changes.lasting if over else self.changes
        return over


def parse(state: Any) -> RunState:
    """Check a state of a loader (one rank's, or merged).

    Raises:
        CheckpointError: If it is not one, or of an unknown version.
    """
    if not isinstance(state, dict):
        raise CheckpointError(
            "a loader's state is a dict (or a list of the dicts of all ranks); found"
            f" {type(state).__name__}"
        )
    if "midstream" not in state:
        raise CheckpointError(
            "this is no midstream state: the key 'midstream' is missing; found"
            f" {sorted(map(str, state))[:12]}"
        )
    if state["midstream"] != FORMAT or type(state["midstream"]) is not int:
        raise CheckpointError(
            f"this state has format {state['midstream']!r}; this midstream reads format {FORMAT}"
        )
    for key, kind in _KEYS.items():
        if key not in state:
            raise CheckpointError(f"this state is incomplete: the key {key!r} is missing")
        if type(state[key]) is not kind:
            raise CheckpointError(
                f"this state is damaged: {key!r} is a {kind.__name__}; found"
                f" {type(state[key]).__name__}"
            )
        if kind is int and not 0 <= state[key] < 1 << 62:
            raise CheckpointError(
                f"this state is damaged: {key!r} is not negative and below 2**62; found"
                f" {state[key]}"
            )
    num_lanes = state["num_lanes"]
    if not 1 <= num_lanes <= _MAX_LANES:
        raise CheckpointError(
            f"this state is damaged: num_lanes is in [1, 2**24]; found {num_lanes}"
        )
    for key, value in state["lanes"].items():
        if (
            type(key) is not str
            or not key.isdecimal()
            or not key.isascii()
            or not _is_lane(key, num_lanes)
        ):
            raise CheckpointError(
                f"this state is damaged: lanes are numbered '0000' to '{num_lanes - 1:04d}'; found"
                f" {key!r:.40}"
            )
        if type(value) is not str:
            raise CheckpointError(
                f"this state is damaged: lane {key} is a string; found {type(value).__name__}"
            )
    if not state["spec"].startswith('{"'):
        raise CheckpointError(
            f"this state is damaged: its spec is no JSON object: {state['spec']!r:.60}"
        )
    try:
        found = digest(state["spec"])
        if found == state["fingerprint"]:
            return RunState(state)
    except (UnicodeError, RecursionError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"this state is damaged: its spec is not what was saved ({error})"
        ) from None
    raise CheckpointError(
        f"this state is damaged: its spec has the fingerprint {found}, not"
        f" {state['fingerprint']!r:.40}"
    )


def _is_lane(key: str, num_lanes: int) -> bool:
    return len(key) < 12 and int(key) < num_lanes and key == f"{int(key):04d}"


_MOST_AHEAD = 10_000_000


def _counts(value: Any, length: int | None = None) -> bool:
    return isinstance(value, list) and all(map(is_count, value)) and length in (None, len(value))


def _ranges(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(
            _counts(item, 3) and item[1] > 0 and item[0] + item[1] * item[2] < 1 << 62
            for item in value
        )
        and sum(item[2] for item in value) <= _MOST_AHEAD
    )


def _run(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and is_count(value.get("rounds"))
        and is_count(value.get("epoch"))
        and type(value.get("done")) is bool
        and "state" in value
        and isinstance(value.get("marks"), dict)
        and ("dealt" not in value or (is_count(value["dealt"]) and value["dealt"] > 0))
        and ("edits" not in value or _placed(value["edits"]))
    )


def _placed(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(places, list) and all(_counts(place, 3) for place in places)
        for places in value.values()
    )


_PARTS: dict[str, tuple[bool, Callable[[Any], bool]]] = {
    "samples": (True, _counts),
    "rows": (False, _counts),
    "tokens": (False, _counts),
    "at": (False, lambda mark: _counts(mark, 4)),
    "tracked": (False, valid),
    "told": (False, lambda told: _counts(told, 2)),
    "ahead": (False, _ranges),
    "lane": (False, _run),
}
"""The entries of a lane: whether it must be there, and what it must look like."""


def decode_lane(key: str, text: str, paths: Paths) -> dict[str, Any] | None:
    """A lane, decoded, with nodes by path."""
    if not text:
        return None
    try:
        lane = unseal(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"this state is damaged: lane {key} is not what was saved ({error}): {text!r:.60}"
        ) from None
    if not isinstance(lane, dict):
        raise CheckpointError(f"this state is damaged: lane {key} is no JSON object: {text!r:.60}")
    for name, (needed, good) in _PARTS.items():
        if not (good(lane[name]) if name in lane else not needed):
            raise CheckpointError(
                f"this state is damaged: lane {key} has no valid {name!r}: {lane.get(name)!r:.60}"
            )
    try:
        lane["events"] = paths.events(lane.get("events", {}))
        if "lane" in lane:
            lane["lane"]["marks"] = paths.marks(lane["lane"]["marks"], lane["lane"]["epoch"])
    except ValueError as error:
        raise CheckpointError(
            f"this state is damaged: lane {key} counts what its pipeline has not ({error})"
        ) from None
    lane.setdefault("rows", lane["samples"].copy())
    return lane
