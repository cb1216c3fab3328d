"""Sequences and map-style datasets: one bad row loses one sample."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import midstream as ms
from tests.cases import plain
from tests.helpers.loaders import drain
from tests.helpers.sources import check_resume


@pytest.mark.parametrize(
    "data",
    [
        [3, 1, 2],
        (3, 1, 2),
        range(5, 9),
        np.arange(4) * 2,
        np.eye(3),
        list("abc"),
        "abc",
        collections.deque([1, 2]),
    ],
    ids=lambda data: f"{type(data).__name__}",
)
def test_a_sequence_yields_its_elements(data: Any) -> None:
    ds = ms.from_dataset(data)
    assert len(ds) == len(data)
    assert plain(list(ds)) == plain([data[row] for row in range(len(data))])
    assert plain(ds.rows([2, 0] if len(data) > 2 else [1, 0])) == plain(
        [data[2 if len(data) > 2 else 1], data[0]]
    )
    assert check_resume(lambda: ms.from_dataset(data)) == plain(list(data))


class OneByOne(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A row is its number times ten; row 7 cannot be read."""

    bad = 7

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        assert type(index) is int
        if index == self.bad:
            raise OSError(f"cannot read {index}")
        return index * 10


class Together(OneByOne):
    """The same, read by `__getitems__`, which fails when the bad row is asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __getitems__(self, index: list[int]) -> list[int]:
        self.asked.append(index)
        return [self[row] for row in index]


class Stops(OneByOne):
    def __getitem__(self, index: int) -> int:
        if index == self.bad:
            raise StopIteration
        return super().__getitem__(index)


@pytest.mark.parametrize("kind", [OneByOne, Together, Stops])
def test_one_bad_row_loses_one_sample_and_names_its_row(kind: type[OneByOne]) -> None:
    found = drain(iter(ms.from_dataset(kind(), name="disk")))
    assert [sample for sample in found if not isinstance(sample, ms.SampleError)] == [
        row * 10 for row in range(20) if row != 7
    ]
    error = found[7]
    assert isinstance(error, ms.SampleError)
    assert error.origin == ms.Origin("disk", 0, 7)
    assert error.function == f"{kind.__name__}.__getitem__"
    assert "disk[7]" in str(error)
    if kind is not Stops:
        assert (error.error_type, error.original_message) == ("OSError", "cannot read 7")
        assert isinstance(error.__cause__, OSError)


def test_the_bad_row_is_named_behind_a_shuffle_and_in_a_later_pass() -> None:
    found = drain(iter(ms.from_dataset(Together(), name="disk").shuffle(3).repeat(2)))
    errors = [sample.origin for sample in found if isinstance(sample, ms.SampleError)]
    assert errors == [ms.Origin("disk", 0, 7), ms.Origin("disk", 1, 7)]
    assert len(found) == 40


def test_getitems_is_asked_for_many_rows_at_once() -> None:
    data = Together()
    data.bad = -1
    ds = ms.from_dataset(data)
    assert ds.rows([3, 1, 2]) == [30, 10, 20]
    assert data.asked == [[3, 1, 2]]
    assert list(ms.from_dataset(torch.utils.data.Subset(data, [4, 2]))) == [40, 20]


@pytest.mark.parametrize("found", [[], [1]])
def test_getitems_that_returns_another_number_of_rows_is_an_error_that_counts_them(
    found: list[int],
) -> None:
    class Short(OneByOne):
        def __getitems__(self, index: list[int]) -> list[int]:
            return found

    ds = ms.from_dataset(Short())
    with pytest.raises(
        ValueError, match=f"Short returned {len(found)} rows where 3 were asked for"
    ):
        ds.rows([0, 1, 2])


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class SizedStream(Stream):
    def __len__(self) -> int:
        return 3


SPLITS = {
    "train": datasets.Dataset.from_dict({"x": [1]}),
    "test": datasets.Dataset.from_dict({"x": [2]}),
}


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "dict": (lambda: {"a": [1]}, "rows by number; found dict"),
    "set": (lambda: {1, 2}, "rows by number; found set"),
    "frozenset": (lambda: frozenset({1}), "rows by number; found frozenset"),
    "dict of another kind": (
        lambda: collections.UserDict({0: 1}),
        "rows by number; found UserDict",
    ),
    "generator": (lambda: (x for x in range(3)), r"from_iterable\(lambda: \.\.\., name=\.\.\.\)"),
    "iterator": (lambda: iter([1]), r"from_iterable\("),
    "map object": (lambda: map(str, [1]), r"from_iterable\("),
    "DatasetDict": (
        lambda: datasets.DatasetDict(SPLITS),
        r"dict of splits; choose one, like data\['train'\]",
    ),
    "IterableDatasetDict": (
        lambda: datasets.IterableDatasetDict({"test": SPLITS["test"].to_iterable_dataset()}),
        r"choose one, like data\['test'\]",
    ),
    "None": (lambda: None, "found NoneType"),
    "number": (lambda: 3, "found int"),
    "midstream": (
        lambda: ms.from_dataset([1], name="me"),
        "already is a midstream dataset(.|\n)*me: from_dataset",
    ),
    "torch stream": (Stream, r"from_iterable\("),
    "torch stream with a length": (SizedStream, r"from_iterable\("),
    "pyarrow table": (lambda: pa.table({"a": [1, 2]}), "Dataset"),
    "pandas frame": (lambda: pd.DataFrame({"a": [1, 2]}), "Dataset"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_data_is_refused_with_the_way_out(kind: str) -> None:
    make, match = WRONG[kind]
    with pytest.raises(TypeError, match=match):
        ms.from_dataset(make())


@pytest.mark.parametrize("name", ["", "a|b", 3, b"x"], ids=repr)
def test_a_name_that_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="string without '|'"):
        ms.from_dataset([1], name=name)
