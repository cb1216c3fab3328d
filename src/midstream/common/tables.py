"""Rows of text as a table: in a terminal, in a notebook, and through rich.

A table is a list of rows, the first one its header. Columns of words stand on the left, columns of
numbers on the right: the first ``left`` columns are words, and with ``last`` the last one too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Literal

Side = Literal["left", "right"]

MONO = "font-family:ui-monospace,Menlo,Consolas,monospace;font-size:90%"
"""CSS of tables and trees."""

NOTE = "opacity:.65;font-size:85%"
"""CSS of remarks beside them."""


def column_sides(num_columns: int, left: int, last: bool = False) -> list[Side]:
    """Returns for each column whether its cells stand on the left or on the right.

    >>> column_sides(4, left=1, last=True)
    ['left', 'right', 'right', 'left']
    """
    words = [index < left or (last and index == num_columns - 1) for index in range(num_columns)]
    return ["left" if word else "right" for word in words]


def column_widths(table: Sequence[Sequence[str]]) -> list[int]:
    """Returns the length of the longest cell of each column."""
    return [max(map(len, column)) for column in zip(*table)]


def table_lines(
    table: Sequence[Sequence[str]],
    left: int,
    last: bool = False,
    widths: Sequence[int] | None = None,
) -> list[str]:
    """Returns a table as lines of text, two spaces between columns.

    Args:
        table: Rows of equally many cells; the first row is the header.
        left: Number of leading columns that hold words.
        last: Whether the last column holds words too.
        widths: Widths of the columns; by default those of their longest cells.

    >>> table_lines([["source", "rows"], ["web", "1,200"]], left=1)
    ['source   rows', 'web     1,200']
    """
    widths = column_widths(table) if widths is None else widths
    sides = column_sides(len(widths), left, last)
    return [
        "  ".join(
            cell.ljust(width) if side == "left" else cell.rjust(width)
            for cell, width, side in zip(row, widths, sides)
        ).rstrip()
        for row in table
    ]


def cell_html(
    text: str, side: Side = "left", *, tag: str = "td", style: str = "", columns: int = 0
) -> str:
    """Returns one cell of an HTML table.

    Args:
        text: Its text, which is escaped.
        side: The side on which the text stands.
        tag: ``td``, or ``th`` in a header.
        style: CSS in addition to the alignment.
        columns: Number of columns that the cell covers, as its ``colspan``; 0 for none.
    """
    span = f" colspan='{columns}'" if columns else ""
    css = f"text-align:{side}" + (f";{style}" if style else "")
    return f"<{tag}{span} style='{css}'>{escape(text)}</{tag}>"


def rows_html(header: str, rows: Iterable[str]) -> str:
    """Returns an HTML table.

    Args:
        header: The cells of its header, as `cell_html` makes them.
        rows: The cells of each row below it.
    """
    body = "".join(f"<tr>{cells}</tr>" for cells in rows)
    return f"<table style='{MONO}'><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def table_html(table: Sequence[Sequence[str]], left: int, last: bool = False) -> str:
    """Returns a table as HTML, aligned as `table_lines` aligns it."""
    header, *rows = table
    sides = column_sides(len(header), left, last)

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(cell_html(text, side, tag=tag) for text, side in zip(row, sides))

    return rows_html(cells(header, "th"), (cells(row, "td") for row in rows))


def rich_table(header: Sequence[str], sides: Sequence[Side]) -> Any:
    """Returns an empty `rich.table.Table` in the style of the command line. Needs rich."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column, side in zip(header, sides):
        table.add_column(column, justify=side, overflow="fold")
    return table
