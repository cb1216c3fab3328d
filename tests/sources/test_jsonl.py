"""read_json: rows by a byte index, streams of compressed and remote files, and lines that are no
JSON.
"""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

import midstream as ms
import midstream.sources.json_lines as json_lines
import midstream.sources.jsonl as jsonl
from midstream.pipeline.single_lane import SingleLaneIterator
from midstream.sources.jsonl import JsonSource


def lines(ids: Any) -> bytes:
    return b"".join(
        json.dumps({"id": i, "text": "naïve 🦜" * (i % 3)}, ensure_ascii=False).encode() + b"\n"
        for i in ids
    )


def compress(path: Path, data: bytes) -> Path:
    with pa.CompressedOutputStream(str(path), "gzip" if path.suffix == ".gz" else "zstd") as file:
        file.write(data)
    return path


def ids(samples: Any) -> list[int]:
    return [sample["id"] for sample in samples]


def survivors(samples: Any) -> tuple[list[int], list[ms.SampleError]]:
    """Ids of the samples, and what was raised between them."""
    found, errors, iterator = [], [], iter(samples)
    while True:
        try:
            found.append(next(iterator)["id"])
        except ms.SampleError as error:
            errors.append(error)
        except StopIteration:
            return found, errors


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that also keeps the indexes of small files."""
    monkeypatch.setattr(json_lines, "_CACHED_FROM", 0)
    monkeypatch.setenv("MIDSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files searched for newlines so far."""
    names: list[str] = []
    find = json_lines._find_rows
    monkeypatch.setattr(
        json_lines,
        "_find_rows",
        lambda found: names.append(Path(found.file.path).name) or find(found),
    )
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of 7 rows."""
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(lines(range(number * 7, number * 7 + 7)))
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# Random access
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_are_read_in_any_order_over_several_files(folder: Path) -> None:
    ds = ms.read_json(f"{folder}/*.jsonl")
    assert len(ds) == 21
    assert repr(ds).partition("  # ")[0] == "data: read_json(21 rows in 3 files)"
    order = [20, 0, 7, 6, 13, 14, 0]
    assert ds.rows(order) == [json.loads(lines([i])) for i in order]
    assert ids(ms.read_json([folder / "2.jsonl", str(folder / "0.jsonl")])) == [
        *range(14, 21),
        *range(7),
    ]
    assert ids(ms.read_json(f"file://{folder}/1.jsonl")) == list(range(7, 14))
    assert sorted(ids(ds.shuffle(3))) == list(range(21)) != ids(ds.shuffle(3))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 1 << 20])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"\xef\xbb\xbf",
        b" \t \r\n\n",
        b"1",
        b"1\n",
        b"1\n2",
        b"\n\n1\n\n\n2\n\n",
        b"1\r\n2\r\n\r\n3\r\n",
        b"  1\n\t2 \n   \n\t\r\n 3",
        b"\xef\xbb\xbf1\n2\n",
        b"\xef\xbb\xbf\n1\n",
        b'"\\n"\n{"a": [1,\t2]}\n',
        '"ü🦜\u2028\x85"\n["é"]\n'.encode(),
        b"10\n200\n3000\n\n40000\n     \n     5",
    ],
)
def test_rows_are_the_lines_that_are_not_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, chunk: int
) -> None:
    monkeypatch.setattr(json_lines, "_CHUNK", chunk)
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    expected = [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    ds = ms.read_json(path)
    assert (len(ds), list(ds)) == (len(expected), expected)
    if chunk == 1:
        assert list(ms.read_json(compress(tmp_path / "x.jsonl.gz", data))) == expected


def test_a_description_opens_nothing(tmp_path: Path) -> None:
    ds = ms.read_json(f"{tmp_path}/*.jsonl").map(dict).shuffle(1).batch(2)
    streams = ms.read_json(tmp_path / "x.jsonl.gz").map(dict)
    assert ds.random_access
    assert not streams.random_access
    (tmp_path / "0.jsonl").write_bytes(lines(range(4)))
    assert len(ds) == 2


def test_a_restore_at_every_row_continues_identically(folder: Path) -> None:
    whole = iter(ms.read_json(f"{folder}/*.jsonl").shuffle(2))
    states, order = [json.dumps(whole.state_dict())], []
    for sample in whole:
        order.append(sample["id"])
        states.append(json.dumps(whole.state_dict()))
    for step, state in enumerate(states):
        resumed = iter(ms.read_json(f"{folder}/*.jsonl").shuffle(2))
        resumed.load_state_dict(json.loads(state))
        assert ids(resumed) == order[step:]


def test_a_checkpoint_loads_after_the_data_moved(folder: Path) -> None:
    ds = ms.read_json(f"{folder}/*.jsonl")
    spec = ds.spec()
    assert spec == {"node": "read_json", "name": "data", "num_files": 3, "length": 21}
    shutil.copytree(folder, folder / "moved")
    assert ms.read_json(f"{folder}/moved/*.jsonl") == ds
    assert ms.read_json(folder / "0.jsonl") != ds


def test_open_files_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midstream.sources.files.MAX_OPEN_FILES", 2)
    ds = ms.read_json(f"{folder}/*.jsonl")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert ids(ds.rows([0, 7, 14])) == [0, 7, 14]
        assert len(os.listdir("/proc/self/fd")) <= before + 2


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------


def test_an_index_is_made_once_and_found_on_disk_afterwards(
    folder: Path, cache: Path, searched: list[str]
) -> None:
    pattern = f"{folder}/*.jsonl"
    assert ids(ms.read_json(pattern)) == list(range(21))
    assert searched == ["0.jsonl", "1.jsonl", "2.jsonl"]
    kept = sorted(cache.iterdir())
    assert [path.suffix for path in kept] == [".npy"] * 3  # and no temporary file
    ds = ms.read_json(pattern)
    assert ids(ds) == list(range(21))
    assert isinstance(ds.node._offsets()[0].base, np.memmap)
    assert len(searched) == 3

    stat = os.stat(folder / "1.jsonl")
    os.utime(folder / "1.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert ids(ms.read_json(pattern)) == list(range(21))
    assert searched[3:] == ["1.jsonl"]
    now = sorted(cache.iterdir())
    assert len(now) == 3  # the one of the older file is gone
    assert len(set(now) & set(kept)) == 2


def test_an_index_that_is_damaged_is_made_again(
    folder: Path, cache: Path, searched: list[str]
) -> None:
    assert len(ms.read_json(folder / "0.jsonl")) == 7
    (path,) = cache.iterdir()
    good = path.read_bytes()
    other = io.BytesIO()
    np.save(other, np.arange(8))
    for bad in (b"", good[:100], b"\x00" * len(good), b"PK\x03\x04", other.getvalue()):
        path.write_bytes(bad)
        assert ids(ms.read_json(folder / "0.jsonl")) == list(range(7))
        assert path.read_bytes() == good
    assert len(searched) == 6


def test_an_index_that_cannot_be_kept_stays_in_memory(
    folder: Path, cache: Path, searched: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder should be")
    ds = ms.read_json(folder / "0.jsonl")
    assert ids(ds) == ids(ds.take(7)) == list(range(7))
    assert searched == ["0.jsonl"]
    assert "stays in memory" in caplog.text


def test_the_cache_is_below_home_unless_told_and_small_files_need_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MIDSTREAM_CACHE")
    monkeypatch.setenv("HOME", str(folder / "home"))
    assert len(ms.read_json(folder / "0.jsonl")) == 7
    assert not (folder / "home").exists()
    monkeypatch.setattr(json_lines, "_CACHED_FROM", 0)
    assert len(ms.read_json(folder / "0.jsonl")) == 7
    assert len(list((folder / "home" / ".cache" / "midstream").iterdir())) == 1


def test_a_pickle_is_small_and_holds_no_index(
    folder: Path, cache: Path, searched: list[str]
) -> None:
    (folder / "0.jsonl").write_bytes(b"1\n" * 50_000)
    ds = ms.read_json(folder / "0.jsonl")
    assert sum(ds) == 50_000
    data = pickle.dumps(ds)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert sum(copy) == 50_000
    assert searched == ["0.jsonl"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.processes
def test_a_forked_child_reads_right_after_its_parent_read_and_shares_the_index(
    folder: Path, searched: list[str]
) -> None:
    ds = ms.read_json(f"{folder}/*.jsonl")
    assert ids(ds.rows([0, 20])) == [0, 20]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send((ids(ds), len(searched))))
    child.start()
    assert ids(ds) == list(range(21))
    assert ours.poll(60)
    assert ours.recv() == (list(range(21)), 3)
    child.join()
    assert child.exitcode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of a stream every 3 rows."""
    monkeypatch.setattr(jsonl._JsonShards, "rows_per_state", 3)


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("num_lanes", [1, 2])
def test_a_compressed_stream_resumes_at_every_row(
    tmp_path: Path, suffix: str, num_lanes: int
) -> None:
    for number in range(3):
        data = lines(range(number * 7, number * 7 + 7)).replace(b"}\n{", b"}\n \r\n{")
        compress(tmp_path / f"{number}.jsonl{suffix}", data)
    pattern = f"{tmp_path}/*.jsonl{suffix}"
    assert sorted(ids(ms.read_json(pattern))) == list(range(21))
    for lane in range(num_lanes):
        whole = SingleLaneIterator(ms.read_json(pattern).node, lane, num_lanes, 0)
        states, order = [json.dumps(whole.state_dict())], []
        for sample in whole:
            order.append(sample["id"])
            states.append(json.dumps(whole.state_dict()))
        assert order == [
            i for number in range(lane, 3, num_lanes) for i in range(number * 7, number * 7 + 7)
        ]
        assert max(map(len, states)) < 300
        for step, state in enumerate(states):
            resumed = SingleLaneIterator(ms.read_json(pattern).node, lane, num_lanes, 0)
            resumed.load_state_dict(json.loads(state))
            assert json.dumps(resumed.state_dict()) == state
            assert ids(resumed) == order[step:]


def test_iter_of_a_stream_resumes_at_every_row(tmp_path: Path) -> None:
    compress(tmp_path / "0.jsonl.gz", lines(range(5)))
    compress(tmp_path / "1.jsonl.zst", lines(range(5, 9)))
    (tmp_path / "2.jsonl").write_bytes(lines(range(9, 11)))
    ds = ms.read_json(
        [tmp_path / "0.jsonl.gz", tmp_path / "1.jsonl.zst", tmp_path / "2.jsonl"], name="mixed"
    )
    assert not ds.random_access
    assert repr(ds).partition("  # ")[0] == "mixed: read_json(3 files)"
    for step in range(12):
        samples = iter(ds)
        head = [next(samples)["id"] for _ in range(step)]
        resumed = iter(pickle.loads(pickle.dumps(ds)))
        resumed.load_state_dict(samples.state_dict())
        assert head + ids(resumed) == list(range(11))


@pytest.mark.usefixtures("every")
def test_a_remote_file_is_a_stream_that_seeks(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/midstream-json/0.jsonl", b"\xef\xbb\xbf" + lines(range(7)))
    memory.pipe("/midstream-json/1.jsonl.gz", gzip.compress(lines(range(7, 14))))
    ds = ms.read_json("memory://midstream-json/*")
    assert not ds.random_access
    samples = iter(ds)
    states = [samples.state_dict()]
    for expected, sample in enumerate(samples):
        assert sample["id"] == expected
        states.append(samples.state_dict())
    assert len(states) == 15
    for step, state in enumerate(states):
        resumed = iter(ds)
        resumed.load_state_dict(state)
        assert ids(resumed) == list(range(step, 14))
    start = jsonl._JsonShards([found.file for found in ds.node._found()])
    line_stream = start.open(0, states[5]["state"][4])
    assert next(line_stream)["id"] == 3  # nothing before the last state is read
    assert line_stream.data.tell() > states[5]["state"][4][2] > 3
    with pytest.raises(FileNotFoundError):
        list(ms.read_json("memory://midstream-json/none.jsonl"))
    memory.rm("/midstream-json", recursive=True)
    with pytest.raises(ms.SourceError, match=r"shard 0 cannot be opened: FileNotFoundError"):
        list(ds)


def test_files_of_several_compressed_parts_are_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(
        gzip.compress(lines(range(3))) + gzip.compress(lines(range(3, 6)))
    )
    assert ids(ms.read_json(tmp_path / "x.jsonl.gz")) == list(range(6))


def test_lanes_of_a_stream_are_at_most_its_files_and_the_error_says_ways_out(
    tmp_path: Path,
) -> None:
    for number in range(2):
        compress(tmp_path / f"{number}.jsonl.gz", lines(range(number, 4, 2)))
    ds = ms.read_json(f"{tmp_path}/*.jsonl.gz", name="web")
    limit, text = ds.node.max_lanes()
    assert limit == 2
    for part in ("'web'", "2 files", "fewer workers", "more files", "plain local files"):
        assert part in text
    assert ds.node.full_lanes(5, 1) == (2, "read_json has 2 files")
    (tmp_path / "x.jsonl").write_bytes(lines(range(9)))
    plain = ms.read_json(tmp_path / "x.jsonl")
    assert plain.node.max_lanes() is None
    assert plain.node.full_lanes(5, 4)[0] == 3
    assert isinstance(plain.node, JsonSource)


def test_a_stream_cut_short_loses_nothing_before_the_cut_and_does_not_end_quietly(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    data = b"".join(
        b'{"id": %d, "x": "%s"}\n' % (i, rng.bytes(40_000).hex().encode()) for i in range(60)
    )
    path = compress(tmp_path / "x.jsonl.gz", data)
    path.write_bytes(path.read_bytes()[:-1_000_000])
    samples, found = iter(ms.read_json(path)), []
    with pytest.raises(ms.SourceError, match=r"x\.jsonl\.gz cannot be read beyond line"):
        for sample in samples:
            found.append(sample["id"])
    assert found == list(range(len(found)))
    assert len(found) > 20
    state = samples.state_dict()
    for _ in range(2):
        with pytest.raises(ms.SourceError, match="beyond line"):
            next(samples)
        assert samples.state_dict() == state
    compress(path, data)
    resumed = iter(ms.read_json(path))
    resumed.load_state_dict(state)
    assert found + ids(resumed) == list(range(60))


def test_a_stream_shorter_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    packed, plain = tmp_path / "x.jsonl.gz", tmp_path / "x.jsonl"
    for delivered in (513, 600):
        for paths in ([packed], [plain, packed]):
            compress(packed, b"1\n" * 600)
            plain.write_bytes(b"1\n" * 600)
            samples = iter(ms.read_json(paths))
            for _ in range(delivered):
                next(samples)
            state = samples.state_dict()
            for rows in (512, 100):
                compress(packed, b"1\n" * rows)
                plain.write_bytes(b"1\n" * rows)
                resumed = iter(ms.read_json(paths))
                resumed.load_state_dict(state)
                with pytest.raises(ms.ReplayDiverged, match="changed since"):
                    next(resumed)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_malformed_line_is_one_lost_sample_that_names_file_and_line(
    tmp_path: Path, suffix: str
) -> None:
    data = b'{"id": 0}\n\n{"id": 1\n{"id": 2}\n{"id": "\xff"}\n{"id": 4}\nnonsense\n'
    path = tmp_path / f"x.jsonl{suffix}"
    if suffix:
        compress(path, data)
    else:
        path.write_bytes(data)
    ds = ms.read_json(path, name="web")
    found, errors = survivors(ds)
    assert found == [0, 2, 4]
    assert [error.origin for error in errors] == [ms.Origin("web", 0, row) for row in (1, 3, 5)]
    for error, line, reason in zip(
        errors, (3, 5, 7), ("delimiter (column 9)", "UnicodeDecodeError", "Expecting value")
    ):
        assert f"{path}, line {line} is not JSON: " in str(error)
        assert reason in str(error)
        assert isinstance(error.__cause__, ValueError)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_restore_around_a_malformed_line_meets_it_at_most_once(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    data = b'{"id": 0}\n{"id": 1}\n[\n{"id": 3}\n]\n'
    compress(path, data) if suffix else path.write_bytes(data)
    whole = iter(ms.read_json(path))
    events: list[Any] = []
    states = [whole.state_dict()]
    while True:
        try:
            events.append(next(whole)["id"])
        except ms.SampleError as error:
            assert "one value over several lines?" in str(error)
            events.append("lost")
        except StopIteration:
            break
        states.append(whole.state_dict())
    assert events == [0, 1, "lost", 3, "lost"]
    for step, state in enumerate(states):
        resumed = iter(ms.read_json(path))
        resumed.load_state_dict(state)
        found, errors = survivors(resumed)
        assert found == [event for event in events[step:] if event != "lost"]
        assert len(errors) == events[step:].count("lost")


def test_far_into_a_file_a_malformed_line_is_named_by_its_byte(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "_COUNTED_TO", 10)
    (folder / "0.jsonl").write_bytes(b'{"id": 100000}\nx\n')
    with pytest.raises(ms.SampleError, match=r"0\.jsonl, the line at byte 15 is not JSON"):
        ms.read_json(folder / "0.jsonl").rows([1])


@pytest.mark.parametrize("opened", [False, True])
def test_a_file_that_changed_since_its_index_was_made_is_refused(
    folder: Path, opened: bool
) -> None:
    path = folder / "1.jsonl"
    whole = path.read_bytes()
    stat = os.stat(path)

    def replace() -> None:
        (folder / "new").write_bytes(whole[:-2] + b" }")
        os.utime(folder / "new", ns=(0, 0))
        os.replace(folder / "new", path)

    changes = [
        lambda: path.write_bytes(whole + b"{}\n"),
        lambda: path.write_bytes(whole[:20]),
        lambda: os.utime(path, ns=(0, stat.st_mtime_ns + 1)),
        replace,
    ]
    for change in changes:
        ds = ms.read_json(f"{folder}/*.jsonl")
        assert len(ds) == 21
        if opened:
            assert ids(ds.rows([7])) == [7]
        ds = ds if opened else pickle.loads(pickle.dumps(ds))
        change()
        assert ids(ds.rows([6, 14])) == [6, 14] if opened else True
        with pytest.raises(
            ms.SourceError, match=r"1\.jsonl has changed since .* Make the dataset again"
        ):
            ds.rows([6, 8])
        path.write_bytes(whole)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert ids(ms.read_json(f"{folder}/*.jsonl")) == list(range(21))
    ds = ms.read_json(f"{folder}/*.jsonl")
    assert len(ds) == 21
    path.unlink()
    with pytest.raises(ms.SourceError, match=r"1\.jsonl cannot be read any more"):
        ds.rows([8])


def test_what_matches_nothing_is_not_found_on_first_use(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/*.jsonl", tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"):
        ds = ms.read_json(path)
        for use in (repr, list):
            with pytest.raises(FileNotFoundError, match="no file"):
                use(ds)
    with pytest.raises(IsADirectoryError, match="Give a pattern"):
        len(ms.read_json(tmp_path))


def test_wrong_arguments_are_refused_at_construction() -> None:
    with pytest.raises(TypeError, match="read_json takes a path"):
        ms.read_json({"a"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read_json takes one path or more"):
        ms.read_json([])
    with pytest.raises(ValueError, match="read_json: a name is a string"):
        ms.read_json("x", name="")


def test_compressed_files_under_a_name_that_does_not_say_so_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(gzip.compress(b"1\n"))
    with pytest.raises(ValueError, match=r"x\.jsonl is compressed \(\.gz\) and not named so"):
        len(ms.read_json(tmp_path / "x.jsonl"))
    compress(tmp_path / "y.jsonl.gz", b"1\n")
    with pytest.raises(ValueError, match=r"a pattern matches the compressed file .*y\.jsonl\.gz"):
        len(ms.read_json(f"{tmp_path}/y*"))
