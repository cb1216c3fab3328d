"""Footers of parquet files, and decoded row groups that are kept."""

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
from midstream.sources.read_ahead import Ahead

CACHE_BYTES = 256 << 20
"""Bytes of decoded row groups kept per source and process. At least one group is kept, however
large.
"""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileIndex:
    """What the footers say. Row groups without rows are left out.

    Attributes:
        files: In order.
        columns: Names, in the order of a sample's keys.
        sizes: Rows of each group, int64, shape [g].
        file_of: Number of each group's file, int32, shape [g].
        number_in_file: Number of each group in its file, int32, shape [g].
    """

    files: list[File]
    columns: list[str]
    sizes: I64
    file_of: npt.NDArray[np.int32]
    number_in_file: npt.NDArray[np.int32]

    def place_of(self, number: int) -> str:
        """A group in words."""
        return f"{self.files[self.file_of[number]]}, row group {self.number_in_file[number]}"


class _Footer(NamedTuple):
    sizes: list[int]
    types: dict[str, str]


def read_file_index(paths: tuple[str, ...], columns: tuple[str, ...] | None) -> FileIndex:
    files = list_files(paths, "read_parquet")
    # Each footer is a few round trips on an object store, so many are asked for at once.
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
    full = sizes > 0
    return FileIndex(files, names, sizes[full], file_of[full], number_in_file[full])


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
    """What a type looks like in a sample: how a writer chose to lay it out in memory makes no
    difference there.
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
    """Refuse files that do not have the same columns.

    Raises:
        ValueError: Naming both files and the columns.
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
                f" {file}\ndiffer:{bullet_list(differing)}\nRead what they share with"
                f" columns={shared}, or make them two sources, bring their samples to one form with"
                " .map, and join them with midstream.concatenate."
            )


def _open_parquet(file: File) -> pq.ParquetFile:
    # Remote reads are gathered into few large ones. Checksums are verified where the writer left
    # some.
    remote = bool(file.url)
    source = file.open() if remote else file.path
    return pq.ParquetFile(source, pre_buffer=remote, page_checksum_verification=True)


_WATCH = 64

_WASTE = 16


class RowGroups:
    """Decoded row groups of one process."""

    def __init__(self, index: FileIndex) -> None:
        self.index = index
        self.starts: I64 = np.concatenate([[0], np.cumsum(index.sizes)]).astype(np.int64)
        files: OpenFiles[pq.ParquetFile] = OpenFiles(
            lambda number: _open_parquet(index.files[number])
        )

        def read(
            number: int,
        ) -> tuple[TableReader, int]:  # no method: a thread that reads does not keep this object
            table = _decode(index, files, number)
            return TableReader(table), table.get_total_buffer_size()

        self.store: Ahead[TableReader] = Ahead(read, lambda: CACHE_BYTES)
        self.decodes = 0
        self.decoded_at: dict[int, int] = {}
        self.rows_decoded = self.rows_used = self.again = (
            0  # since decodes was last a multiple of _WATCH
        )
        self.warned = False

    def of(self, positions: I64) -> I64:
        """The groups in which rows lie."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def reader(self, number: int, rows: int, release: Callable[[int], None]) -> TableReader:
        """The reader of a group, from which ``rows`` rows will be taken; ``release`` hears which
        groups are dropped.
        """
        self.rows_used += rows
        reader, new = self.store.get(number, release)
        if new:
            self._watch(number)
        return reader

    def _watch(self, number: int) -> None:
        """Say it once when the same groups are decoded again and again for a few rows each."""
        self.decodes += 1
        self.rows_decoded += int(self.index.sizes[number])
        self.again += self.decodes - self.decoded_at.get(number, -_WATCH) < _WATCH
        self.decoded_at[number] = self.decodes
        if self.decodes % _WATCH:
            return
        if (
            not self.warned
            and self.again > _WATCH // 2
            and self.rows_used * _WASTE < self.rows_decoded
        ):
            self.warned = True
            _LOG.warning(
                "read_parquet: of %d rows decoded only one is used, because row groups are dropped"
                " from the cache (%d MiB, midstream.sources.parquet.CACHE_BYTES) and soon decoded"
                " again: %s takes %.0f MiB. Use .shuffle(window_blocks=k) with k groups that fit,"
                " read fewer columns, or write the files with a smaller row_group_size.",
                self.rows_decoded // max(1, self.rows_used),
                CACHE_BYTES >> 20,
                self.index.place_of(number),
                self.store.size / (1 << 20),
            )
        self.rows_decoded = self.rows_used = self.again = 0


def _decode(index: FileIndex, files: OpenFiles[pq.ParquetFile], number: int) -> pa.Table:
    try:
        with files.lend(int(index.file_of[number])) as parquet:
            # In a worker the other cores belong to the other workers.
            threads = get_worker_info() is None
            table = parquet.read_row_group(
                int(index.number_in_file[number]), columns=index.columns, use_threads=threads
            ).select(index.columns)
    except Exception as error:
        raise SourceError(
            f"{index.place_of(number)} cannot be read: {type(error).__name__}: {error}. Restore the"
            " file, or leave it out of the paths and start a new run: a checkpoint counts its"
            " rows."
        ) from error
    if table.num_rows != index.sizes[number]:
        raise SourceError(
            f"{index.place_of(number)} has {table.num_rows} rows, and had {index.sizes[number]}"
            " when this dataset was first used: the file was replaced. Make the dataset again with"
            " read_parquet, and start a new run."
        )
    return table
