"""Where the lines of a JSON Lines file are."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from midstream.common.progress_bar import with_progress_bar
from midstream.errors import SourceError
from midstream.pipeline.rows import I64
from midstream.sources.files import File, OpenFiles

_LOG = logging.getLogger(__name__)

_CODECS = {".gz": "gzip", ".zst": "zstd"}

_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh": ".bz2",
    b"\xfd7zXZ": ".xz",
    b"PK\x03\x04": ".zip",
}

BOM = b"\xef\xbb\xbf"

WHITE_SPACE = b" \t\r\n"

_CHUNK = 1 << 20  # bytes searched for newlines at a time

_CACHED_FROM = 1 << 20  # smaller files are searched faster than an index is found on disk

_COUNTED_TO = 64 << 20  # lines further into a file than this are named by their byte


def codec_of(path: str) -> str | None:
    return next((codec for suffix, codec in _CODECS.items() if path.lower().endswith(suffix)), None)


class FoundFile(NamedTuple):
    """A file as it was when the dataset was first used; size (bytes) and time of change (ns) only
    of local ones.
    """

    file: File
    size: int
    mtime_ns: int

    def check(self) -> None:
        """Refuse a file that has changed since.

        Raises:
            SourceError: If it has.
        """
        try:
            stat = os.stat(self.file.path)
        except OSError as error:
            raise SourceError(f"read_json: {self.file} cannot be read any more: {error}") from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise SourceError(
                f"read_json: {self.file} has changed since this dataset was first used: it had"
                f" {self.size:,} bytes, last written at {self.mtime_ns} ns, and has"
                f" {stat.st_size:,}, written at {stat.st_mtime_ns} ns. Rows are found by their"
                " place in the file, so what is read now could be anything. Make the dataset again"
                " with read_json."
            )


def find_file(file: File, plain: bool) -> FoundFile:
    if not plain:
        return FoundFile(file, -1, -1)
    if codec_of(file.path) is not None:
        raise ValueError(
            f"read_json: a pattern matches the compressed file {file}, and whether files are"
            " compressed (a stream) or not (random access) is told by the names given. End the"
            " pattern like the files: '*.jsonl' or '*.jsonl.gz'"
        )
    stat = os.stat(file.path)
    return FoundFile(file, stat.st_size, stat.st_mtime_ns)


class LineReader:
    """The open files of one process, and where their rows are."""

    def __init__(self, found: list[FoundFile], offsets: list[I64]) -> None:
        self.found, self.offsets = found, offsets
        self.starts: I64 = np.cumsum([0, *(len(each) - 1 for each in offsets)], dtype=np.int64)
        self.files: OpenFiles[pa.NativeFile] = OpenFiles(
            lambda number: pa.OSFile(found[number].file.path)
        )

    def read(self, number: int, rows: I64) -> list[tuple[int, bytes]]:
        """Start and bytes of some rows of a file.

        Read, not memory-mapped: of a mapped file that is truncated meanwhile, the process would
        die.
        """
        offsets = self.offsets[number]
        starts, ends = offsets[rows].tolist(), offsets[rows + 1].tolist()
        try:
            read_at = self.files.get(number).read_at
            data = [(start, read_at(end - start, start)) for start, end in zip(starts, ends)]
        except OSError as error:
            self.found[number].check()
            raise SourceError(
                f"read_json: {self.found[number].file} cannot be read: {error}"
            ) from error
        self.found[number].check()  # after reading, so that no change goes unnoticed
        return data

    def place_of(self, number: int, start: int) -> str:
        """A row that starts at this byte, in words."""
        file = self.found[number].file
        if start > _COUNTED_TO:
            return f"{file}, the line at byte {start}"
        return f"{file}, line {bytes(self.files.get(number).read_at(start, 0)).count(10) + 1}"


def load_line_index(found: FoundFile) -> I64:
    """Where the rows of a file start, and where the last one ends: int64, shape [rows + 1].

    Taken from the cache folder where it is there; else made, and left there where that is possible.
    """
    if found.size < _CACHED_FROM:
        return _find_rows(found)
    # The name says it all, so that nothing has to be compared: another size or time is another
    # name.
    family = f"jsonl-{hashlib.blake2b(found.file.path.encode(), digest_size=16).hexdigest()}-"
    folder = Path(os.environ.get("MIDSTREAM_CACHE") or os.path.expanduser("~/.cache/midstream"))
    path = folder / f"{family}{found.size}-{found.mtime_ns}.npy"
    try:
        return _read_index(path, found)
    except (OSError, ValueError):
        pass  # not there, or not what we write
    offsets = _find_rows(found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{family}*.npy"):
            if stale != path:  # another process may just have made ours
                stale.unlink(missing_ok=True)
        _write_index(path, offsets)
        return _read_index(path, found)
    except (OSError, ValueError) as error:
        _LOG.warning(
            "the index of %s stays in memory: %s. $MIDSTREAM_CACHE names the folder it goes to.",
            path,
            error,
        )
        return offsets


def _read_index(path: Path, found: FoundFile) -> I64:
    offsets = np.lib.format.open_memmap(path, mode="r")
    if (
        offsets.dtype != np.int64
        or offsets.ndim != 1
        or not len(offsets)
        or offsets[-1] != found.size
    ):
        raise ValueError(f"{path} is not the index of {found.file}")
    return np.asarray(offsets)


def _write_index(path: Path, offsets: I64) -> None:
    """All of it or nothing: another process may be reading, or writing the same."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, offsets)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _find_rows(found: FoundFile) -> I64:
    path = found.file.path
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(8)
            for magic, suffix in _MAGIC.items():
                if head.startswith(magic):
                    raise ValueError(
                        f"read_json: {path} is compressed ({suffix}) and not named so. Files whose"
                        f" names end in {' or '.join(_CODECS)} are read as streams; decompress"
                        " others first"
                    )
            file.seek(0)
            starts = _row_starts(file, 3 if head.startswith(BOM) else 0)
    except OSError as error:
        raise SourceError(f"read_json: {path} cannot be read: {error}") from error
    found.check()  # it may be growing while we read
    return np.concatenate([*starts, [found.size]]).astype(np.int64, copy=False)


def _row_starts(file: io.FileIO, first: int) -> list[I64]:
    """The first byte of every line that is not blank, chunk by chunk."""
    room = bytearray(_CHUNK)
    buffer = np.frombuffer(room, dtype=np.uint8)
    starts: list[I64] = []
    base, line = 0, first  # bytes read, and start of the line that goes on into the next chunk
    num_chunks = -(-os.fstat(file.fileno()).st_size // _CHUNK)
    chunks = iter(lambda: file.readinto(room), 0)
    for size in with_progress_bar(
        chunks, f"read_json: finding the rows of {os.path.basename(str(file.name))}", num_chunks
    ):
        ends = np.flatnonzero(buffer[:size] == 10) + base
        if len(ends):
            begins = np.concatenate([[line], ends[:-1] + 1])
            starts.append(_not_blank(file, buffer, base, begins, ends))
            line = int(ends[-1]) + 1
        base += size
        file.seek(base)  # a look at a blank line may have moved it
    if line < base:
        starts.append(_not_blank(file, buffer, base, np.array([line]), np.array([base])))
    return starts


def _not_blank(
    file: io.FileIO, buffer: npt.NDArray[np.uint8], base: int, begins: I64, ends: I64
) -> I64:
    """The begins of lines with more than white space between begin and end."""
    # All but the first begin in the buffer, so a look at one byte settles nearly every line.
    first = buffer[np.maximum(begins - base, 0)]
    white = (first == 32) | (first == 13) | (first == 9) | (begins < base)
    keep = (ends > begins) & ~((ends == begins + 1) & white & (begins >= base))
    for index in np.flatnonzero(keep & white).tolist():
        keep[index] = not _is_blank(file, int(begins[index]), int(ends[index]))
    return np.asarray(begins[keep])


def _is_blank(file: io.FileIO, begin: int, end: int) -> bool:
    file.seek(begin)
    while begin < end:
        data = file.read(min(end - begin, 4096))
        if not data:
            return False
        if data.strip(WHITE_SPACE):
            return False
        begin += len(data)
    return True
