"""W5: what a state after every step costs, against the number of sources and workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import show
from contestants import everyone
from interface import SOURCES, Contestant, Work
from measure import Options, attempt, size_of

NAME, TITLE, KIND, SETS, ROUNDS = "W5", "A state after every step", SOURCES, (), 1
TEXT = (
    "Sources of 4,096 numbers in memory, mixed evenly, batches of 8. Microseconds a batch: without"
    " states (peers set to make none, where they can), with a state asked for after every batch, and"
    " the call alone. midstream sends a state with every batch whether asked or not, so its column"
    " without has them too. The map-style peer has one long list whatever the sources."
)
LEFT_OUT = ("midstream-thread",)
SOURCE_COUNTS = {"full": (1, 10, 100, 400), "quick": (1, 10, 100), "tiny": (1, 10)}
WORKERS = {"full": (0, 2, 4), "quick": (0, 2), "tiny": (0, 2)}


def measure(contestant: Contestant, options: Options) -> dict[str, Any]:
    """Every number of sources with every number of workers."""
    grid = {}
    for workers in WORKERS[options.scale]:
        if workers not in contestant.workers and workers != 4:
            continue
        if workers == 4 and 2 not in contestant.workers:
            continue
        for sources in SOURCE_COUNTS[options.scale]:
            work = Work(
                SOURCES, {}, "flat", workers, 8, start=contestant.starts[0], sources=sources
            )
            grid[f"{workers} workers, {sources} sources"] = attempt(
                lambda work=work: _cost(contestant, work, options)
            )  # type: ignore[misc]
    return {"grid": grid}


def _cost(contestant: Contestant, work: Work, options: Options) -> dict[str, Any]:
    without, _, _ = _per_batch(contestant, replace(work, stateful=False), options, ask=False)
    given, call, sizes = _per_batch(contestant, work, options, ask=True)
    return {"without": without, "with": given, "call": call} | sizes


def _per_batch(
    contestant: Contestant, work: Work, options: Options, *, ask: bool
) -> tuple[float, float, dict[str, Any]]:
    """Microseconds a batch, the median of five stretches; of those, the call's; and the sizes of
    the last state.
    """
    reader = contestant.open(work)
    try:
        iterator = iter(reader)
        done = 0
        for _ in range(20):
            next(iterator)
            done += 1
        clock = time.perf_counter
        per_batch, per_call, state = [], [], None
        for _ in range(5):
            begin, count, calls = clock(), 0, 0.0
            while count < 20 or clock() - begin < options.seconds / 6:
                next(iterator)
                done += 1
                count += 1
                if ask:
                    start = clock()
                    state = reader.state(iterator, done)
                    calls += clock() - start
                if clock() - begin > 2 * options.seconds:
                    break
            per_batch.append((clock() - begin) / count * 1e6)
            per_call.append(calls / count * 1e6)
        del iterator
    finally:
        reader.close()
    return sorted(per_batch)[2], sorted(per_call)[2], size_of(state) if ask else {}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each number of workers."""
    known = everyone()
    results = {row["contestant"]: row["result"]["grid"] for row in rows if "result" in row}
    keys = list(dict.fromkeys(key for grid in results.values() for key in grid))
    counts = sorted({int(key.split(", ")[1].split()[0]) for key in keys})
    parts = []
    for workers in sorted({int(key.split()[0]) for key in keys}):
        heads = [
            f"µs a batch, {workers} workers: without → with (the call), bytes",
            *(f"{n} sources" for n in counts),
        ]
        lines = []
        for name in [name for name in known if name in results]:
            cells = [results[name].get(f"{workers} workers, {n} sources", {}) for n in counts]
            if not any(cells):
                continue
            lines.append([show.bold(known[name].title, known[name].ours), *map(_cell, cells)])
        parts.append(show.table(heads, lines))
    return "\n\n".join(parts)


def _cell(one: dict[str, Any]) -> str:
    if "with" not in one:
        return show.short(one)
    return f"{one['without']:,.0f} → {one['with']:,.0f} ({one['call']:,.0f}), {one['bytes']:,} B"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The cost of a batch with its state against sources."""
    lines = []
    for row in rows:
        grid = row.get("result", {}).get("grid", {})
        for workers in sorted({int(key.split()[0]) for key in grid}):
            points = [
                (int(key.split(", ")[1].split()[0]), one["with"])
                for key, one in grid.items()
                if key.startswith(f"{workers} ") and "with" in one
            ]
            if points:
                lines.append((f"{workers} workers", row["contestant"], points, []))
    title = "W5: a batch of 8 with its state, against the number of sources"
    show.lines(
        lines, everyone(), "sources", "microseconds a batch, state included", title, path, logs=True
    )
