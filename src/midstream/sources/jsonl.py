"""JSON Lines: plain local files with random access, compressed and remote ones as streams."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator as Iter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from midstream.common.plain_state import State
from midstream.common.progress_bar import with_progress_bar
from midstream.common.validation import require_name
from midstream.dataset import Dataset
from midstream.errors import SourceError
from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node, row_origins
from midstream.pipeline.rows import I64, U64, Rows
from midstream.sources.files import File, Paths, count, is_remote, list_files, plain_paths
from midstream.sources.json_lines import (
    BOM,
    WHITE_SPACE,
    FoundFile,
    LineReader,
    codec_of,
    find_file,
    load_line_index,
)
from midstream.sources.shards import ShardIterator, Shards

try:
    import orjson as _orjson
except ImportError:  # the extra ``fast``; the same samples without it, later
    _orjson = None  # type: ignore[assignment]

_EVERY = 256  # rows between two states of a stream


def read_json(paths: Paths, *, name: str | None = None) -> Dataset:
    """Read JSON Lines: one JSON value per line, blank lines skipped.

    Args:
        paths: A path, a pattern (``data/*.jsonl``, ``**`` for folders below; matches are sorted), a
            URL that fsspec knows (``s3://...``, patterns too), or a list of these, read in the
            order given.
        name: What progress, origins and errors call it. Left out, the name it has in `interleave`,
            else "data".

    Returns:
        Plain local files: a random-access dataset. With a ``.gz`` or ``.zst`` file or a URL among
        ``paths``: a stream with one shard per file, so lanes, and with them workers and ranks, are
        at most as many as files. Which of the two is told by the names alone. A sample is what
        ``json.loads`` makes of a line (with orjson installed, the extra ``fast``, the same in less
        time).

    Nothing is opened here. The first use (``len``, ``print``, iteration) lists the files; which
    there are is settled then, for this dataset and every worker process. For random access it also
    finds where each line starts (about 1 GB/s); of files above 1 MiB that index (8 bytes a row) is
    kept in the folder ``$MIDSTREAM_CACHE``, by default ``~/.cache/midstream``, for the next time.

    A line that is not JSON is one lost sample: `SampleError` names the file and the line, and the
    next one follows.

    Raises:
        TypeError, ValueError: If an argument is not one of these. On first use: if a file is
            compressed and its name, or the pattern that matched it, does not end so.
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

    State: random access: none but the position. A stream: ``[file, rows read of it, last row that
        was no JSON, rows at its last state, [rows, lines, byte]]``; that state is taken every 256
        rows and says where in the file they end.
    Resume: random access reads nothing again. A stream parses at most 256 rows again; to get there
        it seeks in a plain file, and reads a compressed one again from its start (without parsing
        it).
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

    def _found(self) -> list[FoundFile]:
        """The files: listed on first use, then kept, pickled too."""
        files: list[FoundFile] | None = self.__dict__.get("_files")
        if files is None:
            plain = self.random_access
            files = [find_file(file, plain) for file in list_files(self.paths, "read_json")]
            self._set("_files", files)
        return files

    def _offsets(self) -> list[I64]:
        """Where the rows of each file start. Not pickled: another process finds it on disk."""
        offsets: list[I64] | None = self.__dict__.get("_row_offsets")
        if offsets is None:
            offsets = [
                load_line_index(found)
                for found in with_progress_bar(
                    self._found(), "read_json: finding the rows of files"
                )
            ]
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
        return (
            f"{self.kind}({self.length():,} rows in {files})"
            if self.random_access
            else f"{self.kind}({files})"
        )

    def full_lanes(self, num_lanes: int, block: int) -> tuple[int, str]:
        """In a stream one for each file."""
        if self.random_access:
            return super().full_lanes(num_lanes, block)
        return (
            min(num_lanes, len(self._found())),
            f"read_json has {count(len(self._found()), 'file')}",
        )

    def max_lanes(self) -> tuple[int, str] | None:
        """In a stream as many as there are files."""
        if self.random_access:
            return None
        number = len(self._found())
        return (
            number,
            (
                f"source {self.name or 'data'!r} is read_json of {count(number, 'file')}, read as a"
                " stream because a compressed or remote one is among them, and each file is one"
                " shard. Use fewer workers, split the data into more files, or give it plain local"
                " files: they have random access and feed any number of workers"
            ),
        )

    def _open(self) -> LineReader:
        return LineReader(self._found(), self._offsets())

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(bound, passes, positions)
        lines: LineReader = self._handle()
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
                    origin = bound.origin(origins[place].tolist())
                    samples[place] = FailedSample(
                        (
                            SampleFailure(
                                bound.path, origin, "json.loads", _not_json(where, line, error)
                            ),
                        )
                    )
        return Rows(samples, origins)

    def replay_bound(self) -> str:
        """See `Dataset.replay_bound`."""
        return "at most 256 rows of a lane"

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        files = [found.file for found in self._found()]
        return ShardIterator(_JsonShards(files), bound, lane, pass_, len(files), False)


_ANY_DIGIT = bytes.maketrans(b"123456789", b"000000000")

_LONG_NUMBER = b"0" * 19  # what orjson makes a float of

_DEEP = 900  # orjson nests deeper than json, whose limit is Python's


def parse(line: bytes) -> Any:
    """What ``json.loads`` makes of a line, by orjson where that is installed and makes the same of it.

    Whatever orjson refuses (NaN, lone surrogates, bytes that are no text, ...) and whatever it
    reads differently (integers of more than 64 bits) is left to ``json``, which also words the
    errors.

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


def _is_stream(path: str) -> bool:
    return is_remote(path) or codec_of(path) is not None


def _not_json(where: str, line: bytes, error: Exception) -> ValueError:
    """The error of one line. The parser's own counts lines and columns of that line alone."""
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} (column {min(error.pos, len(error.doc.rstrip())) + 1})"
    else:
        reason = f"{type(error).__name__}: {error}"
    line = line.strip()
    text = line[:80].decode("utf-8", "replace") + ("..." if len(line) > 80 else "")
    hint = (
        " read_json takes one JSON value per line; is this one value over several lines?"
        if line in _OPENING
        else ""
    )
    result = ValueError(f"{where} is not JSON: {reason}: {text!r}.{hint}")
    result.__cause__ = error
    return result


_OPENING = (b"[", b"{", b"[{", b"]", b"}", b"},", b"}]")


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
        self.row, self.line, self.byte = (
            state  # rows and lines read, and the byte that comes next (decompressed)
        )
        self.data = self._open()
        self.ended = False
        self.damage: SourceError | None = None

    def _open(self) -> io.BufferedReader:
        raw = self.file.open() if self.file.url else pa.OSFile(self.file.path)
        codec = codec_of(self.file.path)
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
            if not line.strip(WHITE_SPACE):
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
                f"read_json: {self.file} cannot be read beyond line {self.line}:"
                f" {type(error).__name__}: {error}. Is it complete?"
            )
            raise self.damage from error
        if not self.line:
            self.byte, line = (3, line[3:]) if line.startswith(BOM) else (0, line)
        if not line:
            self.ended = True
            self.data.close()
        self.line += bool(line)
        self.byte += len(line)
        return line
