"""Resumes an epoch that was started with another batch size or another mix.

Random access: until the epoch ends, the pipeline that runs skips the rows that were delivered
(`midstream.checkpoint.changes.AdoptedEpoch`), and its batches are counted from 0 again.

Streams: the state of each lane holds its own position. Only the batch size by which rows were
assigned to lanes when the epoch began is kept ("dealt").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from midstream.changes.weights import phases_in, with_loaded_weights
from midstream.checkpoint.changes import AdoptedEpoch, WeightChange
from midstream.checkpoint.differences import diff_specs
from midstream.checkpoint.read import RunState
from midstream.checkpoint.spec import RAISED, source_names
from midstream.checkpoint.weights_history import weights_of
from midstream.common.plain_state import State, decode
from midstream.errors import CheckpointError, bullet_list
from midstream.metrics.tracked import Tracked, decode_tracked, encode_tracked, merge_tracked
from midstream.nodes.map import Map
from midstream.nodes.mix.interleave import Interleave
from midstream.nodes.mix.picks import Picks, draws_seed
from midstream.nodes.track import Track
from midstream.pipeline import describe
from midstream.pipeline.node import BoundNode, Node, bind

# Kinds of `Node.one_to_one` nodes that a spec can contain; a spec is data and has no nodes to ask.
_ONE_TO_ONE = (Map.kind, Track.kind)


def adopt(run_state: RunState, pipeline: Node, *, strict: bool) -> list[str]:
    """Adapt the state of another pipeline to this one, where it can be resumed exactly.

    The batch size may always differ. Weights of a mix, new inputs and removed inputs may differ
    with ``strict=False``.

    Args:
        run_state: The state; changed in place.
        pipeline: The pipeline that resumes it.
        strict: As in `DataLoader.load_state_dict`.

    Returns:
        How the pipelines differ, a line each.

    Raises:
        CheckpointError: If it cannot be resumed exactly; with the differences and the reason.
    """
    here = describe.spec(pipeline)
    lines = diff_specs(run_state.spec, here)
    old, new = _below_equal_nodes(run_state.spec, here)
    if _kind(old) != "batch" or _kind(new) != "batch" or not _alike(old, new, "batch_size"):
        raise _refusal(
            lines,
            "only the batch size and, with strict=False, a mix's weights and inputs may change",
        )
    size = old["batch_size"]
    old, new = old["inputs"][""], new["inputs"][""]
    mixes = None
    right_below = _kind(old) not in _ONE_TO_ONE
    if old != new:
        old, new = mixes = _below_equal_nodes(old, new)
        _require_mixes(old, new, lines, strict)
    given = 0
    if pipeline.random_access:
        given = _adopt_random(run_state, pipeline, mixes, size, lines)
    elif mixes is not None and not right_below:
        raise _refusal(lines, "in a stream, only a mix right below the batch can change")
    else:
        _adopt_stream(run_state, pipeline, mixes, size, lines)
    if mixes is not None:
        _renumber_sources(run_state, source_names(run_state.spec), source_names(here))
        run_state.changes = with_loaded_weights(
            run_state, _find_mix(bind(pipeline)).path, weights_of(old), weights_of(new), given
        )
    run_state.spec, run_state.fingerprint = here, describe.fingerprint(pipeline)
    return lines


def _below_equal_nodes(old: State, new: State) -> tuple[State, State]:
    """The first nodes of two pipelines that differ, below equal one-to-one nodes."""
    while _kind(old) == _kind(new) in _ONE_TO_ONE and _alike(old, new):
        old, new = old["inputs"][""], new["inputs"][""]
    return old, new


def _require_mixes(old: State, new: State, lines: list[str], strict: bool) -> None:
    """Raise unless two specs are mixes that differ only in weights and inputs, and may do so."""
    same = _kind(old) == _kind(new) == "interleave" and _alike(old, new, "weights", "schedule")
    kept = set(old.get("inputs", {})) & set(new.get("inputs", {}))
    if not same or any(old["inputs"][name] != new["inputs"][name] for name in kept):
        raise _refusal(
            lines,
            "only weights, new and removed inputs of a mix right below the batch can be honoured",
        )
    if strict:
        raise _refusal(
            lines,
            "load_state_dict(state, strict=False) continues with these weights and inputs from"
            " here on",
        )


def _adopt_random(
    run_state: RunState,
    pipeline: Node,
    mixes: tuple[State, State] | None,
    size: int,
    lines: list[str],
) -> int:
    """Record the rows delivered in this epoch, so that the pipeline skips them.

    Args:
        run_state: The state; changed in place.
        pipeline: The pipeline that resumes it.
        mixes: The specs of the mix before and now; None where they are equal.
        size: The batch size before.
        lines: How the pipelines differ.

    Returns:
        How many rows the mix has given in this epoch; 0 without ``mixes``.
    """
    if run_state.done_early:
        raise _refusal(
            lines, "a rank is ahead because it lost whole batches; finish the epoch unchanged"
        )
    before = run_state.changes.adopted or AdoptedEpoch({}, 0)
    offsets, skip = before.offsets, before.skip + run_state.batches * size
    given = 0
    if mixes is not None:
        bound = _find_mix(bind(pipeline))
        mix: Any = bound.node
        if mix.stopping_strategy == "all_exhausted":
            raise _refusal(
                lines,
                "with all_exhausted, sources start over, and the rows that each of them gave cannot"
                " be counted",
            )
        changes = run_state.changes.of_mix(bound.path)
        counts = _rows_of_inputs(mixes[0], mix, offsets, skip, lines, changes, run_state.epoch)
        loads = [
            change.given
            for change in changes
            if change.given is not None and change.epoch == run_state.epoch
        ]
        given = skip + (loads[-1] if loads else 0)
        offsets = {name: counts.get(name, 0) for name, _ in mix.datasets}
        skip = 0
    run_state.changes = replace(run_state.changes, adopted=AdoptedEpoch(offsets, skip))
    run_state.batches, run_state.raised = 0, {}
    for lane in run_state.lanes.values():
        if lane is not None:
            lane.pop(RAISED, None)
    return given


def _find_mix(bound: BoundNode) -> BoundNode:
    """The topmost mix below nodes with one input."""
    while not isinstance(bound.node, Interleave):
        bound = bound.input
    return bound


def _rows_of_inputs(
    old: State,
    mix: Interleave,
    offsets: Mapping[str, int],
    rows: int,
    lines: list[str],
    changes: list[WeightChange],
    epoch: int,
) -> dict[str, int]:
    """How many rows of each input the mix gave in this epoch.

    Args:
        old: The spec of the mix before.
        mix: The mix now.
        offsets: Rows of each input that it skipped.
        rows: How many rows it gave after those.
        lines: How the pipelines differ.
        changes: The changes of its weights.
        epoch: The epoch.
    """
    names = list(old["weights"])
    steps = [[0, old["weights"]], *old.get("schedule", [])]
    planned = [
        (border, tuple((name, weights[name]) for name in names)) for border, weights in steps
    ]
    phases, _ = phases_in(planned, names, changes, epoch)
    counts = dict.fromkeys(names, 0)
    for number, (border, weights) in enumerate(phases):
        end = phases[number + 1][0] if number + 1 < len(phases) else rows
        if border < rows:
            picks = Picks(dict(weights), draws_seed(old["seed"], mix.label, names, number))
            for name, count in zip(names, picks.counts(min(end, rows) - border).tolist()):
                counts[name] += count
    lengths = {name: dataset.length() for name, dataset in mix.datasets}
    for name in names:
        counts[name] += offsets.get(name, 0)
        length = lengths.get(name)
        if mix.stopping_strategy != "first_exhausted" and (
            name not in lengths or (length is not None and counts[name] > length)
        ):
            raise _refusal(
                lines,
                f"input {name!r} may have run out in this epoch, and the mix after that cannot be"
                " counted",
            )
    return counts


def _adopt_stream(
    run_state: RunState,
    pipeline: Node,
    mixes: tuple[State, State] | None,
    size: int,
    lines: list[str],
) -> None:
    """Adapt the state of each lane. The arguments are those of `_adopt_random`."""
    bound = _find_mix(bind(pipeline)) if mixes is not None else None
    for index, lane in run_state.lanes.items():
        if lane is None:
            lane = run_state.lanes[index] = {"samples": [], "rows": [], "events": {}}
        position = lane.setdefault(
            "lane",
            {"epoch": run_state.epoch, "rounds": 0, "done": False, "state": None, "marks": {}},
        )
        if position["done"]:
            continue
        if run_state.batches or run_state.steps_done:
            position.setdefault("dealt", size)
        if mixes is None or bound is None or position["state"] is None:
            continue
        try:
            _change_mix(position, bound, mixes, lines)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"this state is damaged: lane {index} ({error})") from None


def _change_mix(
    position: dict[str, Any], bound: BoundNode, mixes: tuple[State, State], lines: list[str]
) -> None:
    """Change a lane's position in the old mix to one in the new mix.

    The mix begins anew with its inputs where they are; new inputs begin at their start.
    """
    old, new = mixes
    number, since, mix = position["state"]
    if since:
        raise _refusal(
            lines, "a batch is half read; save the state after a batch, not after an error"
        )
    saved = dict(zip(sorted(old["inputs"]), mix["inputs"], strict=True))
    inputs = [saved[name][:3] if name in saved else None for name in sorted(new["inputs"])]
    # An input that was removed and is new again has marks of its first time.
    begin = {
        node.path
        for name, child in bound.inputs.items()
        if name not in saved
        for node in child.walk()
    }
    position["marks"] = {
        key: mark
        for key, mark in position["marks"].items()
        if not begin & {key, key.rpartition(" ")[0]}
    }
    changed: dict[str, Any] = {"picks": 0, "ended": False, "inputs": inputs}
    if "schedule" in new:
        if "phase" not in mix and "weights_by" in new:
            raise _refusal(
                lines, "without a schedule it was not counted how much the mix has given"
            )
        changed["phase"] = [0, 0, mix["phase"][2] if "phase" in mix else mix["picks"]]
        changed["of"] = bound.path
    position["state"] = [number, 0, changed]
    position.pop("edits", None)


def _renumber_sources(run_state: RunState, old: list[str], new: list[str]) -> None:
    """Renumber the counts of all lanes from the old sources to the new ones.

    Counts of a removed source become counts of no source (-1).
    """
    numbers = {index: new.index(name) if name in new else -1 for index, name in enumerate(old)}
    for lane in run_state.lanes.values():
        if lane is None:
            continue
        events: Counter[str] = Counter()
        for key, count in lane["events"].items():
            kind, path, source = key.rsplit("|", 2)
            events[f"{kind}|{path}|{numbers.get(int(source), -1)}"] += count
        for kind in [kind for kind in ("samples", "rows", "tokens") if kind in lane]:
            counts = [0] * len(new)
            for index, count in enumerate(lane[kind]):
                if numbers.get(index, -1) >= 0:
                    counts[numbers[index]] += count
                elif count and kind == "samples":
                    events[f"removed {old[index]}||-1"] += count
            lane[kind] = counts
        lane["events"] = dict(events)
        if "tracked" in lane:
            renumbered: list[Tracked] = [
                {(path, numbers.get(source, -1)): totals}
                for (path, source), totals in decode_tracked(lane["tracked"]).items()
            ]
            lane["tracked"] = decode(encode_tracked(merge_tracked(renumbered)))


def _kind(spec: State) -> Any:
    return spec.get("node") if isinstance(spec, dict) else None


def _alike(old: Mapping[str, State], new: Mapping[str, State], *but: str) -> bool:
    """Whether two nodes are equal except for their inputs and some fields."""
    return all(old.get(key) == new.get(key) for key in {*old, *new} - {"inputs", *but})


def _refusal(lines: list[str], reason: str) -> CheckpointError:
    return CheckpointError(
        f"this state was saved by another pipeline (saved → here):{bullet_list(lines)}\nIt cannot"
        f" be resumed with this one: {reason}. Build the pipeline as it was, or start a new run."
    )
