"""RunState: a state checked and decoded. `midstream.checkpoint` describes the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from midstream.checkpoint.changes import Changes, decode_changes, is_count
from midstream.checkpoint.spec import DONE_EARLY, RAISED, Paths
from midstream.common.plain_state import FORMAT, State, decode, digest, unseal
from midstream.errors import CheckpointError
from midstream.metrics.tracked import is_tracked_state

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

_MAX_DONE_EARLY = 10_000_000


class RunState:
    """The state of a run or of one of its ranks, checked and decoded.

    Attributes:
        fingerprint: Hash of the pipeline.
        spec: The pipeline as data.
        epoch: The epoch in progress, or the next to start.
        batches: Batches of the epoch that were delivered, over all ranks.
        steps_done: Batches of the epoch that each rank handed out.
        num_lanes: Lanes of the run.
        changes: Changed weights, excluded samples, rows delivered by another pipeline.
        lanes: The decoded lanes by number; None where nothing was recorded yet.
        raised: Errors that were raised already, by batch number.
        done_early: Batches from ``batches`` on that are done, in order.
        over: Whether all ranks had reached the end of the epoch in which they were saved; then the
            position is the start of the next.
        finished: Whether the one rank of this state had reached it, and the state does not say
            whether the others had.
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
        recorded = [lane for lane in self.lanes.values() if lane is not None]
        self.finished = False
        self.over = self._take_position([lane["at"] for lane in recorded if "at" in lane])
        if self.over:
            for lane in recorded:
                for name in ("lane", RAISED, DONE_EARLY):
                    lane.pop(name, None)
        self.raised: dict[int, int] = dict(lane[RAISED] for lane in recorded if RAISED in lane)
        self.done_early: list[int] = sorted(
            number
            for lane in recorded
            for first, stride, count in lane.get(DONE_EARLY, ())
            for number in range(first, first + stride * count, stride)
            if number >= self.batches
        )
        for lane in recorded:
            if "lane" in lane and lane["lane"]["epoch"] > self.epoch:
                raise CheckpointError(
                    f"this state is damaged: a lane is in epoch {lane['lane']['epoch']}, the run in"
                    f" {self.epoch}"
                )

    def _take_position(self, recorded: list[list[int]]) -> bool:
        """Set the position from those that the ranks recorded in their lanes ("at").

        Ranks that save after the same step record the same position, except those that had reached
        their end of the epoch before. When all had, the position is the start of the next epoch.

        Returns:
            Whether it is.

        Raises:
            CheckpointError: If the ranks were saved at different steps.
        """
        if not recorded:
            return False
        running = sorted({tuple(position[:3]) for position in recorded if not position[3]})
        ended = sorted({tuple(position[:3]) for position in recorded if position[3]})
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
        # A rank at its end of the epoch that saves right after a load has the position of the other
        # ranks, at a later step, outside its lanes.
        later = self.finished and here[0] == agreed[0] and here[2] >= agreed[2]
        if not fits or not (later or here in (agreed, *running, *ended)):
            positions = sorted({*running, *ended, here})
            shown = "; ".join(
                f"epoch {epoch}, step {step} (batch {batches})"
                for epoch, batches, step in positions[:4]
            )
            raise CheckpointError(
                f"the ranks were saved at different steps: {shown}. Save all ranks after the same"
                " step, with loader.state_at(step) of the smallest; with sync_end=True the epochs"
                " of all ranks end at the same step."
            )
        self.epoch, self.batches, self.steps_done = agreed
        self.changes = self.changes.lasting if over else self.changes
        return over


def parse(state: Any) -> RunState:
    """Check and decode a state of a loader: one rank's, or a merged one.

    Raises:
        CheckpointError: If it is no such state, is damaged, or has another version.
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
    _require_entries(state)
    _require_lanes(state["lanes"], state["num_lanes"])
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


def _require_entries(state: dict[str, Any]) -> None:
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
    if not 1 <= state["num_lanes"] <= _MAX_LANES:
        raise CheckpointError(
            f"this state is damaged: num_lanes is in [1, 2**24]; found {state['num_lanes']}"
        )


def _require_lanes(lanes: dict[Any, Any], num_lanes: int) -> None:
    for key, value in lanes.items():
        if type(key) is not str or not _is_lane(key, num_lanes):
            raise CheckpointError(
                f"this state is damaged: lanes are numbered '0000' to '{num_lanes - 1:04d}'; found"
                f" {key!r:.40}"
            )
        if type(value) is not str:
            raise CheckpointError(
                f"this state is damaged: lane {key} is a string; found {type(value).__name__}"
            )


def _is_lane(key: str, num_lanes: int) -> bool:
    if not (key.isdecimal() and key.isascii() and len(key) < 12):
        return False
    return int(key) < num_lanes and key == f"{int(key):04d}"


def _are_counts(value: Any, length: int | None = None) -> bool:
    return isinstance(value, list) and all(map(is_count, value)) and length in (None, len(value))


def _are_ranges(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(
            _are_counts(item, 3) and item[1] > 0 and item[0] + item[1] * item[2] < 1 << 62
            for item in value
        )
        and sum(item[2] for item in value) <= _MAX_DONE_EARLY
    )


def _is_lane_position(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and is_count(value.get("rounds"))
        and is_count(value.get("epoch"))
        and type(value.get("done")) is bool
        and "state" in value
        and isinstance(value.get("marks"), dict)
        and ("dealt" not in value or (is_count(value["dealt"]) and value["dealt"] > 0))
        and ("edits" not in value or _are_first_picks(value["edits"]))
    )


def _are_first_picks(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(picks, list) and all(_are_counts(pick, 3) for pick in picks)
        for picks in value.values()
    )


_LANE_ENTRIES: dict[str, tuple[bool, Callable[[Any], bool]]] = {
    "samples": (True, _are_counts),
    "rows": (False, _are_counts),
    "tokens": (False, _are_counts),
    "at": (False, lambda position: _are_counts(position, 4)),
    "tracked": (False, is_tracked_state),
    RAISED: (False, lambda raised: _are_counts(raised, 2)),
    DONE_EARLY: (False, _are_ranges),
    "lane": (False, _is_lane_position),
}
"""The entries of a lane: whether each is required, and the check of its value."""


def decode_lane(key: str, text: str, paths: Paths) -> dict[str, Any] | None:
    """Decode a lane, with nodes by path; None where nothing was recorded.

    Raises:
        CheckpointError: If the text is not what `midstream.checkpoint.write.lane_text` made.
    """
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
    for name, (required, is_valid) in _LANE_ENTRIES.items():
        if not (is_valid(lane[name]) if name in lane else not required):
            raise CheckpointError(
                f"this state is damaged: lane {key} has no valid {name!r}: {lane.get(name)!r:.60}"
            )
    try:
        lane["events"] = paths.events(lane.get("events", {}))
        if "lane" in lane:
            lane["lane"]["marks"] = paths.marks(lane["lane"]["marks"], lane["lane"]["epoch"])
    except ValueError as error:
        raise CheckpointError(
            f"this state is damaged: lane {key} has counts that do not fit its pipeline ({error})"
        ) from None
    lane.setdefault("rows", lane["samples"].copy())
    return lane
