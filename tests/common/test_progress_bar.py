"""Progress bars: there after a second, where someone looks, and nowhere else."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import midstream as ms
from midstream.common import progress_bar as _bar
from midstream.common.progress_bar import with_progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Stands still, but for `pass_`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_bar, "time", clock)
    monkeypatch.setattr("tqdm.std.time", clock.time)
    for name in ("RANK", "TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    return clock


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    # Not sys.stderr itself, which pytest sets again before a test.
    monkeypatch.setattr(_bar, "sys", SimpleNamespace(stderr=terminal, modules=sys.modules))
    return terminal


def items(clock: Clock, number: int, seconds: float) -> Iterator[int]:
    for item in range(number):
        yield item
        clock.pass_(seconds)


def test_a_bar_comes_after_a_second_and_goes_at_the_end(clock: Clock, terminal: Terminal) -> None:
    seen = []
    for item in with_progress_bar(range(8), "looking"):
        seen.append((item, terminal.getvalue()))
        clock.pass_(0.3)
    assert [item for item, _ in seen] == list(range(8))
    assert [bool(text) for _, text in seen] == [False] * 4 + [True] * 4
    assert "looking:  50%" in seen[4][1]
    assert " 4/8 " in seen[4][1]
    assert " 7/8 " in seen[7][1]
    assert "[00:01<" in seen[4][1]  # counted from the start
    assert terminal.getvalue().rsplit("\r", 2)[1].strip() == ""  # wiped out


def test_what_takes_less_shows_nothing_and_makes_no_bar(
    clock: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(_bar, "_open_bar")
    assert list(with_progress_bar(items(clock, 100, 0.009), "looking", 100)) == list(range(100))
    assert terminal.getvalue() == ""


def test_no_thread_is_left(clock: Clock, terminal: Terminal) -> None:
    before = threading.active_count()
    assert len(list(with_progress_bar(items(clock, 4, 2.0), "looking", 4))) == 4
    assert "looking" in terminal.getvalue()
    assert threading.active_count() == before


def test_how_many_there_are_is_asked_of_the_items(clock: Clock, terminal: Terminal) -> None:
    for _ in with_progress_bar(["a", "b", "c"], "looking"):
        clock.pass_(2)
    assert " 1/3 " in terminal.getvalue()
    terminal.truncate(0)
    for _ in with_progress_bar(iter("abc"), "looking"):
        clock.pass_(2)
    assert "looking: 1it" in terminal.getvalue()


def test_an_error_and_a_loop_that_is_left_take_the_bar_with_them(
    clock: Clock, terminal: Terminal
) -> None:
    def fails() -> Iterator[int]:
        yield from items(clock, 3, 2.0)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(with_progress_bar(fails(), "looking"))
    assert terminal.getvalue().rsplit("\r", 2)[1].strip() == ""
    going = with_progress_bar(items(clock, 9, 2.0), "looking")
    next(going), next(going)
    going.close()
    assert terminal.getvalue().rsplit("\r", 2)[1].strip() == ""


def _switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "are_progress_bars_disabled", lambda: True)


OFF: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "no terminal": lambda patch: patch.setattr(_bar.sys.stderr, "isatty", lambda: False),
    "TQDM_DISABLE": lambda patch: patch.setenv("TQDM_DISABLE", "1"),
    "datasets, by its switch": _switched_off,
    "datasets, by its variable": lambda patch: patch.setenv(
        "HF_DATASETS_DISABLE_PROGRESS_BARS", "true"
    ),
    "a worker": lambda patch: patch.setattr(_bar, "get_worker_info", lambda: "one"),
    "another rank": lambda patch: patch.setenv("RANK", "3"),
    "a child process": lambda patch: patch.setattr(
        multiprocessing, "parent_process", lambda: "one"
    ),
}


@pytest.mark.parametrize("why", OFF)
def test_no_bar_where_nobody_looks(
    clock: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    assert len(list(with_progress_bar(items(clock, 4, 2.0), "looking", 4))) == 4
    assert "looking" in terminal.getvalue()
    terminal.truncate(0)
    terminal.seek(0)
    OFF[why](monkeypatch)
    assert list(with_progress_bar(items(clock, 4, 2.0), "looking", 4)) == [0, 1, 2, 3]
    assert terminal.getvalue() == ""


def test_the_switch_of_datasets_is_heard(clock: Clock, terminal: Terminal) -> None:
    was_off = datasets.are_progress_bars_disabled()
    try:
        datasets.disable_progress_bars()
        assert len(list(with_progress_bar(items(clock, 4, 2.0), "looking", 4))) == 4
        assert terminal.getvalue() == ""
        datasets.enable_progress_bars()
        assert len(list(with_progress_bar(items(clock, 4, 2.0), "looking", 4))) == 4
        assert "looking" in terminal.getvalue()
    finally:
        (datasets.disable_progress_bars if was_off else datasets.enable_progress_bars)()


@pytest.mark.parametrize(("value", "shown"), [("0", True), ("", True), ("true", False)])
def test_tqdm_disable_means_what_it_says(
    clock: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, value: str, shown: bool
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    assert len(list(with_progress_bar(items(clock, 4, 2.0), "looking", 4))) == 4
    assert ("looking" in terminal.getvalue()) == shown


@pytest.mark.parametrize(("config", "wanted"), [({"IPKernelApp": {}}, True), ({}, False)])
def test_a_notebook_is_where_someone_looks(
    clock: Clock,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    wanted: bool,
) -> None:
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    shell = SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    assert _bar._is_wanted() == wanted


@pytest.mark.processes
def test_a_real_worker_shows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    monkeypatch.setattr(_bar, "_AFTER_S", 0.0)
    ds = ms.from_dataset([1, 2, 3, 4]).map(
        lambda x: (x, os.getpid(), list(with_progress_bar([x, x], "looking")), _bar._is_wanted())
    )
    found = list(ms.DataLoader(ds, batch_size=1, num_workers=1, collate_fn=list))
    assert [sample[2:] for (sample,) in found] == [([x, x], False) for x in (1, 2, 3, 4)]
    assert all(sample[1] != os.getpid() for (sample,) in found)
    assert next(iter(ds))[3]


def test_footers_and_lines_are_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    monkeypatch.setattr(_bar, "_AFTER_S", 0.0)
    for number in range(3):
        pq.write_table(pa.table({"id": [number]}), tmp_path / f"{number}.parquet")
        (tmp_path / f"{number}.jsonl").write_text(f'{{"id": {number}}}\n')
    assert len(ms.read_parquet(f"{tmp_path}/*.parquet")) == 3
    assert "read_parquet: reading footers" in terminal.getvalue()
    assert "/3 " in terminal.getvalue()
    assert len(ms.read_json(f"{tmp_path}/*.jsonl")) == 3
    assert "read_json: finding the rows of files" in terminal.getvalue()
    assert "read_json: finding the rows of 2.jsonl" in terminal.getvalue()
