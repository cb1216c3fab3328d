"""A pipeline as HTML for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from midstream.pipeline import describe
from midstream.pipeline.node import BoundNode, Node, bind

if TYPE_CHECKING:
    pass
from midstream.common.tables import MONO as _MONO
from midstream.common.tables import NOTE as _NOTE


def tree_html(dataset: Node) -> str:
    """A pipeline as a foldable tree: each node with its arguments, its length and its face."""
    return f"<div class='midstream' style='{_MONO}'>{_node(bind(dataset))}</div>"


def _node(bound: BoundNode) -> str:
    node = bound.node
    title = escape(node.summary())
    if bound.source >= 0:
        title = f"<b>{escape(bound.names[bound.source])}</b>: {title}"
    line = f"{title} <span style='{_NOTE}'>{escape(describe.access(node))}</span>"
    if not bound.inputs:
        return f"<div style='padding-left:1.1em'>{line}</div>"
    children = "".join(
        (f"<div style='padding-left:1.1em;{_NOTE}'>{escape(key)}</div>" if key else "")
        + _node(child)
        for key, child in bound.inputs.items()
    )
    return (
        f"<details open style='padding-left:1.1em'><summary>{line}</summary><div"
        " style='border-left:1px solid"
        f" rgba(128,128,128,.4);margin-left:.3em'>{children}</div></details>"
    )
