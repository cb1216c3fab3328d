"""Rows of an Arrow table by number, read without pyarrow's ``take``, whose cost grows with the
number of chunks.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from midstream.pipeline.columns import Column, Columns
from midstream.pipeline.rows import I64


class TableReader:
    """Reads rows of an Arrow table by number.

    Args:
        table: Any ``pyarrow.Table``. Its chunks are neither copied nor combined.
    """

    def __init__(self, table: pa.Table) -> None:
        self.names: list[str] = table.column_names
        self.num_rows: int = table.num_rows
        self._columns = [_Column(table.column(index)) for index in range(table.num_columns)]

    def rows(self, rows: I64) -> list[dict[str, Any]]:
        """The rows with these numbers (int64, shape [k]), in this order, as dicts."""
        return self.columns(rows).samples()

    def row(self, number: int) -> dict[str, Any]:
        """The row with this number, as a dict."""
        return self.rows(np.array([number], dtype=np.int64))[0]

    def columns(self, rows: I64) -> Columns:
        """The rows with these numbers (int64, shape [k]), in this order, column by column."""
        return Columns(self.names, [column.take(rows) for column in self._columns], len(rows))


class _Column:
    """One column, as chunks that are opened when they are first read.

    Attributes:
        chunks: Those with at least one row.
        starts: int64, shape [chunks + 1]: the number of each chunk's first row, then the number of
            rows.
        opened: For each chunk, the result of its function in `_OPENERS`; None until it is read.
        kind: "number", "list", "string" or "other".
        dtype: Of the values of a "list" column.
        spans: The column's memory as one array (numbers), or as two (values and offsets of lists);
            None until first needed.
        no_spans: Spans do not work for this column: its kind has none, some rows are null, or its
            chunks are not in one stretch of memory.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.starts = np.concatenate(
            [[0], np.cumsum([len(chunk) for chunk in self.chunks])]
        ).astype(np.int64)
        self.type = column.type
        self.opened: list[Any] = [None] * len(self.chunks)
        self.kind = _kind(column.type)
        self.dtype = (
            np.dtype(column.type.value_type.to_pandas_dtype()) if self.kind == "list" else None
        )
        self.spans: list[_Span] | None = None
        self.no_spans = self.kind not in ("list", "number") or pa.types.is_fixed_size_list(
            column.type
        )

    def take(self, rows: I64) -> Column:
        """The values at these rows (int64, shape [k])."""
        if len(self.chunks) == 1:
            chunks, inside = None, rows
        else:
            chunks = np.searchsorted(self.starts, rows, side="right") - 1
            inside = rows - self.starts[chunks]
        if self.kind == "number":
            return self._numbers(chunks, inside)
        if self.kind == "list":
            return self._lists(chunks, inside)
        opened = self.opened
        if chunks is None:
            get = opened[0] or self._read(0)
            return Column([get(row) for row in inside.tolist()])
        return Column(
            [
                (opened[chunk] or self._read(chunk))(row)
                for chunk, row in zip(chunks.tolist(), inside.tolist())
            ]
        )

    def _read(self, chunk: int) -> Any:
        self.opened[chunk] = _OPENERS[self.kind](self.chunks[chunk])
        return self.opened[chunk]

    def _spans(self, chunks: I64) -> list[_Span] | None:
        """Arrays from which numpy alone can pick the rows of these chunks, without a Python loop.

        Returns:
            For numbers one span, of the values; for lists two, of the values and of their offsets.
            None where spans do not work.
        """
        if self.no_spans:
            return None
        spans = self.spans  # a local name, for another thread may set self.spans to None meanwhile
        if spans is None:
            first, last = self._arrays(0), self._arrays(len(self.chunks) - 1)
            if first is None or last is None:
                self.no_spans = True
                return None
            spans = self.spans = [_Span(a, b, self.chunks) for a, b in zip(first, last)]
        unknown = np.flatnonzero(spans[-1].starts[chunks] < 0)
        for chunk in set(chunks[unknown].tolist()) if len(unknown) else ():
            arrays = self._arrays(chunk)
            if arrays is None or not all(
                span.add(chunk, array) for span, array in zip(spans, arrays)
            ):
                self.no_spans, self.spans = True, None
                return None
        return spans

    def _arrays(self, chunk: int) -> list[npt.NDArray[Any]] | None:
        """The arrays behind one chunk, ordered as in `_spans`; None if some rows are null."""
        opened = self.opened[chunk] or self._read(chunk)
        if opened[-1] is not None:
            return None
        return [np.asarray(each) for each in opened[:-1]]

    def _lists(self, chunks: I64 | None, inside: I64) -> Column:
        """Lists as views into the chunks' values.

        Every token pipeline spends its time in these loops, so they call no functions.
        """
        opened = self.opened
        if chunks is not None and (spans := self._spans(chunks)) is not None:
            values, ends = spans
            flat, shifts, index = values.array, values.starts[chunks], ends.starts[chunks] + inside
            starts, stops = ends.array[index] + shifts, ends.array[index + 1] + shifts
            return Column(
                [flat[a:b] for a, b in zip(starts.tolist(), stops.tolist())],
                flat.dtype,
                None,
                stops - starts,
            )
        if chunks is None:
            flat, ends, get = opened[0] or self._read(0)
            if get is not None:
                return Column([get(row) for row in inside.tolist()])
            return Column([flat[ends[row] : ends[row + 1]] for row in inside.tolist()], flat.dtype)
        rows: list[Any] = []
        has_nulls = False
        for chunk, row in zip(chunks.tolist(), inside.tolist()):
            flat, ends, get = opened[chunk] or self._read(chunk)
            if get is None:
                rows.append(flat[ends[row] : ends[row + 1]])
            else:
                has_nulls = True
                rows.append(get(row))
        return Column(rows, None if has_nulls else self.dtype)

    def _numbers(self, chunks: I64 | None, inside: I64) -> Column:
        """Numbers as one array; if some are null, as a list of Python numbers and None."""
        opened = self.opened
        if chunks is None:
            values, valid = opened[0] or self._read(0)
            if valid is None:
                return Column(None, None, values[inside])
            return Column(
                [
                    value if is_valid else None
                    for value, is_valid in zip(values[inside].tolist(), valid[inside].tolist())
                ]
            )
        if (spans := self._spans(chunks)) is not None:
            return Column(None, None, spans[0].array[spans[0].starts[chunks] + inside])
        distinct = np.unique(chunks).tolist()
        found = [opened[chunk] or self._read(chunk) for chunk in distinct]
        if any(valid is not None for _, valid in found):
            result: list[Any] = []
            for chunk, row in zip(chunks.tolist(), inside.tolist()):
                values, valid = opened[chunk]
                result.append(values[row].item() if valid is None or valid[row] else None)
            return Column(result)
        dtype = found[0][0].dtype if found else np.dtype(np.int64)
        if 8 * len(distinct) > len(inside):
            # Few rows of each chunk: one numpy call per chunk would cost more than a loop.
            get_of = {chunk: values.item for chunk, (values, _) in zip(distinct, found)}
            picked = [get_of[chunk](row) for chunk, row in zip(chunks.tolist(), inside.tolist())]
            return Column(None, None, np.array(picked, dtype=dtype))
        array = np.empty(len(inside), dtype=dtype)
        for chunk in distinct:
            here = np.flatnonzero(chunks == chunk)
            array[here] = opened[chunk][0][inside[here]]
        return Column(None, None, array)


class _Span:
    """One array over the memory from a column's first chunk to its last.

    In a memory-mapped file the chunks of a column lie in one stretch of memory. Read only the parts
    that `add` has located: the memory between two chunks need not exist.

    Attributes:
        array: Of the chunks' dtype. It and every view of it keep the chunks alive.
        starts: int64, shape [chunks]: index in the array at which each chunk begins; -1 until `add`
            was called for it.
    """

    __slots__ = ("array", "start", "starts")

    def __init__(
        self, first: npt.NDArray[Any], last: npt.NDArray[Any], chunks: list[pa.Array]
    ) -> None:
        self.start = _address(first)
        count = max(0, _address(last) + last.nbytes - self.start) // first.itemsize
        memory: Any = (ctypes.c_byte * (count * first.itemsize)).from_address(self.start)
        memory.held = chunks
        self.array = np.frombuffer(memory, first.dtype) if count else first[:0]
        self.array.flags.writeable = False
        self.starts = np.full(len(chunks), -1, dtype=np.int64)

    def add(self, chunk: int, array: npt.NDArray[Any]) -> bool:
        """Locate a chunk in the array.

        Returns:
            False if the chunk is not within this stretch of memory.
        """
        offset = _address(array) - self.start
        if array.nbytes and (
            offset < 0 or offset + array.nbytes > self.array.nbytes or offset % array.itemsize
        ):
            return False
        self.starts[chunk] = offset // array.itemsize if array.nbytes else 0
        return True


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _kind(type_: pa.DataType) -> str:
    types = pa.types
    if types.is_integer(type_) or types.is_floating(type_) or types.is_boolean(type_):
        return "number"
    if types.is_string(type_) or types.is_large_string(type_):
        return "string"
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        inner = type_.value_type
        if types.is_integer(inner) or types.is_floating(inner):
            return "list"
    return "other"


def _open_numbers(chunk: pa.Array) -> tuple[Any, Any]:
    """The values, and, if some are null, a mask of those that are not."""
    if chunk.null_count:
        valid = chunk.is_valid().to_numpy(zero_copy_only=False)
        return (
            chunk.fill_null(False if pa.types.is_boolean(chunk.type) else 0).to_numpy(
                zero_copy_only=False
            ),
            valid,
        )
    return chunk.to_numpy(zero_copy_only=False), None


def _open_strings(chunk: pa.Array) -> Callable[[int], str | None]:
    buffers = chunk.buffers()
    dtype = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
    offsets: Any = np.frombuffer(buffers[1], dtype=dtype)[
        chunk.offset : chunk.offset + len(chunk) + 1
    ]
    ends = memoryview(offsets)
    data = memoryview(buffers[2] if buffers[2] is not None else b"")
    if not chunk.null_count:
        return lambda row: str(data[ends[row] : ends[row + 1]], "utf-8")
    valid = chunk.is_valid().to_numpy(zero_copy_only=False)
    return lambda row: str(data[ends[row] : ends[row + 1]], "utf-8") if valid[row] else None


def _open_lists(chunk: pa.Array) -> tuple[Any, memoryview, Callable[[int], Any] | None]:
    """All values of a chunk of lists.

    Returns:
        The values; the offsets, so that row i is ``values[offsets[i]:offsets[i + 1]]``; and, if
        some rows or values are null, a function that returns a row instead.
    """
    values = chunk.values
    # Read from the buffer: zero-copy, in the stored dtype, also where some values are null (their
    # bytes mean nothing then).
    dtype = np.dtype(values.type.to_pandas_dtype())
    flat = np.frombuffer(values.buffers()[1] or b"", dtype=dtype)[
        values.offset : values.offset + len(values)
    ]
    flat.flags.writeable = False
    if pa.types.is_fixed_size_list(chunk.type):
        size = chunk.type.list_size
        offsets: Any = np.arange(chunk.offset, chunk.offset + len(chunk) + 1, dtype=np.int64) * size
    else:
        offsets = chunk.offsets.to_numpy()
    ends = memoryview(offsets)
    if not chunk.null_count and not values.null_count:
        return flat, ends, None
    nulls = (
        np.flatnonzero(~values.is_valid().to_numpy(zero_copy_only=False)).tolist()
        if values.null_count
        else []
    )
    valid = chunk.is_valid().to_numpy(zero_copy_only=False) if chunk.null_count else None

    def get(row: int) -> Any:
        if valid is not None and not valid[row]:
            return None
        start, stop = ends[row], ends[row + 1]
        if nulls and bisect.bisect_left(nulls, start) != bisect.bisect_left(nulls, stop):
            return values.slice(start, stop - start).to_pylist()
        return flat[start:stop]

    return flat, ends, get


def _open_others(chunk: pa.Array) -> Callable[[int], Any]:
    return lambda row: chunk[row].as_py()


_OPENERS: dict[str, Callable[[pa.Array], Any]] = {
    "number": _open_numbers,
    "string": _open_strings,
    "list": _open_lists,
    "other": _open_others,
}
