"""A pipeline as a tree in HTML, for notebooks."""

from __future__ import annotations

from html import escape

from midstream.common.tables import MONO, NOTE
from midstream.pipeline import describe
from midstream.pipeline.node import BoundNode, Node, bind

_INDENT = "padding-left:1.1em"
_LINE = "border-left:1px solid rgba(128,128,128,.4);margin-left:.3em"


def tree_html(node: Node) -> str:
    """Returns a pipeline as a foldable tree: each node with its arguments, length and access."""
    return f"<div class='midstream' style='{MONO}'>{_branch(bind(node))}</div>"


def _branch(bound: BoundNode) -> str:
    node = bound.node
    title = escape(node.summary())
    if bound.source >= 0:
        title = f"<b>{escape(bound.names[bound.source])}</b>: {title}"
    line = f"{title} <span style='{NOTE}'>{escape(describe.access(node))}</span>"
    if not bound.inputs:
        return f"<div style='{_INDENT}'>{line}</div>"
    children = "".join(
        (f"<div style='{_INDENT};{NOTE}'>{escape(key)}</div>" if key else "") + _branch(child)
        for key, child in bound.inputs.items()
    )
    return (
        f"<details open style='{_INDENT}'><summary>{line}</summary>"
        f"<div style='{_LINE}'>{children}</div></details>"
    )
