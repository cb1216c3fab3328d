"""Samples that are left out from now on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from midstream.changes.rewrite import topmost
from midstream.common.plain_state import decode, encode
from midstream.errors import Origin
from midstream.pipeline.node import BoundNode, Node, bind

MOST_ORIGINS = 4096
"""How many a run may leave out: they are in every checkpoint, about 16 bytes each."""


def excluded_origins(text: str) -> list[Origin]:
    """What a state's "excluded" says."""
    known = decode(text) if text else {}
    return [Origin(name, *rest) for name, several in sorted(known.items()) for rest in several]


def with_origins(text: str, origins: Iterable[Any], names: list[str]) -> str:
    """The same with more of them.

    Raises:
        ValueError: If one is of no source, or they become too many.
        TypeError: If one is no origin.
    """
    known = {tuple(origin[:4]) for origin in excluded_origins(text)}
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
        known.add((name, int(epoch), int(row), int(part[0]) if part else 0))
    if len(known) > MOST_ORIGINS:
        raise ValueError(
            f"exclude: that would be {len(known):,} samples left out, and every checkpoint holds"
            f" them: at most {MOST_ORIGINS:,}. Take many samples out with .filter, or pass over"
            " whole batches with loader.skip."
        )
    by_name: dict[str, list[list[int]]] = {}
    for name, *rest in sorted(known):
        by_name.setdefault(name, []).append(rest)  # type: ignore[arg-type]
    return encode(by_name) if by_name else ""


def require_excludable(pipeline: Node) -> None:
    """Refuse to leave samples out below a node that reads again: batches it has read would not be what they were.

    Raises:
        ValueError: If there is such a node above the batches, by its path.
    """
    root = bind(pipeline)
    batches = set(topmost(root, "batch"))

    def refuse(bound: BoundNode) -> None:
        if bound.path in batches or all(each.path not in batches for each in bound.walk()):
            return
        if again := bound.node.replay_bound():
            raise ValueError(
                f"exclude: a resume reads {again} again at {bound.path!r}, above .batch: batches"
                " that it has read already would come shorter, or not at all, and it could not go"
                f" on exactly. Put the {bound.node.kind} below the .batch, or pass over whole"
                " batches with loader.skip."
            )
        for child in bound.inputs.values():
            refuse(child)

    refuse(root)
