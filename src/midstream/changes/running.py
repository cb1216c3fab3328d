"""The pipeline that really runs in an epoch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from midstream.changes.excluded import excluded_origins
from midstream.changes.rewrite import path_of, rewrite, topmost
from midstream.changes.weights import edits_of, phases_in
from midstream.checkpoint.weights_history import decode_changes
from midstream.common.plain_state import decode
from midstream.errors import CheckpointError
from midstream.nodes.exclude import Exclude
from midstream.nodes.skip import Skip
from midstream.pipeline.node import Node, bind


def in_epoch(text: str, epoch: int) -> bool:
    """Whether weights were changed in the middle of an epoch."""
    return any(entry["epoch"] == epoch for entry in decode_changes(text))


def apply(pipeline: Node, text: str, epoch: int) -> Node:
    """The pipeline that runs in an epoch.

    Raises:
        CheckpointError: If the edits do not fit the pipeline.
    """
    if not text or not pipeline.random_access:
        return pipeline
    try:
        for path in dict.fromkeys(entry["mix"] for entry in decode_changes(text)):
            pipeline = rewrite(
                pipeline, path, functools.partial(_edited, edits_of(text, path), epoch)
            )
        return pipeline
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"this state is damaged: its edits {text!r:.80} do not fit the pipeline ({error})"
        ) from None


def _edited(entries: list[dict[str, Any]], epoch: int, mix: Any) -> Node:
    """A mix with the phases that its edits give it in an epoch."""
    phases, changed = phases_in(mix.phases, [name for name, _ in mix.datasets], entries, epoch)
    if not changed:
        return mix  # type: ignore[no-any-return]
    return dataclasses.replace(mix, weights=phases[0][1], later=tuple(phases[1:]), edited=True)  # type: ignore[no-any-return]


def running(
    pipeline: Node, rest: str, edits: str = "", epoch: int = -1, excluded: str = ""
) -> Node:
    """The pipeline that makes what is left of an epoch, without the samples that are left out.

    Raises:
        CheckpointError: If ``rest`` or ``edits`` do not fit the pipeline.
    """
    pipeline = apply(pipeline, edits, epoch)
    if not rest:
        return _excluding(pipeline, excluded)
    try:
        left = decode(rest)
        cut = rewrite(
            pipeline,
            path_of(pipeline, "batch"),
            lambda batch: _cut(batch, left["offsets"], left["skip"]),
        )
        return _excluding(cut, excluded)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"this state is damaged: its rest {rest!r:.80} does not fit the pipeline ({error})"
        ) from None


def _excluding(pipeline: Node, excluded: str) -> Node:
    """The pipeline with `Exclude` right below its batches, or at the root where it has none."""
    if not excluded:
        return pipeline
    origins = tuple(
        (name, epoch, row, part) for name, epoch, row, part, _ in excluded_origins(excluded)
    )
    batches = topmost(bind(pipeline), "batch")
    for path in batches:
        pipeline = rewrite(
            pipeline, path, lambda batch: batch.with_inputs({"": Exclude(batch.source, origins)})
        )
    return pipeline if batches else Exclude(pipeline, origins)


def _cut(batch: Node, offsets: dict[str, int], skip: int) -> Node:
    source = batch.inputs()[""]
    if offsets:
        source = rewrite(source, path_of(source, "interleave"), lambda mix: _offset(mix, offsets))
    return batch.with_inputs({"": Skip(source, skip)})


def _offset(mix: Node, offsets: dict[str, int]) -> Node:
    return mix.with_inputs(
        {
            name: Skip(data, offsets[name]) if offsets[name] else data
            for name, data in mix.inputs().items()
        }
    )
