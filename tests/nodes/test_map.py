"""map: None is an error; randomness depends on the sample alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import midstream as ms
from midstream.dataset import Dataset
from tests.helpers.loaders import drain, loader
from tests.helpers.pipelines import numbers, stream


def none_at_5(x: int) -> int | None:
    return None if x == 5 else x


@pytest.mark.parametrize("source", [numbers, stream])
def test_map_that_returns_none_is_an_error_that_names_filter(
    source: Callable[[int], Dataset],
) -> None:
    found = drain(iter(source(8).map(none_at_5)))
    assert [x for x in found if not isinstance(x, ms.SampleError)] == [0, 1, 2, 3, 4, 6, 7]
    assert found[5].error_type == "TypeError"
    assert "returned None" in found[5].original_message
    assert ".filter" in found[5].original_message


def augment(x: int) -> dict[str, Any]:
    """As torchvision does it: draws from whatever is global."""
    return {
        "id": x,
        "noise": [
            torch.rand(2).tolist(),
            np.random.rand(),
            random.random(),
            int(torch.randint(9, (1,))),
        ],
    }


def noisy(x: int, rng: np.random.Generator) -> dict[str, Any]:
    return {"id": x, "noise": rng.random(2).tolist()}


def global_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest


RANDOM: dict[str, Callable[[Dataset], Dataset]] = {
    "with_rng": lambda ds: ds.map(noisy, with_rng=True, seed=4),
    "isolate_rng": lambda ds: ds.map(augment, isolate_rng=True, seed=4),
}


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("source", [numbers, stream])
@pytest.mark.processes
def test_random_augmentation_depends_on_the_sample_alone(
    kind: str, source: Callable[[int], Dataset]
) -> None:
    """Not on lanes, workers, ranks, order of reading or a resume."""
    ds = RANDOM[kind](source(48))
    expected = {sample["id"]: sample["noise"] for sample in ds}
    assert len({json.dumps(noise) for noise in expected.values()}) == 48
    torch.manual_seed(99)
    for options in (
        {"lanes": 1},
        {"lanes": 12},
        {"lanes": 12, "workers": 2},
        {"lanes": 6, "workers": 1, "batch_size": 5},
    ):
        made = loader(ds, **options)  # type: ignore[arg-type]
        iterator = iter(made)
        found = [sample for _ in range(3) for sample in next(iterator)]
        state = made.state_dict()
        made.close()
        resumed = loader(ds, **{**options, "workers": 0})  # type: ignore[arg-type]
        resumed.load_state_dict(state)
        found += [sample for batch in resumed for sample in batch]
        assert sorted(sample["id"] for sample in found) == list(range(48))
        assert all(sample["noise"] == expected[sample["id"]] for sample in found)
    assert all(s["noise"] == expected[s["id"]] for s in RANDOM[kind](source(48)).take(9))


@pytest.mark.parametrize("kind", RANDOM)
def test_random_augmentation_differs_by_seed_epoch_pass_and_place(kind: str) -> None:
    ds = RANDOM[kind](numbers(5))
    fn, option = (noisy, "with_rng") if kind == "with_rng" else (augment, "isolate_rng")
    one = numbers(5).map(fn, seed=4, **{option: True})  # type: ignore[arg-type]
    other = numbers(5).map(fn, seed=5, **{option: True})  # type: ignore[arg-type]
    assert list(one) == list(ds)
    assert list(other) != list(ds)
    assert ds.rows(range(5), epoch=1) != ds.rows(range(5))
    passes = list(RANDOM[kind](numbers(5).repeat(2)))
    assert passes[:5] == list(ds)
    assert [s["id"] for s in passes[5:]] == [s["id"] for s in passes[:5]]
    assert all(a["noise"] != b["noise"] for a, b in zip(passes[:5], passes[5:]))
    assert list(RANDOM[kind](numbers(5).map(lambda x: x))) != list(
        ds
    )  # map#2 is another place than map


@pytest.mark.parametrize("fails", [False, True])
def test_isolate_rng_leaves_the_global_generators_as_they_were(fails: bool) -> None:
    def draw(x: int) -> dict[str, Any]:
        sample = augment(x)
        if fails and x % 2:
            raise ValueError("after drawing")
        return sample

    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    before = global_state()
    for source in (numbers, stream):
        found = drain(iter(source(10).map(draw, isolate_rng=True)))
        assert sum(isinstance(sample, ms.SampleError) for sample in found) == (5 if fails else 0)
    assert global_state() == before


def test_isolate_rng_does_not_depend_on_what_the_global_generators_hold() -> None:
    ds = numbers(6).map(augment, isolate_rng=True)
    torch.manual_seed(1)
    first = list(ds)
    torch.manual_seed(2)
    random.seed(5)
    assert list(ds) == first


def test_both_kinds_of_randomness_together() -> None:
    def both(x: int, rng: np.random.Generator) -> list[float]:
        return [x, rng.random(), random.random()]

    before = global_state()
    ds = numbers(6).map(both, with_rng=True, isolate_rng=True)
    assert list(ds) == list(ds)
    assert global_state() == before
