"""What reading row groups ahead gains: the time to read parquet and to work on it, with and without the thread.

    python benchmarks/ahead.py [--quick] [--local] [--json FILE]

Data is made here: one column of variable-length int32 lists (mean 300) in zstd row groups. It is read from the local disk and
through s3fs from an S3 endpoint on the loopback (moto, a Python program on the same cores), in order and shuffled with the
default window. The consumer sleeps after each batch, as who waits for an accelerator does: as long in all as reading takes alone,
which is where overlap can gain most (half). No workers: the loader reads in the training process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from endpoint import Endpoint

import midstream as ms
from midstream.sources import ahead

BATCH, FILES = 64, 4


def make(folder: Path, groups: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(FILES):
        lengths = rng.integers(100, 500, groups // FILES * rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = rng.zipf(1.3, int(offsets[-1])).clip(0, 50_000).astype(np.int32)
        table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=rows, compression="zstd")


def seconds(url: str, shuffled: bool, on: bool, step: float) -> tuple[float, int, float]:
    """Seconds for all batches, how many there are, and the longest wait for one after the first."""
    ahead.WORTH_S = 0.02 if on else float("inf")
    ds = ms.read_parquet(f"{url}/*.parquet")
    ds = ds.shuffle(1) if shuffled else ds
    loader = ms.DataLoader(ds, batch_size=BATCH, collate_fn=ms.flat)
    len(loader)  # the footers are no part of this
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


def ask(place: str, url: str, rounds: int) -> Iterator[dict[str, Any]]:
    for shuffled in (False, True):
        seconds(url, shuffled, False, 0.0)  # warm
        alone, batches, _ = seconds(url, shuffled, False, 0.0)
        found: dict[bool, list[tuple[float, int, float]]] = {False: [], True: []}
        for _ in range(rounds):
            for on in found:
                found[on].append(seconds(url, shuffled, on, alone / batches))
        without, with_ = (statistics.median(each[0] for each in found[on]) for on in (False, True))
        yield {
            "where": place,
            "order": "shuffled" if shuffled else "in order",
            "reading alone, s": round(alone, 2),
            "without, s": round(without, 2),
            "with, s": round(with_, 2),
            "ratio": round(without / with_, 2),
            "longest wait without, ms": round(1e3 * statistics.median(each[2] for each in found[False])),
            "with, ms": round(1e3 * statistics.median(each[2] for each in found[True])),
        }


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less data, one round")
    parser.add_argument("--rounds", type=int, help="times each is read; the median counts")
    parser.add_argument("--local", action="store_true", help="no endpoint (which needs the extra: midstream[bench])")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    groups, rounds = (32, 1) if arguments.quick else (64, 3)
    rounds = arguments.rounds or rounds
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        make(folder, groups, 4000)
        rows += ask("local disk", name, rounds)
        if not arguments.local:
            endpoint = stack.enter_context(Endpoint())
            os.environ.update(endpoint.environment())
            rows += ask("S3 endpoint", endpoint.upload(folder, "ahead"), rounds)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
