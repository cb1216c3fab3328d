"""Errors that are skipped: counted once, and limited by max_errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import midstream as ms
from midstream.dataset import Dataset
from midstream.pipeline.single_lane import SingleLaneIterator
from tests.helpers.loaders import loader, through_json
from tests.helpers.pipelines import numbers


def until_too_many(iterator: Iterator[Any]) -> tuple[list[Any], ms.TooManyErrors]:
    found = []
    with pytest.raises(ms.TooManyErrors) as caught:
        for sample in iterator:
            found.append(sample)
    return found, caught.value


def fail_at(*bad: int) -> Callable[[int], int]:
    def check(x: int) -> int:
        if x in bad:
            raise ValueError(f"bad {x}")
        return x

    return check


def test_skip_leaves_a_hole_and_its_batch_is_shorter() -> None:
    ds = numbers(16).map(fail_at(5, 6, 13), on_error="skip").batch(4, collate_fn=list)
    assert ds.random_access
    assert list(ds) == [[0, 1, 2, 3], [4, 7], [8, 9, 10, 11], [12, 14, 15]]
    assert len(ds) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_which_all_failed_vanishes_and_is_counted(workers: int) -> None:
    ds = numbers(16).map(fail_at(4, 5, 6, 7, 13), on_error="skip")
    made = loader(ds, workers)
    assert list(made) == [[0, 1, 2, 3], [8, 9, 10, 11], [12, 14, 15]]
    progress = made.progress()
    assert progress.sources["data"].failures == {"ValueError": 5}
    assert progress.samples == 11
    assert progress.sources["data"].epochs == 1.0
    assert made.epoch == 1
    made.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_refill_keeps_batches_full_and_counts(workers: int) -> None:
    ds = numbers(18).map(fail_at(1, 5, 6), on_error="refill")
    assert not ds.random_access
    assert list(ds.batch(4, collate_fn=list)) == [
        [0, 2, 3, 4],
        [7, 8, 9, 10],
        [11, 12, 13, 14],
        [15, 16, 17],
    ]
    made = loader(ds, workers, lanes=2)
    batches = list(made)
    assert [len(batch) for batch in batches] in ([4, 4, 4, 3], [4, 4, 4, 2, 1])
    assert sorted(x for batch in batches for x in batch) == [
        x for x in range(18) if x not in (1, 5, 6)
    ]
    assert made.progress().sources["data"].failures == {"ValueError": 3}
    made.close()


@pytest.mark.parametrize(
    "node",
    [
        lambda ds: ds.filter(lambda x: fail_at(5, 7)(x) % 2, on_error="skip"),
        lambda ds: ds.flat_map(lambda x: [fail_at(5, 7)(x)] * (x % 2), on_error="skip"),
    ],
    ids=["filter", "flat_map"],
)
def test_skip_of_a_stream_node_leaves_out_and_counts(node: Callable[[Dataset], Dataset]) -> None:
    ds = node(numbers(12))
    assert list(ds) == [1, 3, 9, 11]
    made = loader(ds, lanes=1)
    assert list(made) == [[1, 3, 9, 11]]
    assert made.progress().sources["data"].failures == {"ValueError": 2}


def test_every_kind_of_failure_is_counted_by_its_type_and_source() -> None:
    def parse(x: int) -> int:
        if x % 5 == 1:
            raise KeyError(x)
        if x % 5 == 3:
            raise ValueError(x)
        return x

    ds = ms.interleave(
        {"a": numbers(20).map(parse, on_error="skip"), "b": numbers(20)},
        stopping_strategy="all_exhausted_without_replacement",
    )
    made = loader(ds)
    list(made)
    assert made.progress().sources["a"].failures == {"KeyError": 4, "ValueError": 4}
    assert made.progress().sources["b"].failures == {}
    assert made.progress().sources["a"].samples == 12


MODES = ["skip", "refill"]


def limited(mode: Any, limit: int | None) -> Dataset:
    return numbers(30).map(fail_at(5, 6, 13, 22), on_error=mode, max_errors=limit)


@pytest.mark.parametrize("mode", MODES)
def test_more_errors_than_max_errors_are_too_many(mode: str) -> None:
    found, error = until_too_many(iter(limited(mode, 2)))
    assert found == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert "map skipped 3 samples, more than max_errors=2" in str(error)
    assert "3 x ValueError" in str(error)
    assert len(list(limited(mode, 4))) == 26
    assert until_too_many(iter(limited(mode, 0)))[0] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_too_many_errors_end_the_loader_again_and_again(mode: str, workers: int) -> None:
    made = loader(limited(mode, 2), workers, lanes=2)
    iterator = iter(made)
    found, error = until_too_many(iterator)
    assert found == list(loader(limited(mode, None), lanes=2))[: len(found)]
    assert "more than max_errors=2" in str(error)
    with pytest.raises(ms.TooManyErrors):
        next(iterator)
    made.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_the_state_after_too_many_errors_is_that_of_the_last_batch_handed_out(
    mode: str, workers: int
) -> None:
    made = loader(limited(mode, 2), workers, lanes=2)
    found, _ = until_too_many(iter(made))
    state = through_json(made.state_dict())
    assert state["steps_done"] == len(found)
    made.close()
    resumed = loader(limited(mode, None), lanes=2)
    resumed.load_state_dict(state)
    assert found + list(resumed) == list(loader(limited(mode, None), lanes=2))


@pytest.mark.parametrize("mode", MODES)
def test_the_state_after_too_many_errors_is_that_of_the_last_sample_handed_out(mode: str) -> None:
    run = SingleLaneIterator(limited(mode, 2).node, 0, 1, 0)
    found, _ = until_too_many(run)
    with pytest.raises(ms.TooManyErrors):
        next(run)
    resumed = SingleLaneIterator(limited(mode, None).node, 0, 1, 0)
    resumed.load_state_dict(through_json(run.state_dict()))
    assert found + list(resumed) == [x for x in range(30) if x not in (5, 6, 13, 22)]


@pytest.mark.processes
def test_errors_before_a_resume_count_towards_the_limit() -> None:
    run = SingleLaneIterator(limited("skip", 2).node, 0, 1, 0)
    assert [next(run) for _ in range(8)] == [0, 1, 2, 3, 4, 7, 8, 9]
    resumed = SingleLaneIterator(limited("skip", 2).node, 0, 1, 0)
    resumed.load_state_dict(run.state_dict())
    assert until_too_many(resumed)[0] == [10, 11, 12]
    made = loader(limited("skip", 2), lanes=2)
    iterator = iter(made)
    assert [next(iterator) for _ in range(2)] == [[0, 1, 2, 3], [4, 7]]
    again = loader(limited("skip", 2), 2, lanes=2)
    again.load_state_dict(made.state_dict())
    assert until_too_many(iter(again))[0] == [[8, 9, 10, 11]]
    again.close()
