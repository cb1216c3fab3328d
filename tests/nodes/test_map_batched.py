"""``map(batched=True)``: columns in, columns out, any number of rows, exact under resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.dataset import Dataset
from midstream.pipeline.iterator import Lane
from midstream.pipeline.ledger import Ledger
from midstream.pipeline.node import bind
from midstream.pipeline.passes import epoch_key
from midstream.pipeline.rows import as_origin_array
from midstream.pipeline.single_lane import LaneOutput, SingleLaneIterator
from tests.helpers.loaders import drain, through_json


def split(iterator: Any) -> tuple[list[Any], list[ms.SampleError]]:
    found = drain(iterator)
    errors = [each for each in found if isinstance(each, ms.SampleError)]
    return [each for each in found if not isinstance(each, ms.SampleError)], errors


def rows(count: int) -> Dataset:
    return ms.from_dataset([{"id": row, "text": "x" * row} for row in range(count)])


def keep(batch: Any) -> Any:
    return batch


def test_the_function_sees_the_columns_of_a_group_and_what_it_returns_replaces_them() -> None:
    seen = []

    def fn(batch: dict[str, list[Any]]) -> dict[str, Any]:
        seen.append(batch)
        return {"double": [2 * row for row in batch["id"]]}

    ds = rows(5).map(fn, batched=True, batch_size=3)
    assert list(ds) == [{"double": 2 * row} for row in range(5)]
    assert seen == [
        {"id": [0, 1, 2], "text": ["", "x", "xx"]},
        {"id": [3, 4], "text": ["xxx", "xxxx"]},
    ]
    assert not ds.random_access


@pytest.mark.parametrize(
    ("returned", "samples"),
    [
        ({"a": [1, 2], "b": ("x", "y")}, [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]),
        ({"a": np.array([1, 2])}, [{"a": 1}, {"a": 2}]),
        ({"a": torch.tensor([1.5])}, [{"a": 1.5}]),
        ([{"a": 1}, 7], [{"a": 1}, 7]),
        ({}, []),
        ({"a": []}, []),
        ([], []),
    ],
)
def test_what_it_may_return(returned: Any, samples: list[Any]) -> None:
    assert list(rows(4).map(lambda batch: returned, batched=True, batch_size=4)) == samples


def test_two_dimensional_columns_become_arrays() -> None:
    (first, second) = rows(2).map(lambda batch: {"x": np.arange(6).reshape(2, 3)}, batched=True)
    assert (first["x"].tolist(), second["x"].tolist()) == ([0, 1, 2], [3, 4, 5])


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (None, "TypeError", "returns a dict of columns"),
        ({"a": [1], "b": [1, 2]}, "ValueError", "differ in length: {'a': 1, 'b': 2}"),
        ({"a": 3}, "TypeError", "a list or an array; found int for 'a'"),
        ({"a": "word"}, "TypeError", "found str for 'a'"),
        ([1, None], "TypeError", "None for a sample"),
    ],
)
def test_what_it_may_not_return_loses_the_group(returned: Any, error: str, words: str) -> None:
    def fn(batch: dict[str, list[Any]]) -> Any:
        return returned if 2 in batch["id"] else batch

    found, errors = split(iter(rows(6).map(fn, batched=True, batch_size=2)))
    assert [sample["id"] for sample in found] == [0, 1, 4, 5]
    assert [each.error_type for each in errors] == [error]
    assert words in str(errors[0])
    assert errors[0].node == "map_batched"


def test_samples_of_other_keys_in_a_group_are_told() -> None:
    ds = ms.from_dataset([{"a": 1}, {"b": 1}, {"a": 2}, {"a": 3}]).map(
        keep, batched=True, batch_size=2
    )
    found, errors = split(iter(ds))
    assert found == [{"a": 2}, {"a": 3}]
    assert "expected ['a'], found ['b'] in sample 1" in str(errors[0])


def test_samples_that_are_no_dicts_come_as_a_list() -> None:
    assert list(
        ms.from_dataset(range(5)).map(lambda batch: batch[::-1], batched=True, batch_size=2)
    ) == [1, 0, 3, 2, 4]


def test_skip_counts_a_group_and_max_errors_holds() -> None:
    def fn(batch: list[int]) -> list[int]:
        if batch[0] % 4 == 0:
            raise KeyError(batch[0])
        return batch

    loader = ms.DataLoader(
        ms.from_dataset(range(12)).map(fn, batched=True, batch_size=2, on_error="skip"),
        batch_size=1,
        lanes=1,
    )
    assert [int(batch) for batch in loader] == [2, 3, 6, 7, 10, 11]
    assert sum(loader.progress().unattributed.values()) == 3
    with pytest.raises(ms.TooManyErrors, match="max_errors=1"):
        list(
            ms.from_dataset(range(12)).map(
                fn, batched=True, batch_size=2, on_error="skip", max_errors=1
            )
        )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rows(3).map(keep, batched=True, batch_size=0), "batch_size"),
        (lambda: rows(3).map(keep, batched=True, batch_size=1 << 20), "batch_size is below"),
        (lambda: rows(3).map(keep, batched=True, with_rng=True), "no generator per sample"),
        (
            lambda: rows(3).map(keep, batched=True, max_errors=3),
            "max_errors counts skipped samples",
        ),
        (lambda: rows(3).map(keep, batched=True, on_error="ignore"), "on_error"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_told_at_once(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def origins(ds: Dataset) -> list[list[list[int]]]:
    delivery = LaneOutput(bind(ds.node), Lane(0, 1, 1, Ledger()), int(epoch_key(0)[0]), 0)
    found = []
    while True:
        try:
            found.append(as_origin_array(delivery.next()[1])[:, 2:4].tolist())
        except StopIteration:
            return found


def test_origins_are_one_by_one_or_numbered_parts_of_all() -> None:
    def fn(batch: list[int]) -> list[int]:
        return batch if 0 in batch else [*batch, 9]

    parts = 1 << 20
    assert origins(ms.from_dataset(range(4)).map(fn, batched=True, batch_size=2)) == [
        [[0, 0]],
        [[1, 0]],
        *([[2, part], [3, part]] for part in range(3)),
    ]
    twice = (
        ms.from_dataset(range(1))
        .flat_map(lambda x: [x, x])
        .map(lambda b: [*b, 9], batched=True, batch_size=2)
    )
    assert origins(twice) == [[[0, part], [0, parts + part]] for part in range(3)]


def test_a_replay_that_finds_fewer_diverges() -> None:
    size = 3
    ds = ms.from_dataset(range(4)).map(lambda batch: batch * size, batched=True, batch_size=2)
    whole = SingleLaneIterator(ds.node, 0, 1, 0)
    for _ in range(5):
        next(whole)
    state = whole.state_dict()
    size = 1
    resumed = SingleLaneIterator(ds.node, 0, 1, 0)
    resumed.load_state_dict(state)
    with pytest.raises(ms.ReplayDiverged, match="more than 5 samples"):
        next(resumed)


def test_an_endless_input_that_gives_samples_now_and_then_is_no_endless_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("midstream.pipeline.patience.MAX_FRUITLESS", 20)
    endless = ms.from_dataset(range(10)).repeat()
    now_and_then = endless.map(lambda xs: [x for x in xs if x == 0], batched=True, batch_size=2)
    assert [next(run) for run in [iter(now_and_then)] for _ in range(9)] == [0] * 9
    never = endless.map(lambda xs: [], batched=True, batch_size=2)
    with pytest.raises(ms.SourceError, match="made nothing of 20 samples in a row"):
        next(iter(never))


class Vary:
    """Makes of a group as many samples as it likes, depending on the group alone; fails on some."""

    def __init__(self, seed: int, fail: int) -> None:
        self.seed, self.fail = seed, fail

    def __call__(self, batch: list[Any]) -> list[Any]:
        draw = int(np.random.default_rng([self.seed, *batch]).integers(0, 7))
        if draw == self.fail:
            raise ValueError("no")
        return [[*batch, number] for number in range(draw)]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 30),
    size=st.integers(1, 9),
    seed=st.integers(0, 99),
    fail=st.integers(0, 9),
    lane=st.sampled_from([(0, 1), (1, 2), (2, 3)]),
    upstream=st.sampled_from(["source", "filter", "failing", "buffer"]),
    batch=st.booleans(),
)
def test_cut_anywhere_it_goes_on_identically(
    count: int, size: int, seed: int, fail: int, lane: tuple[int, int], upstream: str, batch: bool
) -> None:
    def some(x: int) -> int:
        return 1 // (x % 5) + x

    ds: Dataset = ms.from_dataset(range(count)).shuffle(seed)
    ds = {
        "source": lambda: ds,
        "filter": lambda: ds.filter(lambda x: x % 3),
        "failing": lambda: ds.map(some),
        "buffer": lambda: ds.shuffle(1, buffer_size=6),
    }[upstream]()
    ds = ds.map(Vary(seed, fail), batched=True, batch_size=size)
    ds = ds.batch(2, collate_fn=list) if batch else ds

    def events(run: SingleLaneIterator) -> tuple[list[Any], list[Any]]:
        found, states = [], [through_json(run.state_dict())]
        while True:
            try:
                found.append(next(run))
            except StopIteration:
                return found, states
            except ms.SampleError as error:
                found.append(error.original_message)
            states.append(through_json(run.state_dict()))

    found, states = events(SingleLaneIterator(ds.node, *lane, 0))
    for step, state in enumerate(states):
        resumed = SingleLaneIterator(ds.node, *lane, 0)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        again, later = events(resumed)
        assert again == found[step:]
        if (
            upstream != "buffer"
        ):  # whose safe point, at the end of its input, depends on when it was asked for
            assert later == states[step:]
