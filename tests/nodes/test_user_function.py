"""User code that ends, fails or returns nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import midstream as ms
from midstream.dataset import Dataset
from tests.helpers.loaders import drain
from tests.helpers.pipelines import numbers, stop_at_5, stream

STOPS: dict[str, Callable[[Dataset], Dataset]] = {
    "map": lambda ds: ds.map(stop_at_5),
    "map with_rng": lambda ds: ds.map(lambda x, rng: stop_at_5(x), with_rng=True),
    "map isolate_rng": lambda ds: ds.map(stop_at_5, isolate_rng=True),
    "filter": lambda ds: ds.filter(lambda x: stop_at_5(x) > -1),
    "flat_map": lambda ds: ds.flat_map(lambda x: [stop_at_5(x)]),
    "flat_map of a generator": lambda ds: ds.flat_map(lambda x: (stop_at_5(y) for y in [x])),
}


@pytest.mark.parametrize("node", STOPS)
@pytest.mark.parametrize("source", [numbers, stream])
def test_stop_iteration_out_of_user_code_is_an_error_and_no_end(
    source: Callable[[int], Dataset], node: str
) -> None:
    found = drain(iter(STOPS[node](source(8))))
    assert [x for x in found if not isinstance(x, ms.SampleError)] == [0, 1, 2, 3, 4, 6, 7]
    assert isinstance(found[5], ms.SampleError)
    assert "StopIteration" in str(found[5])
    assert found[5].origin == ms.Origin("data", 0, 5)
