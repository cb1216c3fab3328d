"""Origins of the parts that a sample is split into, and how deep they nest."""

from __future__ import annotations

from midstream.pipeline.node import Node
from midstream.pipeline.rows import PARTS, Origins

_DEEPEST = 3


def require_depth(node: Node) -> None:
    """Refuse parts of parts of parts of parts."""
    if _depth(node) > _DEEPEST:
        raise ValueError(
            f"at most {_DEEPEST} flat_map, pack or map(batched=True) above each other: the parts of"
            " parts are numbered in 64 bits. Do the work of two in one function"
        )


def _depth(node: Node) -> int:
    """The most nodes that make parts on a path from here to a source."""
    return (node.kind in ("flat_map", "map_batched", "pack")) + max(
        (_depth(child) for child in node.inputs().values()), default=0
    )


def part_origin(origins: Origins, part: int, parts: int) -> Origins:
    """A flat_map above another one numbers (outer part, inner part) in one integer."""
    if type(origins) is tuple:
        return (*origins[:3], origins[3] * PARTS + part, 0 if part else origins[4])
    if len(origins) == parts:  # a batch taken apart again
        return tuple(origins[part].tolist())
    moved = origins.copy()
    moved[:, 3] = moved[:, 3] * PARTS + part
    if part:
        moved[:, 4] = 0  # tokens are counted once
    return moved
