"""flat_map: any iterable of samples, and errors in the middle of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import midstream as ms
from tests.helpers.loaders import drain
from tests.helpers.pipelines import numbers


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda x: 3, "found int"),
        (lambda x: None, "found NoneType"),
        (lambda x: "text", "found str"),
        (lambda x: b"bytes", "found bytes"),
        (lambda x: {"a": 1}, "found dict"),
    ],
)
def test_flat_map_that_returns_no_iterable_of_samples_is_an_error(
    wrong: Callable[[int], Any], match: str
) -> None:
    found = drain(iter(numbers(4).flat_map(lambda x: wrong(x) if x == 2 else [x])))
    assert [x for x in found if not isinstance(x, ms.SampleError)] == [0, 1, 3]
    assert f"the function returns an iterable of samples; {match}" in found[2].original_message


@pytest.mark.parametrize(
    "many", [lambda x: (x, x), lambda x: iter([x, x]), lambda x: np.array([x, x])]
)
def test_flat_map_takes_any_iterable(many: Callable[[int], Any]) -> None:
    assert list(numbers(3).flat_map(many)) == [0, 0, 1, 1, 2, 2]


def test_a_generator_that_fails_half_way_gives_none_of_its_samples() -> None:
    def parts(x: int) -> Iterator[int]:
        yield x
        if x == 1:
            raise ValueError("half way")
        yield -x

    found = drain(iter(numbers(3).flat_map(parts)))
    assert [x for x in found if not isinstance(x, ms.SampleError)] == [0, 0, 2, -2]
    assert isinstance(found[2], ms.SampleError)


@pytest.mark.xfail(strict=True, reason="parts of parts of a short batch collide with parts")
def test_parts_of_parts_of_a_mixed_batch_have_origins_of_their_own() -> None:
    """The last batch holds one sample, whose first part takes its origin; see `part_origin`."""
    parts = {
        "a": ms.from_dataset(range(30)),
        "b": ms.from_dataset(range(10_000, 10_019)).flat_map(lambda row: [row, row]),
    }
    mix = ms.interleave(parts, {"a": 2, "b": 1}, seed=0, stopping_strategy="all_exhausted")
    pipeline = mix.batch(3, collate_fn=list).flat_map(lambda batch: batch[:1] * (batch[0] % 4))
    loader = ms.DataLoader(pipeline, batch_size=1, lanes=1, collate_fn=list)
    origins = [tuple(origin)[:4] for _ in loader for origin in loader.trace()]
    assert len(origins) == len(set(origins)) > 0
