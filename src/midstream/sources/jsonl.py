"""JSON Lines: plain local files with random access, compressed and remote ones as streams."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator as Iter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

try:
    import orjson as _orjson
except ImportError:  # the extra ``fast``; the same samples without it, later
    _orjson = None  # type: ignore[assignment]

from midstream.common.plain_state import State
from midstream.common.progress_bar import watched
from midstream.common.validation import require_name
from midstream.dataset import Dataset
from midstream.errors import SourceError
from midstream.pipeline.failures import Failure, Hole
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import Node, Place
from midstream.pipeline.rows import I64, U64, Rows
from midstream.sources.iterable import ShardIterator, Shards
from midstream.sources.parquet import File, OpenFiles, Paths, count, is_remote, list_files, plain_paths
from midstream.sources.sequence import row_origins

_LOG = logging.getLogger(__name__)
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"PK\x03\x04": ".zip"}
_BOM = b"\xef\xbb\xbf"
_WHITE = b" \t\r\n"
_EVERY = 256  # rows between two states of a stream
_CHUNK = 1 << 20  # bytes searched for newlines at a time
_CACHED_FROM = 1 << 20  # smaller files are searched faster than an index is found on disk
_COUNTED_TO = 64 << 20  # lines further into a file than this are named by their byte


def read_json(paths: Paths, *, name: str | None = None) -> Dataset:
    """Read JSON Lines: one JSON value per line, blank lines skipped.

    Args:
        paths: A path, a pattern (``data/*.jsonl``, ``**`` for folders below; matches are sorted), a URL that fsspec knows
            (``s3://...``, patterns too), or a list of these, read in the order given.
        name: What progress, origins and errors call it. Left out, the name it has in `interleave`, else "data".

    Returns:
        Plain local files: a random-access dataset. With a ``.gz`` or ``.zst`` file or a URL among ``paths``: a stream
        with one shard per file, so lanes, and with them workers and ranks, are at most as many as files. Which of the two
        is told by the names alone. A sample is what ``json.loads`` makes of a line (with orjson installed, the extra
        ``fast``, the same in less time).

    Nothing is opened here. The first use (``len``, ``print``, iteration) lists the files; which there are is settled then,
    for this dataset and every worker process. For random access it also finds where each line starts (about 1 GB/s); of
    files above 1 MiB that index (8 bytes a row) is kept in the folder ``$MIDSTREAM_CACHE``, by default
    ``~/.cache/midstream``, for the next time.

    A line that is not JSON is one lost sample: `SampleError` names the file and the line, and the next one follows.

    Raises:
        TypeError, ValueError: If an argument is not one of these. On first use: if a file is compressed and its name, or
            the pattern that matched it, does not end so.
        FileNotFoundError: On first use, if a path or pattern matches nothing.
        SourceError: On reading, if a file vanished or is not what it was on first use.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import midstream as ms
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.jsonl").write_text('{"id": 0}\\n\\n{"id": 1}\\n')
    ...     ds = ms.read_json(f"{folder}/*.jsonl", name="ids")
    ...     print(ds)
    ...     print(ds.rows([1, 0]))
    ids: read_json(2 rows in 1 file)  # random access, 2
    [{'id': 1}, {'id': 0}]
    """
    require_name(name, "read_json")
    return Dataset(JsonSource(plain_paths(paths, "read_json"), name))


@dataclass(frozen=True, eq=False, repr=False)
class JsonSource(Node):
    """Lines of JSON files, numbered through the files in order; in a stream, row r of file f is row ``r * files + f``.

    State: random access: none but the position. A stream: ``[file, rows read of it, last row that was no JSON, rows at its
        last state, [rows, lines, byte]]``; that state is taken every 256 rows and says where in the file they end.
    Resume: random access reads nothing again. A stream parses at most 256 rows again; to get there it seeks in a plain
        file, and reads a compressed one again from its start (without parsing it).
    """

    paths: tuple[str, ...]
    name: str | None = None
    kind = "read_json"
    _kept_slots = (*Node._kept_slots, "_files")

    @property
    def random_access(self) -> bool:
        """Of plain local files."""
        return not any(map(_is_stream, self.paths))

    @property
    def infinite(self) -> bool:
        """Never."""
        return False

    def _found(self) -> list[_Found]:
        """The files: listed on first use, then kept, pickled too."""
        files: list[_Found] | None = self.__dict__.get("_files")
        if files is None:
            plain = self.random_access
            files = [_look_at(file, plain) for file in list_files(self.paths, "read_json")]
            self._set("_files", files)
        return files

    def _offsets(self) -> list[I64]:
        """Where the rows of each file start. Not pickled: another process finds it on disk."""
        offsets: list[I64] | None = self.__dict__.get("_row_offsets")
        if offsets is None:
            offsets = [_load_index(found) for found in watched(self._found(), "read_json: finding the rows of files")]
            self._set("_row_offsets", offsets)
        return offsets

    def _length(self) -> int | None:
        return sum(len(offsets) - 1 for offsets in self._offsets())

    def spec_fields(self) -> dict[str, State]:
        """How many files and, with random access, rows; no paths, so that data may move."""
        fields: dict[str, State] = {"num_files": len(self._found())}
        if self.random_access:
            fields["length"] = self.length()
        return fields

    def summary(self) -> str:
        """Number of files and, with random access, rows."""
        files = count(len(self._found()), "file")
        return f"{self.kind}({self.length():,} rows in {files})" if self.random_access else f"{self.kind}({files})"

    def full_lanes(self, num_lanes: int, block: int) -> tuple[int, str]:
        """In a stream one for each file."""
        if self.random_access:
            return super().full_lanes(num_lanes, block)
        return min(num_lanes, len(self._found())), f"read_json has {count(len(self._found()), 'file')}"

    def max_lanes(self) -> tuple[int, str] | None:
        """In a stream as many as there are files."""
        if self.random_access:
            return None
        number = len(self._found())
        return number, (
            f"source {self.name or 'data'!r} is read_json of {count(number, 'file')}, read as a stream because a compressed or "
            f"remote one is among them, and each file is one shard. Use fewer workers, split the data into more files, or "
            f"give it plain local files: they have random access and feed any number of workers"
        )

    def _open(self) -> _Lines:
        return _Lines(self._found(), self._offsets())

    def _rows(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(at, passes, positions)
        lines: _Lines = self._handle()
        numbers = np.searchsorted(lines.starts, positions, side="right") - 1
        inside = positions - lines.starts[numbers]
        samples: list[Any] = [None] * len(positions)
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            data = lines.read(number, inside[here])
            for place, (start, line) in zip(here.tolist(), data):
                try:
                    samples[place] = parse(line)
                except Exception as error:
                    where = lines.place_of(number, start)
                    origin = at.origin(origins[place].tolist())
                    samples[place] = Hole((Failure(at.path, origin, "json.loads", _not_json(where, line, error)),))
        return Rows(samples, origins)

    def reads_again(self) -> str:
        """See `Dataset.reads_again`."""
        return "at most 256 rows of a lane"

    def _iterate(self, at: Place, lane: Lane, key: int, pass_: int) -> Iterator:
        files = [found.file for found in self._found()]
        return ShardIterator(_JsonShards(files), at, lane, pass_, len(files), False)


_ANY_DIGIT = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * 19  # what orjson makes a float of
_DEEP = 900  # orjson nests deeper than json, whose limit is Python's


def parse(line: bytes) -> Any:
    """What ``json.loads`` makes of a line, by orjson where that is installed and makes the same of it.

    Whatever orjson refuses (NaN, lone surrogates, bytes that are no text, ...) and whatever it reads differently (integers of
    more than 64 bits) is left to ``json``, which also words the errors.

    >>> parse(b'{"a": [1, NaN, 123456789012345678901234567890]}')
    {'a': [1, nan, 123456789012345678901234567890]}
    """
    if (
        _orjson is not None
        and line.translate(_ANY_DIGIT).find(_LONG_NUMBER) < 0
        and (len(line) < _DEEP or line.count(b"[") + line.count(b"{") < _DEEP)
    ):
        try:
            return _orjson.loads(line)
        except ValueError:
            pass
    return json.loads(str(line, "utf-8"))


def _codec(path: str) -> str | None:
    return next((codec for suffix, codec in _CODECS.items() if path.lower().endswith(suffix)), None)


def _is_stream(path: str) -> bool:
    return is_remote(path) or _codec(path) is not None


def _not_json(where: str, line: bytes, error: Exception) -> ValueError:
    """The error of one line. The parser's own counts lines and columns of that line alone."""
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} (column {min(error.pos, len(error.doc.rstrip())) + 1})"
    else:
        reason = f"{type(error).__name__}: {error}"
    line = line.strip()
    text = line[:80].decode("utf-8", "replace") + ("..." if len(line) > 80 else "")
    hint = " read_json takes one JSON value per line; is this one value over several lines?" if line in _OPENING else ""
    result = ValueError(f"{where} is not JSON: {reason}: {text!r}.{hint}")
    result.__cause__ = error
    return result


_OPENING = (b"[", b"{", b"[{", b"]", b"}", b"},", b"}]")


# ---------------------------------------------------------------------------------------------------------------------
# Random access
# ---------------------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """A file as it was when the dataset was first used; size (bytes) and time of change (ns) only of local ones."""

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
                f"read_json: {self.file} has changed since this dataset was first used: it had {self.size:,} bytes, last "
                f"written at {self.mtime_ns} ns, and has {stat.st_size:,}, written at {stat.st_mtime_ns} ns. Rows are found "
                f"by their place in the file, so what is read now could be anything. Make the dataset again with read_json."
            )


def _look_at(file: File, plain: bool) -> _Found:
    if not plain:
        return _Found(file, -1, -1)
    if _codec(file.path) is not None:
        raise ValueError(
            f"read_json: a pattern matches the compressed file {file}, and whether files are compressed (a stream) or not "
            f"(random access) is told by the names given. End the pattern like the files: '*.jsonl' or '*.jsonl.gz'"
        )
    stat = os.stat(file.path)
    return _Found(file, stat.st_size, stat.st_mtime_ns)


class _Lines:
    """The open files of one process, and where their rows are."""

    def __init__(self, found: list[_Found], offsets: list[I64]) -> None:
        self.found, self.offsets = found, offsets
        self.starts: I64 = np.cumsum([0, *(len(each) - 1 for each in offsets)], dtype=np.int64)
        self.files: OpenFiles[pa.NativeFile] = OpenFiles(lambda number: pa.OSFile(found[number].file.path))

    def read(self, number: int, rows: I64) -> list[tuple[int, bytes]]:
        """Start and bytes of some rows of a file.

        Read, not memory-mapped: of a mapped file that is truncated meanwhile, the process would die.
        """
        offsets = self.offsets[number]
        starts, ends = offsets[rows].tolist(), offsets[rows + 1].tolist()
        try:
            read_at = self.files.get(number).read_at
            data = [(start, read_at(end - start, start)) for start, end in zip(starts, ends)]
        except OSError as error:
            self.found[number].check()
            raise SourceError(f"read_json: {self.found[number].file} cannot be read: {error}") from error
        self.found[number].check()  # after reading, so that no change goes unnoticed
        return data

    def place_of(self, number: int, start: int) -> str:
        """A row that starts at this byte, in words."""
        file = self.found[number].file
        if start > _COUNTED_TO:
            return f"{file}, the line at byte {start}"
        return f"{file}, line {bytes(self.files.get(number).read_at(start, 0)).count(10) + 1}"


def _load_index(found: _Found) -> I64:
    """Where the rows of a file start, and where the last one ends: int64, shape [rows + 1].

    Taken from the cache folder where it is there; else made, and left there where that is possible.
    """
    if found.size < _CACHED_FROM:
        return _find_rows(found)
    # The name says it all, so that nothing has to be compared: another size or time is another name.
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
        _LOG.warning("the index of %s stays in memory: %s. $MIDSTREAM_CACHE names the folder it goes to.", path, error)
        return offsets


def _read_index(path: Path, found: _Found) -> I64:
    offsets = np.lib.format.open_memmap(path, mode="r")
    if offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets) or offsets[-1] != found.size:
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


def _find_rows(found: _Found) -> I64:
    path = found.file.path
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(8)
            for magic, suffix in _MAGIC.items():
                if head.startswith(magic):
                    raise ValueError(
                        f"read_json: {path} is compressed ({suffix}) and not named so. Files whose names end in "
                        f"{' or '.join(_CODECS)} are read as streams; decompress others first"
                    )
            file.seek(0)
            starts = _row_starts(file, 3 if head.startswith(_BOM) else 0)
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
    for size in watched(chunks, f"read_json: finding the rows of {os.path.basename(str(file.name))}", num_chunks):
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


def _not_blank(file: io.FileIO, buffer: npt.NDArray[np.uint8], base: int, begins: I64, ends: I64) -> I64:
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
        if data.strip(_WHITE):
            return False
        begin += len(data)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------------


class _JsonShards(Shards):
    """One shard per file."""

    function = "json.loads"
    survives = True
    every = _EVERY

    def __init__(self, files: list[File]) -> None:
        self.files = files
        self.reading: _LineStream | None = None

    def open(self, shard: int, state: State) -> Iter[Any]:
        self.reading = _LineStream(self.files[shard], state or [0, 0, 0])
        return self.reading

    def state(self) -> State:
        assert self.reading is not None
        return [self.reading.row, self.reading.line, self.reading.byte]


class _LineStream:
    """Samples of one file. No generator: after a line that is not JSON it goes on with the next."""

    def __init__(self, file: File, state: list[int]) -> None:
        self.file = file
        self.row, self.line, self.byte = state  # rows and lines read, and the byte that comes next (decompressed)
        self.data = self._open()
        self.ended = False
        self.damage: SourceError | None = None

    def _open(self) -> io.BufferedReader:
        raw = self.file.open() if self.file.url else pa.OSFile(self.file.path)
        codec = _codec(self.file.path)
        if codec is None:
            raw.seek(self.byte)
            return io.BufferedReader(raw, 1 << 20)
        data = io.BufferedReader(pa.CompressedInputStream(raw, codec), 1 << 20)
        left = self.byte
        while left and (skipped := len(data.read(min(left, 1 << 20)))):
            left -= skipped
        return data  # should the file be shorter now, the rows to be read again are missing, and that is noticed

    def __iter__(self) -> _LineStream:
        return self

    def __next__(self) -> Any:
        while True:
            line = self._read()
            if not line:
                raise StopIteration
            if not line.strip(_WHITE):
                continue
            self.row += 1
            try:
                return parse(line)
            except Exception as error:
                raise _not_json(f"{self.file}, line {self.line}", line, error) from error

    def _read(self) -> bytes:
        if self.damage is not None:
            raise self.damage  # asked again, it must not look like the end
        if self.ended:
            return b""
        try:
            line = self.data.readline()
        except Exception as error:
            self.damage = SourceError(
                f"read_json: {self.file} cannot be read beyond line {self.line}: {type(error).__name__}: {error}. Is it "
                f"complete?"
            )
            raise self.damage from error
        if not self.line:
            self.byte, line = (3, line[3:]) if line.startswith(_BOM) else (0, line)
        if not line:
            self.ended = True
            self.data.close()
        self.line += bool(line)
        self.byte += len(line)
        return line
