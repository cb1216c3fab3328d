"""set_weights: changes the weights of a mix during a run.

Random access: in the epoch of a change, the mix that runs has one more phase in its schedule; in
later epochs it has the new weights from the start. Streams: each lane makes the change at its next
pick (`midstream.nodes.mix.weight_changes.LaneEdits`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from midstream.checkpoint.changes import Changes, WeightChange
from midstream.checkpoint.read import RunState
from midstream.common.plain_state import State
from midstream.nodes.mix.interleave import Interleave
from midstream.nodes.mix.weights import Weights, check_weights, quotas
from midstream.pipeline.node import BoundNode


def phases_in(
    planned: Sequence[tuple[int, Weights]],
    names: Sequence[str],
    changes: Sequence[WeightChange],
    epoch: int,
) -> tuple[list[tuple[int, Weights]], bool]:
    """The phases of a mix in an epoch, and whether they differ from the pipeline's own.

    Args:
        planned: The phases of the pipeline: ``(first position, weights)``.
        names: Of the datasets.
        changes: Those of this mix.
        epoch: The epoch.
    """
    phases, changed = list(planned), False
    for change in changes:
        if change.is_load:
            # The pipeline has had these weights since, and its schedule counts from the load on.
            given = change.given if change.given is not None and change.epoch == epoch else 0
            current = max(index for index, (border, _) in enumerate(planned) if border <= given)
            phases = [(max(0, border - given), weights) for border, weights in planned[current:]]
            changed = given > 0 and len(planned) > 1
            continue
        border = change.at if change.epoch == epoch else 0
        if border is not None:
            weights = check_weights(change.weights, names, "set_weights")
            phases = [*(phase for phase in phases if phase[0] < border), (border, weights)]
            changed = True
    return phases, changed


def with_weights(
    run_state: RunState, bound: BoundNode, mix: str, weights: Mapping[str, float]
) -> Changes:
    """The changes of a run with new weights for a mix from the next batch on.

    Args:
        run_state: Where the run stands.
        bound: Root of the pipeline that runs.
        mix: Name or path of the mix.
        weights: By name of the dataset.

    Raises:
        ValueError: If there is no such mix, the names are not those of its datasets, or no exact
            change is possible; with the reason.
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
                f"set_weights: {mix!r} is read by position below a stream, and each lane is at"
                " another position, so its weights cannot change for all lanes at once. Make it a"
                " stream too: interleave(..., weights_by=lambda sample: 1) counts samples, or give"
                " weights_by the length in tokens."
            )
    else:
        if run_state.done_early or (run_state.raised and not run_state.finished):
            raise ValueError(
                "set_weights: a batch raised an error and is not handed out yet, or this rank lost"
                " whole batches and is ahead of the others. Weights cannot change here without"
                " losing rows. Call it after the next batch, or in the next epoch."
            )
        done = 0 if run_state.finished else run_state.batches
        at = _samples_of_mix(bound, target, done, mix)
        length = node.length()
        if length is not None and at >= length > 0:
            at = None  # the mix has no samples left in this epoch
    return _appended(
        run_state.changes,
        WeightChange(target.path, dict(checked), epoch, step, at, by="set_weights"),
    )


def _samples_of_mix(bound: BoundNode, target: BoundNode, count: int, mix: str) -> int:
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
            f"set_weights: there is a {node.kind} above {mix!r}, so the delivered rows are not"
            " the first rows of the mix. Its weights cannot change without losing or repeating"
            f" rows. Put the {node.kind} below the mix (on its datasets)."
        )
    return _samples_of_mix(child, target, taken, mix)


def with_loaded_weights(
    run_state: RunState, path: str, was: State, now: State, given: int
) -> Changes:
    """The changes of a run that a pipeline with other weights loaded (``strict=False``).

    Args:
        run_state: Where the run stands.
        path: Of the mix.
        was: Its weights before, as `midstream.checkpoint.weights_history.weights_of` gives them.
        now: Its weights from here on.
        given: Rows that the mix has given in this epoch.
    """
    return _appended(
        run_state.changes,
        WeightChange(
            path,
            now,
            run_state.epoch,
            run_state.steps_done,
            at=0,
            by="load_state_dict",
            was=was,
            given=given,
        ),
    )


def _appended(changes: Changes, change: WeightChange) -> Changes:
    return dataclasses.replace(changes, weights=(*changes.weights, change))
