"""batch: errors in collate functions, and batches that are collated when they are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import midstream as ms
from midstream.dataset import Dataset
from tests.helpers.loaders import drain
from tests.helpers.pipelines import numbers, stop_at_5, stream


@pytest.mark.parametrize("source", [numbers, stream])
def test_stop_iteration_out_of_collate_is_an_error_and_no_end(
    source: Callable[[int], Dataset],
) -> None:
    found = drain(iter(source(12).batch(3, collate_fn=lambda batch: [stop_at_5(x) for x in batch])))
    assert [x for x in found if not isinstance(x, ms.SampleError)] == [
        [0, 1, 2],
        [6, 7, 8],
        [9, 10, 11],
    ]
    assert "StopIteration" in str(found[1])
    assert found[1].origin is None


@pytest.mark.parametrize("source", [numbers, stream])
def test_a_collate_function_that_returns_none_loses_its_batch(
    source: Callable[[int], Dataset],
) -> None:
    found = drain(iter(source(9).batch(3, collate_fn=lambda batch: None if 3 in batch else batch)))
    assert [x for x in found if not isinstance(x, ms.SampleError)] == [[0, 1, 2], [6, 7, 8]]
    assert "returned None" in found[1].original_message


@pytest.mark.parametrize("collated", [False, True])
def test_a_batch_of_random_access_is_made_when_it_is_taken(collated: bool) -> None:
    made: list[Any] = []

    def note(samples: list[Any]) -> list[Any]:
        made.append(samples)
        if samples[0] == 6:
            raise ValueError("not these")
        return samples

    ds = numbers(12).batch(3, collate_fn=note)
    if collated:  # what is above the batch asks for many at once
        ds = ds.map(lambda batch: batch)
    batches = iter(ds)
    assert next(batches) == [0, 1, 2] and (collated or made == [[0, 1, 2]])
    assert next(batches) == [3, 4, 5] and (collated or made == [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(ms.SampleError, match="not these"):
        next(batches)
    state = batches.state_dict()
    assert list(batches) == [[9, 10, 11]]
    ds.load_state_dict(state)
    assert list(ds) == [[9, 10, 11]]
