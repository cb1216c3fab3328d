"""JSON Lines as a source: plain local files with random access, other files as streams."""

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
from midstream.pipeline.failures import FailedSample
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node, row_origins
from midstream.pipeline.rows import I64, U64, Rows
from midstream.sources.files import File, Paths, is_remote, list_files, paths_as_text, plural
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
from midstream.sources.source_rows import read_one_by_one, row_failure

try:
    import orjson as _orjson
except ImportError:  # the extra ``fast``; without it the samples are the same, but slower
    _orjson = None  # type: ignore[assignment]


def read_json(paths: Paths, *, name: str | None = None) -> Dataset:
    """Read JSON Lines: one JSON value per line, blank lines skipped.

    Args:
        paths: A path, a pattern (``data/*.jsonl``, ``**`` for folders below; matches are sorted), a
            URL that fsspec knows (``s3://...``, patterns too), or a list of these, read in the
            order given.
        name: The source's name in progress, origins and errors. Without one it is the name it has
            in `interleave`, else "data".

    Returns:
        For plain local files a random-access dataset. If a ``.gz`` or ``.zst`` file or a URL is
        among ``paths``, a stream with one shard per file: it has at most as many lanes, and so
        workers and ranks, as files. The names alone decide between the two. A sample is the result
        of ``json.loads`` for a line (orjson, the extra ``fast``, gives the same in less time).

    This function opens no file. The first use (``len``, ``print``, iteration) lists the files. The
    list is fixed from then on, for this dataset and every worker process. For random access the
    first use also finds where each line starts (about 1 GB/s). For files above 1 MiB that index (8
    bytes a row) is cached in the folder ``$MIDSTREAM_CACHE``, by default ``~/.cache/midstream``.

    A line that is not JSON loses one sample: `SampleError` names the file and the line, and reading
    continues with the next line.

    Raises:
        TypeError, ValueError: If an argument is not as described. On first use: if a file is
            compressed and its name, or the pattern that matched it, does not say so.
        FileNotFoundError: On first use, if a path or pattern matches nothing.
        SourceError: On reading, if a file vanished or has changed since the first use.

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
    return Dataset(JsonSource(paths_as_text(paths, "read_json"), name))


@dataclass(frozen=True, eq=False, repr=False)
class JsonSource(Node):
    """Lines of JSON files.

    With random access rows are numbered through the files in order. In a stream row r of file f has
    the number ``r * num_files + f``.

    State: With random access only the position. A stream: ``[file, rows read of it, last row that
        was not JSON, rows at its last position, [rows, lines, byte]]``. The last item is a position
        in the file, which is recorded every 256 rows.
    Resume: Random access reads nothing again. A stream parses at most 256 rows again. To find them
        it seeks in a plain file, and decompresses a compressed file from its start.
    """

    paths: tuple[str, ...]
    name: str | None = None
    kind = "read_json"
    infinite = False
    _kept_slots = (*Node._kept_slots, "_files")

    @property
    def random_access(self) -> bool:
        """Whether all files are local and not compressed, by their names."""
        return not any(map(_is_stream, self.paths))

    def _found(self) -> list[FoundFile]:
        """The files: listed on first use, then cached, also in pickles."""
        return self.cached("_files", self._find)

    def _find(self) -> list[FoundFile]:
        random_access = self.random_access
        return [find_file(file, random_access) for file in list_files(self.paths, "read_json")]

    def _offsets(self) -> list[I64]:
        """The line index of each file. Not pickled: another process finds it on disk."""
        return self.cached("_row_offsets", self._load_offsets)

    def _load_offsets(self) -> list[I64]:
        files = with_progress_bar(self._found(), "read_json: finding the rows of files")
        return [load_line_index(found) for found in files]

    def _length(self) -> int | None:
        return sum(len(offsets) - 1 for offsets in self._offsets())

    def spec_fields(self) -> dict[str, State]:
        """The number of files and, with random access, of rows. Paths are left out, so that the
        files may be moved.
        """
        fields: dict[str, State] = {"num_files": len(self._found())}
        if self.random_access:
            fields["length"] = self.length()
        return fields

    def summary(self) -> str:
        """The number of files and, with random access, of rows."""
        files = plural(len(self._found()), "file")
        return (
            f"{self.kind}({self.length():,} rows in {files})"
            if self.random_access
            else f"{self.kind}({files})"
        )

    def full_lanes(self, num_lanes: int, block: int) -> tuple[int, str]:
        """In a stream one lane for each file."""
        if self.random_access:
            return super().full_lanes(num_lanes, block)
        return (
            min(num_lanes, len(self._found())),
            f"read_json has {plural(len(self._found()), 'file')}",
        )

    def max_lanes(self) -> tuple[int, str] | None:
        """In a stream as many lanes as files."""
        if self.random_access:
            return None
        number = len(self._found())
        return (
            number,
            (
                f"source {self.name or 'data'!r} is read_json of {plural(number, 'file')}, read as"
                " a stream because a compressed or remote one is among them, and each file is one"
                " shard. Use fewer workers, split the data into more files, or give it plain local"
                " files: they have random access and feed any number of workers"
            ),
        )

    def _open(self) -> LineReader:
        return LineReader(self._found(), self._offsets())

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(bound, passes, positions)
        reader: LineReader = self._handle()
        numbers = np.searchsorted(reader.starts, positions, side="right") - 1
        inside = positions - reader.starts[numbers]
        samples: list[Any] = [None] * len(positions)
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            parsed = _parse_rows(bound, reader, number, inside[here], origins[here])
            for index, sample in zip(here.tolist(), parsed):
                samples[index] = sample
        return Rows(samples, origins)

    def replay_bound(self) -> str:
        """See `Dataset.replay_bound`."""
        return "at most 256 rows of a lane"

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        files = [found.file for found in self._found()]
        return ShardIterator(_JsonShards(files), bound, lane, pass_, len(files), False)


def _parse_rows(
    bound: BoundNode, reader: LineReader, number: int, rows: I64, origins: I64
) -> Iter[Any]:
    """Rows of the file with this number, by their numbers within it."""
    lines = reader.read(number, rows)

    def failed(index: int, error: Exception) -> FailedSample:
        where = reader.describe(number, int(rows[index]))
        error = _not_json(where, lines[index], error)
        return row_failure(bound, origins[index], "json.loads", error)

    return read_one_by_one(lines, parse, failed)


_ANY_DIGIT = bytes.maketrans(b"123456789", b"000000000")

_LONG_NUMBER = b"0" * 19  # orjson reads an integer of more than 64 bits as a float

_DEEP = 900  # brackets: orjson accepts deeper nesting than json, whose limit is Python's


def parse(line: bytes) -> Any:
    """Parse a line, with the same result as ``json.loads``, by orjson if that is installed.

    ``json`` parses the lines that orjson refuses (NaN, lone surrogates, bytes that are not UTF-8,
    ...) or would read differently (integers of more than 64 bits), so all errors are those of
    ``json``.

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
    """The error for one line, with its place in the file, which the parser does not know."""
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
    """The shards of a stream: one per file."""

    function = "json.loads"
    continues_after_errors = True
    rows_per_state = 256

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
    """Samples of one file.

    A class instead of a generator, because it must continue after a line that is not JSON.

    Args:
        file: The file.
        state: ``[rows, lines, byte]``: rows and lines read so far, and the next byte
            (decompressed).
    """

    def __init__(self, file: File, state: list[int]) -> None:
        self.file = file
        self.row, self.line, self.byte = state
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
        # If the file is shorter now, this stops early. `ShardIterator` then misses the rows that it
        # has to read again, and raises.
        left = self.byte
        while left and (skipped := len(data.read(min(left, 1 << 20)))):
            left -= skipped
        return data

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
            raise self.damage  # again, because an empty line would mean the end of the file
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
