"""Finds and reads the rows of JSON Lines files, by an index of where each starts, cached on disk."""

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

_CODECS = {".gz": "gzip", ".zst": "zstd"}  # compression by suffix

_MAGIC = {  # suffixes by the first bytes of a compressed file
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh": ".bz2",
    b"\xfd7zXZ": ".xz",
    b"PK\x03\x04": ".zip",
}

BOM = b"\xef\xbb\xbf"

WHITE_SPACE = b" \t\r\n"

_CHUNK = 1 << 20  # bytes searched for newlines at once

_CACHED_FROM = 1 << 20  # bytes: searching a smaller file is faster than loading its index

_COUNTED_TO = 64 << 20  # bytes: beyond them messages name a line by its byte, not its number


def codec_of(path: str) -> str | None:
    """The compression of a file, by the end of its name; None for a plain file."""
    return next((codec for suffix, codec in _CODECS.items() if path.lower().endswith(suffix)), None)


class FoundFile(NamedTuple):
    """A file as it was when the dataset was first used.

    Attributes:
        file: The file.
        size: Bytes; -1 for a file that is read as a stream.
        mtime_ns: Time of the last change; -1 for a file that is read as a stream.
    """

    file: File
    size: int
    mtime_ns: int

    def check(self) -> None:
        """Check that the file has not changed since.

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
                " byte offsets, which may be wrong now. Make the dataset again with read_json."
            )


def find_file(file: File, random_access: bool) -> FoundFile:
    """Record size and time of change of a file.

    Raises:
        ValueError: If the file is to be read with random access and is compressed.
    """
    if not random_access:
        return FoundFile(file, -1, -1)
    if codec_of(file.path) is not None:
        raise ValueError(
            f"read_json: a pattern matches the compressed file {file}, but only the end of the"
            " pattern decides whether files are read as compressed (a stream) or not (random"
            " access). End the pattern as the files end: '*.jsonl' or '*.jsonl.gz'"
        )
    stat = os.stat(file.path)
    return FoundFile(file, stat.st_size, stat.st_mtime_ns)


class LineReader:
    """Reads rows of the files by number, in one process.

    Attributes:
        found: The files.
        offsets: For each file where its rows start, see `load_line_index`.
        starts: int64, shape [files + 1]: the number of each file's first row, then the number of
            rows.
        files: The open files.
    """

    def __init__(self, found: list[FoundFile], offsets: list[I64]) -> None:
        self.found, self.offsets = found, offsets
        self.starts: I64 = np.cumsum([0, *(len(each) - 1 for each in offsets)], dtype=np.int64)
        self.files: OpenFiles[pa.NativeFile] = OpenFiles(
            lambda number: pa.OSFile(found[number].file.path)
        )

    def read(self, number: int, rows: I64) -> list[bytes]:
        """The bytes of some rows of a file.

        Files are not memory-mapped: if a mapped file is truncated while it is read, the process
        dies of a bus error.

        Args:
            number: Of the file.
            rows: Row numbers within the file, int64, shape [k].

        Raises:
            SourceError: If the file cannot be read or has changed since the dataset's first use.
        """
        offsets = self.offsets[number]
        starts, ends = offsets[rows].tolist(), offsets[rows + 1].tolist()
        try:
            read_at = self.files.get(number).read_at
            lines = [read_at(end - start, start) for start, end in zip(starts, ends)]
        except OSError as error:
            self.found[number].check()
            raise SourceError(
                f"read_json: {self.found[number].file} cannot be read: {error}"
            ) from error
        self.found[number].check()  # after reading, so that no change goes unnoticed
        return lines

    def describe(self, number: int, row: int) -> str:
        """The file and line of a row of the file with this number, for messages."""
        file, start = self.found[number].file, int(self.offsets[number][row])
        if start > _COUNTED_TO:
            return f"{file}, the line at byte {start}"
        return f"{file}, line {bytes(self.files.get(number).read_at(start, 0)).count(10) + 1}"


def load_line_index(found: FoundFile) -> I64:
    """The byte at which each row starts, and the size of the file: int64, shape [rows + 1].

    The index is loaded from the cache folder. If it is not there, it is made, and written to that
    folder if possible.
    """
    if found.size < _CACHED_FROM:
        return _find_rows(found)
    # The name holds the file's size and time of change, so an index of an older file has another
    # name and need not be compared.
    family = f"jsonl-{hashlib.blake2b(found.file.path.encode(), digest_size=16).hexdigest()}-"
    folder = Path(os.environ.get("MIDSTREAM_CACHE") or os.path.expanduser("~/.cache/midstream"))
    path = folder / f"{family}{found.size}-{found.mtime_ns}.npy"
    try:
        return _read_index(path, found)
    except (OSError, ValueError):
        pass  # not there, or not an index
    offsets = _find_rows(found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{family}*.npy"):
            if stale != path:  # another process may just have written this one
                stale.unlink(missing_ok=True)
        _write_index(path, offsets)
        return _read_index(path, found)
    except (OSError, ValueError) as error:
        _LOG.warning(
            "the index of %s stays in memory: %s. It belongs in the folder $MIDSTREAM_CACHE.",
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
    """Write an index atomically, for another process may be reading or writing the same file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, offsets)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _find_rows(found: FoundFile) -> I64:
    """Make the index of a file by a search for newlines.

    Raises:
        SourceError: If the file cannot be read, or changes meanwhile.
        ValueError: If the file is compressed.
    """
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
    found.check()  # it may have grown meanwhile
    return np.concatenate([*starts, [found.size]]).astype(np.int64, copy=False)


def _row_starts(file: io.FileIO, first: int) -> list[I64]:
    """The first byte of every line that is not blank: one array per chunk of the file.

    Args:
        file: The file, at its start.
        first: The byte at which the first line starts.
    """
    memory = bytearray(_CHUNK)
    buffer = np.frombuffer(memory, dtype=np.uint8)
    starts: list[I64] = []
    base, line = 0, first  # bytes read, and start of the line that continues in the next chunk
    num_chunks = -(-os.fstat(file.fileno()).st_size // _CHUNK)
    chunks = iter(lambda: file.readinto(memory), 0)
    for size in with_progress_bar(
        chunks, f"read_json: finding the rows of {os.path.basename(str(file.name))}", num_chunks
    ):
        ends = np.flatnonzero(buffer[:size] == 10) + base
        if len(ends):
            begins = np.concatenate([[line], ends[:-1] + 1])
            starts.append(_not_blank(file, buffer, base, begins, ends))
            line = int(ends[-1]) + 1
        base += size
        file.seek(base)  # _not_blank may have moved it
    if line < base:
        starts.append(_not_blank(file, buffer, base, np.array([line]), np.array([base])))
    return starts


def _not_blank(
    file: io.FileIO, buffer: npt.NDArray[np.uint8], base: int, begins: I64, ends: I64
) -> I64:
    """The starts of those lines that hold more than white space.

    Args:
        file: The file, from which lines that may be blank are read once more.
        buffer: The chunk of the file that was read last.
        base: The byte of the file at which that chunk starts.
        begins: First byte of each line, int64, shape [k].
        ends: The byte of each line's newline, int64, shape [k].
    """
    # All lines but the first begin in the buffer, so for nearly every line one byte decides.
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
