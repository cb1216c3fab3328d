"""What W1, W2, W3, W7 and W8 share: rates in modes, medians of rounds, bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import show
from contestants import everyone

Row = dict[str, Any]


def medians(
    rows: Sequence[Row], modes: Sequence[str], key: str = "per_second"
) -> dict[str, dict[str, show.Spread]]:
    """Contestant -> mode -> the median of the rounds with its spread; or why there is none."""
    found: dict[str, dict[str, show.Spread]] = {}
    for row in rows:
        found.setdefault(row["contestant"], {})
    for name, cells in found.items():
        mine = [row for row in rows if row["contestant"] == name]
        for mode in modes:
            cells[mode] = show.spread(
                mine, lambda row, mode=mode: row["result"]["modes"].get(mode, {}), key
            )
    return found


def report(
    rows: Sequence[Row], modes: Sequence[str], unit: str, scale: float, wording: str = ""
) -> str:
    """A table, and a sentence for each mode that names the fastest."""
    found = medians(rows, modes)
    known = everyone()
    names = [name for name in known if name in found]
    lines = []
    for name in names:
        cells = [found[name][mode].text(scale) for mode in modes]
        lines.append([show.bold(known[name].title, known[name].ours), *cells])
    table = show.table([unit, *modes], lines)
    return table + "\n\n" + show.sentences(found, modes, known, scale, wording)


def bars(
    rows: Sequence[Row], modes: Sequence[str], unit: str, scale: float, title: str, path: Path
) -> None:
    """One panel a mode, one bar a contestant."""
    found = medians(rows, modes)
    show.bars(found, modes, everyone(), unit, scale, title, path)
