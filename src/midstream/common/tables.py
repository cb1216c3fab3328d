"""Tables of text as HTML, for notebooks."""

from __future__ import annotations

from html import escape

MONO = "font-family:ui-monospace,Menlo,Consolas,monospace;font-size:90%"
NOTE = "opacity:.65;font-size:85%"


def table_html(table: list[list[str]], left: int, last: bool) -> str:
    """An HTML table.

    Args:
        table: Rows of cells; the first row is the header.
        left: Number of first columns that are aligned to the left; the others hold numbers, and
            are aligned to the right.
        last: Whether the last column is aligned to the left too.
    """

    def cells(row: list[str], tag: str) -> str:
        sides = [
            "left" if i < left or (last and i == len(row) - 1) else "right" for i in range(len(row))
        ]
        return "".join(
            f"<{tag} style='text-align:{side}'>{escape(cell)}</{tag}>"
            for side, cell in zip(sides, row)
        )

    header, *rows = table
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        "<table"
        f" style='{MONO}'><thead><tr>{cells(header, 'th')}</tr></thead><tbody>{body}</tbody></table>"
    )
