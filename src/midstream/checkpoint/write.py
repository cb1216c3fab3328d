"""Encodes a run's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midstream.checkpoint.read import RunState
from midstream.checkpoint.spec import Paths
from midstream.common.plain_state import State, copy_plain, encode, seal


def leaf_text(lane: Mapping[str, Any], paths: Paths, run: str | None = None) -> str:
    """What `decode_lane` decodes, of a lane with nodes by path.

    Args:
        lane: Its entries.
        paths: Of the pipeline.
        run: Its "lane" with nodes by number, encoded, where that is known already.
    """
    parts = {name: part for name, part in lane.items() if name not in ("crc", "events", "lane")}
    if parts["rows"] == parts["samples"]:
        del parts["rows"]
    if lane["events"]:
        parts["events"] = paths.short_events(lane["events"])
    if "lane" in lane:
        run = encode(encode_run(lane["lane"], paths))
    body = encode(parts)
    return seal(f'{body[:-1]},"lane":{run}}}' if run else body)


def encode_run(run: Mapping[str, Any], paths: Paths) -> dict[str, State]:
    """A lane's "lane" with nodes by number."""
    return {**run, "marks": paths.short_marks(run["marks"], run["epoch"])}


def to_state(run_state: RunState, state: dict[str, State]) -> dict[str, State]:
    """``state`` with everything that ``run_state`` says, after it was changed."""
    position = [run_state.epoch, run_state.batches, run_state.steps_done]
    lanes, paths = dict.fromkeys(state["lanes"], ""), Paths(run_state.spec)
    for index, lane in run_state.lanes.items():
        if lane is not None:
            if "at" in lane:
                lane["at"] = [*position, 0]
            lanes[f"{index:04d}"] = leaf_text(lane, paths)
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
