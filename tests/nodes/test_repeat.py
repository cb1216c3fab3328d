"""repeat: nothing, repeated, ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import midstream as ms
from midstream.dataset import Dataset
from tests.helpers.loaders import loader
from tests.helpers.pipelines import numbers, stream

NOTHING: dict[str, Callable[[], Dataset]] = {
    "no rows": lambda: numbers(0),
    "no rows, filtered": lambda: numbers(0).filter(bool),
    "nothing passes": lambda: numbers(9).filter(lambda x: False),
    "nothing is made": lambda: numbers(4).flat_map(lambda x: []),
    "nothing is taken": lambda: stream(9).take(0),
    "all is skipped": lambda: stream(9).skip(900),
    "no iterable": lambda: ms.from_iterable(list, name="none"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # that a lane found nothing is told
@pytest.mark.parametrize("times", [3, None], ids=["three times", "for ever"])
@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.processes
def test_repeat_of_nothing_ends(nothing: str, times: int | None) -> None:
    ds = NOTHING[nothing]().repeat(times)
    assert list(ds) == []
    for workers in (0, 2 if nothing == "nothing passes" else 0):
        made = loader(ds, workers, lanes=None)
        assert list(made) == []
        made.close()
