"""read_parquet: what is read, how much of it at a time, and what is said when it cannot be."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import midstream as ms
import midstream.sources.files as files
import midstream.sources.read_ahead as ahead
import midstream.sources.row_groups as row_groups
from midstream.pipeline.cursor import Cursor
from midstream.pipeline.iterator import Lane
from midstream.pipeline.ledger import Ledger
from midstream.pipeline.node import bind
from midstream.pipeline.passes import epoch_key
from midstream.sources.parquet import ParquetSource

GROUP = 5


def write(path: Path | str, ids: range, group: int = GROUP, **columns: Any) -> None:
    table = pa.table({"id": pa.array(ids, pa.int64()), **columns})
    pq.write_table(table, path, row_group_size=group)


def make_files(folder: Path, num_files: int = 3, rows: int = 12) -> Path:
    """num_files files of ``rows`` rows in groups of 5, 5 and 2; ids count through the files in the
    order of their names.
    """
    for number in range(num_files):
        ids = range(number * rows, (number + 1) * rows)
        write(
            folder / f"part-{number}.parquet",
            ids,
            tokens=pa.array([np.arange(i, i + 4, dtype=np.int32) for i in ids]),
        )
    return folder


def ids(samples: Any) -> list[int]:
    return [sample["id"] for sample in samples]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the row groups decoded so far."""
    numbers: list[int] = []
    decode = row_groups._decode
    monkeypatch.setattr(
        row_groups, "_decode", lambda *which: numbers.append(which[-1]) or decode(*which)
    )
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------------------------------------------------


def test_a_pattern_is_sorted_and_a_list_keeps_its_order(tmp_path: Path) -> None:
    make_files(tmp_path)
    assert ids(ms.read_parquet(f"{tmp_path}/*.parquet")) == list(range(36))
    paths = [tmp_path / "part-2.parquet", str(tmp_path / "part-0.parquet")]
    assert ids(ms.read_parquet(paths)) == [*range(24, 36), *range(12)]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    shutil.copy(tmp_path / "part-1.parquet", tmp_path / "deep" / "er" / "x.parquet")
    assert ids(ms.read_parquet(tmp_path / "deep" / "**" / "*.parquet")) == list(range(12, 24))
    assert ids(ms.read_parquet(f"file://{tmp_path}/part-1.parquet")) == list(range(12, 24))


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    write(tmp_path / "a[0].parquet", range(3))
    assert ids(ms.read_parquet(tmp_path / "a[0].parquet")) == [0, 1, 2]


def test_values_come_back_as_written_in_any_order(tmp_path: Path) -> None:
    table = pa.table(
        {
            "int": pa.array([1, None, 3, 4, 5, 6, 7], pa.int32()),
            "float": pa.array([0.5, 1.5, None, float("inf"), -1.0, 0.0, 2.0]),
            "bool": pa.array([True, False, None, True, True, False, False]),
            "text": ["a", None, "", "naïve 🦜", "x" * 100, "b", "c"],
            "large": pa.array(["p", "q", None, "r", "s", "t", ""], pa.large_string()),
            "bytes": [b"\x00\xff", b"", None, b"1", b"2", b"3", b"4"],
            "category": pa.array(["u", "v", "u", None, "v", "u", "v"]).dictionary_encode(),
            "list": pa.array([[1, 2], [], None, [3], [4, 5, 6], [7], [8]], pa.list_(pa.int16())),
            "holes": [[1, None], [None], [], None, [2], [3], [4]],
            "fixed": pa.array([[i, i + 1] for i in range(7)], pa.list_(pa.float32(), 2)),
            "nested": [{"a": [{"b": i}], "c": None if i % 2 else str(i)} for i in range(7)],
            "words": [["to", "be"], [], None, ["or"], [None], ["not"], ["x"]],
            "when": pa.array([0, 1, 2, 3, None, 5, 6], pa.timestamp("ms")),
        }
    )
    pq.write_table(table.slice(0, 4), tmp_path / "0.parquet", row_group_size=3)
    pq.write_table(table.slice(4), tmp_path / "1.parquet", row_group_size=2)
    ds = ms.read_parquet(f"{tmp_path}/*.parquet")
    order = [6, 0, 3, 3, 1, 5, 2, 4, 0]
    expected = table.to_pylist()
    for row, sample in zip(order, ds.rows(order)):
        plain = {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in sample.items()
        }
        assert plain == expected[row]
    sample = ds.rows([0])[0]
    assert sample["list"].dtype == np.int16
    assert sample["fixed"].dtype == np.float32
    assert not sample["list"].flags.writeable


def test_columns_choose_what_is_read_and_the_order_of_keys(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.parquet", range(4), a=["x"] * 4, **{"a.b": [1] * 4})
    ds = ms.read_parquet(f"{tmp_path}/*.parquet", columns=["a", "id"])
    assert list(ds.rows([5])[0].items()) == [("a", "x"), ("id", 1)]
    assert list(ms.read_parquet(f"{tmp_path}/*.parquet").rows([0])[0]) == ["id", "a", "a.b"]


def test_columns_that_are_not_asked_for_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"id": [1, 2], "id.x": [7, 777_777]})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    at = whole.index(np.array([7, 777_777]).tobytes())
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    assert list(ms.read_parquet(path, columns=["id"])) == [{"id": 1}, {"id": 2}]
    with pytest.raises(ms.SourceError):
        list(ms.read_parquet(path))


def test_columns_in_another_order_or_memory_layout_are_the_same_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "0.parquet")
    other = pa.table({"b": pa.array(["y"], pa.large_string()), "a": [2]})
    pq.write_table(other, tmp_path / "1.parquet")
    samples = list(ms.read_parquet(f"{tmp_path}/*.parquet"))
    assert samples == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert list(samples[1]) == ["a", "b"]


def test_files_and_groups_without_rows_take_no_position(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", range(0))
    write(tmp_path / "1.parquet", range(3), group=2)
    with pq.ParquetWriter(tmp_path / "2.parquet", pa.schema({"id": pa.int64()})) as writer:
        for chunk in ([3, 4], [], [5]):
            writer.write_table(pa.table({"id": pa.array(chunk, pa.int64())}))
    write(tmp_path / "3.parquet", range(0))
    ds = ms.read_parquet(f"{tmp_path}/*.parquet")
    assert ds.node.block_sizes().tolist() == [2, 1, 2, 1]
    assert ids(ds) == list(range(6))
    assert sorted(ids(ds.shuffle(1, window_blocks=2))) == list(range(6))
    empty = ms.read_parquet(tmp_path / "0.parquet")
    assert (len(empty), list(empty), list(empty.shuffle(1))) == (0, [], [])


def test_fsspec_urls_and_their_patterns_are_read(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    make_files(tmp_path)
    memory.put(f"{tmp_path}/part-*.parquet", "/midstream-parquet/")
    assert ids(
        ms.read_parquet("memory://midstream-parquet/*.parquet").shuffle(3, window_blocks=1).take(36)
    ) == ids(ms.read_parquet(f"{tmp_path}/*.parquet").shuffle(3, window_blocks=1))
    one = ms.read_parquet("memory://midstream-parquet/part-1.parquet")
    assert ids(one) == list(range(12, 24))
    with pytest.raises(FileNotFoundError, match="memory://midstream-parquet/none"):
        len(ms.read_parquet("memory://midstream-parquet/none-*.parquet"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        len(ms.read_parquet("memory://midstream-parquet/none.parquet"))
    memory.rm("/midstream-parquet", recursive=True)
    with pytest.raises(
        ms.SourceError, match=r"memory://midstream-parquet/part-1\.parquet, row group 0"
    ):
        pickle.loads(pickle.dumps(one)).rows([0])


# ---------------------------------------------------------------------------------------------------------------------
# How much is read
# ---------------------------------------------------------------------------------------------------------------------


def test_a_description_opens_nothing_and_its_length_decodes_nothing(
    tmp_path: Path, decoded: list[int]
) -> None:
    ds = ms.read_parquet(f"{tmp_path}/*.parquet").shuffle(1).map(dict).batch(2)
    make_files(tmp_path)
    assert len(ds) == 18
    assert "read_parquet([id, tokens], 36 rows in 9 row groups of 3 files)" in repr(ds)
    assert ds.state_dict()["fingerprint"] == ds.fingerprint
    assert decoded == []


def test_rows_decode_only_the_groups_they_lie_in_each_once(
    tmp_path: Path, decoded: list[int]
) -> None:
    ds = ms.read_parquet(f"{make_files(tmp_path)}/*.parquet")
    assert ids(ds.rows([35, 4, 0, 34, 12, 4])) == [35, 4, 0, 34, 12, 4]
    assert sorted(decoded) == [0, 3, 8]
    assert ids(ds.rows([1, 13])) == [1, 13]
    assert len(decoded) == 3


def test_a_window_shuffle_visits_every_row_once_and_few_groups_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    ds = ms.read_parquet(f"{make_files(tmp_path, 8, 25)}/*.parquet")
    shuffled = ds.shuffle(5, window_blocks=4)
    order = [ids(shuffled.rows([position]))[0] for position in range(200)]
    assert sorted(order) == list(range(200))
    assert order != list(range(200))
    for window in range(10):  # 4 groups of 5 rows
        assert len({row // GROUP for row in order[20 * window : 20 * window + 20]}) == 4
    decoded.clear()
    group_bytes = ds.node._handle().store.num_bytes // 40
    monkeypatch.setattr(row_groups, "CACHE_BYTES", 5 * group_bytes)
    ds = pickle.loads(pickle.dumps(ds))
    shuffled = ds.shuffle(5, window_blocks=4)
    assert [ids(shuffled.rows([position]))[0] for position in range(200)] == order
    assert len(decoded) == 40  # once each, though only a window fits


def test_decoded_groups_are_bounded_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{make_files(tmp_path, 4, 50)}/*.parquet"
    probe = ms.read_parquet(path)
    probe.rows([0])
    group_bytes = probe.node._handle().store.num_bytes
    assert group_bytes >= GROUP * (8 + 16)
    for bound in (0, group_bytes, 3 * group_bytes + 1):
        monkeypatch.setattr(row_groups, "CACHE_BYTES", bound)
        ds = ms.read_parquet(path)
        store = ds.node._handle().store
        seen = set()
        for row in np.random.default_rng(0).permutation(200)[:60]:
            assert ids(ds.rows([row])) == [row]
            seen.add(row // GROUP)
            assert len(store.kept) == max(1, min(len(seen), bound // group_bytes))
            assert store.num_bytes == sum(size for _, size in store.kept.values())


def test_the_groups_used_last_are_kept_and_used_before_others_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    write(tmp_path / "x.parquet", range(60), group=10)
    ds = ms.read_parquet(tmp_path / "x.parquet")
    ds.rows([0])
    monkeypatch.setattr(row_groups, "CACHE_BYTES", 3 * ds.node._handle().store.num_bytes)
    ds.rows([10]), ds.rows([20]), ds.rows([5]), ds.rows([30]), ds.rows([1])
    assert decoded == [0, 1, 2, 3]  # 3 pushed out 1, not 0
    ds.rows([30, 40, 50])
    decoded.clear()
    assert ids(ds.rows(range(60))) == list(range(60))
    assert sorted(decoded) == [0, 1, 2]


def test_one_request_over_many_groups_pins_no_more_than_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "CACHE_BYTES", 0)
    ds = ms.read_parquet(f"{make_files(tmp_path)}/*.parquet")
    order = np.random.default_rng(1).permutation(36)
    samples = ds.rows(order)
    assert [sample["tokens"].tolist() for sample in samples] == [
        list(range(i, i + 4)) for i in order
    ]
    views = {sample["id"] for sample in samples if sample["tokens"].base is not None}
    assert len(ds.node._handle().store.kept) == 1
    assert views <= {34, 35}  # the last group read


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 2)
    monkeypatch.setattr(row_groups, "CACHE_BYTES", 0)
    ds = ms.read_parquet(f"{make_files(tmp_path, 5)}/*.parquet")
    before = len(os.listdir("/proc/self/fd"))
    for row in (0, 12, 24, 36, 48, 0, 13, 59):
        assert ids(ds.rows([row])) == [row]
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_groups_decoded_again_and_again_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(row_groups, "CACHE_BYTES", 0)
    write(tmp_path / "x.parquet", range(400), group=100)
    ds = ms.read_parquet(tmp_path / "x.parquet")
    with caplog.at_level(logging.WARNING, logger="midstream"):
        assert ids(ds) == list(range(400))
        assert not caplog.records
        for row in range(200):
            ds.rows([row * 100 % 399])
    assert len(caplog.records) == 1
    assert "window_blocks" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Processes and checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_a_pickle_is_small_holds_nothing_open_and_spares_the_footers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = ms.read_parquet(f"{make_files(tmp_path)}/*.parquet")
    fresh = len(pickle.dumps(ds))
    assert ids(ds) == list(range(36))
    data = pickle.dumps(ds)
    assert fresh < 1000
    assert len(data) < 5000
    monkeypatch.setattr(row_groups, "_read_footer", None)
    monkeypatch.setattr(row_groups, "list_files", None)
    copy = pickle.loads(data)
    assert "_opened" not in copy.node.__dict__
    assert copy == ds
    assert ids(copy) == list(range(36))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.processes
def test_a_forked_child_reads_right_after_its_parent_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "CACHE_BYTES", 0)
    ds = ms.read_parquet(f"{make_files(tmp_path)}/*.parquet")
    assert ids(ds.rows([0, 20])) == [0, 20]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(ids(ds)))
    child.start()
    assert ids(ds) == list(range(36))  # at the same time
    assert ours.poll(60)
    assert ours.recv() == list(range(36))
    child.join()
    assert child.exitcode == 0


def test_a_shuffled_read_resumes_at_every_row(tmp_path: Path) -> None:
    path = f"{make_files(tmp_path, 2)}/*.parquet"
    whole = iter(ms.read_parquet(path).shuffle(7, window_blocks=2))
    states, order = [json.dumps(whole.state_dict())], []
    for sample in whole:
        order.append(sample["id"])
        states.append(json.dumps(whole.state_dict()))
    assert sorted(order) == list(range(24))
    for step, state in enumerate(states):
        resumed = iter(ms.read_parquet(path).shuffle(7, window_blocks=2))
        resumed.load_state_dict(json.loads(state))
        assert ids(resumed) == order[step:]


def test_a_checkpoint_loads_after_the_data_moved_but_not_with_other_row_groups(
    tmp_path: Path,
) -> None:
    here, there, other = tmp_path / "here", tmp_path / "there", tmp_path / "other"
    here.mkdir()
    make_files(here)
    shutil.copytree(here, there)
    other.mkdir()
    for number in range(3):
        pq.write_table(
            pq.read_table(here / f"part-{number}.parquet"),
            other / f"{number}.parquet",
            row_group_size=4,
        )
    ds = ms.read_parquet(f"{here}/*.parquet")
    assert ms.read_parquet(f"{there}/*.parquet") == ds
    assert ms.read_parquet(f"{other}/*.parquet") != ds  # its shuffle would be another
    assert ms.read_parquet(f"{here}/*.parquet", columns=["id"]) != ds
    assert str(tmp_path) not in json.dumps(ds.spec())
    assert ds.spec()["length"] == 36
    assert ds.spec()["num_files"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read
# ---------------------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_at_construction() -> None:
    for paths in ({"a"}, 3, None, b"a", ["a", 1], (path for path in ["a"])):
        with pytest.raises(TypeError, match="a path, a pattern"):
            ms.read_parquet(paths)  # type: ignore[arg-type]
    for empty in ([], [""], ""):
        with pytest.raises(ValueError, match="one path or more"):
            ms.read_parquet(empty)
    with pytest.raises(TypeError, match=r"columns=\['text'\]"):
        ms.read_parquet("x", columns="text")
    for columns in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="each once"):
            ms.read_parquet("x", columns=columns)
    with pytest.raises(ValueError, match="read_parquet: a name is a string"):
        ms.read_parquet("x", name="a|b")


def test_what_matches_nothing_is_not_found_on_first_use(tmp_path: Path) -> None:
    for path, text in (
        (f"{tmp_path}/*.parquet", "no file matches the pattern"),
        (tmp_path / "x", "there is no file"),
    ):
        ds = ms.read_parquet(path)
        assert isinstance(ds.node, ParquetSource)
        for use in (len, repr, list):
            with pytest.raises(FileNotFoundError, match=text):
                use(ds)
    with pytest.raises(IsADirectoryError, match="Give a pattern"):
        len(ms.read_parquet(tmp_path))
    write(tmp_path / "x.parquet", range(3))
    with pytest.raises(ValueError, match="matched twice"):
        len(ms.read_parquet([tmp_path / "x.parquet", f"{tmp_path}/*.parquet"]))
    assert len(ms.read_parquet(f"{tmp_path}/*.parquet")) == 3


def test_files_with_other_columns_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", range(3), a=["x"] * 3)
    write(tmp_path / "1.parquet", range(3), b=["x"] * 3)
    pattern = f"{tmp_path}/*.parquet"
    with pytest.raises(ValueError, match="differ") as caught:
        len(ms.read_parquet(pattern))
    for part in (
        "0.parquet",
        "1.parquet",
        "'a': string in the first, absent",
        "'b': absent",
        "columns=['id']",
    ):
        assert part in str(caught.value)
    assert ids(ms.read_parquet(pattern, columns=["id"])) == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match=r"0\.parquet has no column 'c'\. It has: id, a"):
        len(ms.read_parquet(pattern, columns=["id", "c"]))
    with pytest.raises(ValueError, match="'a': string in the first, absent in the second"):
        len(ms.read_parquet(pattern, columns=["a"]))
    write(tmp_path / "1.parquet", range(3), a=[1] * 3)
    with pytest.raises(ValueError, match="'a': string in the first, int64 in the second"):
        len(ms.read_parquet(pattern))


def test_a_damaged_footer_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ms.SourceError, match=r"footer of .*x\.parquet"):
        len(ms.read_parquet(tmp_path / "x.parquet"))


def test_a_damaged_or_vanished_or_replaced_file_names_file_and_row_group(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"id": range(10)})
    pq.write_table(
        table,
        path,
        row_group_size=5,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    whole = path.read_bytes()
    ds = ms.read_parquet(path)
    assert len(ds) == 10
    at = whole.index(np.int64(7).tobytes())
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    assert ids(ds.rows([0, 4])) == [0, 4]
    with pytest.raises(ms.SourceError, match=r"x\.parquet, row group 1 cannot be read"):
        ds.rows([5])
    write(path, range(20), group=10)
    with pytest.raises(ms.SourceError, match=r"row group 0 has 10 rows, and had 5"):
        pickle.loads(pickle.dumps(ds)).rows([0])
    path.unlink()
    with pytest.raises(
        ms.SourceError, match=r"x\.parquet, row group 0 cannot be read: FileNotFoundError"
    ):
        pickle.loads(pickle.dumps(ds)).rows([0])


def test_text_that_is_no_text_is_one_lost_sample(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff\xfe", b"c", b"d"])
    text = pa.StringArray.from_buffers(4, *raw.buffers()[1:])
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet", row_group_size=2)
    samples = iter(ms.read_parquet(tmp_path / "x.parquet", name="web"))
    assert next(samples) == {"text": "a"}
    with pytest.raises(ms.SampleError, match=r"x\.parquet, row group 0, row 1") as caught:
        next(samples)
    assert caught.value.origin == ms.Origin("web", 0, 1)
    assert list(samples) == [{"text": "c"}, {"text": "d"}]


# ---------------------------------------------------------------------------------------------------------------------
# Reading ahead
# ---------------------------------------------------------------------------------------------------------------------

THREAD = "midstream-ahead"


class Decoding:
    """What was decoded by whom; a gate that holds the background thread back where it is closed."""

    def __init__(self) -> None:
        self.by: list[tuple[int, bool]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Semaphore(0)

    @property
    def ahead(self) -> list[int]:
        return [number for number, ahead in self.by if ahead]


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Decoding:
    """Every read counts as a slow one, so that what comes next is read ahead."""
    monkeypatch.setattr(ahead, "SLOW_READ_S", 0.0)
    found = Decoding()
    decode = row_groups._decode

    def watched(index: Any, files: Any, number: int) -> Any:
        in_thread = threading.current_thread().name == THREAD
        found.by.append((number, in_thread))
        if in_thread:
            found.began.release()
            assert found.gate.wait(60)
        return decode(index, files, number)

    monkeypatch.setattr(row_groups, "_decode", watched)
    return found


def settle(ds: ms.Dataset) -> list[int]:
    """Wait until the thread has read what it may; the groups that wait then."""
    store = source_of(ds)._handle().store
    thread = store.thread.running
    if thread is not None:
        thread.join(60)
        assert not thread.is_alive()
    return list(store.prefetched)


def source_of(ds: ms.Dataset) -> ParquetSource:
    node = ds.node
    while node.inputs():
        node = next(iter(node.inputs().values()))
    assert isinstance(node, ParquetSource)
    return node


def pipelines(path: str) -> dict[str, ms.Dataset]:
    def source(name: str | None = None) -> ms.Dataset:
        return ms.read_parquet(path, name=name)

    mixed = ms.interleave(
        {"a": source(), "b": source().shuffle(2, window_blocks=3).map(dict)}, {"a": 3, "b": 1}
    )
    joined = ms.concatenate([source("x").skip(3), source("y").shuffle(1, window_blocks=2)])
    return {
        "in order": source(),
        "shuffled": source().shuffle(3, window_blocks=4),
        "shuffled without windows": source().shuffle(3, window_blocks=None).map(dict),
        "batches": source().shuffle(3, window_blocks=2).skip(4).batch(7, collate_fn=list),
        "epochs": source().shuffle(3, window_blocks=2).repeat(2).take(60),
        "mixed": mixed,
        "joined": joined,
        "a stream": mixed.filter(lambda sample: sample["id"] % 3 > 0).shuffle(4, buffer_size=9),
    }


PIPELINES = list(pipelines("x"))


@pytest.mark.parametrize("groups_kept", [0, 3, 100])
@pytest.mark.parametrize("name", PIPELINES)
def test_samples_and_states_are_the_same_with_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoding: Decoding, name: str, groups_kept: int
) -> None:
    path = f"{make_files(tmp_path)}/*.parquet"
    probe = ms.read_parquet(path)
    probe.rows([0])
    monkeypatch.setattr(
        row_groups, "CACHE_BYTES", groups_kept * probe.node._handle().store.num_bytes
    )

    def read(worth: float) -> list[tuple[str, Any]]:
        monkeypatch.setattr(ahead, "SLOW_READ_S", worth)
        ds = pipelines(path)[name]
        whole = iter(ds)
        steps = [(json.dumps(whole.state_dict()), None)]
        for sample in whole:
            steps.append((json.dumps(whole.state_dict()), repr(sample)))
            if worth == 0.0:
                settle(ds)  # the other extreme: all that may be read ahead has been
        return steps

    decoding.by.clear()
    plain = read(float("inf"))
    assert decoding.ahead == []
    assert len(plain) > 5
    decoding.by.clear()
    assert read(0.0) == plain
    assert decoding.ahead != []
    assert read(1e-9) == plain  # and whatever the race of the two brings


@pytest.mark.parametrize("name", PIPELINES)
def test_hints_are_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    node = pipelines(f"{make_files(tmp_path)}/*.parquet")[name].node
    while not node.random_access:
        node = next(iter(node.inputs().values()))
    read: list[tuple[int, list[int]]] = []
    told: list[tuple[int, list[int]]] = []
    rows = ParquetSource._rows
    monkeypatch.setattr(
        ParquetSource,
        "_rows",
        lambda self, at, positions, *more: (
            read.append((id(self), positions.tolist())) or rows(self, at, positions, *more)
        ),
    )
    monkeypatch.setattr(
        ParquetSource,
        "_hint",
        lambda self, positions: told.append((id(self), positions.tolist())),
    )
    place, positions = bind(node), np.arange(node.length())
    for where in (positions, positions[::3], positions[-1:]):
        place.rows(where, epoch_key(1), np.ones(1, dtype=np.int64))
        place.hint(where, epoch_key(1), np.ones(1, dtype=np.int64))
    assert told == read
    assert len(told) >= 3


def test_the_next_groups_are_read_in_the_thread_each_once(
    tmp_path: Path, decoding: Decoding
) -> None:
    ds = ms.read_parquet(f"{make_files(tmp_path)}/*.parquet")
    whole = iter(ds)
    assert next(whole)["id"] == 0
    settle(ds)
    assert decoding.by[:2] == [(0, False), (1, True)]
    for expected in range(1, 36):
        assert next(whole)["id"] == expected
        settle(ds)
    assert decoding.by == [(0, False), *((number, True) for number in range(1, 9))]


def test_the_thread_helps_with_what_is_asked_for_at_once(
    tmp_path: Path, decoding: Decoding
) -> None:
    ds = ms.read_parquet(f"{make_files(tmp_path)}/*.parquet")
    assert ids(ds.rows(range(36))) == list(range(36))
    settle(ds)
    assert sorted(number for number, _ in decoding.by) == list(range(9))
    assert 8 in decoding.ahead  # from the end


def test_a_group_that_is_being_read_is_waited_for_not_read_again(
    tmp_path: Path, decoding: Decoding
) -> None:
    ds = ms.read_parquet(f"{make_files(tmp_path)}/*.parquet")
    decoding.gate.clear()
    ds.rows([0])
    ds.node._hint(np.array([5]))
    assert decoding.began.acquire(timeout=60)
    found: list[int] = []
    asks = threading.Thread(target=lambda: found.extend(ids(ds.rows([6]))))
    asks.start()
    store = ds.node._handle().store
    deadline = time.monotonic() + 60
    while True:
        with store.changed:  # whoever has been counted under it has also decided whether to wait
            if store.calls == 2 or time.monotonic() > deadline:
                break
    decoding.gate.set()
    asks.join(60)
    assert found == [6]
    assert decoding.by == [(0, False), (1, True)]


@pytest.mark.parametrize(("cost", "expected"), [(0.019, []), (0.021, [1, 2])])
def test_it_starts_only_where_a_read_takes_long(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoding: Decoding,
    cost: float,
    expected: list[int],
) -> None:
    monkeypatch.setattr(ahead, "SLOW_READ_S", 0.02)
    monkeypatch.setattr(ahead, "_timed", lambda read, number: (*read(number), cost))
    write(tmp_path / "x.parquet", range(15))
    ds = ms.read_parquet(tmp_path / "x.parquet")
    for _ in ds:
        settle(ds)
    assert decoding.ahead == expected


@pytest.mark.parametrize("groups_kept", [0, 1, 2, 4])
@pytest.mark.parametrize("name", ["in order", "shuffled", "batches", "epochs"])
def test_what_is_read_ahead_takes_two_groups_more_than_the_cache_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoding: Decoding, name: str, groups_kept: int
) -> None:
    for number in range(8):
        write(tmp_path / f"{number}.parquet", range(number * 20, number * 20 + 20))
    ds = pipelines(f"{tmp_path}/*.parquet")[name]
    probe = ms.read_parquet(f"{tmp_path}/*.parquet")
    probe.rows([0])
    size = probe.node._handle().store.num_bytes
    monkeypatch.setattr(row_groups, "CACHE_BYTES", groups_kept * size)
    most = 0
    watched = row_groups._decode

    def decode(index: Any, files: Any, number: int) -> Any:
        nonlocal most
        with store.changed:
            assert (
                store.num_bytes
                == sum(each for _, each in store.kept.values())
                == size * len(store.kept)
            )
            assert store.prefetched_bytes == size * len(store.prefetched)
            assert len(store.reading) <= 2  # one by whoever asks, one by the thread
            most = max(most, len(store.kept) + len(store.prefetched) + len(store.reading))
        return watched(index, files, number)

    monkeypatch.setattr(row_groups, "_decode", decode)
    store = source_of(ds)._handle().store
    for step, _ in enumerate(ds):
        if step % 3:
            settle(ds)
    assert decoding.ahead
    assert most <= max(1, groups_kept) + 2


def test_a_shuffle_has_its_next_window_at_hand_where_there_is_room(
    tmp_path: Path, decoding: Decoding
) -> None:
    for number in range(8):
        write(tmp_path / f"{number}.parquet", range(number * 20, number * 20 + 20))
    ds = ms.read_parquet(f"{tmp_path}/*.parquet").shuffle(1, window_blocks=4)
    order = []
    for sample in ds:
        settle(ds)
        order.append(sample["id"])
    assert (
        len({number for number, by_thread in decoding.by if not by_thread}) <= 4
    )  # of the first window
    assert sorted(number for number, _ in decoding.by) == list(range(32))
    assert order == ids(ms.read_parquet(f"{tmp_path}/*.parquet").shuffle(1, window_blocks=4))


@pytest.mark.parametrize("leaves", [1, 2])
def test_an_interrupt_between_two_steps_of_a_read_leaves_nothing_to_wait_for(leaves: int) -> None:
    class Interrupted:
        """A condition; Ctrl-C comes as it is left for the n-th time."""

        def __init__(self, condition: threading.Condition) -> None:
            self.condition, self.left = condition, 0

        def __enter__(self) -> None:
            self.condition.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.condition.__exit__(*error)
            self.left += 1
            if self.left == leaves:
                raise KeyboardInterrupt

        def __getattr__(self, name: str) -> Any:
            return getattr(self.condition, name)

    store: ahead.ReadAheadCache[int] = ahead.ReadAheadCache(lambda number: (number, 1), lambda: 4)
    store.changed = Interrupted(store.changed)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        store.get(3, print)
    again = threading.Thread(target=lambda: store.get(3, print), daemon=True)
    again.start()
    again.join(5)
    assert not again.is_alive()


def store_of(
    limit: int,
) -> tuple[
    ahead.ReadAheadCache[int], Callable[..., None], Callable[[], tuple[list[int], list[int]]]
]:
    """A store of numbers, each of size 1; what gets them; what waits for the thread and tells what
    is there.
    """
    store: ahead.ReadAheadCache[int] = ahead.ReadAheadCache(
        lambda number: (number, 1), lambda: limit
    )

    def get(*numbers: int) -> None:
        for number in numbers:
            assert store.get(number, lambda _: None)[0] == number

    def wait() -> tuple[list[int], list[int]]:
        thread = store.thread.running
        if thread is not None:
            thread.join(60)
        return list(store.kept), list(store.prefetched)

    return store, get, wait


def test_what_is_idle_makes_room_and_what_is_in_use_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ahead, "SLOW_READ_S", 0.0)
    store, get, wait = store_of(2)
    get(0, 1)
    store.hint([2, 3, 4])
    assert wait() == ([0, 1], [2])  # one beyond
    get(*[0, 1] * 20)
    assert wait() == ([0, 1], [2])
    get(*[1] * 20)
    assert wait() == ([1], [2])  # 0 went: 2 is in its place
    get(2)
    assert wait() == ([1, 2], [3])


def test_what_was_read_for_nothing_makes_room_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "SLOW_READ_S", 0.0)
    store, get, wait = store_of(1)
    get(0)
    store.hint([1, 2, 3])
    assert wait() == ([0], [1])
    get(100)  # somewhere else: 2 and 3 are not wanted any more
    assert list(store.wanted) == []
    for number in range(101, 140):
        store.hint([number + 1])
        wait()
        get(number)
    assert wait() == ([139], [140])


# -- errors -----------------------------------------------------------------------------------------------------------


def spoil(path: Path, number: int) -> None:
    """Overwrite a row group's pages, so that its checksum is wrong."""
    column = pq.ParquetFile(path).metadata.row_group(number).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)


@pytest.mark.parametrize("shuffled", [False, True])
def test_an_error_comes_with_the_sample_that_needs_the_group_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoding: Decoding, shuffled: bool
) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.parquet", range(number * 10, number * 10 + 10))

    def read(worth: float) -> tuple[list[int], type, str, Any]:
        monkeypatch.setattr(ahead, "SLOW_READ_S", worth)
        source = ms.read_parquet(f"{tmp_path}/*.parquet")
        len(source)
        ds = source.shuffle(2, window_blocks=2) if shuffled else source
        whole, found = iter(ds), []
        with pytest.raises(ms.SourceError) as raised:
            for sample in whole:
                found.append(sample["id"])
                settle(ds)
        return found, raised.type, str(raised.value), whole.state_dict()

    whole = ms.read_parquet(f"{tmp_path}/*.parquet")
    order = ids(whole.shuffle(2, window_blocks=2) if shuffled else whole)
    victim = order[25] // 5
    spoil(tmp_path / f"{victim // 2}.parquet", victim % 2)
    plain = read(float("inf"))
    decoding.by.clear()
    assert read(0.0) == plain
    assert victim in decoding.ahead
    assert plain[0] == order[: len(plain[0])]
    assert order[len(plain[0])] // 5 == victim
    assert f"{victim // 2}.parquet, row group {victim % 2} cannot be read" in plain[2]


def test_an_error_in_a_group_that_nobody_asks_for_is_no_error(
    tmp_path: Path, decoding: Decoding
) -> None:
    write(tmp_path / "0.parquet", range(20))
    ds = ms.read_parquet(tmp_path / "0.parquet")
    len(ds)
    spoil(tmp_path / "0.parquet", 1)
    whole, found = iter(ds), []
    for _ in range(5):
        found.append(next(whole)["id"])
        settle(ds)
    assert found == list(range(5))
    assert 1 in decoding.ahead
    assert ids(ds.rows([10, 19])) == [10, 19]


def test_what_could_be_read_at_the_second_try_is_read(tmp_path: Path, decoding: Decoding) -> None:
    write(tmp_path / "0.parquet", range(10))
    ds = ms.read_parquet(tmp_path / "0.parquet")
    len(ds)
    whole = (tmp_path / "0.parquet").read_bytes()
    spoil(tmp_path / "0.parquet", 1)
    rows = iter(ds)
    assert next(rows)["id"] == 0
    settle(ds)
    assert decoding.ahead == [1]
    with (tmp_path / "0.parquet").open("r+b") as file:
        file.write(whole)
    assert ids(rows) == list(range(1, 10))


def test_an_error_while_a_larger_chunk_is_tried_does_not_end_in_no_chunk_at_all(
    tmp_path: Path,
) -> None:
    write(tmp_path / "0.parquet", range(10))
    ds = ms.read_parquet(tmp_path / "0.parquet")
    len(ds)
    spoil(tmp_path / "0.parquet", 1)
    cursor = Cursor(bind(ds.node), Lane(0, 1, 1, Ledger()), 0, 0)
    cursor.chunk, cursor.cost_before_trial = (
        8,
        1e-12,
    )  # as after a chunk was doubled, which will turn out not to pay
    assert [next(cursor)[0]["id"] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ms.SourceError, match="row group 1 cannot be read"):
        next(cursor)


# -- threads and processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_forked_while_the_thread_reads_reads_by_itself(
    tmp_path: Path, decoding: Decoding
) -> None:
    ds = ms.read_parquet(f"{make_files(tmp_path)}/*.parquet")
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        decoding.gate.clear()
        whole = iter(ds)
        assert next(whole)["id"] == 0
        ds.node._handle().store.wanted.clear()
        ds.node._hint(np.array([35, 30, 25, 20]))
        held = ds.node._handle().store.reading
        ours, theirs = context.Pipe()

        def child() -> None:
            decoding.gate.set()
            here = [thread.name for thread in threading.enumerate() if thread.name == THREAD]
            theirs.send((here, ids(ds), ids(whole)))

        process = context.Process(target=child)
        process.start()
        assert ours.poll(60)
        assert ours.recv() == ([], list(range(36)), list(range(1, 36)))
        process.join(60)
        assert process.exitcode == 0
        decoding.gate.set()
        assert ids(whole) == list(range(1, 36))
        settle(ds)
        assert held == set()


@pytest.mark.parametrize("groups_kept", [0, 3])
def test_threads_that_read_one_source_disturb_each_other_in_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoding: Decoding, groups_kept: int
) -> None:
    ds = ms.read_parquet(f"{make_files(tmp_path, 4)}/*.parquet")
    ds.rows([0])
    monkeypatch.setattr(row_groups, "CACHE_BYTES", groups_kept * ds.node._handle().store.num_bytes)
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 2)
    orders = [ds if seed == 0 else ds.shuffle(seed, window_blocks=2) for seed in range(6)]
    expected = [[list(range(i, i + 4)) for i in ids(order)] for order in orders]
    found: list[Any] = [None] * 6

    def read(number: int) -> None:
        found[number] = [sample["tokens"].tolist() for sample in orders[number].repeat(3)]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for order, first in zip(found, expected):
        assert order[: len(first)] == first
        assert len(order) == 3 * len(first)
    settle(ds)
    store = ds.node._handle().store
    assert store.reading == set()
    assert store.num_bytes == sum(size for _, size in store.kept.values())
    assert store.num_bytes <= row_groups.CACHE_BYTES or len(store.kept) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["main", "thread", "process"])
def test_loaders_of_every_kind_make_the_same_batches(
    tmp_path: Path, decoding: Decoding, kind: str
) -> None:
    ds = ms.read_parquet(f"{make_files(tmp_path, 4)}/*.parquet").shuffle(3, window_blocks=3)
    expected = [
        batch["id"].tolist()
        for batch in ms.DataLoader(ds.map(dict), batch_size=4, collate_fn=ms.pad)
    ]
    options: dict[str, Any] = {"num_workers": 0}
    if kind != "main":
        options = {"num_workers": 2, "worker_type": kind}
    loader = ms.DataLoader(
        pickle.loads(pickle.dumps(ds)).map(dict), batch_size=4, collate_fn=ms.pad, **options
    )
    assert [batch["id"].tolist() for batch in loader] == expected
    loader.close()


def test_the_thread_ends_when_the_dataset_goes(tmp_path: Path, decoding: Decoding) -> None:
    ds = ms.read_parquet(f"{make_files(tmp_path)}/*.parquet")
    decoding.gate.clear()
    whole = iter(ds)
    next(whole)
    assert decoding.began.acquire(timeout=60)
    store = weakref.ref(ds.node._handle().store)
    thread = store().thread.running  # type: ignore[union-attr]
    opened = threading.Timer(0.05, decoding.gate.set)
    opened.start()
    del ds, whole
    assert store() is None
    assert not thread.is_alive()
    assert decoding.ahead == [1]  # no further one


def test_a_thread_is_there_only_while_there_is_something_to_read(
    tmp_path: Path, decoding: Decoding
) -> None:
    ds = ms.read_parquet(f"{make_files(tmp_path)}/*.parquet")
    assert ids(ds) == list(range(36))
    settle(ds)
    assert [thread.name for thread in threading.enumerate() if thread.name == THREAD] == []
    assert "_opened" not in pickle.loads(pickle.dumps(ds)).node.__dict__


@pytest.mark.slow
def test_the_interpreter_ends_while_the_thread_reads(tmp_path: Path) -> None:
    make_files(tmp_path)
    code = f"""
import threading, time
import midstream as ms
import midstream.sources.read_ahead as ahead, midstream.sources.row_groups as row_groups
ahead.SLOW_READ_S = 0.0
decode, began = row_groups._decode, threading.Event()
def slow(*which):
    if threading.current_thread().name == "{THREAD}":
        began.set()
        time.sleep(0.3)
        found = decode(*which)
        print("read", which[-1], flush=True)
        return found
    return decode(*which)
row_groups._decode = slow
ds = ms.read_parquet("{tmp_path}/*.parquet")
whole = iter(ds)
next(whole)
assert began.wait(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "read 1\n", "")
