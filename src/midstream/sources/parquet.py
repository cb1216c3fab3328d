"""Parquet files: random access by row group, without reading any data up front."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from midstream._state import State
from midstream.core import I64, U64, Dataset, Place, Rows
from midstream.errors import SourceError
from midstream.sources._files import PathLike, as_paths, is_local, open_file, resolve
from midstream.sources.arrow import TableReader
from midstream.sources.sequence import row_origins

CACHE_BYTES = 256 << 20
"""Most bytes of decoded row groups that a process keeps for one source (and never less than one group)."""
_OPEN_FILES = 32


def read_parquet(
    paths: PathLike | Sequence[PathLike], *, columns: Sequence[str] | None = None, name: str | None = None
) -> Dataset:
    """Rows of parquet files.

    Args:
        paths: A path, glob (``"data/*.parquet"``, sorted) or fsspec URL, or a list of them, read in this order.
        columns: Which columns, in this order; all when left out.
        name: What progress, origins and errors call the source.

    The footers tell how many rows there are; data is read by whole row groups, so reading one row costs its group.
    ``.shuffle(seed)`` knows that and mixes windows of 16 groups. Decoded groups are kept within 256 MiB per process.

    Raises (when first read):
        FileNotFoundError: If a path or glob matches nothing.
        ValueError: If the files differ in schema, or a column is not there.

    >>> import tempfile, pathlib, pyarrow as pa, pyarrow.parquet as pq, midstream as ms
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "a.parquet")
    ...     pq.write_table(pa.table({"x": [1, 2, 3]}), path, row_group_size=2)
    ...     list(ms.read_parquet(path))
    [{'x': 1}, {'x': 2}, {'x': 3}]
    """
    if columns is not None and (isinstance(columns, str) or not all(isinstance(column, str) for column in columns)):
        raise TypeError(f"read_parquet: columns is a list of names; found {columns!r}")
    return ParquetSource(as_paths(paths, "read_parquet"), None if columns is None else tuple(columns), name)


@dataclass(frozen=True, eq=False, repr=False)
class ParquetSource(Dataset):
    """Rows of parquet files, by row group.

    State: none but the position.
    Resume: reads the row group of the next row.
    """

    paths: tuple[str, ...]
    columns: tuple[str, ...] | None = None
    name: str | None = None
    kind = "read_parquet"
    _kept_slots = ("_waiting", "_epoch", "_index_made")

    @property
    def infinite(self) -> bool:
        """Never."""
        return False

    def _length(self) -> int | None:
        return int(self._index().starts[-1])

    def block_sizes(self) -> I64 | None:
        """Rows of each row group."""
        return np.diff(self._index().starts)

    def spec_fields(self) -> dict[str, State]:
        """Columns, number of files and rows; no paths, which may move."""
        index = self._index()
        return {"columns": list(index.columns), "files": len(index.files), "length": self.length()}

    def summary(self) -> str:
        """Number of files, groups and rows."""
        index = self._index()
        return f"{self.kind}({len(index.files)} files, {len(index.starts) - 1} row groups, {self.length():,} rows)"

    def _index(self) -> _Index:
        """Row groups of all files, read from the footers once and pickled along: a few bytes for each."""
        index: _Index | None = self.__dict__.get("_index_made")
        if index is None:
            index = _read_index(resolve(self.paths, "read_parquet"), self.columns)
            self._set("_index_made", index)
        return index

    def _open(self) -> _Groups:
        return _Groups(self._index())

    def _rows(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows:
        groups: _Groups = self._handle()
        starts = groups.index.starts
        number = np.searchsorted(starts, positions, side="right") - 1
        samples: list[Any] = [None] * len(positions)
        for group in np.unique(number).tolist():
            here = np.flatnonzero(number == group)
            rows = groups.get(group, at.path).rows(positions[here] - starts[group])
            for place, row in zip(here.tolist(), rows):
                samples[place] = row
        return Rows(samples, row_origins(at.source, passes, positions))


class _Index(NamedTuple):
    """Where the rows are.

    Attributes:
        files: Paths or URLs.
        columns: What is read, in this order.
        starts: int64, shape [groups + 1]: the first row of each row group that has any, and the end.
        where: int64, shape [groups, 2]: its file and its number there.
    """

    files: list[str]
    columns: list[str]
    starts: I64
    where: I64


def _read_index(files: list[str], columns: tuple[str, ...] | None) -> _Index:
    sizes: list[int] = []
    where: list[tuple[int, int]] = []
    first: Any = None
    for number, path in enumerate(files):
        with _open_parquet(path) as file:
            schema = file.schema_arrow.remove_metadata()
            if first is None:
                first = schema
            elif not schema.equals(first):
                raise ValueError(
                    f"read_parquet: files differ in schema; {files[0]} has {_columns(first)}, {path} has {_columns(schema)}. "
                    f"Read them as two sources and concatenate or interleave those."
                )
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if rows:
                    sizes.append(rows)
                    where.append((number, group))
    missing = [column for column in columns or () if column not in first.names]
    if missing:
        raise ValueError(f"read_parquet: there is no column {missing[0]!r}; expected one of {first.names}")
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    chosen = list(columns) if columns is not None else list(first.names)
    return _Index(files, chosen, starts, np.array(where, dtype=np.int64).reshape(-1, 2))


def _columns(schema: Any) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _open_parquet(path: str) -> Any:
    try:
        return pq.ParquetFile(path if is_local(path) else open_file(path, "read_parquet"))
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"read_parquet: {path} cannot be read as parquet: {type(error).__name__}: {error}") from error


class _Groups:
    """Open files and decoded row groups of this process, each within a bound; the oldest used go first."""

    def __init__(self, index: _Index) -> None:
        self.index = index
        self.files: OrderedDict[int, Any] = OrderedDict()
        self.readers: OrderedDict[int, tuple[TableReader, int]] = OrderedDict()
        self.bytes = 0
        self.decoded = 0
        self.lock = threading.Lock()

    def get(self, group: int, path: str) -> TableReader:
        """The reader of a row group."""
        with self.lock:
            known = self.readers.get(group)
            if known is not None:
                self.readers.move_to_end(group)
                return known[0]
            number, inside = self.index.where[group].tolist()
            try:
                table = self._file(number).read_row_group(inside, columns=self.index.columns)
            except SourceError:
                raise
            except Exception as error:
                raise SourceError(
                    f"{path}: row group {inside} of {self.index.files[number]} cannot be read: {type(error).__name__}: "
                    f"{error}. Has the file changed, or was it cut off?"
                ) from error
            expected = int(self.index.starts[group + 1] - self.index.starts[group])
            if table.num_rows != expected:
                raise SourceError(
                    f"{path}: row group {inside} of {self.index.files[number]} has {table.num_rows} rows, and had {expected} "
                    f"when its footer was read; the file was changed while it is in use."
                )
            reader = TableReader(table.select(self.index.columns))
            self.readers[group] = (reader, table.nbytes)
            self.bytes += table.nbytes
            self.decoded += 1
            while self.bytes > CACHE_BYTES and len(self.readers) > 1:
                self.bytes -= self.readers.popitem(last=False)[1][1]
            return reader

    def _file(self, number: int) -> Any:
        file = self.files.get(number)
        if file is None:
            file = self.files[number] = _open_parquet(self.index.files[number])
            if len(self.files) > _OPEN_FILES:
                self.files.popitem(last=False)[1].close()
        else:
            self.files.move_to_end(number)
        return file
