"""How pipelines and progress look in a notebook. Imported only when something is shown."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from midstream.core import Dataset, Place, bind

if TYPE_CHECKING:
    from midstream.progress import Progress

_MONO = "font-family:ui-monospace,Menlo,Consolas,monospace;font-size:90%"
_NOTE = "opacity:.65;font-size:85%"


def tree_html(dataset: Dataset) -> str:
    """A pipeline as a foldable tree: each node with its arguments, its length and its face."""
    return f"<div class='midstream' style='{_MONO}'>{_node(bind(dataset))}</div>"


def _node(place: Place) -> str:
    node = place.node
    title = escape(node.summary())
    if place.source >= 0:
        title = f"<b>{escape(place.names[place.source])}</b>: {title}"
    line = f"{title} <span style='{_NOTE}'>{escape(_face(node))}</span>"
    if not place.inputs:
        return f"<div style='padding-left:1.1em'>{line}</div>"
    children = "".join(
        (f"<div style='padding-left:1.1em;{_NOTE}'>{escape(key)}</div>" if key else "") + _node(child)
        for key, child in place.inputs.items()
    )
    return (
        f"<details open style='padding-left:1.1em'><summary>{line}</summary>"
        f"<div style='border-left:1px solid rgba(128,128,128,.4);margin-left:.3em'>{children}</div></details>"
    )


def _face(node: Dataset) -> str:
    if not node.random_access:
        return "stream, endless" if node.infinite else "stream"
    length = node.length()
    return "random access, endless" if length is None else f"random access, {length:,}"


def progress_html(progress: Progress) -> str:
    """A progress table."""
    header, *rows = progress.rows()
    head = "".join(
        f"<th style='text-align:{'left' if i == 0 else 'right'}'>{escape(c)}</th>" for i, c in enumerate(header)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td style='text-align:{'left' if i == 0 else 'right'}'>{escape(c)}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    caption = f"epoch {progress.epoch}, {progress.batches:,} batches in it, {progress.samples:,} samples in all"
    return (
        f"<div><div style='{_NOTE}'>{escape(caption)}</div>"
        f"<table style='{_MONO}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
