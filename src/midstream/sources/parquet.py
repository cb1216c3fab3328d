"""A source over parquet files: random access by row group; only footers are read up front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.common.plain_state import State, fingerprint
from midstream.common.validation import require_name
from midstream.dataset import Dataset
from midstream.pipeline.failures import FailedSample
from midstream.pipeline.node import BoundNode, Node, row_origins
from midstream.pipeline.rows import I64, U64, Rows
from midstream.sources.arrow_table import TableReader
from midstream.sources.files import Paths, paths_as_text, plural
from midstream.sources.row_groups import FileIndex, RowGroups, read_file_index
from midstream.sources.source_rows import read_one_by_one, row_failure


def read_parquet(
    paths: Paths, *, columns: Sequence[str] | None = None, name: str | None = None
) -> Dataset:
    """Read parquet files, with random access and without loading them.

    Args:
        paths: A path, a pattern (``data/*.parquet``, ``**`` for folders below; matches are sorted),
            a URL that fsspec knows (``s3://...``, patterns too), or a list of these, read in the
            order given.
        columns: The columns to read, which also is the order of a sample's keys; None for all of
            the first file's.
        name: The source's name in progress, origins and errors. Without one it is the name it has
            in `interleave`, else "data".

    Returns:
        A random-access dataset. A sample is a dict of a row's columns: numeric lists as read-only
        numpy views of the stored dtype, numbers, strings and nested values as Python objects. A
        view keeps its whole column of the row group in memory; copy it if you keep it for long.

    This function opens no file. The first use (``len``, ``print``, iteration) lists the files and
    reads their footers. The list of files is fixed from then on, for this dataset and every worker
    process.

    Rows are decoded a row group at a time, and ``.shuffle()`` mixes windows of groups, so that
    reading in shuffled order decodes each about once per process. The groups of a window (16, see
    ``window_blocks``) should fit in `midstream.sources.row_groups.CACHE_BYTES`: write files with
    ``row_group_size`` of some thousand rows. Groups that take more than 20 ms to read are read
    ahead by a thread, while you work on the groups before them.

    Raises:
        TypeError, ValueError: If an argument is not as described. On first use: if the files do not
            have the same columns, or lack one of ``columns``.
        FileNotFoundError: On first use, if a path or pattern matches nothing.
        SourceError: On reading, if a file is damaged, or has changed since the first use.

    >>> import tempfile
    >>> import midstream as ms, pyarrow as pa, pyarrow.parquet as pq
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = pa.table({"id": [1, 2, 3], "text": ["a", "b", "c"]})
    ...     pq.write_table(table, f"{folder}/x.parquet", row_group_size=2)
    ...     ds = ms.read_parquet(f"{folder}/*.parquet", columns=["text"], name="letters")
    ...     print(ds)
    ...     print(ds.rows([2, 0]))
    letters: read_parquet([text], 3 rows in 2 row groups of 1 file)  # random access, 3
    [{'text': 'c'}, {'text': 'a'}]
    """
    require_name(name, "read_parquet")
    if columns is not None:
        listed = isinstance(columns, Sequence) and not isinstance(columns, str)
        if not listed or not all(isinstance(column, str) for column in columns):
            raise TypeError(
                "read_parquet: columns must be a list of names, like columns=['text']; found"
                f" {columns!r}"
            )
        if not columns or len(set(columns)) < len(columns):
            raise ValueError(
                f"read_parquet: columns must be one name or more, each once; found {list(columns)}"
            )
    return Dataset(
        ParquetSource(
            paths_as_text(paths, "read_parquet"), None if columns is None else tuple(columns), name
        )
    )


@dataclass(frozen=True, eq=False, repr=False)
class ParquetSource(Node):
    """Rows of parquet files, numbered through the files in order.

    Each process caches decoded row groups up to `CACHE_BYTES`; the least recently used group is
    dropped first. A file is opened when one of its groups is first needed, and at most
    `MAX_OPEN_FILES` are open at a time. The list of files and the sizes of their row groups are
    read once and pickled to the workers (16 bytes a group and the paths); open files are not.

    If groups take long to read, one thread per process reads the next groups while the consumer
    works (`midstream.sources.read_ahead.ReadAheadCache`). It uses the free room in the cache and at
    most two groups more. Reading ahead changes when groups are read, but neither the samples, nor
    their order, nor the state.

    State: only the position.
    Resume: decodes again the row groups that hold the next rows; reads no other row again.
    """

    paths: tuple[str, ...]
    columns: tuple[str, ...] | None = None
    name: str | None = None
    kind = "read_parquet"
    infinite = False
    takes_hints = True
    _kept_slots = (*Node._kept_slots, "_file_index")

    def _index(self) -> FileIndex:
        """The files and row groups: read on first use, then cached, also in pickles."""
        return self.cached("_file_index", lambda: read_file_index(self.paths, self.columns))

    def _length(self) -> int | None:
        return int(self._index().sizes.sum())

    def block_sizes(self) -> I64 | None:
        """Number of rows of each row group, int64; groups without rows are left out."""
        return self._index().sizes

    def spec_fields(self) -> dict[str, State]:
        """The columns, and the numbers of rows, files and row groups.

        Paths are left out, so that the files may be moved. The order of a shuffle depends on the
        sizes of the row groups, so their hash is included.
        """
        index = self._index()
        return {
            "columns": list(index.columns),
            "length": self.length(),
            "num_files": len(index.files),
            "num_row_groups": len(index.sizes),
            "row_groups": fingerprint(index.sizes.tolist()),
        }

    def summary(self) -> str:
        """The columns, and the numbers of rows, row groups and files."""
        index = self._index()
        return (
            f"{self.kind}([{', '.join(index.columns)}], {self.length():,} rows in"
            f" {plural(len(index.sizes), 'row group')} of {plural(len(index.files), 'file')})"
        )

    def _open(self) -> RowGroups:
        return RowGroups(self._index())

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(bound, passes, positions)
        groups: RowGroups = self._handle()
        numbers = groups.of(positions)
        inside = positions - groups.starts[numbers]
        parts: dict[int, tuple[I64, Rows]] = {}

        def release(number: int) -> None:
            # The rows read so far are views of the group and would keep it in memory after it left
            # the cache, so they are copied.
            if number in parts:
                here, rows = parts[number]
                if rows.columns is not None:
                    copied = Rows(None, rows.origins, None, rows.columns.own())
                else:
                    copied = Rows([_without_views(sample) for sample in rows.samples], rows.origins)
                parts[number] = here, copied

        needed = groups.store.cached_first(np.unique(numbers).tolist())
        for number in needed:
            here = np.flatnonzero(numbers == number)
            reader = groups.reader(number, len(here), release)
            if number == needed[0]:
                # The thread starts from the other end, so that both read different groups.
                groups.store.hint(needed[:0:-1])
            rows = _read_rows(bound, groups, number, reader, inside[here], origins[here])
            parts[number] = here, rows
        return Rows.scatter(len(positions), list(parts.values()))

    def wants_hints(self) -> bool:
        """See `Node.wants_hints`."""
        groups: RowGroups = self._handle()
        return groups.store.wants_hints

    def _hint(self, positions: I64) -> None:
        groups: RowGroups = self._handle()
        numbers, first = np.unique(groups.of(positions), return_index=True)
        groups.store.hint(numbers[np.argsort(first)].tolist())


def _read_rows(
    bound: BoundNode, groups: RowGroups, number: int, reader: TableReader, rows: I64, origins: I64
) -> Rows:
    """Rows of one row group, by their numbers within it."""
    try:
        return Rows(None, origins, None, reader.columns(rows))
    except Exception:  # for example text that is not UTF-8, in one of the rows

        def failed(index: int, error: Exception) -> FailedSample:
            where = f"{groups.index.describe(number)}, row {rows[index]}"
            return row_failure(bound, origins[index], where, error)

        return Rows(list(read_one_by_one(rows, reader.row, failed)), origins)


def _without_views(sample: Any) -> Any:
    """A copy of the sample whose arrays own their memory."""
    if type(sample) is not dict:
        return sample
    return {
        key: value.copy() if isinstance(value, np.ndarray) else value
        for key, value in sample.items()
    }
