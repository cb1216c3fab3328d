"""JSON Lines: plain files by random access over an index of byte offsets, compressed and remote ones as streams."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator as Iter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from midstream._state import State
from midstream.core import I64, U64, Dataset, Iterator, Lane, Place, Rows
from midstream.errors import SourceError
from midstream.failures import Failure, Hole
from midstream.sources._files import PathLike, as_paths, is_local, open_file, resolve
from midstream.sources.iterable import ShardIterator, Shards
from midstream.sources.sequence import row_origins

_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_SCAN = 16 << 20


def read_json(paths: PathLike | Sequence[PathLike], *, name: str | None = None) -> Dataset:
    """Rows of JSON Lines files: one JSON value on each line; blank lines are skipped.

    Args:
        paths: A path, glob (sorted) or fsspec URL, or a list of them, read in this order.
        name: What progress, origins and errors call the source.

    Plain local files have random access. The offsets of their lines are found once and kept under ``MIDSTREAM_CACHE``
    (else ``~/.cache/midstream``), for each file as it is (path, size, time of change). As soon as one path is compressed
    (``.gz``, ``.zst``) or remote, the source is a stream with one shard for each file.

    A line that is not JSON is one lost sample, reported with its file and line.

    Raises (when first read):
        FileNotFoundError: If a path or glob matches nothing.

    >>> import tempfile, pathlib, midstream as ms
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "a.jsonl")
    ...     _ = path.write_text('{"x": 1}\\n{"x": 2}\\n')
    ...     ms.read_json(path).rows([1])
    [{'x': 2}]
    """
    return JsonSource(as_paths(paths, "read_json"), name)


@dataclass(frozen=True, eq=False, repr=False)
class JsonSource(Dataset):
    """Rows of JSON Lines files.

    State: random access: none but the position. Stream: that of `ShardIterator`, a shard being a file.
    Resume: random access: reads nothing again. Stream: the file in progress is read again from its start.
    """

    paths: tuple[str, ...]
    name: str | None = None
    kind = "read_json"
    _kept_slots = ("_waiting", "_epoch", "_files_found")

    @property
    def random_access(self) -> bool:
        """Whether every file is plain and local; the names tell."""
        return all(is_local(path) and Path(path).suffix not in _COMPRESSED for path in self.paths)

    @property
    def infinite(self) -> bool:
        """Never."""
        return False

    def _files(self) -> list[str]:
        files: list[str] | None = self.__dict__.get("_files_found")
        if files is None:
            files = resolve(self.paths, "read_json")
            self._set("_files_found", files)
        return files

    def _length(self) -> int | None:
        return int(self._handle().starts[-1])

    def spec_fields(self) -> dict[str, State]:
        """Number of files, and of rows where it is known; no paths, which may move."""
        fields: dict[str, State] = {"files": len(self._files())}
        if self.random_access:
            fields["length"] = self.length()
        return fields

    def summary(self) -> str:
        """Number of files and rows."""
        rows = f", {self.length():,} rows" if self.random_access else ""
        return f"{self.kind}({len(self._files())} files{rows})"

    def full_lanes(self, num_lanes: int, block: int) -> tuple[int, str]:
        """Streams: one for each file."""
        if self.random_access:
            return super().full_lanes(num_lanes, block)
        return min(num_lanes, len(self._files())), f"read_json has {len(self._files())} compressed or remote files"

    def max_lanes(self) -> tuple[int, str] | None:
        """Streams: as many as there are files."""
        if self.random_access:
            return None
        count = len(self._files())
        return count, (
            f"source {self.name or self.kind!r} reads {count} compressed or remote file{'s' if count > 1 else ''}, one shard "
            f"each. Use fewer workers, split the data into more files, or decompress it: plain local files have random access"
        )

    def _open(self) -> _Lines:
        return _Lines(self._files())

    def _rows(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(at.source, passes, positions)
        samples: list[Any] = []
        for file, line, data in self._handle().read(positions, at.path):
            try:
                samples.append(json.loads(data))
            except ValueError as error:
                where = f"{file}: row {line}"
                origin = at.origin(origins[len(samples)].tolist())
                samples.append(Hole((Failure(at.path, origin, f"json.loads @ {where}", error),)))
        return Rows(samples, origins)

    def _iterate(self, at: Place, lane: Lane, key: int, pass_: int) -> Iterator:
        files = self._files()
        return ShardIterator(_JsonShards(files), at, lane, pass_, len(files), False)


class _Lines:
    """The lines of plain files by number, over memory maps."""

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.stamps = [_stamp(path) for path in files]
        self.offsets = [_offsets(path, stamp) for path, stamp in zip(files, self.stamps)]
        self.starts = np.concatenate([[0], np.cumsum([len(offsets) for offsets in self.offsets])]).astype(np.int64)
        self.maps: list[Any] = [None] * len(files)

    def read(self, positions: I64, where: str) -> Iter[tuple[str, int, bytes]]:
        """File, row in it and bytes of each position."""
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        for number in set(numbers.tolist()):
            if _stamp(self.files[number]) != self.stamps[number]:
                raise SourceError(
                    f"{where}: {self.files[number]} was changed while it is in use, so its rows are no longer where they were. "
                    f"Start again from data that stays as it is."
                )
        for number, row in zip(numbers.tolist(), (positions - self.starts[numbers]).tolist()):
            data = self.maps[number]
            if data is None:
                data = self.maps[number] = _map(self.files[number])
            offsets = self.offsets[number]
            start = int(offsets[row])
            end = data.find(b"\n", start)
            yield self.files[number], row, data[start : end if end >= 0 else len(data)]


def _stamp(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise SourceError(f"read_json: {path} cannot be read: {error}") from error
    return found.st_size, found.st_mtime_ns


def _map(path: str) -> Any:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _offsets(path: str, stamp: tuple[int, int]) -> I64:
    """Where the lines start, int64: from the cache, else found and cached."""
    folder = Path(os.environ.get("MIDSTREAM_CACHE") or Path.home() / ".cache" / "midstream")
    key = hashlib.blake2b(f"{path}|{stamp[0]}|{stamp[1]}".encode(), digest_size=16).hexdigest()
    cached = folder / f"{key}.lines.npy"
    with contextlib.suppress(OSError, ValueError):
        offsets: I64 = np.load(cached, mmap_mode="r")
        if offsets.dtype == np.int64 and offsets.ndim == 1:
            return offsets
    offsets = find_lines(path)
    with contextlib.suppress(OSError):  # a home that cannot be written costs the scan each time, nothing else
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, offsets)
            os.replace(temporary, cached)
        except BaseException:
            os.unlink(temporary)
            raise
    return offsets


def find_lines(path: str) -> I64:
    """Offsets of the lines of a file that are not blank, int64."""
    data = _map(path)
    if not len(data):
        return np.empty(0, dtype=np.int64)
    view = np.frombuffer(data, dtype=np.uint8)
    ends = [np.flatnonzero(view[start : start + _SCAN] == ord("\n")) + start for start in range(0, len(view), _SCAN)]
    end = np.concatenate(ends)
    if not len(end) or end[-1] != len(view) - 1:
        end = np.append(end, len(view))
    start = np.concatenate([[0], end[:-1] + 1])
    # Only short lines can be blank; those are looked at one by one.
    keep = np.ones(len(start), dtype=bool)
    for index in np.flatnonzero(end - start < 8).tolist():
        keep[index] = bool(data[int(start[index]) : int(end[index])].strip())
    return start[keep].astype(np.int64)


class _JsonShards(Shards):
    """Compressed or remote files, a shard each."""

    function = "json.loads"
    survives = True

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def open(self, shard: int, state: State) -> Iter[Any]:
        return _JsonStream(self.files[shard])


class _JsonStream:
    """Parsed lines of one file. Goes on after a line that is not JSON."""

    def __init__(self, path: str) -> None:
        self.path = path
        raw: Any = open(path, "rb") if is_local(path) else open_file(path, "read_json")  # noqa: SIM115
        compression = _COMPRESSED.get(Path(path).suffix)
        if compression is not None:
            raw = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression)
        self.raw, self.left, self.done = raw, b"", False
        self.lines: list[bytes] = []

    def __iter__(self) -> _JsonStream:
        return self

    def __next__(self) -> Any:
        while True:
            while not self.lines:
                if self.done:
                    raise StopIteration
                self._read()
            line = self.lines.pop()
            if line.strip():
                return json.loads(line)

    def _read(self) -> None:
        try:
            data = self.raw.read(1 << 20)
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"read_json: {self.path} cannot be decompressed: {error}. Is it cut off?") from error
        if not data:
            self.done = True
            self.lines = [self.left]
            self.raw.close()
            return
        *whole, self.left = (self.left + data).split(b"\n")
        self.lines = whole[::-1]
