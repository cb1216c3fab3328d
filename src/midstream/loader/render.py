"""A position as a checkpoint. The format is described in `midstream.checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midstream.checkpoint.spec import DONE_EARLY, RAISED
from midstream.checkpoint.write import lane_text
from midstream.common.plain_state import FORMAT, Fragment, State, decode, encode
from midstream.loader.counts import LaneCounts
from midstream.loader.position import Position, Snapshot
from midstream.metrics.tracked import encode_tracked
from midstream.pipeline import describe


def state_at(position: Position, step: int | None) -> dict[str, Any]:
    """The state after batch ``step`` of the epoch, or now: plain values, fresh each time.

    A complete epoch is the start of the next one, where the other ranks are there too.

    Raises:
        ValueError: If the position does not know this step any more, or not yet.
    """
    at = position.at(step)
    ranks, over = position.topology.world_size, at.complete and position.together
    epoch, steps, changes = position.epoch, at.steps, position.pipeline.changes
    batches = position.start + (steps - position.first_step) * ranks
    states: Mapping[int, str] = at.states
    extra: dict[int, dict[str, State]] = {}
    if over:
        epoch, batches, steps, changes = position.epoch + 1, 0, 0, changes.lasting
        states = {}
        if position.keep:
            states = {index: _left_over(position, at.states.get(index)) for index in position.own}
    elif position.total is not None or position.by_position:
        batches = _add_done_early(position, at, batches, extra)
    if position.own:
        own = extra.setdefault(position.own[0], {})
        own["at"] = [epoch, batches, steps, int(at.complete and not over)]
        if tracked := position.history.after(at.number):
            own["tracked"] = Fragment(encode_tracked(tracked))
    if over:
        texts = {
            f"{index:04d}": _lane_text(position, states.get(index), at.counts.get(index))
            for index in position.own
        }
    else:
        texts = _lane_texts(position, at)
    for index, more in extra.items() if position.own else ():
        texts[f"{index:04d}"] = _lane_text(position, states.get(index), at.counts.get(index), more)
    pipeline = position.pipeline
    return {
        "midstream": FORMAT,
        "fingerprint": describe.fingerprint(pipeline.original),
        "spec": pipeline.spec,
        "epoch": epoch,
        "batches": batches,
        "steps_done": steps,
        "num_lanes": position.num_lanes,
        **changes.texts,
        "lanes": texts,
    }


def has_left_over(position: Position) -> bool:
    """Whether lanes have something left that comes first in the next epoch (``sync_end``)."""
    return (
        position.keep
        and position.complete
        and any(_left_over(position, position.states.get(index)) for index in position.own)
    )


def _left_over(position: Position, state: str | None) -> str:
    """The state of a lane as the next epoch begins.

    Empty when the lane had ended, else what it has left, which comes first.
    """
    lane: dict[str, Any]
    if state is None:
        lane = {"epoch": position.epoch, "done": False, "state": None, "marks": {}}
    else:
        lane = decode(state)
    return "" if lane["done"] else encode({**lane, "rounds": 0})


def _add_done_early(
    position: Position, at: Snapshot, batches: int, extra: dict[int, dict[str, State]]
) -> int:
    """Random access: add batches done early and errors already raised to the lanes.

    Args:
        position: The position.
        at: The moment.
        batches: Batches of all ranks that are done, by the steps of this one.
        extra: Further entries of each lane; changed.

    Returns:
        Batches of all ranks that are done.
    """
    ranks = position.topology.world_size
    turns = range((batches - position.start) // ranks, at.passed)
    done = [position.first + turn * ranks for turn in turns]
    if ranks == 1:
        batches, done = position.start + at.passed, []
    elif position.total is not None:
        batches = min(batches, position.total)
    done += sorted(n for n in position.done_early if n >= position.first + at.passed * ranks)
    by_lane: dict[int, list[int]] = {}
    for number in done:
        by_lane.setdefault(position.recording_lane(number), []).append(number)
    for index, numbers in by_lane.items():
        extra.setdefault(index, {})[DONE_EARLY] = to_ranges(numbers)
    for batch, errors in sorted(at.raised.items(), reverse=True):
        extra.setdefault(position.recording_lane(batch), {})[RAISED] = [batch, errors]
    return batches


def _lane_texts(position: Position, at: Snapshot) -> dict[str, str]:
    """All lanes as text.

    Of the lanes rendered last time, only those that have changed since are rendered again.
    """
    if position.rendered is not None:
        before, kept = position.rendered
        first, last = min(before, at.number), max(before, at.number)
        if first == last or (at.log and at.log[0].number <= first + 1):
            texts = kept.copy()
            changed = set()
            for entry in reversed(at.log):
                if entry.number <= first:
                    break
                if entry.number <= last:
                    changed.add(entry.lane)
            for index in changed if position.own else ():
                texts[f"{index:04d}"] = _lane_text(
                    position, at.states.get(index), at.counts.get(index)
                )
            position.rendered = at.number, texts
            return texts.copy()
    texts = {
        f"{index:04d}": _lane_text(position, at.states.get(index), at.counts.get(index))
        for index in position.own
    }
    position.rendered = at.number, texts
    return texts.copy()


def _lane_text(
    position: Position,
    state: str | None,
    counts: LaneCounts | None,
    more: Mapping[str, State] | None = None,
) -> str:
    """The text of one lane, "" where there is nothing to say."""
    if not state and not more and (counts is None or not (counts.samples.any() or counts.events)):
        return ""
    counts = counts or LaneCounts(position.num_sources)
    entries = {**counts.texts(), "events": counts.events, **(more or {})}
    return lane_text(entries, position.pipeline.paths, state)


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
