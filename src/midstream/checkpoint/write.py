"""Encodes the state of a run. `midstream.checkpoint` describes the format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midstream.checkpoint.read import RunState
from midstream.checkpoint.spec import Paths
from midstream.common.plain_state import State, copy_plain, encode, seal


def lane_text(lane: Mapping[str, Any], paths: Paths, position: str | None = None) -> str:
    """Encode a lane. The inverse of `midstream.checkpoint.read.decode_lane`.

    Args:
        lane: Its entries, with nodes by path.
        paths: Of the pipeline.
        position: The entry "lane" with nodes by number, where it is encoded already.
    """
    entries = {name: part for name, part in lane.items() if name not in ("crc", "events", "lane")}
    if entries["rows"] == entries["samples"]:
        del entries["rows"]
    if lane["events"]:
        entries["events"] = paths.short_events(lane["events"])
    if "lane" in lane:
        position = encode(with_node_numbers(lane["lane"], paths))
    body = encode(entries)
    return seal(f'{body[:-1]},"lane":{position}}}' if position else body)


def with_node_numbers(position: Mapping[str, Any], paths: Paths) -> dict[str, State]:
    """The entry "lane" of a lane, with nodes by number in place of paths."""
    return {**position, "marks": paths.short_marks(position["marks"], position["epoch"])}


def to_state(run_state: RunState, state: dict[str, State]) -> dict[str, State]:
    """A copy of a state with the values of ``run_state``, which was decoded from it and changed."""
    position = [run_state.epoch, run_state.batches, run_state.steps_done]
    lanes, paths = dict.fromkeys(state["lanes"], ""), Paths(run_state.spec)
    for index, lane in run_state.lanes.items():
        if lane is not None:
            if "at" in lane:
                lane["at"] = [*position, 0]
            lanes[f"{index:04d}"] = lane_text(lane, paths)
    return {
        **copy_plain({**state, "lanes": {}}),
        "fingerprint": run_state.fingerprint,
        "spec": encode(run_state.spec),
        "epoch": run_state.epoch,
        "batches": run_state.batches,
        "steps_done": run_state.steps_done,
        "num_lanes": run_state.num_lanes,
        **run_state.changes.texts,
        "lanes": lanes,
    }
