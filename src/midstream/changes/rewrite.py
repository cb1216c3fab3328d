"""Replaces one node of a pipeline. Everything below and above it stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from midstream.pipeline.node import Node, Place, bind


def rewrite(pipeline: Node, path: str, change: Callable[[Any], Node]) -> Node:
    """The pipeline with the node at ``path`` replaced by ``change(node)``.

    Raises:
        KeyError: If there is no node at this path.
    """

    def rewritten(place: Place) -> Node:
        if place.path == path:
            return change(place.node)
        for name, child in place.inputs.items():
            if any(each.path == path for each in child.walk()):
                return place.node.with_inputs({**place.node.inputs(), name: rewritten(child)})
        raise KeyError(path)

    return rewritten(bind(pipeline))


def path_of(pipeline: Node, kind: str) -> str:
    """The path of the first node of a kind. Only one-to-one nodes may stand above it.

    Raises:
        ValueError: If another node stands above it, or there is none.
    """
    place = bind(pipeline)
    while place.node.kind != kind:
        if not place.node.one_to_one:
            raise ValueError(f"there is a {place.node.kind} above the {kind}")
        place = place.input
    return place.path


def topmost(place: Place, kind: str) -> list[str]:
    """The paths of all nodes of a kind that have no other of that kind above them."""
    if place.node.kind == kind:
        return [place.path]
    return [path for child in place.inputs.values() for path in topmost(child, kind)]
