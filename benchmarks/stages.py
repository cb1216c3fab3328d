"""Measures each stage of W1 and W2: microseconds a sample that it adds, and the raw limits.

    python benchmarks/stages.py [--quick] [--json FILE] [--cache FOLDER]

Each stage is read by itself, in the chunks that the loader would read, with all below it; what it
adds is the difference:

    source        zero-copy rows of the Arrow file, in random order
    shuffle       the order by formula, and the rows of it
    interleave    the choice, and putting the rows of three sources in their places (W2)
    batch         batches of 32: `ragged` (list), `flat` or `pad` (padded)
    reader        chunk sizes, origins
    loader        position, counts, and the state with every batch

The limits are those of W1 and W2, of the same rows. Microseconds of processor time, the median of
rounds in turn. The data is that of `run.py`, made first where it is missing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import own
import prepare
import show
import torch
from contestants import everyone
from interface import WEIGHTS, Work

import midstream as ms
from midstream.checkpoint.spec import Paths
from midstream.dataset import Dataset
from midstream.distributed.topology import Topology
from midstream.pipeline.node import bind
from midstream.pipeline.rows import LazyBatches
from midstream.workers.messages import Plan
from midstream.workers.readers import Runner

BATCH, CHUNK = 32, 512
WORKS = {"W1": ("shuffled", "tokens"), "W2": ("mix", "mix")}
SHAPES: dict[str, Any] = {"list": ms.ragged, "flat": ms.flat, "padded": ms.pad}
STAGES = ("source", "shuffle", "interleave", "batch", "reader", "loader")


def in_chunks(
    dataset: Dataset, samples: int, each: int = 1, order: Any = None
) -> Callable[[], float]:
    """Microseconds a sample of rows read a chunk at a time, where a row is ``each`` samples."""
    place, chunk = bind(dataset.node), CHUNK // each
    key, first = np.zeros(1, dtype=np.uint64), np.zeros(1, dtype=np.int64)

    def measure() -> float:
        start = time.process_time()
        for at in range(0, samples // each - chunk + 1, chunk):
            rows = np.arange(at, at + chunk) if order is None else order[at : at + chunk]
            found = place.lazy_rows(rows, key, first)
            for number in range(len(found) if isinstance(found, LazyBatches) else 0):
                found.item(number, None)
        done = samples // each // chunk * chunk * each
        return (time.process_time() - start) / done * 1e6

    return measure


def batches(make: Callable[[], Iterable[Any]], samples: int) -> Callable[[], float]:
    """Microseconds a sample of batches taken one by one."""

    def measure() -> float:
        iterator, warm = iter(make()), samples // BATCH // 10
        for _ in islice(iterator, warm):
            pass
        start = time.process_time()
        done = sum(BATCH for _ in islice(iterator, samples // BATCH - warm))
        return (time.process_time() - start) / done * 1e6

    return measure


def stages(work: Work, samples: int) -> dict[str, Callable[[], float]]:
    """Stage -> how it is measured, with all below it."""
    sources: dict[str, Dataset] = {}
    for part, folder in work.folders.items():
        import datasets

        sources[part] = ms.from_dataset(datasets.load_from_disk(f"{folder}/arrow"))
    largest = next(iter(sources))
    rows = len(sources[largest])
    order = np.random.default_rng(0).permutation(rows)
    shuffled = {part: source.shuffle(work.seed) for part, source in sources.items()}
    found = {
        "source": in_chunks(sources[largest], min(samples, rows), order=order),
        "shuffle": in_chunks(shuffled[largest], min(samples, rows)),
    }
    top = shuffled[largest]
    if len(shuffled) > 1:
        top = ms.interleave(shuffled, weights=WEIGHTS, seed=work.seed)
        found["interleave"] = in_chunks(top, samples)
    batched = top.batch(BATCH, collate_fn=SHAPES[work.shape])
    paths, plan, topology = Paths(batched.spec()), Plan(0, None, {}, {}), Topology(0, 1, 0)
    found["batch"] = in_chunks(batched, samples, BATCH)
    found["reader"] = batches(
        lambda: Runner(batched.node, paths, topology, 48, 0, plan, None), samples
    )
    found["loader"] = batches(lambda: ms.DataLoader(batched), samples)
    for name in ("limit", "limit-rows"):
        found[name] = batches(lambda name=name: everyone()[name].open(work), samples)  # type: ignore[misc]
    return found


def folders_of(cache: Path, scale: str, data: str) -> dict[str, str]:
    """Part -> folder of a set of data, made where it is missing."""
    folders = {}
    for number, (part, count) in enumerate(prepare.parts_of(data, scale).items()):
        folder = prepare.folder_of(cache, scale, data, part)
        if not (folder / "raw" / "values.npy").exists():
            prepare.make_raw(folder, data, number, count)
        if not (folder / "arrow").exists():
            prepare.write("arrow", folder)
        folders[part] = str(folder)
    return folders


def measure(arguments: argparse.Namespace) -> own.Rows:
    """Every stage of both, in the three shapes of a batch."""
    torch.set_num_threads(1)
    scale = "quick" if arguments.quick else "full"
    rows = []
    for name, (kind, data) in WORKS.items():
        folders = folders_of(arguments.cache, scale, data)
        samples = int(sum(prepare.parts_of(data, scale).values()) * 0.6) // CHUNK * CHUNK
        for shape in SHAPES:
            found = own.in_turn(
                stages(Work(kind, folders, shape), samples), 3 if arguments.quick else 7
            )
            rows.append({"question": name, "shape": shape, "with all below it": found})
    return rows


def report(rows: own.Rows) -> str:
    """What each stage adds, one column for each kind of batch."""
    columns = []
    for row in rows:
        found = row["with all below it"]
        known = [stage for stage in STAGES if stage in found]
        added = {stage: found[stage] - found[before] for before, stage in zip(known, known[1:])}
        added[known[0]] = found[known[0]]
        total, limit, by_row = found["loader"], found["limit"], found["limit-rows"]
        columns.append(
            [f"{added[stage]:.2f}" if stage in added else "-" for stage in STAGES]
            + [
                f"**{total:.2f}**",
                f"{limit:.2f}",
                f"{by_row:.2f}",
                f"{limit / total:.2f}",
                f"{by_row / total:.2f}",
            ]
        )
    names = [
        *STAGES,
        "**all**",
        "limit, by the block",
        "limit, row by row",
        "speed to the one",
        "to the other",
    ]
    heads = ["µs a sample", *(f"{row['question']} {row['shape']}" for row in rows)]
    return show.table(heads, [[name, *cells] for name, *cells in zip(names, *columns)])


if __name__ == "__main__":
    own.main(
        "stages", __doc__, measure, report, kept="where run.py keeps its data; default %(default)s"
    )
