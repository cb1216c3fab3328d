"""Weights that were changed while a run was going on: what was changed when, and what follows for an epoch.

A state says so in "edits", empty before the first one, else a JSON list in order, the run's
history:

    {"mix": "mix",                path of the mix
     "weights": {"web": 1, ...},  from here on
     "epoch": 2, "step": 700,     after which step of a rank
     "at": 11200,                 random access: the position of the mix; null when it takes effect with the next epoch
     "by": "set_weights"}         or "load_state_dict", with the weights before it in "was": then the pipeline has these

Random access: in the epoch of an edit the mix that runs has one more phase in its schedule; in
later epochs it has the new weights from the start. Streams: each lane places the edit where it next
picks (`midstream.nodes.mix.picks.LaneEdits`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from midstream.checkpoint.read import RunState
from midstream.checkpoint.weights_history import decode_changes
from midstream.common.plain_state import State, encode
from midstream.nodes.mix.interleave import Interleave
from midstream.nodes.mix.weights import Weights, check_weights, quotas
from midstream.pipeline.node import BoundNode


def phases_in(
    planned: Sequence[tuple[int, Weights]],
    names: Sequence[str],
    entries: list[dict[str, Any]],
    epoch: int,
) -> tuple[list[tuple[int, Weights]], bool]:
    """The phases of a mix in an epoch, and whether they are others than planned.

    Args:
        planned: What the pipeline says.
        names: Of the datasets.
        entries: The edits of this mix.
        epoch: The epoch.
    """
    phases, changed = list(planned), False
    for entry in entries:
        if (
            entry["by"] != "set_weights"
        ):  # the pipeline has had these weights since, and the mix was counted anew
            given = entry["given"] if entry["epoch"] == epoch else 0
            begun = max(index for index, (border, _) in enumerate(planned) if border <= given)
            phases = [(max(0, border - given), weights) for border, weights in planned[begun:]]
            changed = given > 0 and len(planned) > 1
            continue
        border = entry["at"] if entry["epoch"] == epoch else 0
        if border is not None:
            weights = check_weights(entry["weights"], names, "set_weights")
            phases = [*(phase for phase in phases if phase[0] < border), (border, weights)]
            changed = True
    return phases, changed


def edits_of(text: str, path: str) -> list[dict[str, Any]]:
    """The edits of one mix."""
    return [entry for entry in decode_changes(text) if entry["mix"] == path]


def lane_edits(text: str) -> dict[str, list[dict[str, float]]]:
    """What `midstream.nodes.mix.picks.LaneEdits` knows: the weights set for each mix, in order,
    since it was last loaded anew.
    """
    known: dict[str, list[dict[str, float]]] = {}
    for entry in decode_changes(text):
        if entry["by"] == "set_weights":
            known.setdefault(entry["mix"], []).append(entry["weights"])
        else:
            known.pop(entry["mix"], None)
    return known


def add(run_state: RunState, bound: BoundNode, mix: str, weights: Mapping[str, float]) -> str:
    """The edits with one more: from the next batch on.

    Args:
        canonical: Where the run stands.
        place: Of the pipeline that runs.
        mix: Name or path of the mix.
        weights: By name.

    Raises:
        ValueError: If there is no such mix, the names are not its datasets', or it cannot be done
            exactly; with the reason.
        TypeError: If a weight is no number.
    """
    mixes = [each for each in bound.walk() if isinstance(each.node, Interleave)]
    found = [each for each in mixes if mix in (each.path, each.node.label)]
    if len(found) != 1:
        there = ", ".join(repr(each.path) for each in mixes) or "none"
        raise ValueError(
            f"set_weights: {'several mixes are' if found else 'no mix is'} named {mix!r}; there are"
            f" {there}. Name one with interleave(..., name=...), or give its path."
        )
    if not isinstance(weights, Mapping):
        raise TypeError(
            "set_weights takes weights by name, like {'web': 1, 'code': 2}; found"
            f" {type(weights).__name__}"
        )
    target, node = found[0], found[0].node
    assert isinstance(node, Interleave)
    checked = check_weights(weights, [name for name, _ in node.datasets], f"set_weights of {mix!r}")
    quotas(dict(checked))
    epoch, step, at = run_state.epoch + run_state.finished, run_state.steps_done, None
    if run_state.finished:
        step = 0
    if not bound.node.random_access:
        if node.random_access:
            raise ValueError(
                f"set_weights: {mix!r} is read by position under a stream, each lane at another"
                " one, so there is no place at which its weights could change for all. Make it a"
                " stream too: interleave(..., weights_by=lambda sample: 1) counts samples, or give"
                " weights_by the length in tokens."
            )
    else:
        if run_state.ahead or (run_state.told and not run_state.finished):
            raise ValueError(
                "set_weights: a batch raised an error and is not handed out yet, or this rank lost"
                " whole batches and is ahead of the others, so weights cannot change here without"
                " losing rows. Call it after the next batch, or in the next epoch."
            )
        done = 0 if run_state.finished else run_state.batches
        at = _given(bound, target, done, mix)
        length = node.length()
        if length is not None and at >= length > 0:
            at = None  # there is nothing left of it in this epoch
    entry = {
        "mix": target.path,
        "weights": dict(checked),
        "epoch": epoch,
        "step": step,
        "at": at,
        "by": "set_weights",
    }
    return encode([*decode_changes(run_state.edits), entry])


def _given(bound: BoundNode, target: BoundNode, count: int, mix: str) -> int:
    """How many samples of a mix are among the first ``count`` samples of a node above it."""
    node = bound.node
    length = node.length()
    count = count if length is None else min(count, length)
    if bound is target:
        return count
    name, child = next(
        (name, child) for name, child in bound.inputs.items() if target in child.walk()
    )
    taken = node.taken_of(name, count)
    if taken is None:
        raise ValueError(
            f"set_weights: there is a {node.kind} above {mix!r}, so what was delivered is not the"
            " beginning of the mix, and its weights cannot change without losing or repeating"
            f" rows. Put the {node.kind} below the mix (on its datasets)."
        )
    return _given(child, target, taken, mix)


def note_load(run_state: RunState, path: str, was: State, now: State, given: int) -> str:
    """The edits with a load (``strict=False``) that goes on with the weights of another pipeline."""
    entry: dict[str, State] = {
        "mix": path,
        "weights": now,
        "was": was,
        "epoch": run_state.epoch,
        "step": run_state.steps_done,
        "at": 0,
        "given": given,
        "by": "load_state_dict",
    }
    return encode([*decode_changes(run_state.edits), entry])
