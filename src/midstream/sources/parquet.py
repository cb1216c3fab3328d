"""Parquet files: random access by row group, with nothing but footers read up front.

Also here, because every source of files needs it: `list_files`, which turns paths, patterns and
URLs into files, and `OpenFiles`, which keeps few of them open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.common.plain_state import State, fingerprint
from midstream.common.validation import require_name
from midstream.dataset import Dataset
from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.node import BoundNode, Node, row_origins
from midstream.pipeline.rows import I64, U64, Rows
from midstream.sources.files import Paths, count, plain_paths
from midstream.sources.row_groups import FileIndex, RowGroups, read_file_index


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
        name: What progress, origins and errors call it. Left out, the name it has in `interleave`,
            else "data".

    Returns:
        A random-access dataset. A sample is a dict of a row's columns: numeric lists as read-only
        numpy views of the stored dtype (copy one to keep it for long: a view keeps its column of
        the row group in memory), numbers, strings and nested values as Python objects.

    Nothing is opened here. The first use (``len``, ``print``, iteration) lists the files and reads
    their footers; which files there are is settled then, for this dataset and every worker process.
    Rows are decoded a row group at a time, and ``.shuffle()`` mixes windows of groups, so that
    reading in shuffled order decodes each about once per process. The groups of a window (16, see
    ``window_blocks``) should fit in `CACHE_BYTES`: write files with ``row_group_size`` of some
    thousand rows. Groups that take more than 20 ms to read are read ahead, in a thread, while you
    work on those before.

    Raises:
        TypeError, ValueError: If an argument is not one of these. On first use: if the files do not
            have the same columns, or lack one of ``columns``.
        FileNotFoundError: On first use, if a path or pattern matches nothing.
        SourceError: On reading, if a file is damaged, or is not what it was on first use.

    >>> import tempfile
    >>> import midstream as ms, pyarrow as pa, pyarrow.parquet as pq
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pq.write_table(pa.table({"id": [1, 2, 3], "text": ["a", "b", "c"]}), f"{folder}/x.parquet", row_group_size=2)
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
                "read_parquet: columns is a list of names, like columns=['text']; found"
                f" {columns!r}"
            )
        if not columns or len(set(columns)) < len(columns):
            raise ValueError(
                f"read_parquet: columns is one name or more, each once; found {list(columns)}"
            )
    return Dataset(
        ParquetSource(
            plain_paths(paths, "read_parquet"), None if columns is None else tuple(columns), name
        )
    )


@dataclass(frozen=True, eq=False, repr=False)
class ParquetSource(Node):
    """Rows of parquet files, numbered through the files in order.

    Decoded row groups are kept, least recently used first out, up to `CACHE_BYTES` per process;
    files are opened when a group of theirs is first needed, at most `MAX_OPEN_FILES` at a time. The
    list of files and the sizes of their row groups are read once and travel to the workers (16
    bytes a group and the paths); nothing that is open does.

    Where a group takes long to read, those that come next are read by one thread per process while
    the consumer works (`midstream.sources.read_ahead.Ahead`): in the room that the cache has left,
    and at most two groups beyond it. That changes when groups are read, never which samples come,
    nor their order, nor the state.

    State: none but the position.
    Resume: decodes the row groups it stands in again; reads no other row again.
    """

    paths: tuple[str, ...]
    columns: tuple[str, ...] | None = None
    name: str | None = None
    kind = "read_parquet"
    reads_ahead = True
    _kept_slots = (*Node._kept_slots, "_groups")

    @property
    def infinite(self) -> bool:
        """Never."""
        return False

    def _index(self) -> FileIndex:
        """Files and row groups: read on first use, then kept, pickled too."""
        index: FileIndex | None = self.__dict__.get("_groups")
        if index is None:
            index = read_file_index(self.paths, self.columns)
            self._set("_groups", index)
        return index

    def _length(self) -> int | None:
        return int(self._index().sizes.sum())

    def block_sizes(self) -> I64 | None:
        """Rows of each row group, int64; groups without rows are left out."""
        return self._index().sizes

    def spec_fields(self) -> dict[str, State]:
        """Columns, and how many rows, files and row groups; no paths, so that data may move.

        The order of a shuffle depends on the sizes of the row groups, so their hash is here too.
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
        """Columns, and number of rows, row groups and files."""
        index = self._index()
        return (
            f"{self.kind}([{', '.join(index.columns)}], {self.length():,} rows in"
            f" {count(len(index.sizes), 'row group')} of {count(len(index.files), 'file')})"
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
            # Views of a group that leaves the cache would keep it in memory all the same, group
            # after group.
            if number in parts:
                here, rows = parts[number]
                if rows.columns is not None:
                    parts[number] = here, Rows(None, rows.origins, None, rows.columns.own())
                else:
                    parts[number] = (
                        here,
                        Rows([_without_views(sample) for sample in rows.samples], rows.origins),
                    )

        needed = groups.store.at_hand_first(np.unique(numbers).tolist())
        for number in needed:
            here = np.flatnonzero(numbers == number)
            reader = groups.reader(number, len(here), release)
            if number == needed[0]:
                groups.store.want(needed[:0:-1])  # the thread helps, from the other end
            try:
                parts[number] = here, Rows(None, origins[here], None, reader.columns(inside[here]))
            except (
                Exception
            ):  # one row at a time tells which one it was (bytes that are no text, say)
                found: list[Any] = []
                for row, place in zip(inside[here], here.tolist()):
                    try:
                        found.append(reader.rows(row.reshape(1))[0])
                    except Exception as error:
                        where = f"{groups.index.place_of(number)}, row {row}"
                        found.append(
                            FailedSample(
                                (
                                    SampleFailure(
                                        bound.path,
                                        bound.origin(origins[place].tolist()),
                                        where,
                                        error,
                                    ),
                                )
                            )
                        )
                parts[number] = here, Rows(found, origins[here])
        return Rows.scatter(len(positions), list(parts.values()))

    def wants_more(self) -> bool:
        groups: RowGroups = self._handle()
        return groups.store.hungry

    def _hint(self, positions: I64) -> None:
        groups: RowGroups = self._handle()
        numbers, first = np.unique(groups.of(positions), return_index=True)
        groups.store.want(numbers[np.argsort(first)].tolist())


def _without_views(sample: Any) -> Any:
    """The sample with arrays of its own."""
    if type(sample) is not dict:
        return sample
    return {
        key: value.copy() if isinstance(value, np.ndarray) else value
        for key, value in sample.items()
    }
