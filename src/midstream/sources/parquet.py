"""Parquet files: random access by row group, with nothing but footers read up front.

Also here, because every source of files needs it: `list_files`, which turns paths, patterns and URLs into files, and
`OpenFiles`, which keeps few of them open.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import get_worker_info

from midstream.common.plain_state import State, fingerprint
from midstream.common.progress_bar import watched
from midstream.common.validation import require_name, require_text
from midstream.dataset import Dataset
from midstream.errors import SourceError, bullet_list
from midstream.pipeline.failures import Failure, Hole
from midstream.pipeline.node import Node, Place
from midstream.pipeline.rows import I64, U64, Rows
from midstream.sources.arrow import TableReader
from midstream.sources.read_ahead import Ahead
from midstream.sources.sequence import row_origins

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

CACHE_BYTES = 256 << 20
"""Bytes of decoded row groups kept per source and process. At least one group is kept, however large."""

MAX_OPEN_FILES = 32
"""Files kept open per source and process."""

_LOG = logging.getLogger(__name__)


def read_parquet(paths: Paths, *, columns: Sequence[str] | None = None, name: str | None = None) -> Dataset:
    """Read parquet files, with random access and without loading them.

    Args:
        paths: A path, a pattern (``data/*.parquet``, ``**`` for folders below; matches are sorted), a URL that fsspec
            knows (``s3://...``, patterns too), or a list of these, read in the order given.
        columns: The columns to read, which also is the order of a sample's keys; None for all of the first file's.
        name: What progress, origins and errors call it. Left out, the name it has in `interleave`, else "data".

    Returns:
        A random-access dataset. A sample is a dict of a row's columns: numeric lists as read-only numpy views of the
        stored dtype (copy one to keep it for long: a view keeps its column of the row group in memory), numbers, strings
        and nested values as Python objects.

    Nothing is opened here. The first use (``len``, ``print``, iteration) lists the files and reads their footers; which
    files there are is settled then, for this dataset and every worker process. Rows are decoded a row group at a time,
    and ``.shuffle()`` mixes windows of groups, so that reading in shuffled order decodes each about once per process. The
    groups of a window (16, see ``window_blocks``) should fit in `CACHE_BYTES`: write files with ``row_group_size`` of some
    thousand rows. Groups that take more than 20 ms to read are read ahead, in a thread, while you work on those before.

    Raises:
        TypeError, ValueError: If an argument is not one of these. On first use: if the files do not have the same columns,
            or lack one of ``columns``.
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
            raise TypeError(f"read_parquet: columns is a list of names, like columns=['text']; found {columns!r}")
        if not columns or len(set(columns)) < len(columns):
            raise ValueError(f"read_parquet: columns is one name or more, each once; found {list(columns)}")
    return Dataset(ParquetSource(plain_paths(paths, "read_parquet"), None if columns is None else tuple(columns), name))


@dataclass(frozen=True, eq=False, repr=False)
class ParquetSource(Node):
    """Rows of parquet files, numbered through the files in order.

    Decoded row groups are kept, least recently used first out, up to `CACHE_BYTES` per process; files are opened when a
    group of theirs is first needed, at most `MAX_OPEN_FILES` at a time. The list of files and the sizes of their row
    groups are read once and travel to the workers (16 bytes a group and the paths); nothing that is open does.

    Where a group takes long to read, those that come next are read by one thread per process while the consumer works
    (`midstream.sources.read_ahead.Ahead`): in the room that the cache has left, and at most two groups beyond it. That changes
    when groups are read, never which samples come, nor their order, nor the state.

    State: none but the position.
    Resume: decodes the row groups it stands in again; reads no other row again.
    """

    paths: tuple[str, ...]
    columns: tuple[str, ...] | None = None
    name: str | None = None
    kind = "read_parquet"
    _reads_ahead = True
    _kept_slots = (*Node._kept_slots, "_groups")

    @property
    def infinite(self) -> bool:
        """Never."""
        return False

    def _index(self) -> _Index:
        """Files and row groups: read on first use, then kept, pickled too."""
        index: _Index | None = self.__dict__.get("_groups")
        if index is None:
            index = _read_index(self.paths, self.columns)
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
            f"{self.kind}([{', '.join(index.columns)}], {self.length():,} rows in {count(len(index.sizes), 'row group')} of "
            f"{count(len(index.files), 'file')})"
        )

    def _open(self) -> _Groups:
        return _Groups(self._index())

    def _rows(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(at, passes, positions)
        groups: _Groups = self._handle()
        numbers = groups.of(positions)
        inside = positions - groups.starts[numbers]
        parts: dict[int, tuple[I64, Rows]] = {}

        def release(number: int) -> None:
            # Views of a group that leaves the cache would keep it in memory all the same, group after group.
            if number in parts:
                here, rows = parts[number]
                if rows.columns is not None:
                    parts[number] = here, Rows(None, rows.origins, None, rows.columns.own())
                else:
                    parts[number] = here, Rows([_without_views(sample) for sample in rows.samples], rows.origins)

        needed = groups.store.at_hand_first(np.unique(numbers).tolist())
        for number in needed:
            here = np.flatnonzero(numbers == number)
            reader = groups.reader(number, len(here), release)
            if number == needed[0]:
                groups.store.want(needed[:0:-1])  # the thread helps, from the other end
            try:
                parts[number] = here, Rows(None, origins[here], None, reader.columns(inside[here]))
            except Exception:  # one row at a time tells which one it was (bytes that are no text, say)
                found: list[Any] = []
                for row, place in zip(inside[here], here.tolist()):
                    try:
                        found.append(reader.rows(row.reshape(1))[0])
                    except Exception as error:
                        where = f"{groups.index.place_of(number)}, row {row}"
                        found.append(Hole((Failure(at.path, at.origin(origins[place].tolist()), where, error),)))
                parts[number] = here, Rows(found, origins[here])
        return Rows.scatter(len(positions), list(parts.values()))

    def _wants_more(self) -> bool:
        groups: _Groups = self._handle()
        return groups.store.hungry

    def _foretell(self, positions: I64) -> None:
        groups: _Groups = self._handle()
        numbers, first = np.unique(groups.of(positions), return_index=True)
        groups.store.want(numbers[np.argsort(first)].tolist())


def _without_views(sample: Any) -> Any:
    """The sample with arrays of its own."""
    if type(sample) is not dict:
        return sample
    return {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in sample.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Footers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Index:
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


def _read_index(paths: tuple[str, ...], columns: tuple[str, ...] | None) -> _Index:
    files = list_files(paths, "read_parquet")
    # Each footer is a few round trips on an object store, so many are asked for at once.
    with ThreadPoolExecutor(min(16, len(files))) as pool:
        footers = list(watched(pool.map(_read_footer, files), "read_parquet: reading footers", len(files)))
    names = list(footers[0].types) if columns is None else list(columns)
    _check_columns(files, footers, names, everything=columns is None)
    sizes = np.array([size for footer in footers for size in footer.sizes], dtype=np.int64)
    counts = [len(footer.sizes) for footer in footers]
    file_of = np.repeat(np.arange(len(files), dtype=np.int32), counts)
    number_in_file = np.array([number for many in counts for number in range(many)], dtype=np.int32)
    full = sizes > 0
    return _Index(files, names, sizes[full], file_of[full], number_in_file[full])


def _read_footer(file: File) -> _Footer:
    try:
        with _open_parquet(file) as parquet:
            footer, schema = parquet.metadata, parquet.schema_arrow
    except Exception as error:
        raise SourceError(
            f"read_parquet: the footer of {file} cannot be read: {type(error).__name__}: {error}. Is it a complete parquet "
            f"file?"
        ) from error
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"read_parquet: {file} has two columns of the same name: {schema.names}")
    sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    return _Footer(sizes, {field.name: _type_name(field.type) for field in schema})


def _type_name(type_: pa.DataType) -> str:
    """What a type looks like in a sample: how a writer chose to lay it out in memory makes no difference there."""
    types = pa.types
    if types.is_dictionary(type_):
        return _type_name(type_.value_type)
    if types.is_list(type_) or types.is_large_list(type_):
        return f"list<{_type_name(type_.value_type)}>"
    if types.is_struct(type_):
        return f"struct<{', '.join(f'{field.name}: {_type_name(field.type)}' for field in type_)}>"
    return str(type_).removeprefix("large_").removesuffix("_view")


def _check_columns(files: list[File], footers: list[_Footer], names: list[str], everything: bool) -> None:
    """Refuse files that do not have the same columns.

    Raises:
        ValueError: Naming both files and the columns.
    """
    first = footers[0].types
    missing = [name for name in names if name not in first]
    if missing:
        raise ValueError(f"read_parquet: {files[0]} has no column {missing[0]!r}. It has: {', '.join(first)}")
    for file, (_, types) in zip(files[1:], footers[1:]):
        compared = [*names, *(name for name in types if everything and name not in first)]
        differing = [
            f"{name!r}: {first.get(name, 'absent')} in the first, {types.get(name, 'absent')} in the second"
            for name in compared
            if first.get(name) != types.get(name)
        ]
        if differing:
            shared = [name for name in names if first[name] == types.get(name)]
            raise ValueError(
                f"read_parquet: the columns of\n  {files[0]}\n  {file}\ndiffer:{bullet_list(differing)}\nRead what they share "
                f"with columns={shared}, or make them two sources, bring their samples to one form with .map, and join them "
                f"with midstream.concatenate."
            )


def _open_parquet(file: File) -> pq.ParquetFile:
    # Remote reads are gathered into few large ones. Checksums are verified where the writer left some.
    remote = bool(file.url)
    source = file.open() if remote else file.path
    return pq.ParquetFile(source, pre_buffer=remote, page_checksum_verification=True)


# ---------------------------------------------------------------------------------------------------------------------
# Row groups
# ---------------------------------------------------------------------------------------------------------------------

_WATCH = 64
_WASTE = 16


class _Groups:
    """Decoded row groups of one process."""

    def __init__(self, index: _Index) -> None:
        self.index = index
        self.starts: I64 = np.concatenate([[0], np.cumsum(index.sizes)]).astype(np.int64)
        files: OpenFiles[pq.ParquetFile] = OpenFiles(lambda number: _open_parquet(index.files[number]))

        def read(number: int) -> tuple[TableReader, int]:  # no method: a thread that reads does not keep this object
            table = _decode(index, files, number)
            return TableReader(table), table.get_total_buffer_size()

        self.store: Ahead[TableReader] = Ahead(read, lambda: CACHE_BYTES)
        self.decodes = 0
        self.decoded_at: dict[int, int] = {}
        self.rows_decoded = self.rows_used = self.again = 0  # since decodes was last a multiple of _WATCH
        self.warned = False

    def of(self, positions: I64) -> I64:
        """The groups in which rows lie."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def reader(self, number: int, rows: int, release: Callable[[int], None]) -> TableReader:
        """The reader of a group, from which ``rows`` rows will be taken; ``release`` hears which groups are dropped."""
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
        if not self.warned and self.again > _WATCH // 2 and self.rows_used * _WASTE < self.rows_decoded:
            self.warned = True
            _LOG.warning(
                "read_parquet: of %d rows decoded only one is used, because row groups are dropped from the cache (%d MiB, "
                "midstream.sources.parquet.CACHE_BYTES) and soon decoded again: %s takes %.0f MiB. Use "
                ".shuffle(window_blocks=k) with k groups that fit, read fewer columns, or write the files with a smaller "
                "row_group_size.",
                self.rows_decoded // max(1, self.rows_used),
                CACHE_BYTES >> 20,
                self.index.place_of(number),
                self.store.size / (1 << 20),
            )
        self.rows_decoded = self.rows_used = self.again = 0


def _decode(index: _Index, files: OpenFiles[pq.ParquetFile], number: int) -> pa.Table:
    try:
        with files.lend(int(index.file_of[number])) as parquet:
            # In a worker the other cores belong to the other workers.
            threads = get_worker_info() is None
            table = parquet.read_row_group(
                int(index.number_in_file[number]), columns=index.columns, use_threads=threads
            ).select(index.columns)
    except Exception as error:
        raise SourceError(
            f"{index.place_of(number)} cannot be read: {type(error).__name__}: {error}. Restore the file, or leave it out "
            f"of the paths and start a new run: a checkpoint counts its rows."
        ) from error
    if table.num_rows != index.sizes[number]:
        raise SourceError(
            f"{index.place_of(number)} has {table.num_rows} rows, and had {index.sizes[number]} when this dataset was "
            f"first used: the file was replaced. Make the dataset again with read_parquet, and start a new run."
        )
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


class File(NamedTuple):
    """A file that was found.

    Attributes:
        path: Absolute, or in terms of its own file system.
        url: For a remote file the URL or pattern it was found by, which names the file system; "" for a local one.
    """

    path: str
    url: str = ""

    def __str__(self) -> str:
        if not self.url or "://" in self.path:
            return self.path
        return f"{self.url.split('://')[0]}://{self.path.lstrip('/')}"

    def open(self) -> Any:
        """A remote file, opened for reading bytes."""
        # Asked for anew each time: fsspec keeps file systems itself, and makes new ones in a forked process.
        return fsspec.core.url_to_fs(self.url)[0].open(self.path, "rb")


class Closable(Protocol):
    """What `OpenFiles` holds."""

    def close(self) -> None:
        """Close it."""


F = TypeVar("F", bound=Closable)


class OpenFiles(Generic[F]):
    """Files by number, opened as they are needed; the ones used last, at most `MAX_OPEN_FILES`, stay open."""

    def __init__(self, open_file: Callable[[int], F]) -> None:
        self.open_file = open_file
        self.files: OrderedDict[int, F] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, number: int) -> F:
        """An open file."""
        file = self.files.get(number)
        if file is None:
            while len(self.files) >= MAX_OPEN_FILES:
                self.files.popitem(last=False)[1].close()
            file = self.files[number] = self.open_file(number)
        else:
            self.files.move_to_end(number)
        return file

    @contextlib.contextmanager
    def lend(self, number: int) -> Iterator[F]:
        """An open file for one thread alone; another one that asks for the same file meanwhile gets it opened again."""
        with self.lock:
            file = self.files.pop(number, None)
            while file is None and len(self.files) >= MAX_OPEN_FILES:
                self.files.popitem(last=False)[1].close()
        if file is None:
            file = self.open_file(number)
        try:
            yield file
        finally:
            with self.lock:
                spare = self.files.pop(number, None)
                self.files[number] = file
                while len(self.files) > MAX_OPEN_FILES:
                    self.files.popitem(last=False)[1].close()
            if spare is not None:
                spare.close()


def plain_paths(paths: Paths, where: str) -> tuple[str, ...]:
    """Paths, patterns and URLs as strings. Looks at no file."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not isinstance(paths, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in paths):
        raise TypeError(
            f"{where} takes a path, a pattern like 'data/*', a URL, or a list of these; found {paths!r:.200}. (A set or a "
            f"generator has no order of its own: give sorted(...).)"
        )
    plain = tuple(os.fspath(path) for path in paths)
    if not plain or not all(isinstance(path, str) and path for path in plain):
        raise ValueError(f"{where} takes one path or more, none of them empty; found {list(plain)}")
    for path in plain:
        require_text(path, f"{where}: a path")
    return plain


def is_remote(path: str) -> bool:
    """Whether a path is a URL that fsspec opens; ``file://`` is local."""
    return "://" in path and not path.startswith(("file://", "local://"))


def list_files(paths: tuple[str, ...], where: str) -> list[File]:
    """The files that paths, patterns and URLs stand for: in the order given, the matches of a pattern sorted.

    Raises:
        FileNotFoundError: If one of them matches nothing.
        IsADirectoryError: If one of them is a folder.
        ValueError: If a file is matched twice.
    """
    files: list[File] = []
    for path in paths:
        found = _list_remote(path) if is_remote(path) else _list_local(path, where)
        if not found:
            pattern = "no file matches the pattern" if glob.has_magic(path) else "there is no file"
            base = "" if is_remote(path) or os.path.isabs(path) else f" in {os.getcwd()!r}"
            raise FileNotFoundError(f"{where}: {pattern} {path!r}{base}")
        files.extend(found)
    seen: set[str] = set()
    for name in map(str, files):
        if name in seen:
            raise ValueError(
                f"{where}: {name} is matched twice by {list(paths)}, so its rows would be there twice. Name it once; to see "
                f"data more often use .repeat, or midstream.interleave with weights"
            )
        require_text(name, f"{where}: the name of a file")
        seen.add(name)
    return files


def _list_local(path: str, where: str) -> list[File]:
    if "://" in path:
        path = fsspec.core.strip_protocol(path)
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(path):
        raise IsADirectoryError(f"{where}: {path!r} is a folder. Give a pattern, like {os.path.join(path, '*')!r}")
    if os.path.exists(path):  # before it is taken for a pattern: a name may contain brackets
        return [File(path)]
    return [File(match) for match in sorted(glob.glob(path, recursive=True)) if os.path.isfile(match)]


def _list_remote(url: str) -> list[File]:
    system, path = fsspec.core.url_to_fs(url)
    if system.exists(path):  # before it is taken for a pattern: a URL may contain a question mark
        return [File(path, url)]
    return [File(match, url) for match in sorted(system.glob(path))] if glob.has_magic(path) else []


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
