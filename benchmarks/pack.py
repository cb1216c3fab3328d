"""What packing costs, and what it wastes: tokens per second against numpy, fill of the rows by mode and window.

    python benchmarks/pack.py [--quick] [--json FILE]

Data is made here: one column of variable-length int32 lists (mean 300, long-tailed) in an Arrow table. The limit is plain numpy
over the same zero-copy views, in the same run: documents joined and cut, with no labels, positions, origins or state.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

import midstream as ms
from midstream.sources.arrow import TableReader

SEQ_LEN = 2048


def make(documents: int) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.2, 1.0, documents), 1, 20_000).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = rng.integers(0, 50_000, int(offsets[-1]), dtype=np.int32)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def views(data: datasets.Dataset) -> Iterator[Any]:
    reader = TableReader(data.data.table)
    for first in range(0, len(data), 512):
        for sample in reader.rows(np.arange(first, min(first + 512, len(data)))):
            yield sample["input_ids"]


def numpy_rows(data: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Join and cut, with what everyone has to do."""
    held: list[Any] = []
    filled = 0
    for tokens in views(data):
        while filled + len(tokens) >= SEQ_LEN:
            cut = SEQ_LEN - filled
            row = np.empty(SEQ_LEN, dtype=np.int64)
            np.concatenate([*held, tokens[:cut]], out=row, casting="unsafe")
            yield {"input_ids": row, "labels": row.copy()}
            held, filled, tokens = [], 0, tokens[cut:]
        if len(tokens):
            held.append(tokens)
            filled += len(tokens)


def speed(rows: Callable[[], Iterable[Any]], count: int, rounds: int) -> float:
    """Million tokens per second: the best of some rounds."""
    best = 0.0
    for _ in range(rounds):
        iterator = iter(rows())
        next(iter(iterator))
        start = time.perf_counter()
        done = sum(1 for _ in itertools.islice(iterator, count))
        best = max(best, done * SEQ_LEN / (time.perf_counter() - start) / 1e6)
    return best


def fill(rows: Iterable[dict[str, Any]]) -> float:
    tokens, number = 0, 0
    for row in rows:
        tokens += int(row["seq_lens"].sum())
        number += 1
    return tokens / (number * SEQ_LEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less data, fewer rounds")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    data = make(10_000 if arguments.quick else 60_000)
    count, rounds = (1_000, 2) if arguments.quick else (6_000, 4)
    ds = ms.from_dataset(data)
    results: dict[str, float] = {"numpy Mtokens/s": speed(lambda: numpy_rows(data), count, rounds)}
    pipelines = {
        "concat": ds.pack(SEQ_LEN),
        "concat, separator": ds.pack(SEQ_LEN, separator=0),
        "fit": ds.pack(SEQ_LEN, mode="fit"),
    }
    for name, pipeline in pipelines.items():
        results[f"{name} Mtokens/s"] = speed(lambda pipeline=pipeline: pipeline, count, rounds)  # type: ignore[misc]
        results[f"{name} of numpy"] = results[f"{name} Mtokens/s"] / results["numpy Mtokens/s"]
    for window, min_fill in itertools.product((64, 256, 1024), (0.0, 0.95)):
        rows = ds.take(10_000).pack(SEQ_LEN, mode="fit", window=window, min_fill=min_fill)
        results[f"fit window {window} min_fill {min_fill}: padding"] = 1 - fill(rows)
    for name, value in results.items():
        print(f"{name:48} {value:10.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
