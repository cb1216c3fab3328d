"""Measures the gain from reading row groups ahead: time to read parquet and work on it, with and
without the thread.

    python benchmarks/ahead.py [--quick] [--json FILE]

Data is made here: one column of variable-length int32 lists (mean 300) in zstd row groups. It is
read from the local disk and through s3fs from an S3 endpoint on the loopback (moto, a Python
program on the same cores), in order and shuffled with the default window. The consumer sleeps after
each batch, like a training loop that waits for its accelerator. In all it sleeps as long as reading
takes alone, because there overlap gains most (half of the time). Figures are the best of some
rounds, in turns. There are no workers: the loader reads in the training process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import own
import pyarrow as pa
import pyarrow.parquet as pq
import show
from endpoint import Endpoint

import midstream as ms
from midstream.sources import read_ahead as ahead

BATCH, FILES = 256, 4


def make(folder: Path, groups: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(FILES):
        lengths = rng.integers(100, 500, groups // FILES * rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = rng.zipf(1.3, int(offsets[-1])).clip(0, 50_000).astype(np.int32)
        table = pa.table(
            {"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))}
        )
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=rows, compression="zstd")


def seconds(url: str, shuffled: bool, on: bool, step: float) -> tuple[float, int, float]:
    """Seconds for all batches, how many there are, and the longest wait for one after the first."""
    ahead.SLOW_READ_S = 0.02 if on else float("inf")
    ds = ms.read_parquet(f"{url}/*.parquet")
    ds = ds.shuffle(1) if shuffled else ds
    loader = ms.DataLoader(ds, batch_size=BATCH, collate_fn=ms.flat)
    len(loader)  # reads the footers, which are not measured
    batches, longest = 0, 0.0
    start = time.perf_counter()
    asked = start
    for _ in loader:
        if batches:
            longest = max(longest, time.perf_counter() - asked)
        batches += 1
        time.sleep(step)
        asked = time.perf_counter()
    return time.perf_counter() - start, batches, longest


def ask(url: str, shuffled: bool, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    alone, batches, _ = min(seconds(url, shuffled, False, 0.0) for _ in range(2))
    found: dict[bool, list[tuple[float, int, float]]] = {False: [], True: []}
    for _ in range(rounds):
        for on in found:
            found[on].append(seconds(url, shuffled, on, alone / batches))
    return {
        "where": "S3 endpoint" if url.startswith("s3:") else "local disk",
        "order": "shuffled" if shuffled else "in order",
        "alone": alone,
        **{("with" if on else "without"): min(each[0] for each in found[on]) for on in found},
        **{
            f"longest wait {'with' if on else 'without'}": min(each[2] for each in found[on])
            for on in found
        },
    }


def measure(arguments: argparse.Namespace) -> own.Rows:
    """Seconds by place and order."""
    groups, rounds = (16, 1) if arguments.quick else (64, 3)
    with tempfile.TemporaryDirectory() as name, Endpoint() as endpoint:
        os.environ.update(endpoint.environment())
        make(Path(name), groups, 4000)
        places = [name, endpoint.upload(Path(name), "ahead")]
        return [ask(place, shuffled, rounds) for place in places for shuffled in (False, True)]


def report(rows: own.Rows) -> str:
    """The table."""
    heads = [
        "",
        "reading alone, s",
        "one after the other, s",
        "reading ahead, s",
        "times as fast",
        "longest wait, ms",
        "ahead, ms",
    ]
    lines = [
        [
            f"{row['where']}, {row['order']}",
            *(show.number(row[name]) for name in ("alone", "without", "with")),
            show.number(row["without"] / row["with"]),
            *(show.number(1e3 * row[f"longest wait {name}"]) for name in ("without", "with")),
        ]
        for row in rows
    ]
    return show.table(heads, lines)


if __name__ == "__main__":
    own.main("ahead", __doc__, measure, report)
