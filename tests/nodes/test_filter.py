"""filter: a warning, and in the end an error, where almost nothing passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

import midstream as ms
from tests.helpers.loaders import loader
from tests.helpers.pipelines import numbers


def rare(x: int) -> bool:
    return x % 300 == 0


def told(samples: Callable[[], list[Any]]) -> tuple[list[Any], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = samples()
    return found, [str(w.message) for w in caught if "samples passed" in str(w.message)]


def test_a_filter_that_lets_almost_nothing_pass_is_told_once() -> None:
    found, texts = told(lambda: list(numbers(4000).filter(rare)))
    assert found == list(range(0, 4000, 300))
    assert len(texts) == 1
    assert "filter: only 4 of 1,000 samples passed rare @ " in texts[0]
    assert (
        told(lambda: list(numbers(4000).filter(rare).repeat(2)))[1] == texts
    )  # not again in the second pass
    assert told(lambda: list(numbers(4000).filter(lambda x: x % 90 == 0)))[1] == []
    assert told(lambda: list(numbers(900).filter(rare)))[1] == []


def test_a_filter_that_lets_nothing_pass_is_told_at_the_end() -> None:
    found, texts = told(lambda: list(numbers(1500).filter(lambda x: False)))
    assert found == []
    assert len(texts) == 1
    assert "only 0 of 1,000" in texts[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_tells_of_the_filter_once_for_all_lanes_workers_and_epochs(workers: int) -> None:
    made = loader(numbers(8000).filter(rare), workers, lanes=4)
    found, texts = told(lambda: [[x for batch in made for x in batch] for _ in range(2)])
    made.close()
    assert [sorted(epoch) for epoch in found] == [list(range(0, 8000, 300))] * 2
    assert len(texts) == 1


def test_a_warning_turned_into_an_error_loses_nothing() -> None:
    ds = numbers(4000).filter(rare)
    for make in (
        lambda: iter(ds),
        lambda: iter(loader(ds, lanes=1, batch_size=None, collate_fn=None)),
    ):
        found, warned, iterator = [], 0, make()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            while True:
                try:
                    found.append(next(iterator))
                except StopIteration:
                    break
                except RuntimeWarning:
                    warned += 1
        assert (found, warned) == (list(range(0, 4000, 300)), 1)


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_an_endless_search_is_a_source_error(
    workers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if workers is not None:
        monkeypatch.setattr("midstream.pipeline.patience.MAX_FRUITLESS", 5000)
    ds = numbers(50).repeat().filter(lambda x: x > 50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        made = None if workers is None else loader(ds, workers, lanes=2)
        with pytest.raises(
            ms.SourceError, match=r"filter: (100|5),000 samples in a row(.|\n)*before \.repeat\(\)"
        ):
            next(iter(ds) if made is None else iter(made))
        if made is not None:
            made.close()
