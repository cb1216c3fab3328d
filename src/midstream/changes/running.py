"""The pipeline that runs in an epoch: with changed weights, skipped rows and excluded samples."""

from __future__ import annotations

import dataclasses
import functools

from midstream.changes.rewrite import path_of, rewrite, topmost
from midstream.changes.weights import phases_in
from midstream.checkpoint.changes import AdoptedEpoch, Changes, WeightChange
from midstream.errors import CheckpointError, Origin
from midstream.nodes.exclude import Exclude
from midstream.nodes.mix.interleave import Interleave
from midstream.nodes.skip import Skip
from midstream.pipeline.node import Node, bind


def running(pipeline: Node, changes: Changes, epoch: int = -1) -> Node:
    """The pipeline that runs in an epoch.

    Args:
        pipeline: As the user built it.
        changes: Those of the run.
        epoch: The epoch; -1 for one in which no weights changed.

    Raises:
        CheckpointError: If the changes do not fit the pipeline.
    """
    pipeline = _with_changed_weights(pipeline, changes, epoch)
    adopted = changes.adopted
    if adopted is None:
        return _without_excluded(pipeline, changes.excluded)
    try:
        skipping = rewrite(
            pipeline,
            path_of(pipeline, "batch"),
            lambda batch: _without_delivered(batch, adopted),
        )
        return _without_excluded(skipping, changes.excluded)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"this state is damaged: its rest {changes.texts['rest']!r:.80} does not fit the"
            f" pipeline ({error})"
        ) from None


def _with_changed_weights(pipeline: Node, changes: Changes, epoch: int) -> Node:
    """The pipeline with the weights of an epoch.

    In a stream each lane changes its weights itself (`midstream.nodes.mix.weight_changes`).
    """
    if not changes.weights or not pipeline.random_access:
        return pipeline
    try:
        for path in dict.fromkeys(change.mix for change in changes.weights):
            reweigh = functools.partial(_reweighed, changes=changes.of_mix(path), epoch=epoch)
            pipeline = rewrite(pipeline, path, reweigh)
        return pipeline
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"this state is damaged: its edits {changes.texts['edits']!r:.80} do not fit the"
            f" pipeline ({error})"
        ) from None


def _reweighed(mix: Interleave, changes: list[WeightChange], epoch: int) -> Node:
    """A mix with the phases that its changes give it in an epoch."""
    phases, changed = phases_in(mix.phases, [name for name, _ in mix.datasets], changes, epoch)
    if not changed:
        return mix
    return dataclasses.replace(mix, weights=phases[0][1], later=tuple(phases[1:]), edited=True)


def _without_delivered(batch: Node, adopted: AdoptedEpoch) -> Node:
    """A batch node that skips the rows delivered before the epoch was adopted."""
    source = batch.inputs()[""]
    if adopted.offsets:
        source = rewrite(
            source,
            path_of(source, "interleave"),
            lambda mix: mix.with_inputs(
                {
                    name: Skip(data, adopted.offsets[name]) if adopted.offsets[name] else data
                    for name, data in mix.inputs().items()
                }
            ),
        )
    return batch.with_inputs({"": Skip(source, adopted.skip)})


def _without_excluded(pipeline: Node, excluded: tuple[Origin, ...]) -> Node:
    """The pipeline with `Exclude` right below its batches, or at the root where it has none."""
    if not excluded:
        return pipeline
    origins = tuple((origin.source, origin.epoch, origin.row, origin.part) for origin in excluded)
    batches = topmost(bind(pipeline), "batch")
    for path in batches:
        pipeline = rewrite(
            pipeline, path, lambda batch: batch.with_inputs({"": Exclude(batch.source, origins)})
        )
    return pipeline if batches else Exclude(pipeline, origins)
