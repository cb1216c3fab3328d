"""Measures packing: tokens a second beside plain Python and numpy, and the padding of mode "fit".

    python benchmarks/pack.py [--quick] [--json FILE]

Data is made here: one column of variable-length int32 lists (mean 300, long-tailed up to 20,000) in
an Arrow table. In one run, taking turns, all over the same zero-copy views:

    copying        the documents joined, a thousand at a time, as int64: no rows
    numpy          the same, cut to rows of 2,048: the limit of a loader that makes no labels and has no state
    Python         the recipe of many training scripts: a list that grows, cut to rows, with a copy as labels
    concat, fit    midstream: rows with labels, positions, document lengths, origins of every piece and a state

Microseconds are of processor time.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import numpy as np
import own
import pyarrow as pa
import show

import midstream as ms
from midstream.sources.arrow_table import TableReader

SEQ_LEN, BATCH, TOGETHER = 2048, 8, 1000
OURS = "midstream: "


def make(documents: int) -> datasets.Dataset:
    """Documents as Arrow stores them."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.2, 1.0, documents), 1, 20_000).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = rng.integers(0, 50_000, int(offsets[-1]), dtype=np.int32)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def views(data: datasets.Dataset) -> Iterator[list[Any]]:
    """The documents, so many together."""
    reader = TableReader(data.data.table)
    for first in range(0, len(data), TOGETHER):
        yield reader.columns(np.arange(first, min(first + TOGETHER, len(data)))).columns[0].values


def copied(data: datasets.Dataset) -> Iterator[Any]:
    """Documents joined, as pieces of a row's length; each block begins a new row."""
    for documents in views(data):
        joined = np.concatenate(documents).astype(np.int64)
        yield from joined[: len(joined) // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN)


def numpy_rows(data: datasets.Dataset) -> Iterator[Any]:
    """Join and cut."""
    rest = np.empty(0, dtype=np.int32)
    for documents in views(data):
        joined = np.concatenate((rest, *documents)).astype(np.int64)
        rows = len(joined) // SEQ_LEN
        yield from joined[: rows * SEQ_LEN].reshape(rows, SEQ_LEN)
        rest = joined[rows * SEQ_LEN :]


def python_rows(data: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """A list that grows."""
    held: list[int] = []
    for document in itertools.chain.from_iterable(views(data)):
        held.extend(document.tolist())
        while len(held) >= SEQ_LEN:
            row, held = np.array(held[:SEQ_LEN], dtype=np.int64), held[SEQ_LEN:]
            yield {"input_ids": row, "labels": row.copy()}


def speed(rows: Callable[[], Iterable[Any]], count: int, each: int = 1) -> float:
    """Million tokens a second."""
    iterator = iter(rows())
    for _ in itertools.islice(iterator, count // each // 10):
        pass
    start = time.process_time()
    done = sum(each for _ in itertools.islice(iterator, count // each))
    return done * SEQ_LEN / (time.process_time() - start) / 1e6


def fill(rows: Iterable[dict[str, Any]]) -> float:
    """The share of rows that are tokens."""
    found = [int(row["seq_lens"].sum()) for row in rows]
    return sum(found) / (len(found) * SEQ_LEN)


def measure(arguments: argparse.Namespace) -> own.Rows:
    """Speeds, and padding by window."""
    data = make(10_000 if arguments.quick else 60_000)
    count, rounds = (1_000, 3) if arguments.quick else (6_000, 7)
    ds = ms.from_dataset(data)
    ways: dict[str, tuple[Callable[[], Iterable[Any]], int]] = {
        "copying the tokens": (lambda: copied(data), 1),
        "numpy, ids alone": (lambda: numpy_rows(data), 1),
        "Python lists, ids and labels": (lambda: python_rows(data), 1),
        OURS + "concat": (lambda: ds.pack(SEQ_LEN), 1),
        OURS + "concat, separator": (lambda: ds.pack(SEQ_LEN, separator=0), 1),
        OURS + "fit": (lambda: ds.pack(SEQ_LEN, mode="fit"), 1),
        OURS + "concat, in batches of 8 from the loader": (
            lambda: ms.DataLoader(ds.pack(SEQ_LEN), BATCH),
            BATCH,
        ),
        OURS + "fit, in batches of 8 from the loader": (
            lambda: ms.DataLoader(ds.pack(SEQ_LEN, mode="fit"), BATCH),
            BATCH,
        ),
    }
    work = {
        name: lambda way=way, each=each: speed(way, count, each)
        for name, (way, each) in ways.items()
    }
    speeds = own.in_turn(work, rounds)  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = [
        {"way": name, "million tokens a second": value} for name, value in speeds.items()
    ]
    for window, min_fill in itertools.product((64, 256, 1024), (0.0, 0.95)):
        packed = ds.take(10_000).pack(SEQ_LEN, mode="fit", window=window, min_fill=min_fill)
        rows.append({"window": window, "min_fill": min_fill, "padding": 1 - fill(packed)})
    return rows


def report(rows: own.Rows) -> str:
    """Two tables."""
    speeds = {row["way"]: row["million tokens a second"] for row in rows if "way" in row}
    copying, limit, plain = list(speeds.values())[:3]
    lines = [
        [
            show.bold(name, name.startswith(OURS)),
            show.number(value),
            *(show.number(value / other) for other in (copying, limit, plain)),
        ]
        for name, value in speeds.items()
    ]
    heads = ["rows of 2,048", "million tokens a second", "of copying", "of numpy", "of Python"]
    wasted = [
        [f"{row['window']:,}", f"{row['min_fill']:.2f}", f"{row['padding']:.2%}"]
        for row in rows
        if "window" in row
    ]
    return (
        show.table(heads, lines)
        + "\n\n"
        + show.table(["fit: window", "min_fill", "padding"], wasted)
    )


if __name__ == "__main__":
    own.main("pack", __doc__, measure, report)
