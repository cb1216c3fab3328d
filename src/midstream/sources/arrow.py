"""Hugging Face ``datasets.Dataset``: Arrow tables read as zero-copy views.

`TableReader` turns an Arrow table into rows without pyarrow's ``take`` (whose cost grows with the number of chunks) and
without the Hugging Face formatters (50 µs a row); the parquet source reads its row groups with it too.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from midstream._state import State
from midstream.core import I64, U64, Dataset, Place, Rows
from midstream.sources.sequence import ReturnedOthers, require_rows, row_failure, row_origins


@dataclass(frozen=True, eq=False, repr=False)
class ArrowSource(Dataset):
    """Rows of a Hugging Face dataset.

    Plain columns are read from Arrow directly: numeric lists as read-only numpy views of the stored dtype, numbers,
    strings and nested values as Python objects. A dataset with a format of its own (``with_format``, a transform) or with
    features that decode (images, audio) is read through its own ``__getitems__``.

    State: none but the position.
    Resume: reads nothing again.
    """

    data: Any
    name: str | None = None
    kind = "from_dataset"

    @property
    def infinite(self) -> bool:
        """Never."""
        return False

    def _length(self) -> int | None:
        return len(self.data)

    def spec_fields(self) -> dict[str, State]:
        """Columns and number of rows."""
        return {"data": "datasets.Dataset", "columns": list(self.data.column_names), "length": self.length()}

    def summary(self) -> str:
        """Columns and number of rows."""
        return f"{self.kind}(datasets.Dataset[{', '.join(self.data.column_names)}], {self.length():,} rows)"

    def _open(self) -> Any:
        data = self.data
        if _formats_itself(data):
            return None, None
        # The indices mapping has no public accessor; this is the one place that knows of it.
        mapping = getattr(data, "_indices", None)
        indices = None if mapping is None else mapping.column(0).to_numpy().astype(np.int64, copy=False)
        return TableReader(data.data.table.select(data.column_names)), indices

    def _rows(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(at, passes, positions)
        reader, indices = self._handle()
        if reader is not None:
            rows = positions if indices is None else indices[positions]
            try:
                return Rows(reader.rows(rows), origins)
            except Exception:  # one row at a time tells which one it was (text that is not UTF-8, say)
                samples: list[Any] = []
                for row in rows:
                    try:
                        samples.extend(reader.rows(np.array([row])))
                    except Exception as error:
                        samples.append(row_failure(at, self.data, origins[len(samples)], error))
                return Rows(samples, origins)
        index = positions.tolist()
        try:
            samples = self.data.__getitems__(index)
            require_rows(at, self.data, len(samples), len(index))
        except ReturnedOthers:
            raise
        except Exception:  # one row at a time tells which one it was
            samples = []
            for row in index:
                try:
                    samples.append(self.data[row])
                except Exception as error:
                    samples.append(row_failure(at, self.data, origins[len(samples)], error))
        return Rows(samples, origins)


def _formats_itself(data: Any) -> bool:
    """Whether rows are more than what Arrow stores."""
    if data.format["type"] is not None or data.format["columns"] != data.column_names:
        return True
    return any(_decodes(feature) for feature in data.features.values())


def _decodes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_decodes, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(_decodes, feature))
    if hasattr(feature, "decode_example"):
        return bool(getattr(feature, "decode", True))
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _decodes(inner)
    return type(feature).__name__ in ("Array2D", "Array3D", "Array4D", "Array5D")


Getter = Callable[[list[int], list[int]], list[Any]]


class TableReader:
    """Rows of an Arrow table by number, as dicts.

    Args:
        table: Any ``pyarrow.Table``; nothing is copied or combined.
    """

    def __init__(self, table: pa.Table) -> None:
        self.names: list[str] = table.column_names
        self.num_rows: int = table.num_rows
        self._columns = [_Column(table.column(index)) for index in range(table.num_columns)]

    def rows(self, rows: I64) -> list[dict[str, Any]]:
        """The rows with these numbers (int64, shape [k]), in this order."""
        columns = [column.take(rows) for column in self._columns]
        names = self.names
        if len(columns) == 1:
            name = names[0]
            return [{name: value} for value in columns[0]]
        if not columns:
            return [{} for _ in range(len(rows))]
        return [dict(zip(names, values)) for values in zip(*columns)]


class _Column:
    """One column: its chunks, opened as they are first read, and where each starts."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.starts = np.concatenate([[0], np.cumsum([len(chunk) for chunk in self.chunks])]).astype(np.int64)
        self.type = column.type
        self.opened: list[Any] = [None] * len(self.chunks)
        self.kind = _kind(column.type)

    def take(self, rows: I64) -> list[Any]:
        """Values at these rows."""
        if len(self.chunks) == 1:
            chunks, inside = None, rows
        else:
            chunks = np.searchsorted(self.starts, rows, side="right") - 1
            inside = rows - self.starts[chunks]
        if self.kind == "number":
            return self._numbers(chunks, inside)
        opened = self.opened
        if chunks is None:
            if opened[0] is None:
                self._read(0)
            get = opened[0]
            return [get(row) for row in inside.tolist()]
        result = []
        for chunk, row in zip(chunks.tolist(), inside.tolist()):
            get = opened[chunk]
            if get is None:
                get = self._read(chunk)
            result.append(get(row))
        return result

    def _read(self, chunk: int) -> Any:
        self.opened[chunk] = _OPEN[self.kind](self.chunks[chunk])
        return self.opened[chunk]

    def _numbers(self, chunks: I64 | None, inside: I64) -> list[Any]:
        """Numbers are gathered chunk by chunk, and become Python numbers all at once."""
        if chunks is None:
            return self._number_chunk(0)(inside)
        first = int(chunks[0])
        if (chunks == first).all():
            return self._number_chunk(first)(inside)
        result: list[Any] = [None] * len(inside)
        for chunk in np.unique(chunks).tolist():
            here = np.flatnonzero(chunks == chunk)
            for place, value in zip(here.tolist(), self._number_chunk(chunk)(inside[here])):
                result[place] = value
        return result

    def _number_chunk(self, chunk: int) -> Callable[[I64], list[Any]]:
        get: Callable[[I64], list[Any]] = self.opened[chunk] or self._read(chunk)
        return get


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


def _open_numbers(chunk: pa.Array) -> Callable[[I64], list[Any]]:
    if chunk.null_count:
        valid = chunk.is_valid().to_numpy(zero_copy_only=False)
        values = chunk.fill_null(False if pa.types.is_boolean(chunk.type) else 0).to_numpy(zero_copy_only=False)
        return lambda rows: [
            value if good else None for value, good in zip(values[rows].tolist(), valid[rows].tolist())
        ]
    values = chunk.to_numpy(zero_copy_only=False)
    return lambda rows: values[rows].tolist()


def _open_strings(chunk: pa.Array) -> Callable[[int], str | None]:
    buffers = chunk.buffers()
    dtype = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
    offsets: Any = np.frombuffer(buffers[1], dtype=dtype)[chunk.offset : chunk.offset + len(chunk) + 1]
    ends = memoryview(offsets)
    data = memoryview(buffers[2] if buffers[2] is not None else b"")
    if not chunk.null_count:
        return lambda row: str(data[ends[row] : ends[row + 1]], "utf-8")
    valid = chunk.is_valid().to_numpy(zero_copy_only=False)
    return lambda row: str(data[ends[row] : ends[row + 1]], "utf-8") if valid[row] else None


def _open_lists(chunk: pa.Array) -> Callable[[int], Any]:
    values = chunk.values
    # Straight from the buffer: the stored dtype, zero-copy, and defined (if meaningless) where a value is null.
    dtype = np.dtype(values.type.to_pandas_dtype())
    flat = np.frombuffer(values.buffers()[1] or b"", dtype=dtype)[values.offset : values.offset + len(values)]
    flat.flags.writeable = False
    nulls = np.flatnonzero(~values.is_valid().to_numpy(zero_copy_only=False)).tolist() if values.null_count else []

    def view(start: int, stop: int) -> Any:
        if nulls and bisect.bisect_left(nulls, start) != bisect.bisect_left(nulls, stop):
            return values.slice(start, stop - start).to_pylist()
        return flat[start:stop]

    if pa.types.is_fixed_size_list(chunk.type):
        size, offset = chunk.type.list_size, chunk.offset

        def get(row: int) -> Any:
            start = (offset + row) * size
            return view(start, start + size)
    else:
        offsets: Any = chunk.offsets.to_numpy()
        ends = memoryview(offsets)

        if nulls:

            def get(row: int) -> Any:
                return view(ends[row], ends[row + 1])
        else:

            def get(row: int) -> Any:
                return flat[ends[row] : ends[row + 1]]

    if not chunk.null_count:
        return get
    valid = chunk.is_valid().to_numpy(zero_copy_only=False)
    return lambda row: get(row) if valid[row] else None


def _open_others(chunk: pa.Array) -> Callable[[int], Any]:
    return lambda row: chunk[row].as_py()


_OPEN: dict[str, Callable[[pa.Array], Any]] = {
    "number": _open_numbers,
    "string": _open_strings,
    "list": _open_lists,
    "other": _open_others,
}
