"""What is left of an epoch that began with another batch size, or with another mix, and goes on with this one.

A state says so in "rest", empty in every other epoch, else JSON:

    {"offsets": {"web": 700, ...},   rows of each input of the mix that were delivered; none where the mix is as it was
     "skip": 96}                     then, rows of what the batches are made of that were delivered

Random access: until the epoch ends, the pipeline that runs is the one that was given, with `Skip`
at these two places; batches count from 0 again. Streams need none of it: each lane's state says
where it stands. It only keeps how rows were dealt to lanes when the epoch began ("dealt").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from midstream.changes.weights import phases_in, with_loaded_weights
from midstream.checkpoint.changes import AdoptedEpoch, WeightChange
from midstream.checkpoint.differences import diff_specs
from midstream.checkpoint.read import RunState
from midstream.checkpoint.spec import source_names
from midstream.checkpoint.weights_history import weights_of
from midstream.common.plain_state import State, decode
from midstream.common.randomness import fold, salt
from midstream.errors import CheckpointError, bullet_list
from midstream.metrics.tracked import Tracked, decode_tracked, encode_tracked, join_tracked
from midstream.nodes.mix.interleave import Interleave, Picks
from midstream.pipeline import describe
from midstream.pipeline.node import BoundNode, Node, bind

_ONE_TO_ONE = ("map", "track")


def adopt(run_state: RunState, pipeline: Node, *, strict: bool) -> list[str]:
    """Let a state of a pipeline that differs go on with this one, where that can be done exactly.

    Another batch size can always be; other weights, new and removed inputs of a mix when asked for
    (``strict=False``). Changes ``run_state`` in place.

    Returns:
        What differs, a line each.

    Raises:
        CheckpointError: If it cannot be done, with the differences and the reason.
    """
    here = describe.spec(pipeline)
    lines = diff_specs(run_state.spec, here)
    old, new, above = run_state.spec, here, []
    while _kind(old) == _kind(new) in _ONE_TO_ONE and _alike(old, new):
        old, new = old["inputs"][""], new["inputs"][""]
    if _kind(old) != "batch" or _kind(new) != "batch" or not _alike(old, new, "batch_size"):
        raise _refusal(
            lines,
            "only the batch size and, with strict=False, a mix's weights and inputs may change",
        )
    size = old["batch_size"]
    old, new = old["inputs"][""], new["inputs"][""]
    other_mix = old != new
    if other_mix:
        if not strict and _kind(old) in _ONE_TO_ONE:
            above.append(_kind(old))
        while _kind(old) == _kind(new) in _ONE_TO_ONE and _alike(old, new):
            old, new = old["inputs"][""], new["inputs"][""]
        same = _kind(old) == _kind(new) == "interleave" and _alike(old, new, "weights", "schedule")
        kept = set(old.get("inputs", {})) & set(new.get("inputs", {}))
        if not same or any(old["inputs"][name] != new["inputs"][name] for name in kept):
            raise _refusal(
                lines,
                "only weights, new and removed inputs of a mix right below the batch can be"
                " honoured",
            )
        if strict:
            raise _refusal(
                lines,
                "load_state_dict(state, strict=False) goes on with these weights and inputs from"
                " here on",
            )
    given = 0
    if pipeline.random_access:
        given = _adopt_random(run_state, pipeline, old if other_mix else None, size, lines)
    else:
        _adopt_stream(
            run_state, pipeline, (old, new) if other_mix else None, size, bool(above), lines
        )
    if other_mix:
        _rename(run_state, source_names(run_state.spec), source_names(here))
        run_state.changes = with_loaded_weights(
            run_state, _find(bind(pipeline)).path, weights_of(old), weights_of(new), given
        )
    run_state.spec, run_state.fingerprint = here, describe.fingerprint(pipeline)
    return lines


def _adopt_random(
    run_state: RunState, pipeline: Node, old: State, size: int, lines: list[str]
) -> int:
    """Returns how many rows the mix has given in this epoch."""
    if run_state.done_early:
        raise _refusal(
            lines, "a rank is ahead because it lost whole batches; finish the epoch as it is"
        )
    before = run_state.changes.adopted or AdoptedEpoch({}, 0)
    offsets, skip = before.offsets, before.skip + run_state.batches * size
    given = 0
    if old is not None:
        bound = _find(bind(pipeline))
        mix: Any = bound.node
        if mix.stopping_strategy == "all_exhausted":
            raise _refusal(
                lines,
                "with all_exhausted, sources start over, and a mix of passes cannot be counted"
                " anew",
            )
        changes = run_state.changes.of_mix(bound.path)
        counts = _counts(old, mix, offsets, skip, lines, changes, run_state.epoch)
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
            lane.pop("told", None)
    return given


def _find(bound: BoundNode) -> BoundNode:
    while not isinstance(bound.node, Interleave):
        bound = bound.input
    return bound


def _counts(
    old: State,
    mix: Interleave,
    offsets: Mapping[str, int],
    rows: int,
    lines: list[str],
    changes: list[WeightChange],
    epoch: int,
) -> dict[str, int]:
    """Rows of each input among the first rows of the mix as it was."""
    names = list(old["weights"])
    seed = fold(old["seed"], salt("/".join([mix.label, *sorted(names)])))
    steps = [[0, old["weights"]], *old.get("schedule", [])]
    planned = [
        (border, tuple((name, weights[name]) for name in names)) for border, weights in steps
    ]
    phases, _ = phases_in(planned, names, changes, epoch)
    counts = dict.fromkeys(names, 0)
    for number, (border, weights) in enumerate(phases):
        end = phases[number + 1][0] if number + 1 < len(phases) else rows
        if border < rows:
            picks = Picks(dict(weights), fold(seed, number) if number else seed)
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
    above: bool,
    lines: list[str],
) -> None:
    """``mixes``: the specs of the mix as it was and as it is, where it is another one."""
    was, mix_spec = mixes or ({}, {})
    new = _find(bind(pipeline)).inputs if mixes is not None else {}
    if mixes is not None and above:
        raise _refusal(lines, "in a stream, only a mix right below the batch can change")
    for index, lane in run_state.lanes.items():
        if lane is None:
            lane = run_state.lanes[index] = {"samples": [], "rows": [], "events": {}}
        run = lane.setdefault(
            "lane",
            {"epoch": run_state.epoch, "rounds": 0, "done": False, "state": None, "marks": {}},
        )
        if run["done"]:
            continue
        if run_state.batches or run_state.steps_done:
            run.setdefault("dealt", size)
        if mixes is None or run["state"] is None:
            continue
        try:
            number, since, mix = run["state"]
            if since:
                raise _refusal(
                    lines, "a batch is half read; save the state after a batch, not after an error"
                )
            saved = dict(zip(sorted(was["inputs"]), mix["inputs"], strict=True))
            kept = [
                saved[name][:3] if name in saved else None for name in sorted(mix_spec["inputs"])
            ]
            # What an input of that name had counted when it was removed is not what begins now.
            begin = {
                bound.path
                for name, child in new.items()
                if name not in saved
                for bound in child.walk()
            }
            run["marks"] = {
                key: mark
                for key, mark in run["marks"].items()
                if not begin & {key, key.rpartition(" ")[0]}
            }
            changed: dict[str, Any] = {"picks": 0, "ended": False, "inputs": kept}
            if "schedule" in mix_spec:
                if "phase" not in mix and "weights_by" in mix_spec:
                    raise _refusal(
                        lines, "without a schedule it was not counted how much the mix has given"
                    )
                changed["phase"] = [0, 0, mix["phase"][2] if "phase" in mix else mix["picks"]]
                changed["of"] = _find(bind(pipeline)).path
            run["state"] = [number, 0, changed]
            run.pop("edits", None)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"this state is damaged: lane {index} ({error})") from None


def _rename(run_state: RunState, old: list[str], new: list[str]) -> None:
    """Number the counts by the sources as they are now; those of a source that was removed are of
    none.
    """
    bound = {index: new.index(name) if name in new else -1 for index, name in enumerate(old)}
    for lane in run_state.lanes.values():
        if lane is None:
            continue
        events: dict[str, int] = {}
        for key, count in lane["events"].items():
            kind, path, source = key.rsplit("|", 2)
            key = f"{kind}|{path}|{bound.get(int(source), -1)}"
            events[key] = events.get(key, 0) + count
        for kind in [kind for kind in ("samples", "rows", "tokens") if kind in lane]:
            counts = [0] * len(new)
            for index, count in enumerate(lane[kind]):
                if bound.get(index, -1) >= 0:
                    counts[bound[index]] += count
                elif count and kind == "samples":
                    key = f"removed {old[index]}||-1"
                    events[key] = events.get(key, 0) + count
            lane[kind] = counts
        lane["events"] = events
        if "tracked" in lane:
            moved: list[Tracked] = []
            for (path, source), named in decode_tracked(lane["tracked"]).items():
                moved.append({(path, bound.get(source, -1)): named})
            lane["tracked"] = decode(encode_tracked(join_tracked(moved)))


def _kind(spec: State) -> Any:
    return spec.get("node") if isinstance(spec, dict) else None


def _alike(old: Mapping[str, State], new: Mapping[str, State], *but: str) -> bool:
    """Whether two nodes are the same, but for their inputs and some fields."""
    return all(old.get(key) == new.get(key) for key in {*old, *new} - {"inputs", *but})


def _refusal(lines: list[str], reason: str) -> CheckpointError:
    return CheckpointError(
        f"this state was saved by another pipeline (saved → here):{bullet_list(lines)}\nIt cannot"
        f" go on with this one: {reason}. Build the pipeline as it was, or start afresh."
    )
