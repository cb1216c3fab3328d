"""W7: parquet at an S3 endpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import show
from contestants import everyone
from interface import REMOTE, Contestant, Work, rows_of
from measure import Options, Truth, attempt

from questions import throughput

NAME, TITLE, KIND, SETS, ROUNDS = "W7", "Remote parquet", REMOTE, ("remote",), 2
TEXT = (
    "Documents as in W1 in four parquet files (row groups of 2,000) at an S3 endpoint on the loopback (moto, a Python program on "
    "the same cores), four fifths of them read shuffled through s3fs, flat batches of 32. Thousand documents a second, opening and "
    "start of the workers (spawned) included; below, the time to the first batch. Mosaic reads the same rows as MDS."
)
MODES = {"0 workers": 0, "2 workers": 2}
LEFT_OUT = ("midstream-stream",)
UNIT, SCALE = "thousand documents a second", 1e3


def measure(contestant: Contestant, options: Options) -> dict[str, Any]:
    """The rate in each mode."""
    truth = Truth(options.folders("remote"))
    most = int(options.rows("remote") * 0.8)
    modes = {}
    for mode, workers in MODES.items():
        if workers in contestant.workers:
            # s3fs has a thread of its own, which does not survive a fork.
            work = Work(
                REMOTE,
                {},
                "flat",
                workers,
                start="spawn" if "spawn" in contestant.starts else "fork",
                url=options.url,
            )
            modes[mode] = attempt(lambda work=work: _whole(contestant, work, most, truth))  # type: ignore[misc]
    return {"modes": modes}


def _whole(contestant: Contestant, work: Work, most: int, truth: Truth) -> dict[str, Any]:
    """From nothing opened to so many rows."""
    begin = time.perf_counter()
    reader = contestant.open(work)
    try:
        rows, first = 0, 0.0
        iterator = iter(reader)
        while rows < most:
            batch = next(iterator)
            first = first or time.perf_counter() - begin
            if rows < 320:
                truth.check(batch)
            rows += rows_of(batch)
        took = time.perf_counter() - begin
        del iterator
    finally:
        reader.close()
    return {"per_second": rows / took, "rows": rows, "first_batch": first}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and the time to the first batch."""
    first = throughput.medians(rows, tuple(MODES), "first_batch")
    known = everyone()
    lines = [
        [
            show.bold(known[name].title, known[name].ours),
            *(first[name][mode].text(1) for mode in MODES),
        ]
        for name in known
        if name in first
    ]
    return (
        throughput.report(rows, tuple(MODES), UNIT, SCALE)
        + "\n\n"
        + show.table(["seconds to the first batch", *MODES], lines)
    )


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars."""
    throughput.bars(
        rows, tuple(MODES), UNIT, SCALE, "W7: parquet at an S3 endpoint on the loopback", path
    )
