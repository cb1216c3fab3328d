"""Rows and LazyBatches: samples at an array of positions, with their origins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from midstream.pipeline.breadcrumbs import Trail
from midstream.pipeline.columns import Columns
from midstream.pipeline.failures import FailedSample

I64 = npt.NDArray[np.int64]

U64 = npt.NDArray[np.uint64]

Origins = Any
"""Origins of one sample: a tuple (source, pass, row, part, tokens), or an int64 array [m, 5] for a
sample made of several rows.

``tokens`` is 0 unless pack set it. The other four identify the row, and key every random draw.
"""

PARTS = 1 << 20
"""Parts of a part are numbered in one integer: ``part * PARTS + number``."""

Item = tuple[Any, Origins]
"""A sample and its origins, as iterators return them."""

Stash = dict[tuple[int, ...], tuple[int, tuple[Any, ...]]]
"""Tracked metrics of samples that were read, by the first four numbers of a sample's first origin:
the sample's source (-1 for several) and a value for each metric.
"""


class Rows:
    """The samples at an array of positions.

    Attributes:
        origins: int64, shape [m, 5]: source index, pass, row, part, tokens.
        sizes: Origins per sample, int64 of shape [k], or None when every sample has exactly one.
        columns: The samples as columns, where they come from a table and no node has needed them
            as rows. None of them is a `FailedSample` then.
    """

    __slots__ = ("_samples", "columns", "origins", "sizes")

    def __init__(
        self,
        samples: list[Any] | None,
        origins: I64,
        sizes: I64 | None = None,
        columns: Columns | None = None,
    ) -> None:
        self._samples, self.origins, self.sizes, self.columns = samples, origins, sizes, columns

    @property
    def samples(self) -> list[Any]:
        """One per position; a `FailedSample` where user code failed. Columns become dicts on first
        use.
        """
        if self._samples is None:
            assert self.columns is not None
            self._samples = self.columns.samples()
        return self._samples

    def items(self) -> list[Item]:
        """The samples, each with its origins, as iterators return them."""
        if self.sizes is None:
            return list(zip(self.samples, map(tuple, self.origins.tolist())))
        ends = np.cumsum(self.sizes).tolist()
        starts = [0, *ends[:-1]]
        return [(sample, self.origins[a:b]) for sample, a, b in zip(self.samples, starts, ends)]

    @staticmethod
    def scatter(length: int, parts: Sequence[tuple[I64, Rows]]) -> Rows:
        """Put the rows of several inputs in one order.

        Args:
            length: Number of samples in all.
            parts: For each input the indices of its samples in the result (int64, shape [j]), and
                its rows.
        """
        if all(rows.sizes is None for _, rows in parts):
            if len(parts) == 1 and parts[0][0].size == length:
                return parts[0][1]  # the indices of an only part are 0, 1, 2, ...
            origins = np.empty((length, 5), dtype=np.int64)
            for indices, rows in parts:
                origins[indices] = rows.origins
            tables = [rows.columns for _, rows in parts if rows.columns is not None]
            if len(tables) == len(parts) > 0:
                order = np.empty(length, dtype=np.int64)
                order[np.concatenate([indices for indices, _ in parts])] = np.arange(length)
                if (columns := Columns.join(tables, order)) is not None:
                    return Rows(None, origins, None, columns)
            samples: list[Any] = [None] * length
            for indices, rows in parts:
                for index, sample in zip(indices.tolist(), rows.samples):
                    samples[index] = sample
            return Rows(samples, origins)
        samples = [None] * length
        pieces: list[I64] = [np.empty((0, 5), dtype=np.int64)] * length
        for indices, rows in parts:
            for index, (sample, origin) in zip(indices.tolist(), rows.items()):
                samples[index] = sample
                pieces[index] = as_origin_array(origin)
        sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
        return Rows(
            samples, np.concatenate(pieces) if pieces else np.empty((0, 5), dtype=np.int64), sizes
        )


class LazyBatches:
    """Lazily collated batches.

    A chunk of rows is read in one call; each batch is collated when it is taken, so that its memory
    is reused and still in cache.

    Attributes:
        rows: The rows of all batches.
        bounds: Batch i is made of the rows from ``bounds[i]`` to ``bounds[i + 1]``.
        make: ``make(first, last)`` collates these rows; it returns a `FailedSample` where user code
            failed.
    """

    __slots__ = ("bounds", "make", "rows")

    def __init__(self, rows: Rows, bounds: list[int], make: Callable[[int, int], Any]) -> None:
        self.rows, self.bounds, self.make = rows, bounds, make

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def origins(self) -> I64:
        """Origins of all rows, int64, shape [m, 5]."""
        return self.rows.origins

    def item(self, index: int, trail: Trail | None) -> Item:
        """Collate batch ``index``; its origins, or none where collating it failed."""
        first, last = self.bounds[index], self.bounds[index + 1]
        origins = self.origins[first:last]
        if trail is not None:
            trail.rows(origins)
        sample = self.make(first, last)
        if type(sample) is not FailedSample:
            return sample, origins
        sample.errors[0].rows = origins
        return sample, origins[:0]

    def num_bytes(self) -> int:
        """Roughly how large the rows of one batch are, in bytes."""
        rows = self.rows
        one = rows.samples[0] if rows.columns is None else rows.columns[:1].samples()[0]
        return num_bytes(one) * self.bounds[1]


def as_origin_array(origins: Origins) -> I64:
    """Origins of one sample as int64 of shape [m, 5]."""
    if type(origins) is tuple:
        return np.array([origins], dtype=np.int64)
    return origins  # type: ignore[no-any-return]


def join_origins(items: Sequence[Item]) -> I64:
    """Origins of several samples as one int64 array of shape [m, 5]."""
    if all(type(origin) is tuple for _, origin in items):
        return np.array([origin for _, origin in items], dtype=np.int64).reshape(-1, 5)
    return np.concatenate([as_origin_array(origin) for _, origin in items])


def pick(values: npt.NDArray[Any], index: I64) -> npt.NDArray[Any]:
    """``values[index]``; ``values`` itself where it has one value for all positions (shape [1])."""
    return values if values.size == 1 else values[index]


def num_bytes(sample: Any) -> int:
    """Roughly how large a sample is, in bytes."""
    size = getattr(sample, "nbytes", None)
    if size is not None:
        return int(size)
    if isinstance(sample, dict):
        return sum(num_bytes(value) for value in sample.values())
    if isinstance(sample, (str, bytes)):
        return len(sample)
    if isinstance(sample, (list, tuple)):
        return len(sample) * num_bytes(sample[0]) if sample else 8
    return 64
