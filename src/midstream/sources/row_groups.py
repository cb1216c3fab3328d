"""Reads the footers of parquet files, and decodes row groups and caches them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import get_worker_info

from midstream.common.progress_bar import with_progress_bar
from midstream.errors import SourceError, bullet_list
from midstream.pipeline.rows import I64
from midstream.sources.arrow_table import TableReader
from midstream.sources.files import File, OpenFiles, list_files
from midstream.sources.read_ahead import ReadAheadCache

CACHE_BYTES = 256 << 20
"""Bytes of decoded row groups that one source caches in one process. At least one group is cached,
however large it is.
"""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileIndex:
    """The row groups of all files, from their footers. Row groups without rows are left out.

    Attributes:
        files: In the order in which their rows are numbered.
        columns: Names, in the order of a sample's keys.
        sizes: Number of rows of each group, int64, shape [groups].
        file_of: For each group the number of its file, int32, shape [groups].
        number_in_file: For each group its number in that file, int32, shape [groups].
    """

    files: list[File]
    columns: list[str]
    sizes: I64
    file_of: npt.NDArray[np.int32]
    number_in_file: npt.NDArray[np.int32]

    def describe(self, number: int) -> str:
        """The file and number of a row group, for messages."""
        return f"{self.files[self.file_of[number]]}, row group {self.number_in_file[number]}"


class _Footer(NamedTuple):
    """Rows of each row group, and the type of each column by name (see `_type_name`)."""

    sizes: list[int]
    types: dict[str, str]


def read_file_index(paths: tuple[str, ...], columns: tuple[str, ...] | None) -> FileIndex:
    """Find the files and read their footers.

    Args:
        paths: Paths, patterns and URLs.
        columns: The columns to read; None for all of the first file.

    Raises:
        FileNotFoundError: If a path or pattern matches nothing.
        SourceError: If a footer cannot be read.
        ValueError: If the files do not have the same columns.
    """
    files = list_files(paths, "read_parquet")
    # A footer takes a few round trips to an object store, so up to 16 are read at once.
    with ThreadPoolExecutor(min(16, len(files))) as pool:
        footers = list(
            with_progress_bar(
                pool.map(_read_footer, files), "read_parquet: reading footers", len(files)
            )
        )
    names = list(footers[0].types) if columns is None else list(columns)
    _check_columns(files, footers, names, everything=columns is None)
    sizes = np.array([size for footer in footers for size in footer.sizes], dtype=np.int64)
    counts = [len(footer.sizes) for footer in footers]
    file_of = np.repeat(np.arange(len(files), dtype=np.int32), counts)
    number_in_file = np.array([number for many in counts for number in range(many)], dtype=np.int32)
    has_rows = sizes > 0
    return FileIndex(files, names, sizes[has_rows], file_of[has_rows], number_in_file[has_rows])


def _read_footer(file: File) -> _Footer:
    try:
        with _open_parquet(file) as parquet:
            footer, schema = parquet.metadata, parquet.schema_arrow
    except Exception as error:
        raise SourceError(
            f"read_parquet: the footer of {file} cannot be read: {type(error).__name__}: {error}."
            " Is it a complete parquet file?"
        ) from error
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"read_parquet: {file} has two columns of the same name: {schema.names}")
    sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    return _Footer(sizes, {field.name: _type_name(field.type) for field in schema})


def _type_name(type_: pa.DataType) -> str:
    """The name of a type, the same for all types that give the same Python values in a sample.

    A writer's choice of memory layout (dictionary, large offsets, views) makes no difference.
    """
    types = pa.types
    if types.is_dictionary(type_):
        return _type_name(type_.value_type)
    if types.is_list(type_) or types.is_large_list(type_):
        return f"list<{_type_name(type_.value_type)}>"
    if types.is_struct(type_):
        return f"struct<{', '.join(f'{field.name}: {_type_name(field.type)}' for field in type_)}>"
    return str(type_).removeprefix("large_").removesuffix("_view")


def _check_columns(
    files: list[File], footers: list[_Footer], names: list[str], everything: bool
) -> None:
    """Check that all files have the same columns.

    Args:
        names: The columns to read.
        everything: Whether a file may have no other columns than those.

    Raises:
        ValueError: If they do not; it names both files and the columns.
    """
    first = footers[0].types
    missing = [name for name in names if name not in first]
    if missing:
        raise ValueError(
            f"read_parquet: {files[0]} has no column {missing[0]!r}. It has: {', '.join(first)}"
        )
    for file, (_, types) in zip(files[1:], footers[1:]):
        compared = [*names, *(name for name in types if everything and name not in first)]
        differing = [
            f"{name!r}: {first.get(name, 'absent')} in the first, {types.get(name, 'absent')} in"
            " the second"
            for name in compared
            if first.get(name) != types.get(name)
        ]
        if differing:
            shared = [name for name in names if first[name] == types.get(name)]
            raise ValueError(
                f"read_parquet: the columns of\n  {files[0]}\n "
                f" {file}\ndiffer:{bullet_list(differing)}\nRead the columns they share with"
                f" columns={shared}, or make them two sources, give their samples the same keys"
                " with .map, and join them with midstream.concatenate."
            )


def _open_parquet(file: File) -> pq.ParquetFile:
    # pre_buffer merges remote reads into a few large ones. Checksums are verified if the file has
    # them.
    remote = bool(file.url)
    source = file.open() if remote else file.path
    return pq.ParquetFile(source, pre_buffer=remote, page_checksum_verification=True)


_CHECK_EVERY = 64  # decodes between two checks for wasted decoding

_WASTEFUL = 16  # rows decoded for each row used from which on a warning is logged


class RowGroups:
    """Decodes the row groups of one source in one process, caches them and reads ahead.

    Attributes:
        index: The row groups of all files.
        starts: int64, shape [groups + 1]: the number of each group's first row, then the number of
            rows.
        store: The decoded groups by number.
    """

    def __init__(self, index: FileIndex) -> None:
        self.index = index
        self.starts: I64 = np.concatenate([[0], np.cumsum(index.sizes)]).astype(np.int64)
        files: OpenFiles[pq.ParquetFile] = OpenFiles(
            lambda number: _open_parquet(index.files[number])
        )

        # A function and not a method, so that a thread that reads does not keep this object alive.
        def read(number: int) -> tuple[TableReader, int]:
            table = _decode(index, files, number)
            return TableReader(table), table.get_total_buffer_size()

        self.store: ReadAheadCache[TableReader] = ReadAheadCache(read, lambda: CACHE_BYTES)
        self.decodes = 0
        self.decoded_at: dict[int, int] = {}
        # Since ``decodes`` was last a multiple of _CHECK_EVERY:
        self.rows_decoded = self.rows_used = self.decoded_again = 0
        self.warned = False

    def of(self, positions: I64) -> I64:
        """For each row number (int64, shape [k]) the number of its group."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def reader(self, number: int, rows: int, release: Callable[[int], None]) -> TableReader:
        """The rows of a group.

        Args:
            number: Of the group.
            rows: How many rows of it will be used.
            release: Called with the number of each group that is dropped from the cache.
        """
        self.rows_used += rows
        reader, is_new = self.store.get(number, release)
        if is_new:
            self._check_waste(number)
        return reader

    def _check_waste(self, number: int) -> None:
        """Warn once if the same groups are decoded again and again for a few rows each."""
        self.decodes += 1
        self.rows_decoded += int(self.index.sizes[number])
        self.decoded_again += (
            self.decodes - self.decoded_at.get(number, -_CHECK_EVERY) < _CHECK_EVERY
        )
        self.decoded_at[number] = self.decodes
        if self.decodes % _CHECK_EVERY:
            return
        if (
            not self.warned
            and self.decoded_again > _CHECK_EVERY // 2
            and self.rows_used * _WASTEFUL < self.rows_decoded
        ):
            self.warned = True
            _LOG.warning(
                "read_parquet: of %d rows decoded only one is used, because row groups are dropped"
                " from the cache (%d MiB, midstream.sources.row_groups.CACHE_BYTES) and soon"
                " decoded again: %s takes %.0f MiB. Use .shuffle(window_blocks=k) with k groups that"
                " fit, read fewer columns, or write the files with a smaller row_group_size.",
                self.rows_decoded // max(1, self.rows_used),
                CACHE_BYTES >> 20,
                self.index.describe(number),
                self.store.last_size / (1 << 20),
            )
        self.rows_decoded = self.rows_used = self.decoded_again = 0


def _decode(index: FileIndex, files: OpenFiles[pq.ParquetFile], number: int) -> pa.Table:
    """Read and decode one row group.

    Raises:
        SourceError: If it cannot be read, or has another number of rows than its footer said.
    """
    try:
        with files.lend(int(index.file_of[number])) as parquet:
            # In a worker process one thread only: the other cores belong to the other workers.
            threads = get_worker_info() is None
            table = parquet.read_row_group(
                int(index.number_in_file[number]), columns=index.columns, use_threads=threads
            ).select(index.columns)
    except Exception as error:
        raise SourceError(
            f"{index.describe(number)} cannot be read: {type(error).__name__}: {error}. Restore the"
            " file, or leave it out of the paths and start a new run: a checkpoint counts its"
            " rows."
        ) from error
    if table.num_rows != index.sizes[number]:
        raise SourceError(
            f"{index.describe(number)} has {table.num_rows} rows, and had {index.sizes[number]}"
            " when this dataset was first used: the file was replaced. Make the dataset again with"
            " read_parquet, and start a new run."
        )
    return table
