"""Finds a node in the tree of a pipeline, and replaces it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from midstream.pipeline.node import BoundNode, Node, bind


def rewrite(pipeline: Node, path: str, change: Callable[[Any], Node]) -> Node:
    """The pipeline with the node at ``path`` replaced by ``change(node)``.

    All other nodes stay, with new copies of those above it.

    Raises:
        KeyError: If there is no node at this path.
    """

    def rewritten(bound: BoundNode) -> Node:
        if bound.path == path:
            return change(bound.node)
        for name, child in bound.inputs.items():
            if any(each.path == path for each in child.walk()):
                return bound.node.with_inputs({**bound.node.inputs(), name: rewritten(child)})
        raise KeyError(path)

    return rewritten(bind(pipeline))


def path_of(pipeline: Node, kind: str) -> str:
    """The path of the topmost node of a kind. Only one-to-one nodes may be above it.

    Raises:
        ValueError: If another node is above it, or there is none.
    """
    bound = bind(pipeline)
    while bound.node.kind != kind:
        if not bound.node.one_to_one:
            raise ValueError(f"there is a {bound.node.kind} above the {kind}")
        bound = bound.input
    return bound.path


def topmost(bound: BoundNode, kind: str) -> list[str]:
    """The paths of all nodes of a kind that have no other node of this kind above them."""
    if bound.node.kind == kind:
        return [bound.path]
    return [path for child in bound.inputs.values() for path in topmost(child, kind)]
