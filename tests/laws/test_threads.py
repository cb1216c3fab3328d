"""The laws of reading in threads, of reading ahead without workers, and of workers that are started
early.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import midstream as ms
from midstream.dataset import Dataset
from tests.cases import READERS, build, plain
from tests.helpers.loaders import loader, through_json, whole

ROWS = [row for row in READERS if row != "map isolated rng"]
THREADS: dict[str, dict[str, Any]] = {
    "threads": {"workers": 2, "worker_type": "thread"},
    "ahead": {"prefetch_factor": 3},
}

pytestmark = pytest.mark.filterwarnings("ignore:the loader was left after batch:UserWarning")


def reading() -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith("midstream-reader")
    ]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    if reading():
        gc.collect()
    assert reading() == []


def piece(made: ms.DataLoader, count: int | None) -> list[Any]:
    """So many batches, or all that are left, each with the state after it."""
    found = []
    for batch in made:
        found.append((plain(batch), through_json(made.state_dict()), made.trace()))
        if count is not None and len(found) == count:
            break
    return found


@pytest.mark.parametrize("kind", THREADS)
@pytest.mark.parametrize("row", ROWS)
def test_batches_states_and_origins_are_those_of_the_main_process(row: str, kind: str) -> None:
    ds = build(row)
    expected = piece(loader(ds), None)
    made = loader(ds, **THREADS[kind])
    assert piece(made, None) == expected
    assert made.epoch == 1
    made.close()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.processes
def test_threads_processes_and_reading_ahead_go_on_from_each_other(row: str) -> None:
    ds = build(row)
    expected = whole(ds)
    step = max(1, len(expected) // 6)
    kinds: list[dict[str, Any]] = [
        {"workers": 3, "worker_type": "thread"},
        {"workers": 2},
        {"prefetch_factor": 2},
        {"workers": 2, "worker_type": "thread"},
        {},
        {"workers": 1, "worker_type": "thread"},
    ]
    found: list[Any] = []
    state = None
    for index, kind in enumerate(kinds):
        made = loader(ds, **kind)
        if state is not None:
            made.load_state_dict(state)
            assert made.state_dict() == state
        if state is None or state["epoch"] == 0:
            part = piece(made, None if index == len(kinds) - 1 else step)
            found += [batch for batch, _, _ in part]
            state = part[-1][1]
        made.close()
    assert found == expected


@pytest.mark.parametrize("kind", THREADS)
def test_epochs_break_and_restart(kind: str) -> None:
    for ds in (build("interleave"), build("interleave streams")):
        plainly, made = (
            loader(ds),
            loader(
                ds, **THREADS[kind], **({"persistent_workers": True} if kind == "threads" else {})
            ),
        )
        epochs = [[plain(batch) for batch in plainly] for _ in range(3)]
        piece(made, 3)
        assert [[plain(batch) for batch in made] for _ in range(2)] == epochs[:2]
        piece(made, 2)
        made.set_epoch(3)
        made.set_epoch(2)
        assert [plain(batch) for batch in made] == epochs[2]
        made.close()


def fails(x: int) -> int:
    if x in (5, 11):
        raise ValueError(f"no {x}")
    return x


@pytest.mark.parametrize("kind", THREADS)
def test_an_error_loses_one_sample(kind: str) -> None:
    def run(**options: Any) -> list[Any]:
        made = loader(ms.from_dataset(range(24)).map(fails), **options)
        iterator, found = iter(made), []
        while True:
            try:
                found.append((next(iterator), made.state_dict()))
            except StopIteration:
                made.close()
                return found
            except ms.SampleError as error:
                found.append((str(error.origin), made.state_dict()))

    assert run(**THREADS[kind]) == run()


class Ends:
    """Ends its thread, once."""

    def __init__(self) -> None:
        self.ready = True

    def __call__(self, x: int) -> int:
        if x == 21 and self.ready:
            self.ready = False
            raise SystemExit(3)
        return x


ends: list[Ends] = []


def call_ends(x: int) -> int:
    return ends[-1](x)


@pytest.mark.parametrize("kind", THREADS)
def test_a_thread_that_was_ended_is_a_worker_error_and_the_state_stays(kind: str) -> None:
    ends.append(Ends())
    made = loader(ms.from_dataset(range(40)).map(call_ends), **THREADS[kind])
    iterator = iter(made)
    found = []
    with pytest.raises(ms.WorkerError, match="was ended by SystemExit: 3"):
        while True:
            found.append(next(iterator))
    assert 0 < len(found) <= 5
    assert made.state_dict()["steps_done"] == len(found)
    with pytest.raises(ms.WorkerError):
        next(iterator)
    made.load_state_dict(made.state_dict())
    assert [*found, *made] == [list(range(start, start + 4)) for start in range(0, 40, 4)]
    made.close()


@pytest.mark.parametrize("kind", THREADS)
def test_threads_end_with_close_with_the_iterator_and_with_the_loader(kind: str) -> None:
    ds = ms.from_dataset(range(400))
    made = loader(ds, **THREADS[kind])
    iterator = iter(made)
    next(iterator)
    assert reading()
    made.close()
    assert not reading()
    with pytest.raises(RuntimeError, match="left behind"):
        next(iterator)
    del iterator
    for _ in made:
        break
    del made
    assert not reading()
    made = loader(ds, **THREADS[kind])
    first, second = iter(made), iter(made)
    next(second)
    del first
    assert len(reading()) == (2 if kind == "threads" else 1)
    del second, made


def test_one_thread_reads_ahead_and_the_state_is_that_of_the_last_batch_handed_out() -> None:
    came = threading.Event()
    go = threading.Event()
    numbers.update(came=came, go=go)
    made = loader(ms.from_dataset(range(64)).map(signals), prefetch_factor=3)
    iterator = iter(made)
    assert next(iterator) == [0, 1, 2, 3]
    assert came.wait(60), "nobody read ahead"
    state = made.state_dict()
    assert state["steps_done"] == 1
    go.set()
    rest = list(iterator)
    made.load_state_dict(state)
    assert list(made) == rest
    made.close()


numbers: dict[str, threading.Event] = {}


def signals(x: int) -> int:
    if x == 12:  # in the fourth batch
        numbers["came"].set()
    if x == 16:
        numbers["go"].wait(60)
    return x


def test_arguments_that_do_not_fit_are_refused() -> None:
    ds = ms.from_dataset(range(8))
    with pytest.raises(ValueError, match="worker_type is 'process' or 'thread'"):
        ms.DataLoader(ds, worker_type="threads")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="starts no process"):
        ms.DataLoader(ds, num_workers=1, worker_type="thread", multiprocessing_context="fork")
    with pytest.raises(ValueError, match="prefetch_factor is an integer"):
        ms.DataLoader(ds, prefetch_factor=0)
    with pytest.raises(TypeError, match="worker_type"):
        ms.DataLoader(range(8), sampler=range(8), worker_type="thread")
    for options in THREADS.values():
        with pytest.raises(ValueError, match="has isolate_rng=True.*with_rng=True"):
            loader(build("map isolated rng"), **options)


def test_a_preemption_stops_between_two_steps_and_threads_go_on() -> None:
    ds = ms.from_dataset(range(40)).shuffle(1)
    expected = whole(ds)
    made = loader(ds, **THREADS["threads"])
    found = []
    with ms.PreemptionGuard() as guard:
        for batch in made:
            found.append(batch)
            if len(found) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if guard.should_stop:
                break
    state = made.state_dict()
    made.close()
    resumed = loader(ds, **THREADS["ahead"])
    resumed.load_state_dict(state)
    assert [*found, *resumed] == expected
    resumed.close()


# -- start() -------------------------------------------------------------------------------------------------------------

STARTED: dict[str, dict[str, Any]] = {
    **THREADS,
    "fork": {"workers": 2},
    "persistent": {"workers": 2, "persistent_workers": True},
    "spawn": {"workers": 1, "method": "spawn"},
}


def running(made: ms.DataLoader) -> Any:
    return [worker.pid for worker in getattr(made._iterator, "_workers", [])] or made._iterator


@pytest.mark.parametrize("kind", STARTED)
@pytest.mark.processes
def test_workers_that_were_started_early_are_the_ones_that_read(kind: str) -> None:
    ds: Dataset = ms.from_dataset(range(40)).shuffle(1)
    plainly = loader(ds)
    epochs = [[plain(batch) for batch in plainly] for _ in range(2)]
    made = loader(ds, **STARTED[kind])
    before = made.state_dict()
    made.start()
    made.start()
    assert made.state_dict() == before
    iterator = iter(made)
    there = running(made)
    found = [next(iterator)]
    made.start()  # an epoch is in progress
    assert running(made) == there
    found += iterator
    assert found == epochs[0]
    made.start()
    assert [plain(batch) for batch in made] == epochs[1]
    if kind == "persistent":
        assert running(made) == there
    made.close()


@pytest.mark.parametrize("kind", ["threads", "fork", "persistent"])
@pytest.mark.processes
def test_what_changes_after_start_is_what_counts(kind: str) -> None:
    ds: Dataset = ms.from_dataset(range(40)).shuffle(1)
    plainly = loader(ds)
    epochs = [[plain(batch) for batch in plainly] for _ in range(6)]
    cut = loader(ds)
    state = piece(cut, 4)[-1][1]
    made = loader(ds, **STARTED[kind])
    made.start()
    made.load_state_dict(state)
    made.start()
    assert made.state_dict() == state
    assert [plain(batch) for batch in made] == epochs[0][4:]
    made.start()
    made.set_epoch(4)
    assert [plain(batch) for batch in made] == epochs[4]
    made.start()
    made.close()
    assert [plain(batch) for batch in made] == epochs[5]
    made.start()
    made.close()
