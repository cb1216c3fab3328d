"""Trail: the origins of the rows a worker is working on, readable by its parent after its death.

The table is shared memory: int64, shape [workers, 1 + ROWS, 5]. The first row of a worker's part is
``(n, 0, 0, 0, 0)``: the number of rows in progress, 0 between two turns. Their origins follow;
where there are more than `ROWS`, only the smallest and the largest.

It is written before a source is read and before user code is called: once per chunk with random
access, once per sample in a stream (0.1 µs). In a stream a buffer may lie between the row that was
read last and the one that is worked on.
"""

from __future__ import annotations

import functools
import struct
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["ROWS", "Trail", "describe_trail", "new_table"]

I64 = npt.NDArray[np.int64]

ROWS = 1024
"""The most origins that are stored one by one."""

_WIDTH = 5  # numbers of an origin

_NAMED = 6  # rows or sources are listed by name up to so many


def new_table(num_workers: int) -> torch.Tensor:
    """A table in shared memory, 40 KB per worker; freed with the last process that holds it."""
    table = torch.zeros(num_workers, 1 + ROWS, _WIDTH, dtype=torch.int64)
    return table.share_memory_()  # type: ignore[no-untyped-call, no-any-return]


class Trail:
    """Writes one worker's part of the table.

    Attributes:
        row: ``row(source, pass, row, part, tokens)`` records that one sample is in progress.
    """

    __slots__ = ("_count", "_last", "_rows", "row")

    def __init__(self, table: I64) -> None:
        self._count = memoryview(table.data).cast("B").cast("q")
        self._rows = table[1:]
        self.row = functools.partial(struct.Struct("q32x5q").pack_into, self._count, 0, 1)
        # A weak reference: keeping a large array alive would make the next one slower to allocate.
        self._last: Callable[[], I64 | None] = lambda: None

    def rows(self, origins: I64) -> None:
        """Record that these samples are in progress: int64, shape [n, 5]."""
        self._count[0] = 0
        number = len(origins)
        if number > ROWS:
            self._rows[0] = _reduce(np.minimum, origins)
            self._rows[1] = _reduce(np.maximum, origins)
        else:
            self._rows[:number] = origins
        self._count[0] = number
        self._last = weakref.ref(origins)

    def passed_on(self, origins: I64) -> None:
        """As `rows`, for samples that a node returned; often they are recorded already."""
        if origins is not self._last() or self._count[0] != len(origins):
            self.rows(origins)

    def clear(self) -> None:
        """Record that nothing is in progress."""
        self._count[0] = 0


def _reduce(function: np.ufunc, origins: I64) -> I64:
    """Reduce over the rows, 64 at a time: numpy is 30 times slower on rows of five numbers."""
    step = 64
    whole = origins[: len(origins) // step * step].reshape(-1, step * _WIDTH)
    reduced = function.reduce(whole).reshape(step, _WIDTH)
    return function.reduce(np.concatenate([reduced, origins[-step:]]))  # type: ignore[no-any-return]


def describe_trail(table: I64, names: Sequence[str]) -> str:
    """One worker's part of the table in words; empty when nothing was in progress.

    >>> table = np.zeros((1 + ROWS, 5), dtype=np.int64)
    >>> Trail(table).rows(np.array([[1, 0, 96, 0, 0], [1, 0, 97, 0, 0], [0, 2, 5, 0, 0]]))
    >>> describe_trail(table, ["code", "web"])
    "row 5 of 'code' (pass 2) or rows 96 to 97 of 'web' (pass 0)"
    """
    number = int(table[0, 0])
    if not number:
        return ""
    if number > ROWS:
        low, high = table[1], table[2]
        sources = " and ".join(repr(name) for name in names[low[0] : high[0] + 1])
        return (
            f"{number:,} rows between {low[2]:,} and {high[2]:,} of {sources}"
            f" ({_passes(low[1], high[1])})"
        )
    origins = table[1 : number + 1]
    parts = []
    for source, pass_ in np.unique(origins[:, :2], axis=0).tolist():
        rows = np.unique(origins[(origins[:, 0] == source) & (origins[:, 1] == pass_), 2]).tolist()
        parts.append(f"{_in_words(rows)} of {names[source]!r} ({_passes(pass_, pass_)})")
    more = f" or {len(parts) - _NAMED} others" if len(parts) > _NAMED else ""
    return " or ".join(parts[:_NAMED]) + more


def _passes(low: int, high: int) -> str:
    return f"pass {low:,}" if low == high else f"passes {low:,} to {high:,}"


def _in_words(rows: list[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]:,}"
    if rows[-1] - rows[0] == len(rows) - 1:
        return f"rows {rows[0]:,} to {rows[-1]:,}"
    if len(rows) <= _NAMED:
        return f"rows {', '.join(format(row, ',') for row in rows)}"
    return f"{len(rows):,} rows between {rows[0]:,} and {rows[-1]:,}"
