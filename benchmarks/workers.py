"""Compares threads and processes: batches a second of the four ways to read.

    python benchmarks/workers.py [--quick] [--json FILE]

    here         num_workers=0
    ahead        num_workers=0, prefetch_factor=4: one thread reads ahead
    threads      num_workers=2, worker_type="thread"
    processes    num_workers=2

over four pipelines, in batches of 16: rows of an Arrow table and nothing else (16 times as many a
batch); numpy that lets go of the GIL (a sort of 40,000 numbers a row); Python code that does not (a
loop over 2,000 numbers); waiting (5 ms a row, as for a far disk). Each without a training step, and
with one that waits 10 ms for its accelerator. Wall time, the median of rounds in turn, from after
the first batches on.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import datasets
import numpy as np
import own
import pack
import show
import torch

import midstream as ms

BATCH, STEP_S = 16, 0.010
WAYS: dict[str, dict[str, Any]] = {
    "here": {},
    "ahead": {"prefetch_factor": 4},
    "threads": {"num_workers": 2, "worker_type": "thread", "prefetch_factor": 4},
    "processes": {"num_workers": 2, "multiprocessing_context": "fork", "prefetch_factor": 4},
}


def sort(row: int) -> Any:
    """Outside the GIL."""
    numbers = np.random.default_rng(row).random(40_000, dtype=np.float32)
    numbers.sort()
    return numbers[::1000].copy()


def loop(row: int) -> int:
    """In Python."""
    total = row
    for number in range(2_000):
        total = (total * 31 + number) % 1_000_003
    return total


def wait(row: int) -> int:
    """For something far away."""
    time.sleep(0.005)
    return row


def pipelines() -> dict[str, tuple[ms.Dataset, int, Any]]:
    """Name -> dataset, rows a batch, collate function."""
    datasets.disable_progress_bars()
    numbers = ms.from_dataset(range(1 << 20)).shuffle(1)
    return {
        "reading alone": (
            ms.from_dataset(pack.make(50_000)).shuffle(1).repeat(),
            16 * BATCH,
            ms.flat,
        ),
        "numpy outside the GIL": (numbers.map(sort), BATCH, None),
        "Python code": (numbers.map(loop), BATCH, None),
        "waiting": (numbers.map(wait), BATCH, None),
    }


def rate(
    dataset: ms.Dataset, size: int, collate: Any, way: dict[str, Any], step: float, seconds: float
) -> float:
    """Batches a second."""
    loader = ms.DataLoader(dataset, size, collate_fn=collate, **way)
    iterator = iter(loader)
    for _ in itertools.islice(iterator, 8):
        pass
    done, start = 0, time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        next(iterator)
        done += 1
        if step:
            time.sleep(step)
    loader.close()
    return done / (now - start)


def measure(arguments: argparse.Namespace) -> own.Rows:
    """Every pipeline, every way, with and without a step."""
    torch.set_num_threads(1)
    seconds, rounds = (0.3, 1) if arguments.quick else (1.0, 5)
    rows = []
    for (name, (dataset, size, collate)), step in itertools.product(
        pipelines().items(), (0.0, STEP_S)
    ):
        work = {
            way: lambda how=how: rate(dataset, size, collate, how, step, seconds)  # noqa: B023
            for way, how in WAYS.items()
        }
        rows.append({"pipeline": name, "step": step, "batches a second": own.in_turn(work, rounds)})  # type: ignore[arg-type]
    return rows


def report(rows: own.Rows) -> str:
    """One line for each pipeline and step; what is within a tenth of the fastest is bold."""
    lines = []
    for row in rows:
        found = row["batches a second"]
        best = max(found.values())
        cells = [show.bold(show.number(found[way]), found[way] > 0.9 * best) for way in WAYS]
        lines.append(
            [row["pipeline"], f"{row['step'] * 1e3:.0f} ms" if row["step"] else "none", *cells]
        )
    return show.table(["batches a second", "training step", *WAYS], lines)


if __name__ == "__main__":
    own.main("workers", __doc__, measure, report)
