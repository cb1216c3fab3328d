"""M: does memory grow from epoch to epoch?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import show
from contestants import everyone
from interface import SHUFFLED, Contestant, Work
from measure import Options, attempt, memory

NAME, TITLE, KIND, SETS, ROUNDS = "M", "Memory", SHUFFLED, ("epoch",), 1
TEXT = (
    "Memory of the main process and its 2 workers (kept over epochs where the loader can), over 5 epochs of 20,000 documents, flat. "
    "Own memory: anonymous and shared memory in MiB, pages shared by several processes counted once, memory-mapped files left out; "
    "the mean of three looks late in each epoch. Growth: from the second epoch to the fifth."
)
LEFT_OUT = ("limit", "limit-rows", "nodes-views", "midstream-stream")
EPOCHS = 5


def measure(contestant: Contestant, options: Options) -> dict[str, Any]:
    """MiB per epoch."""
    work = Work(
        SHUFFLED, options.folders("epoch"), "flat", 2, start=contestant.starts[0], persistent=True
    )
    return attempt(lambda: _epochs(contestant, work, options.rows("epoch") // 32))


def _epochs(contestant: Contestant, work: Work, batches: int) -> dict[str, Any]:
    looks = {int(batches * part) for part in (0.6, 0.75, 0.9)}
    reader = contestant.open(work)
    own, resident = [], []
    try:
        for _ in range(EPOCHS):
            seen = [memory() for number, _ in enumerate(reader) if number in looks]
            if len(seen) < len(looks):
                raise ValueError(f"an epoch of fewer than {batches} batches")
            own.append(statistics.mean(one["own"] for one in seen))
            resident.append(statistics.mean(one["resident"] for one in seen))
    finally:
        reader.close()
    return {"own": own, "resident": resident}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    known = everyone()
    lines = []
    for row in sorted((row for row in rows), key=lambda row: list(known).index(row["contestant"])):
        one = row.get("result", row)
        title = show.bold(known[row["contestant"]].title, known[row["contestant"]].ours)
        if "own" not in one:
            lines.append([title, show.short(one), *["-"] * (EPOCHS + 1)])
            continue
        growth = one["own"][4] / one["own"][1] - 1
        lines.append(
            [
                title,
                *(f"{value:,.0f}" for value in one["own"]),
                f"{growth:+.1%}",
                f"{one['resident'][4]:,.0f}",
            ]
        )
    heads = [
        "own memory, MiB",
        *(f"epoch {n + 1}" for n in range(EPOCHS)),
        "growth 2 → 5",
        "resident in all, epoch 5",
    ]
    return show.table(heads, lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Own memory over epochs."""
    lines = []
    for row in rows:
        own = row.get("result", {}).get("own")
        if own:
            points = [(number + 1, value / own[1] * 100) for number, value in enumerate(own)]
            lines.append(("2 workers", row["contestant"], points, []))
    title = "M: own memory of main process and workers"
    show.lines(lines, everyone(), "epoch", "per cent of the second epoch", title, path, logs=False)
