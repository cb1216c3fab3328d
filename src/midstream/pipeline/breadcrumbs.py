"""What a worker has in hand, written where its parent can still read it when the worker is dead.

The table is shared memory: int64, shape [workers, 1 + ROWS, 5]. The first row of a worker's part is
``(n, 0, 0, 0, 0)``: how many rows it has in hand, 0 between two turns. Their origins follow; where
they are more than `ROWS`, the smallest and the largest do.

Written before a source is read and before user code is called: once a chunk on the random-access
face, once a sample on the stream face (0.1 µs), because there a buffer may lie between what was
read last and what is worked on.
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
"""The most origins that are kept one by one."""

_WIDTH = 5  # of an origin

_NAMED = 6


def new_table(num_workers: int) -> torch.Tensor:
    """A table for so many workers: 32 KB each, freed with the last process that holds it."""
    table = torch.zeros(num_workers, 1 + ROWS, _WIDTH, dtype=torch.int64)
    return table.share_memory_()  # type: ignore[no-untyped-call, no-any-return]


class Trail:
    """One worker's part of the table, for writing.

    Attributes:
        row: ``row(source, pass, row, part, tokens)``: one sample is in hand.
    """

    __slots__ = ("_count", "_last", "_rows", "row")

    def __init__(self, table: I64) -> None:
        self._count = memoryview(table.data).cast("B").cast("q")
        self._rows = table[1:]
        self.row = functools.partial(struct.Struct("q32x5q").pack_into, self._count, 0, 1)
        self._last: Callable[[], I64 | None] = lambda: (
            None
        )  # weak: a large array kept makes the next one dear

    def rows(self, origins: I64) -> None:
        """These samples are in hand: int64, shape [n, 5]."""
        self._count[0] = 0
        number = len(origins)
        if number > ROWS:
            self._rows[0], self._rows[1] = (
                _reduce(np.minimum, origins),
                _reduce(np.maximum, origins),
            )
        else:
            self._rows[:number] = origins
        self._count[0] = number
        self._last = weakref.ref(origins)

    def passed_on(self, origins: I64) -> None:
        """A node returned these samples; most return the very array that is written already."""
        if origins is not self._last() or self._count[0] != len(origins):
            self.rows(origins)

    def clear(self) -> None:
        """Nothing is in hand."""
        self._count[0] = 0


def _reduce(function: np.ufunc, origins: I64) -> I64:
    """Over the rows, in long strides: numpy takes 30 times as long for such short rows."""
    stride = 64
    whole = origins[: len(origins) // stride * stride].reshape(-1, stride * _WIDTH)
    strides = function.reduce(whole).reshape(stride, _WIDTH)
    return function.reduce(np.concatenate([strides, origins[-stride:]]))  # type: ignore[no-any-return]


def describe_trail(table: I64, names: Sequence[str]) -> str:
    """One worker's part of the table in words; "" when nothing was in hand.

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
