"""Column and Columns: samples stored by column, as a table has them.

A source over a table reads one list per column, not one dict per sample. Nodes that only move
samples (shuffle, interleave, take, ...) pass `Columns` on and never make a dict. `batch` copies a
whole column into its tensor. The first node that reads a sample (map, filter) turns the columns
into dicts.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Block", "Column", "Columns", "rows_of_block", "whole_block"]


class Column:
    """One column: a value per sample.

    Attributes:
        values: The values, as Python objects or array views.
        dtype: Set where every value is a one-dimensional array of this dtype.
        array: Set where every value is a number: all of them, of the stored dtype, shape [k].
    """

    __slots__ = ("_lengths", "_values", "array", "dtype")

    def __init__(
        self,
        values: list[Any] | None,
        dtype: np.dtype[Any] | None = None,
        array: npt.NDArray[Any] | None = None,
        lengths: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._values, self.dtype, self.array, self._lengths = values, dtype, array, lengths

    @property
    def values(self) -> list[Any]:
        """As Python objects or array views. Numbers are converted from ``array`` on first use."""
        if self._values is None:
            assert self.array is not None
            self._values = self.array.tolist()
        return self._values

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Lengths of the values, which are sequences: int64, shape [k]."""
        if self._lengths is None:
            self._lengths = np.fromiter(
                map(len, self.values), dtype=np.int64, count=len(self.values)
            )
        return self._lengths

    def __getitem__(self, part: slice) -> Column:
        """The values of some samples."""
        if self.array is not None:
            return Column(None, None, self.array[part])
        return Column(
            self.values[part],
            self.dtype,
            None,
            None if self._lengths is None else self._lengths[part],
        )

    def own(self) -> Column:
        """A column whose arrays are copies, not views into a table."""
        if self.array is not None:
            return self
        return Column(
            [value.copy() if isinstance(value, np.ndarray) else value for value in self.values],
            self.dtype,
        )


class Columns:
    """Several samples as columns of one length.

    Attributes:
        names: Names of the columns, in the order of a sample's keys.
        columns: One for each name.
        length: Number of samples.
    """

    __slots__ = ("columns", "length", "names")

    def __init__(self, names: list[str], columns: list[Column], length: int) -> None:
        self.names, self.columns, self.length = names, columns, length

    def samples(self) -> list[dict[str, Any]]:
        """The samples as dicts."""
        names, columns = self.names, self.columns
        if len(columns) == 1:
            name = names[0]
            return [{name: value} for value in columns[0].values]
        if not columns:
            return [{} for _ in range(self.length)]
        return [dict(zip(names, values)) for values in zip(*(column.values for column in columns))]

    def __getitem__(self, part: slice) -> Columns:
        """Some of the samples."""
        length = len(range(*part.indices(self.length)))
        return Columns(self.names, [column[part] for column in self.columns], length)

    def own(self) -> Columns:
        """The samples with arrays that are copies, not views into a table."""
        return Columns(self.names, [column.own() for column in self.columns], self.length)

    @staticmethod
    def join(parts: Sequence[Columns], order: npt.NDArray[np.int64]) -> Columns | None:
        """Concatenate several parts, then reorder the samples.

        Args:
            parts: Columns of one or several inputs.
            order: Indices into the concatenated samples, int64, shape [k].

        Returns:
            None where the parts differ in the names of the columns, their order, or their types.
        """
        first = parts[0]
        if any(part.names != first.names for part in parts):
            return None
        columns: list[Column] = []
        for number in range(len(first.names)):
            same = [part.columns[number] for part in parts]
            if len({column.dtype for column in same}) > 1:
                return None
            arrays = [column.array for column in same if column.array is not None]
            if len(arrays) == len(same) and len({array.dtype for array in arrays}) == 1:
                columns.append(Column(None, None, np.concatenate(arrays)[order]))
                continue
            if arrays:
                return None
            values = (
                [value for column in same for value in column.values]
                if len(same) > 1
                else same[0].values
            )
            picked = (
                list(itemgetter(*order.tolist())(values))
                if len(order) > 1
                else [values[i] for i in order.tolist()]
            )
            columns.append(Column(picked, same[0].dtype))
        return Columns(first.names, columns, len(order))


class Block(np.ndarray):
    """A two-dimensional array whose rows a node returns as single samples.

    Attributes:
        refs: Weak references to its rows, in order.
    """

    refs: list[weakref.ref[Any]]


def rows_of_block(
    shape: tuple[int, int], dtype: Any
) -> tuple[npt.NDArray[Any], list[npt.NDArray[Any]]]:
    """An array to be filled, and its rows, from which `whole_block` finds it again."""
    block = Block(shape, dtype)
    whole = block.view(np.ndarray)
    rows = list(whole)
    block.refs = list(map(weakref.ref, rows))
    return whole, rows


def whole_block(rows: Sequence[Any]) -> npt.NDArray[Any] | None:
    """The array whose rows these are, all of them and in order, so that `batch` need not stack;
    else None.
    """
    whole = rows[0].base
    if (
        type(whole) is not np.ndarray
        or type(whole.base) is not Block
        or len(whole.base.refs) != len(rows)
    ):
        return None
    return whole if all(ref() is row for ref, row in zip(whole.base.refs, rows)) else None
