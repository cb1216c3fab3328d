"""Origins of the parts that a sample is split into, and how deep they nest."""

from __future__ import annotations

from midstream.pipeline.node import Node
from midstream.pipeline.rows import PARTS, Origins

_MAX_DEPTH = 3


def require_depth(node: Node) -> None:
    """Refuse a pipeline in which parts nest more than three deep.

    Raises:
        ValueError: If more than three nodes between ``node`` and a source make parts.
    """
    if _depth(node) > _MAX_DEPTH:
        raise ValueError(
            f"at most {_MAX_DEPTH} flat_map, pack or map(batched=True) above each other: the parts"
            " of parts are numbered in 64 bits. Do the work of two in one function"
        )


def _depth(node: Node) -> int:
    """Largest number of nodes that make parts on a path from ``node`` to a source."""
    return node.makes_parts + max((_depth(child) for child in node.inputs().values()), default=0)


def part_origin(origins: Origins, part: int, parts: int) -> Origins:
    """Return the origin of a part of a sample.

    Where parts nest, outer and inner number are one integer: ``outer * PARTS + inner``.

    Args:
        origins: Of the sample.
        part: Number of the part, from 0.
        parts: How many parts the sample has.
    """
    if type(origins) is tuple:
        return (*origins[:3], origins[3] * PARTS + part, 0 if part else origins[4])
    if len(origins) == parts:  # a batch that was split into its samples
        return tuple(origins[part].tolist())
    moved = origins.copy()
    moved[:, 3] = moved[:, 3] * PARTS + part
    if part:
        moved[:, 4] = 0  # tokens are counted with the first part only
    return moved
