"""Measures the cost of midstream itself: per sample, per state, per batch and per resume, as ratios
within one run.

    python benchmarks/overhead.py [--quick] [--json FILE]

Data is made here: one column of variable-length int32 lists (mean 200) in a memory-mapped Arrow
file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

import midstream as ms
from midstream.dataset import Dataset
from midstream.pipeline.cursor import iterate
from midstream.pipeline.node import bind
from midstream.sources.arrow_table import TableReader

warnings.filterwarnings("ignore", message=".*set_vital.*|.*worker processes in total.*")


def make(folder: Path, rows: int) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 300, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = rng.integers(0, 50_000, int(offsets[-1]), dtype=np.int32)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})
    data = datasets.Dataset(pa_table_of(table))
    data.save_to_disk(str(folder / f"rows-{rows}"))
    return datasets.load_from_disk(str(folder / f"rows-{rows}"))


def pa_table_of(table: pa.Table) -> Any:
    return datasets.table.InMemoryTable(table)


def per_sample(make_iterable: Callable[[], Iterable[Any]], count: int, rounds: int = 3) -> float:
    """Microseconds for one sample: the best of some rounds, after a warm-up."""
    best = float("inf")
    for _ in range(rounds):
        iterator = iter(make_iterable())
        for _ in itertools.islice(iterator, 200):
            pass
        start = time.perf_counter()
        done = sum(1 for _ in itertools.islice(iterator, count))
        best = min(best, (time.perf_counter() - start) / done * 1e6)
    return best


def raw_views(data: datasets.Dataset) -> Iterator[Any]:
    """The limit: zero-copy numpy views, nothing else."""
    column = TableReader(data.data.table)._columns[0]
    for chunk in range(len(column.chunks)):
        flat, ends, _ = column.opened[chunk] or column._read(chunk)
        for row in range(len(column.chunks[chunk])):
            yield flat[ends[row] : ends[row + 1]]


def identity(sample: Any) -> Any:
    return sample


def yes(sample: Any) -> bool:
    return True


def one(sample: Any) -> list[Any]:
    return [sample]


def nodes(data: datasets.Dataset, count: int) -> dict[str, float]:
    source = ms.from_dataset(data)

    def three(wrap: Callable[[Dataset, int], Dataset]) -> Dataset:
        parts = {name: wrap(ms.from_dataset(data), seed) for seed, name in enumerate("abc")}
        return ms.interleave(parts, {"a": 7, "b": 2, "c": 1})

    hub = {name: data.to_iterable_dataset() for name in "abc"}
    pipelines: dict[str, Callable[[], Iterable[Any]]] = {
        "raw views (the limit)": lambda: raw_views(data),
        "source": lambda: source,
        "shuffle": lambda: source.shuffle(1),
        "map": lambda: source.map(identity),
        "repeat": lambda: source.repeat(),
        "take": lambda: source.take(10**6),
        "concatenate": lambda: ms.concatenate([source, ms.from_dataset(data, name="again")]),
        "batch of 32 (list)": lambda: source.batch(32, collate_fn=list),
        "filter": lambda: source.filter(yes),
        "flat_map": lambda: source.flat_map(one),
        "buffered shuffle (1000)": lambda: source.shuffle(1, buffer_size=1000),
        "3 sources: interleave → map": lambda: three(lambda ds, seed: ds).map(identity),
        "3 sources: shuffle → interleave → map": lambda: three(
            lambda ds, seed: ds.shuffle(seed)
        ).map(identity),
        "3 sources: filter → interleave (stream) → map": lambda: three(
            lambda ds, seed: ds.filter(yes)
        ).map(identity),
    }
    costs = {name: per_sample(one_of, count) for name, one_of in pipelines.items()}
    costs["batch of 32 (list)"] /= 32
    few = max(2000, count // 20)
    mixed = datasets.interleave_datasets(
        list(hub.values()), probabilities=[0.7, 0.2, 0.1], seed=0
    ).with_format("numpy")
    costs["datasets: interleave_datasets of 3, numpy"] = per_sample(lambda: mixed, few, 1)
    costs["datasets: map-style, numpy, one by one"] = per_sample(
        lambda: data.with_format("numpy"), few, 1
    )
    return costs


def mixture(count: int, stream: bool) -> Dataset:
    data = list(range(4096))
    parts: dict[str, Dataset] = {}
    for number in range(count):
        part = ms.from_dataset(data).shuffle(number)
        parts[f"s{number:03d}"] = part.filter(yes) if stream else part
    return ms.interleave(parts) if count > 1 else next(iter(parts.values()))


def states() -> list[dict[str, Any]]:
    """Cost and size of ``state_dict()``."""
    rows = []
    for stream, sources, lanes in itertools.product((False, True), (1, 100, 400), (1, 64)):
        ds = mixture(sources, stream).repeat()
        loader = ms.DataLoader(ds, batch_size=8, lanes=lanes)
        for _ in itertools.islice(loader, 2 * lanes):
            pass
        start = time.perf_counter()
        for _ in range(20):
            state = loader.state_dict()
        elapsed = (time.perf_counter() - start) / 20
        size = len(json.dumps({**state, "spec": ""}))
        rows.append(
            {
                "access": "stream" if stream else "random access",
                "sources": sources,
                "lanes": lanes,
                "µs": round(elapsed * 1e6, 1),
                "bytes": size,
                "bytes a lane": round(size / lanes),
            }
        )
    return rows


class Bare(torch.utils.data.IterableDataset):
    """The same batches in torch's own loader, without states, origins and order over workers."""

    def __init__(self, ds: Dataset) -> None:
        self.ds = ds

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        from midstream.pipeline.iterator import Lane
        from midstream.pipeline.ledger import Ledger

        place = bind(self.ds.node)
        runs = [
            iterate(place, Lane(lane, 48, 1, Ledger()), 0, 0)
            for lane in range(worker.id, 48, worker.num_workers)
        ]
        while True:
            for run in runs:
                yield next(run)[0]


def whole_state(batches: int) -> list[dict[str, Any]]:
    """What a batch costs more on our loader than on torch's, with 2 workers: state, origins and
    order.
    """
    rows = []
    for stream, (sources, lanes) in itertools.product(
        (False, True), ((1, 4), (1, 256), (100, 48), (400, 48))
    ):
        ds = mixture(sources, stream).repeat().batch(8)
        ours, theirs = [], []
        for _ in range(3):
            loader = ms.DataLoader(ds, num_workers=2, lanes=lanes, prefetch_factor=4)
            ours.append(per_batch(loader, batches, loader.state_dict))
            loader.close()
            bare = torch.utils.data.DataLoader(
                Bare(ds), batch_size=None, num_workers=2, prefetch_factor=4
            )
            theirs.append(per_batch(bare, batches, None))
        rows.append(
            {
                "access": "stream" if stream else "random access",
                "sources": sources,
                "lanes": lanes,
                "ours, µs a batch": round(min(ours)),
                "torch without state, µs a batch": round(min(theirs)),
                "difference": round(min(ours) - min(theirs)),
                "of a 10 ms step": f"{(min(ours) - min(theirs)) / 1e4:.1%}",
            }
        )
    return rows


def per_batch(loader: Any, batches: int, also: Callable[[], Any] | None) -> float:
    iterator = iter(loader)
    for _ in range(50):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    elapsed = (time.perf_counter() - start) / batches * 1e6
    del iterator
    return elapsed


def resumes(rows: int) -> list[dict[str, Any]]:
    """Time from load_state_dict to the first batch."""
    data = range(rows)
    pipelines = {
        "shuffle, map": ms.from_dataset(data).shuffle(1).map(identity),
        "mix of 3, shuffled": ms.interleave(
            {name: ms.from_dataset(range(rows // 3)).shuffle(1) for name in "abc"},
            stopping_strategy="all_exhausted_without_replacement",
        ),
        "filter, buffered shuffle (10,000)": ms.from_dataset(data)
        .shuffle(1)
        .filter(yes)
        .shuffle(2, buffer_size=10_000),
    }
    result = []
    for name, ds in pipelines.items():
        row: dict[str, Any] = {"pipeline": name}
        for workers, percent in itertools.product((0, 2), (1, 50, 99)):
            loader = ms.DataLoader(ds, batch_size=32)
            state = position(loader, ds, rows * percent // 100 // 32)
            best = float("inf")
            for _ in range(3):
                fresh = ms.DataLoader(ds, batch_size=32, num_workers=workers)
                fresh.state_dict()  # description and fingerprint made, as in any process that saves
                start = time.perf_counter()
                fresh.load_state_dict(state)
                next(iter(fresh))
                best = min(best, time.perf_counter() - start)
                fresh.close()
            row[f"{workers} workers, {percent} %"] = f"{best * 1e3:.1f} ms"
        result.append(row)
    return result


def position(loader: ms.DataLoader, ds: Dataset, batches: int) -> Any:
    if ds.random_access:
        state = loader.state_dict()
        state["batches"] = state["steps_done"] = batches
        return state
    for _ in itertools.islice(loader, batches):
        pass
    return loader.state_dict()


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    scale = 10 if options.quick else 1
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        costs = nodes(make(Path(folder), 200_000 // scale), 100_000 // scale)
    limit = costs["raw views (the limit)"]
    sample_rows = [
        {"per sample": name, "µs": round(cost, 2), "over raw views, µs": round(cost - limit, 2)}
        for name, cost in costs.items()
    ]
    print("\n## Per sample\n\n" + table(sample_rows))
    state_rows = states()
    print("\n## state_dict()\n\n" + table(state_rows))
    batch_rows = whole_state(1000 // min(scale, 3))
    print("\n## Per batch, 2 workers\n\n" + table(batch_rows))
    resume_rows = resumes(1_000_000 // scale)
    print("\n## Load to first batch\n\n" + table(resume_rows))
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "samples": sample_rows,
                    "states": state_rows,
                    "batches": batch_rows,
                    "resumes": resume_rows,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
