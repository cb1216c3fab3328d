"""exclude: leaves single samples out of a run, from its next batch on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from midstream.changes.rewrite import topmost
from midstream.checkpoint.changes import Changes
from midstream.errors import Origin
from midstream.pipeline.node import BoundNode, Node, bind

MOST_ORIGINS = 4096
"""The most samples that a run may leave out: each checkpoint holds about 16 bytes for each."""


def with_excluded(changes: Changes, origins: Iterable[Any], names: list[str]) -> Changes:
    """The changes of a run that also leaves out these samples.

    Args:
        changes: Those of the run.
        origins: ``(source, epoch, row)``, ``(source, epoch, row, part)`` or an `Origin`.
        names: Of the sources.

    Raises:
        ValueError: If an origin names no source, a number is negative, or the run would leave out
            more than `MOST_ORIGINS` samples.
        TypeError: If something is no origin.
    """
    excluded = set(changes.excluded)
    for origin in origins:
        if (
            not isinstance(origin, (tuple, list))
            or not 3 <= len(origin) <= 5
            or not all(
                isinstance(item, (int, np.integer)) and not isinstance(item, bool)
                for item in origin[1:]
            )
        ):
            raise TypeError(
                "exclude takes origins as loader.trace() gives them, or (source, epoch, row) or"
                f" (source, epoch, row, part); found {origin!r:.80}"
            )
        name, epoch, row, *part = origin
        if name not in names:
            raise ValueError(
                f"exclude: no source is named {name!r}; there are {', '.join(map(repr, names))}"
            )
        if min(origin[1:]) < 0:
            raise ValueError(f"exclude: epoch, row and part are at least 0; found {origin!r}")
        excluded.add(Origin(name, int(epoch), int(row), int(part[0]) if part else 0))
    if len(excluded) > MOST_ORIGINS:
        raise ValueError(
            f"exclude: that would be {len(excluded):,} samples left out, and every checkpoint holds"
            f" them: at most {MOST_ORIGINS:,}. Remove many samples with .filter, or skip whole"
            " batches with loader.skip."
        )
    return dataclasses.replace(changes, excluded=tuple(sorted(excluded)))


def require_excludable(pipeline: Node) -> None:
    """Raise if a node above the batches reads some of them again on a resume.

    It would read other batches than before: shorter ones, or none where all samples are excluded.

    Raises:
        ValueError: If there is such a node; the message has its path.
    """
    root = bind(pipeline)
    batches = set(topmost(root, "batch"))

    def refuse(bound: BoundNode) -> None:
        if bound.path in batches or all(each.path not in batches for each in bound.walk()):
            return
        if again := bound.node.replay_bound():
            raise ValueError(
                f"exclude: a resume reads {again} again at {bound.path!r}, above .batch. Batches"
                " that it has read already would be shorter or missing, and the resume would not"
                f" be exact. Put the {bound.node.kind} below the .batch, or skip whole batches with"
                " loader.skip."
            )
        for child in bound.inputs.values():
            refuse(child)

    refuse(root)
