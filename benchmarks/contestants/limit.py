"""What the bytes allow: numpy views over memory-mapped Arrow in a plain Python loop, with no loader
at all.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
from interface import (
    IMAGES,
    MIX,
    PACK,
    REMOTE,
    SHUFFLED,
    WEIGHTS,
    Contestant,
    Packed,
    Reader,
    Views,
    Work,
    decode_row,
    numpy_batch,
    stack_images,
    tensor_batch,
)


class _Shuffled:
    def __init__(self, work: Work) -> None:
        self.work, self.views = work, Views(work.part())

    def __iter__(self) -> Iterator[Any]:
        size, views = self.work.batch_size, self.views
        order = np.random.default_rng(self.work.seed).permutation(len(views))
        for first in range(0, len(order) - size + 1, size):
            rows = order[first : first + size]
            yield numpy_batch(views.ids[rows].tolist(), views.tokens(rows), self.work.shape)


class _RowByRow:
    """One row at a time, as a tensor: what a hand-written map-style dataset can do at best."""

    def __init__(self, work: Work) -> None:
        self.work, self.views = work, [Views(folder) for folder in work.folders.values()]

    def __iter__(self) -> Iterator[Any]:
        rng = np.random.default_rng(self.work.seed)
        weights = np.array([WEIGHTS.get(part, 1) for part in self.work.folders], dtype=float)
        orders = [iter(rng.permutation(len(views)).tolist()) for views in self.views]
        while True:
            chosen = rng.choice(
                len(orders), size=self.work.batch_size, p=weights / weights.sum()
            ).tolist()
            try:
                rows = [self.views[source][next(orders[source])] for source in chosen]
            except StopIteration:
                return
            yield tensor_batch(
                [row["id"] for row in rows], [row["input_ids"] for row in rows], self.work.shape
            )


class _Mix:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.views = [Views(folder) for folder in work.folders.values()]

    def __iter__(self) -> Iterator[Any]:
        rng = np.random.default_rng(self.work.seed)
        size = self.work.batch_size
        weights = np.array([WEIGHTS[part] for part in self.work.folders]) / sum(WEIGHTS.values())
        orders = [rng.permutation(len(views)) for views in self.views]
        taken = [0] * len(orders)
        while True:
            chosen = rng.choice(len(orders), size=size, p=weights)
            ids: list[int] = []
            arrays: list[Any] = []
            for source, views in enumerate(self.views):
                number = int((chosen == source).sum())
                rows = orders[source][taken[source] : taken[source] + number]
                if len(rows) < number:
                    return
                taken[source] += number
                ids += views.ids[rows].tolist()
                arrays += views.tokens(rows)
            # The batch is filled source by source and put in the order of the draw.
            back = np.argsort(np.argsort(chosen, kind="stable"), kind="stable").tolist()
            yield numpy_batch([ids[i] for i in back], [arrays[i] for i in back], self.work.shape)


class _Images:
    """The user's function in a loop, in so many processes; the processes share the rows and send
    nothing.
    """

    def __init__(self, work: Work) -> None:
        self.work = work

    def __iter__(self) -> Iterator[Any]:
        from interface import Raw

        raw = Raw(self.work.part())
        order = np.random.default_rng(self.work.seed).permutation(len(raw))
        size = self.work.batch_size
        for first in range(0, len(order) - size + 1, size):
            rows = [
                {"id": raw.ids[row], "jpeg": raw[row].tobytes()}
                for row in order[first : first + size].tolist()
            ]
            yield stack_images([decode_row(row) for row in rows])


def _decode_all(work: Work, counter: Any, ready: Any) -> None:
    import torch

    torch.set_num_threads(1)
    ready.wait()
    while True:
        for batch in _Images(work):
            with counter.get_lock():
                counter.value += len(batch["id"])


class _ImagesInProcesses(Reader):
    """As many bare loops as workers; a "batch" is whatever was decoded since the last look."""

    def __init__(self, work: Work) -> None:
        super().__init__(None)
        context = multiprocessing.get_context("fork")
        self.size = work.batch_size
        self.counter, ready = context.Value("l", 0), context.Barrier(work.workers + 1)
        self.processes = [
            context.Process(target=_decode_all, args=(work, self.counter, ready), daemon=True)
            for _ in range(work.workers)
        ]
        for process in self.processes:
            process.start()
        ready.wait()

    def __iter__(self) -> Iterator[Any]:
        import time

        done = 0
        while True:
            while self.counter.value < done + self.size:
                time.sleep(0.001)
            done += self.size
            yield {"id": range(self.size)}

    def close(self) -> None:
        """Stop the processes."""
        for process in self.processes:
            process.terminate()
            process.join()


class _Remote:
    """pyarrow over s3fs: row groups in shuffled order, the rows of each shuffled."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __iter__(self) -> Iterator[Any]:
        import fsspec
        import pyarrow.parquet as pq

        files, _, paths = fsspec.get_fs_token_paths(f"{self.work.url}/*.parquet")
        opened = [pq.ParquetFile(files.open(path), pre_buffer=True) for path in sorted(paths)]
        groups = [(file, group) for file in opened for group in range(file.num_row_groups)]
        rng = np.random.default_rng(self.work.seed)
        for number in rng.permutation(len(groups)).tolist():
            file, group = groups[number]
            table = file.read_row_group(group, columns=["id", "input_ids"]).combine_chunks()
            ids = table.column("id").to_numpy()
            column = table.column("input_ids").chunk(0)
            values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
            order = rng.permutation(len(ids))
            size = self.work.batch_size
            for first in range(0, len(order) - size + 1, size):
                rows = order[first : first + size]
                arrays = [
                    values[s:e] for s, e in zip(offsets[rows].tolist(), offsets[rows + 1].tolist())
                ]
                yield numpy_batch(ids[rows].tolist(), arrays, self.work.shape)


class Limit(Contestant):
    """The bound."""

    name, title, limit = "limit", "limit: views by the block, no loader", True
    kinds = frozenset({SHUFFLED, MIX, PACK, IMAGES, REMOTE})
    workers = (0,)
    settings = (
        "numpy views over memory-mapped Arrow record batches, rows by a numpy permutation, in a plain loop; the mix by "
        "numpy's Generator.choice; packing by the concat-and-split below. Images: the bare function in a loop, or one loop in "
        "each of two processes that send nothing. Remote: pyarrow.parquet over s3fs, row group by row group."
    )

    def open(self, work: Work) -> Reader:
        """The loop."""
        if work.kind == IMAGES:
            return _ImagesInProcesses(work) if work.workers else Reader(_Images(work))
        if work.kind == REMOTE:
            return Reader(_Remote(work))
        loop = _Shuffled(work) if work.kind == SHUFFLED else _Mix(work)
        return Reader(Packed(loop) if work.kind == PACK else loop)


class LimitRows(Contestant):
    """The bound for whoever reads row by row and makes a tensor of each."""

    name, title, limit = "limit-rows", "limit: views row by row, as tensors", True
    kinds = frozenset({SHUFFLED, MIX})
    workers = (0,)
    settings = "The same views, each row looked up by itself and made a tensor on the same memory, in a plain loop."

    def open(self, work: Work) -> Reader:
        """The loop."""
        return Reader(_RowByRow(work))


ALL = [Limit, LimitRows]
