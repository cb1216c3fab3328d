"""Sources: the rows are what is stored, in order, each once, wherever the run is cut and whoever
reads.
"""

from __future__ import annotations

import collections
import datetime
import functools
import decimal
import gc
import io
import json
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import GeneratorType
from typing import Any

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from datasets.table import InMemoryTable
from hypothesis import given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.dataset import Dataset
from midstream.pipeline.single_lane import SingleLaneIterator
from midstream.sources.arrow_table import TableReader
from midstream.sources.huggingface import _HubShards
from tests.helpers.loaders import drain, through_json
from tests.helpers import loaders

N = 24
loader = functools.partial(loaders.loader, lanes=None)
all_batches = functools.partial(loaders.whole, lanes=None)


def test_column_names_and_rows_are_told_without_reading() -> None:
    ds = ms.from_dataset(datasets.Dataset.from_dict({"a": [1, 2], "b": ["x", "y"]}), name="pairs")
    assert repr(ds).partition("  # ")[0] == "pairs: from_dataset(datasets.Dataset[a, b], 2 rows)"
    assert len(ds) == 2


# -- what runs and resumes ----------------------------------------------------------------------------------------------


def check_resume(make: Callable[[], Dataset], lane: tuple[int, int] = (0, 1)) -> list[Any]:
    """Cut after every sample, in chains of 1, 2, 3 and 7, each state saved again right after its
    load.
    """
    whole = SingleLaneIterator(make().node, *lane, 0)
    samples, states = [], [through_json(whole.state_dict())]
    for sample in whole:
        samples.append(plain(sample))
        states.append(through_json(whole.state_dict()))
    for step, state in enumerate(states):
        resumed = SingleLaneIterator(make().node, *lane, 0)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        again = SingleLaneIterator(make().node, *lane, 0)
        again.load_state_dict(resumed.state_dict())
        assert [plain(sample) for sample in again] == samples[step:], f"resumed after sample {step}"
    for stride in (1, 2, 3, 7):
        found, state = [], states[0]
        while True:
            part = SingleLaneIterator(make().node, *lane, 0)
            part.load_state_dict(state)
            taken = [plain(sample) for _, sample in zip(range(stride), part)]
            found.extend(taken)
            state = part.state_dict()
            if len(taken) < stride:
                break
        assert found == samples, f"pieces of {stride}"
    return samples


# -- Arrow tables -------------------------------------------------------------------------------------------------------

DAY = datetime.datetime(2024, 2, 29, 12, 30)


def column(type_: pa.DataType, make: Callable[[int], Any]) -> pa.Array:
    return pa.array([make(row) for row in range(N)], type_)


NUMBERS: dict[str, pa.Array] = {
    "int8": column(pa.int8(), lambda i: i - 12),
    "int64": column(pa.int64(), lambda i: (-1) ** i * (2**63 - 1 - i)),
    "uint8": column(pa.uint8(), lambda i: 255 - i),
    "uint64": column(pa.uint64(), lambda i: 2**64 - 1 - i),
    "float16": column(pa.float16(), lambda i: np.float16(i / 4)),
    "float32": column(pa.float32(), lambda i: [math.nan, math.inf, i / 8][i % 3]),
    "float64": column(pa.float64(), lambda i: i / 3),
    "bool": column(pa.bool_(), lambda i: i % 3 == 0),
}
TEXTS: dict[str, pa.Array] = {
    "string": column(pa.string(), lambda i: ["", f"row {i}", "日本 ä" * i][i % 3]),
    "large_string": column(pa.large_string(), lambda i: "x" * i),
    "binary": column(pa.binary(), lambda i: bytes(range(i))),
}
LISTS: dict[str, tuple[pa.Array, Any]] = {
    "list int32": (column(pa.list_(pa.int32()), lambda i: list(range(i % 5))), np.int32),
    "list uint8": (column(pa.list_(pa.uint8()), lambda i: list(range(i))), np.uint8),
    "list uint64": (column(pa.list_(pa.uint64()), lambda i: [2**64 - 1] * (i % 3)), np.uint64),
    "list float16": (
        column(pa.list_(pa.float16()), lambda i: [np.float16(i)] * (i % 2)),
        np.float16,
    ),
    "list float32": (column(pa.list_(pa.float32()), lambda i: [i / 8] * (i % 4)), np.float32),
    "large_list int64": (column(pa.large_list(pa.int64()), lambda i: [i] * (i % 6)), np.int64),
    "fixed list float64": (column(pa.list_(pa.float64(), 3), lambda i: [i, i / 2, -i]), np.float64),
}
OTHERS: dict[str, pa.Array] = {
    "timestamp us": column(pa.timestamp("us"), lambda i: DAY + datetime.timedelta(microseconds=i)),
    "timestamp ns tz": column(pa.timestamp("ns", "UTC"), lambda i: 10**18 + i),
    "date": column(pa.date32(), lambda i: DAY.date() + datetime.timedelta(days=i)),
    "duration": column(pa.duration("us"), lambda i: datetime.timedelta(seconds=i)),
    "decimal": column(pa.decimal128(12, 3), lambda i: decimal.Decimal(i) / 8),
    "dictionary": column(pa.string(), lambda i: f"kind {i % 3}").dictionary_encode(),
    "list bool": column(pa.list_(pa.bool_()), lambda i: [i % 2 == 0] * (i % 4)),
    "list string": column(pa.list_(pa.string()), lambda i: [f"word {i}", ""][: i % 3]),
    "list of list": column(pa.list_(pa.list_(pa.int16())), lambda i: [[i] * (i % 3), []][: i % 3]),
    "struct": column(
        pa.struct({"a": pa.int8(), "b": pa.struct({"c": pa.list_(pa.int32()), "d": pa.string()})}),
        lambda i: {"a": i, "b": {"c": list(range(i % 3)), "d": f"deep {i}"}},
    ),
    "list of struct": column(
        pa.list_(pa.struct({"k": pa.int64()})), lambda i: [{"k": i}] * (i % 3)
    ),
}
COLUMNS: dict[str, pa.Array] = {
    **NUMBERS,
    **TEXTS,
    **{name: array for name, (array, _) in LISTS.items()},
    **OTHERS,
}
CUTS = [0, 3, 3, 4, 11, 18, N]  # one chunk is empty, one has a single row


def with_nulls(array: pa.Array) -> pa.Array:
    """Every fifth value is None."""
    values = [None if row % 5 == 2 else array[row].as_py() for row in range(N)]
    if pa.types.is_dictionary(array.type):
        return pa.array(values).dictionary_encode()
    if pa.types.is_timestamp(array.type) and array.type.unit == "ns":
        values = [None if value is None else value.value for value in values]
    return pa.array(values, array.type)


def chunked(array: pa.Array) -> pa.ChunkedArray:
    return pa.chunked_array([array[a:b] for a, b in zip(CUTS, CUTS[1:])])


def dataset(columns: dict[str, pa.Array]) -> datasets.Dataset:
    table = pa.table({name: chunked(array) for name, array in columns.items()})
    return datasets.Dataset(InMemoryTable(table))


WIDE = {**COLUMNS, **{f"{name} null": with_nulls(array) for name, array in COLUMNS.items()}}


@pytest.fixture(scope="module", params=["memory", "mapped"])
def wide(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> datasets.Dataset:
    """Every type, with and without None, in memory and on disk."""
    data = dataset(WIDE)
    if request.param == "memory":
        return data
    path = str(tmp_path_factory.mktemp("wide"))
    data.save_to_disk(path)
    return datasets.load_from_disk(path)


def differs(found: Any, expected: Any) -> bool:
    """Whether a value is not what Hugging Face's Python format gives (arrays count as lists)."""
    if isinstance(found, np.ndarray):
        found = found.tolist()
    if isinstance(expected, dict):
        return (
            not isinstance(found, dict)
            or list(found) != list(expected)
            or any(differs(found[key], expected[key]) for key in expected)
        )
    if isinstance(expected, list):
        return (
            not isinstance(found, list)
            or len(found) != len(expected)
            or any(differs(a, b) for a, b in zip(found, expected))
        )
    if isinstance(expected, float) and math.isnan(expected):
        return not (isinstance(found, float) and math.isnan(found))
    return type(found) is not type(expected) or found != expected


def check_rows(data: datasets.Dataset, ds: Dataset) -> None:
    """Read forward and in jumps, and compare value by value with ``data[i]``."""
    expected = [data[row] for row in range(len(data))]
    for order in (
        range(len(data)),
        np.random.default_rng(1).permutation(len(data)),
        [0] * len(data),
    ):
        found = ds.rows(np.asarray(order))
        wrong = [
            f"row {row}, {name!r}: {sample[name]!r} is not {expected[row][name]!r}"
            for row, sample in zip(order, found)
            for name in expected[row]
            if differs(sample[name], expected[row][name])
        ]
        assert wrong == []
        assert all(list(sample) == data.column_names for sample in found)
    assert not differs([plain(sample) for sample in ds], expected)


VIEWS: dict[str, Callable[[datasets.Dataset], datasets.Dataset]] = {
    "whole": lambda d: d,
    "shuffled": lambda d: d.shuffle(seed=3),
    "selected": lambda d: d.select([17, 3, 3, 22, 0, 9]),
    "range": lambda d: d.select(range(5, 19)),
    "range from the middle of a chunk, one row": lambda d: d.select(range(12, 13)),
    "range of shuffled": lambda d: d.shuffle(seed=3).select(range(4, 15)),
    "shuffled range": lambda d: d.select(range(4, 15)).shuffle(seed=3),
    "train_test_split": lambda d: d.train_test_split(0.4, seed=1)["test"],
    "shard": lambda d: d.shard(3, 1, contiguous=True),
    "every third": lambda d: d.shard(3, 1, contiguous=False),
    "concatenated": lambda d: datasets.concatenate_datasets(
        [d.select(range(7)), d, d.select(range(20, 24))]
    ),
    "concatenated with a shuffled one": lambda d: datasets.concatenate_datasets(
        [d.shuffle(seed=1), d]
    ),
    "columns selected": lambda d: d.select_columns(["struct", "int8", "list int32 null"]),
    "one column": lambda d: d.select_columns(["list float32"]),
    "columns removed": lambda d: d.remove_columns(["int8", "string", "dictionary"]),
    "columns renamed": lambda d: d.rename_columns({"int8": "string2", "list int32": "tokens"}),
}


@pytest.mark.parametrize("view", VIEWS)
def test_rows_equal_hugging_face_python_rows(wide: datasets.Dataset, view: str) -> None:
    data = VIEWS[view](wide)
    check_rows(data, ms.from_dataset(data))


@pytest.mark.parametrize("view", ["whole", "shuffled", "range", "concatenated"])
def test_numeric_lists_keep_their_dtype_and_numbers_are_python(
    wide: datasets.Dataset, view: str
) -> None:
    for sample in ms.from_dataset(VIEWS[view](wide)):
        for name, (_, dtype) in LISTS.items():
            assert isinstance(sample[name], np.ndarray), name
            assert sample[name].dtype == dtype, name
            assert sample[name].ndim == 1
        for name in NUMBERS:
            assert type(sample[name]) in (int, float, bool), name


@pytest.mark.parametrize("view", ["whole", "shuffled", "range", "concatenated"])
@pytest.mark.parametrize("name", LISTS)
def test_numeric_lists_are_read_only_views_of_what_is_stored(
    wide: datasets.Dataset, name: str, view: str
) -> None:
    data = VIEWS[view](wide)
    stored = [
        chunk.values.to_numpy() for chunk in data.data.table.column(name).chunks if len(chunk)
    ]
    for sample in ms.from_dataset(data):
        array = sample[name]
        assert not array.flags.writeable
        if array.size:
            assert any(np.shares_memory(array, chunk) for chunk in stored)
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


@pytest.mark.parametrize("name", WIDE)
def test_every_type_reads_from_slices_of_one_array_and_from_many_chunks(name: str) -> None:
    array = WIDE[name]
    for stored in (array, array[5:17], array[23:], chunked(array)):
        data = datasets.Dataset(InMemoryTable(pa.table({"x": stored})))
        check_rows(data, ms.from_dataset(data))


@pytest.mark.parametrize("name", COLUMNS)
def test_nothing_but_none_reads_as_none(name: str) -> None:
    array = (
        pa.nulls(5, WIDE[name].type) if name != "dictionary" else pa.array([None] * 5, pa.string())
    )
    data = datasets.Dataset(InMemoryTable(pa.table({"x": array})))
    assert ms.from_dataset(data).rows(range(5)) == [{"x": None}] * 5


def test_a_column_of_the_null_type_reads_as_none() -> None:
    data = datasets.Dataset.from_dict({"x": [None, None], "y": [1, 2]})
    check_rows(data, ms.from_dataset(data))


def test_a_null_inside_a_list_is_none() -> None:
    for rows in (
        [[1, None], [2], [], None],
        [[0.5, None, 1.5], [None]],
        [[[1, None], None], [[2]]],
    ):
        data = datasets.Dataset.from_dict({"x": rows})
        check_rows(data, ms.from_dataset(data))


@pytest.mark.parametrize(
    "rows", [[[1, 2], [3, None], [4]], [[1, None], [2, 3]], [[5, 6], [7, 8], [None, 9]]], ids=str
)
def test_a_null_in_one_list_leaves_the_others_numpy(rows: list[list[int | None]]) -> None:
    data = datasets.Dataset.from_dict({"x": rows})
    for row, sample in zip(rows, ms.from_dataset(data)):
        if None not in row:
            assert isinstance(sample["x"], np.ndarray)
            assert sample["x"].dtype == np.int64
    good = [index for index, row in enumerate(rows) if None not in row]
    for sample in ms.from_dataset(
        data.select(range(good[0], good[0] + 1))
    ):  # the null is not even in the slice
        assert isinstance(sample["x"], np.ndarray)


def test_a_none_among_fixed_size_lists_leaves_the_others_numpy() -> None:
    data = datasets.Dataset(
        InMemoryTable(pa.table({"x": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2))}))
    )
    first, none, last = ms.from_dataset(data).rows([0, 1, 2])
    assert none["x"] is None
    for sample, expected in ((first, [1, 2]), (last, [3, 4])):
        assert isinstance(sample["x"], np.ndarray)
        assert sample["x"].dtype == np.int32
        assert sample["x"].tolist() == expected


def test_an_empty_list_has_the_stored_dtype() -> None:
    data = datasets.Dataset(
        InMemoryTable(pa.table({"x": pa.array([[], [], []], pa.list_(pa.int16()))}))
    )
    for sample in ms.from_dataset(data):
        assert sample["x"].dtype == np.int16
        assert sample["x"].shape == (0,)


def test_many_record_batches_read_like_one(tmp_path: Path) -> None:
    def to_row(row: int) -> dict[str, Any]:
        return {"id": row, "tokens": list(range(row % 7)), "text": f"row {row}"}

    one = datasets.Dataset.from_list([to_row(row) for row in range(100)])
    many = one.map(
        lambda row: row, writer_batch_size=3, cache_file_name=str(tmp_path / "many.arrow")
    )
    assert len(many.data.table.column("tokens").chunks) > 30
    check_rows(many, ms.from_dataset(many))
    check_rows(many.shuffle(seed=1), ms.from_dataset(many.shuffle(seed=1)))
    assert ms.from_dataset(many).rows(range(100))[57]["tokens"].tolist() == [0]


def test_zero_length_chunks_are_passed_over() -> None:
    empty = pa.array([], pa.int64())
    chunks = [empty, empty, pa.array([1]), empty, pa.array([2, 3]), empty]
    data = datasets.Dataset(InMemoryTable(pa.table({"x": pa.chunked_array(chunks)})))
    assert [sample["x"] for sample in ms.from_dataset(data)] == [1, 2, 3]
    assert [sample["x"] for sample in ms.from_dataset(data).rows([2, 0, 1])] == [3, 1, 2]


@pytest.mark.parametrize("view", ["none", "no rows selected", "no columns"])
def test_an_empty_dataset_has_no_rows(view: str) -> None:
    data = datasets.Dataset.from_dict({"x": [], "y": []})
    if view == "no rows selected":
        data = datasets.Dataset.from_dict({"x": [1, 2]}).select([])
    if view == "no columns":
        data = datasets.Dataset.from_dict({})
    ds = ms.from_dataset(data)
    assert len(ds) == 0
    assert list(ds) == []
    assert ds.rows([]) == []
    assert list(ds.shuffle(1)) == []
    assert whole(ds) == []


def test_reading_calls_no_formatter_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(COLUMNS)
    ds = ms.from_dataset(data.shuffle(seed=1))

    def refuse(*_: Any) -> None:
        raise AssertionError("went through the Hugging Face formatter")

    monkeypatch.setattr(datasets.Dataset, "__getitem__", refuse)
    monkeypatch.setattr(datasets.Dataset, "__getitems__", refuse)
    assert len(list(ds)) == N


# -- datasets with a format of their own --------------------------------------------------------------------------------


def tokens() -> datasets.Dataset:
    rows = range(12)
    return datasets.Dataset.from_dict(
        {"id": list(rows), "x": [[row, row + 1] for row in rows], "s": list("abcdefghijkl")}
    )


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    "with_format",
    [
        lambda d: d.with_format("numpy"),
        lambda d: d.with_format("torch"),
        lambda d: d.with_format("torch", columns=["x"]),
        lambda d: d.with_format("numpy", columns=["x"], output_all_columns=True),
        lambda d: d.with_format(None, columns=["s"]),
        lambda d: d.with_transform(lambda batch: {"y": [value * 10 for value in batch["id"]]}),
    ],
    ids=[
        "numpy",
        "torch",
        "torch one column",
        "numpy and the rest",
        "python one column",
        "transform",
    ],
)
def test_a_dataset_with_its_own_format_keeps_it(
    with_format: Callable[[Any], Any], shuffled: bool
) -> None:
    data = with_format(tokens().shuffle(seed=2) if shuffled else tokens())
    for found, expected in zip(
        ms.from_dataset(data), [data[row] for row in range(12)], strict=True
    ):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert type(found[name]) is type(value)
            assert plain(found[name]) == plain(value)
            assert getattr(found[name], "dtype", None) == getattr(value, "dtype", None)


def test_set_transform_after_the_source_was_made_does_not_reach_it_half_way() -> None:
    data = tokens()
    data.set_transform(lambda batch: {"y": batch["id"]})
    assert [sample["y"] for sample in ms.from_dataset(data)] == list(range(12))


def test_a_transform_that_raises_loses_one_row_and_names_it() -> None:
    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        if 7 in batch["id"]:
            raise ValueError("seven")
        return batch

    found = drain(iter(ms.from_dataset(tokens().with_transform(transform), name="rows")))
    assert [sample["id"] if isinstance(sample, dict) else sample.origin for sample in found] == [
        *range(7),
        ms.Origin("rows", 0, 7),
        *range(8, 12),
    ]
    assert found[7].error_type == "ValueError"


@pytest.mark.parametrize(
    "change",
    [lambda ids: [i for i in ids if i != 7], lambda ids: ids + ids[:1]],
    ids=["fewer", "more"],
)
def test_a_transform_that_changes_the_number_of_rows_is_an_error_that_says_so(
    change: Callable[[Any], Any],
) -> None:
    data = tokens().with_transform(lambda batch: {"id": change(batch["id"])})
    with pytest.raises((ValueError, ms.SampleError, ms.SourceError), match="rows"):
        list(ms.from_dataset(data))


def picture(value: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), (value, 2 * value, 3 * value)).save(file, "PNG")
    return file.getvalue()


def pictures(**options: Any) -> datasets.Dataset:
    rows = {
        "image": [{"bytes": picture(i), "path": None} for i in range(9)],
        "label": list(range(9)),
    }
    features = datasets.Features(
        {"image": datasets.Image(**options), "label": datasets.ClassLabel(num_classes=9)}
    )
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("shuffled", [False, True])
def test_images_are_decoded_several_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, shuffled: bool
) -> None:
    data = pictures().shuffle(seed=1) if shuffled else pictures()
    expected = [(np.asarray(row["image"]).tolist(), row["label"]) for row in data]
    asked: list[list[int]] = []
    together = datasets.Dataset.__getitems__

    def spy(self: datasets.Dataset, index: list[int]) -> Any:
        asked.append(index)
        return together(self, index)

    monkeypatch.setattr(datasets.Dataset, "__getitems__", spy)
    found = ms.from_dataset(data).rows(range(9))
    assert [(np.asarray(row["image"]).tolist(), row["label"]) for row in found] == expected
    assert asked == [list(range(9))]
    batches = list(
        ms.from_dataset(data).map(lambda row: {**row, "image": np.array(row["image"])}).batch(4)
    )
    assert batches[0]["image"].shape == (4, 3, 4, 3)
    assert batches[0]["image"].dtype == torch.uint8


def test_images_that_stay_encoded_are_read_from_the_table() -> None:
    check_rows(pictures(decode=False), ms.from_dataset(pictures(decode=False)))


def test_a_broken_image_loses_one_row_and_names_it() -> None:
    rows = [{"bytes": b"no picture" if i == 4 else picture(i), "path": None} for i in range(9)]
    data = datasets.Dataset.from_dict(
        {"image": rows}, features=datasets.Features({"image": datasets.Image()})
    )
    found = drain(iter(ms.from_dataset(data)))
    assert [index for index, sample in enumerate(found) if isinstance(sample, ms.SampleError)] == [
        4
    ]
    assert found[4].origin == ms.Origin("data", 0, 4)
    assert "UnidentifiedImageError" in found[4].error_type
    assert len(found) == 9


def test_array_features_and_class_labels_equal_hugging_face() -> None:
    features = datasets.Features(
        {
            "grid": datasets.Array2D((2, 3), "float32"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    data = datasets.Dataset.from_dict(
        {"grid": [[[i, 1, 2], [3, 4, 5]] for i in range(6)], "label": [0, 1] * 3}, features=features
    )
    assert [plain(sample) for sample in ms.from_dataset(data)] == [
        plain(data[row]) for row in range(6)
    ]


# -- sequences and map-style datasets -----------------------------------------------------------------------------------


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


# -- iterables ----------------------------------------------------------------------------------------------------------


def shard_rows(shard: int = 0) -> Iterator[int]:
    """Shards of 5, 6, 7, ... rows."""
    return (100 * shard + row for row in range(5 + shard))


def generator_that_dies(shard: int = 0) -> Iterator[int]:
    for row in range(10):
        if row == 4:
            raise OSError("connection lost")
        yield 100 * shard + row


class GoesOn:
    """An iterator of 10 rows that raises at row 4 and goes on."""

    def __init__(self, shard: int = 0, bad: int = 4) -> None:
        self.shard, self.row, self.bad = shard, -1, bad

    def __iter__(self) -> GoesOn:
        return self

    def __next__(self) -> int:
        self.row += 1
        if self.row == 10:
            raise StopIteration
        if self.row == self.bad:
            raise OSError("bad record")
        return 100 * self.shard + self.row


def test_an_iterable_is_made_afresh_for_every_pass() -> None:
    made: list[int] = []

    def make() -> list[int]:
        made.append(1)
        return [1, 2, 3]

    ds = ms.from_iterable(make, name="letters")
    assert made == []
    assert list(ds) == list(ds) == [1, 2, 3]
    assert list(ds.repeat(2)) == [1, 2, 3, 1, 2, 3]
    assert len(made) == 4


@pytest.mark.parametrize("lane", [(0, 1), (1, 3), (3, 4), (4, 5)])
def test_shard_i_feeds_lane_i_modulo_the_lanes(lane: tuple[int, int]) -> None:
    expected = [row for shard in range(lane[0], 4, lane[1]) for row in shard_rows(shard)]
    assert (
        check_resume(lambda: ms.from_iterable(shard_rows, name="s", num_shards=4), lane) == expected
    )


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 7])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_stride_gives_every_row_to_one_lane(num_lanes: int, num_shards: int) -> None:
    def make() -> Dataset:
        return ms.from_iterable(shard_rows, name="s", num_shards=num_shards, split="stride")

    found = [check_resume(make, (lane, num_lanes)) for lane in range(num_lanes)]
    everything = [row for shard in range(num_shards) for row in shard_rows(shard)]
    assert sorted(row for rows in found for row in rows) == sorted(everything)
    assert all(rows == sorted(rows) for rows in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_stride_serves_more_workers_than_shards(workers: int) -> None:
    ds = ms.from_iterable(lambda: range(50), name="s", split="stride")
    batches = all_batches(ds, workers, lanes=6)
    assert batches == all_batches(ds, 0, lanes=6)
    assert sorted(row for batch in batches for row in batch) == list(range(50))


def test_origins_of_an_iterable_name_row_and_shard() -> None:
    made = loader(ms.from_iterable(shard_rows, name="s", num_shards=3))
    batch = next(iter(made))
    assert batch == [0, 1, 2, 3]
    assert made.trace() == [ms.Origin("s", 0, 3 * row) for row in range(4)]


@pytest.mark.parametrize("split", ["shards", "stride"])
def test_a_generator_that_raises_is_dead_and_said_to_be(split: Any) -> None:
    def make() -> Dataset:
        return ms.from_iterable(generator_that_dies, name="net", num_shards=2, split=split)

    run = SingleLaneIterator(make().node, 0, 1, 0)
    assert [next(run) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ms.SampleError) as caught:
        next(run)
    assert caught.value.origin == ms.Origin("net", 0, 8)
    assert caught.value.original_message == "connection lost"
    assert "generator_that_dies @ " in caught.value.function
    state = through_json(run.state_dict())
    resumed = SingleLaneIterator(make().node, 0, 1, 0)
    resumed.load_state_dict(state)
    for stream in (
        run,
        run,
        resumed,
        resumed,
    ):  # again and again: never the next shard as if nothing had been lost
        with pytest.raises(
            ms.SourceError,
            match="shard 0 raised at row 4(.|\n)*every row after it is lost(.|\n)*in .map",
        ):
            next(stream)


def test_a_generator_that_raises_at_once_is_dead_and_said_to_be() -> None:
    def dies_at_once() -> Iterator[int]:
        raise OSError("no connection")
        yield 1

    run = iter(ms.from_iterable(dies_at_once, name="net"))
    with pytest.raises(ms.SampleError, match="no connection"):
        next(run)
    with pytest.raises(ms.SourceError, match="raised at row 0"):
        next(run)


@pytest.mark.parametrize("split", ["shards", "stride"])
@pytest.mark.parametrize("bad", [0, 4, 8])
def test_an_iterator_that_goes_on_after_raising_loses_one_sample(split: Any, bad: int) -> None:
    def make() -> Dataset:
        return ms.from_iterable(
            lambda shard: GoesOn(shard, bad), name="log", num_shards=2, split=split
        )

    whole = SingleLaneIterator(make().node, 0, 1, 0)
    found: list[Any] = []
    states = [whole.state_dict()]
    while True:
        try:
            found.append(next(whole))
        except StopIteration:
            break
        except ms.SampleError as error:
            found.append(error.origin)
        states.append(through_json(whole.state_dict()))
    expected: list[Any] = [100 * shard + row for shard in (0, 1) for row in range(10)]
    expected[bad], expected[10 + bad] = (
        ms.Origin("log", 0, 2 * bad),
        ms.Origin("log", 0, 2 * bad + 1),
    )
    assert found == expected
    for step, state in enumerate(states):
        resumed = SingleLaneIterator(make().node, 0, 1, 0)
        resumed.load_state_dict(state)
        assert [
            sample.origin if isinstance(sample, ms.SampleError) else sample
            for sample in drain(resumed)
        ] == found[step:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dead_generator_ends_a_loader_with_a_source_error(workers: int) -> None:
    def make(shard: int) -> Iterator[int]:
        return generator_that_dies(shard) if shard == 1 else shard_rows(shard)

    made = loader(ms.from_iterable(make, name="net", num_shards=2), workers, batch_size=2)
    iterator = iter(made)
    assert [next(iterator) for _ in range(4)] == [[0, 1], [100, 101], [2, 3], [102, 103]]
    with pytest.raises((ms.SampleError, ms.SourceError)):
        while True:
            next(iterator)
    with pytest.raises(ms.SourceError, match="shard 1 raised at row 4"):
        while True:
            try:
                next(iterator)
            except ms.SampleError:
                pass
    made.close()


def test_a_shard_that_cannot_be_opened_is_a_source_error_with_the_cause() -> None:
    def make() -> list[int]:
        raise FileNotFoundError("gone.csv")

    with pytest.raises(
        ms.SourceError, match=r"shard 0 cannot be opened: FileNotFoundError: gone\.csv"
    ) as caught:
        next(iter(ms.from_iterable(make, name="files")))
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(ms.SourceError, match="cannot be opened: TypeError"):
        next(iter(ms.from_iterable(lambda: 3, name="files")))  # type: ignore[arg-type,return-value]


def test_data_that_became_shorter_is_a_replay_that_diverged() -> None:
    whole = iter(ms.from_iterable(lambda: range(10), name="log"))
    for _ in range(6):
        next(whole)
    state = whole.state_dict()
    shorter = ms.from_iterable(lambda: range(4), name="log")
    resumed = SingleLaneIterator(shorter.node, 0, 1, 0)
    resumed.load_state_dict({**state, "fingerprint": shorter.fingerprint})
    with pytest.raises(ms.ReplayDiverged, match="ended at row 4 while rows up to 6"):
        next(resumed)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"make_iterable": [1, 2]}, TypeError, "from_iterable takes a callable; found list"),
        pytest.param(
            {"make_iterable": (x for x in "ab")},
            TypeError,
            "takes a callable; found generator",
            id="generator",
        ),
        ({"num_shards": 0}, ValueError, "num_shards is at least 1; found 0"),
        ({"num_shards": 2.0}, TypeError, "num_shards is an integer; found 2.0"),
        ({"num_shards": True}, TypeError, "num_shards is an integer; found True"),
        ({"split": "rows"}, ValueError, "split is one of 'shards', 'stride'; found 'rows'"),
        ({"name": 5}, ValueError, "name"),
        ({"name": "a|b"}, ValueError, "name"),
        ({"name": ""}, ValueError, "name"),
    ],
    ids=str,
)
def test_wrong_arguments_of_from_iterable_are_refused(
    options: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ms.from_iterable(**{"make_iterable": lambda: [1], "name": "x", **options})


# -- Hugging Face streams -----------------------------------------------------------------------------------------------


def stream(n: int = 32, shards: int = 4, start: int = 0) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"id": list(range(start, start + n))}).to_iterable_dataset(
        num_shards=shards
    )


def from_shards(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        for row in range(7 + shard):
            yield {"id": 100 * shard + row}


def twice(batch: dict[str, list[int]]) -> dict[str, list[int]]:
    return {"id": [value for value in batch["id"] for _ in range(value % 3)]}


HUB: dict[str, Callable[[], datasets.IterableDataset]] = {
    "arrow": stream,
    "arrow, one shard": lambda: stream(20, 1),
    "arrow, uneven shards": lambda: stream(23, 5),
    "generator": lambda: datasets.IterableDataset.from_generator(
        from_shards, gen_kwargs={"shards": [0, 1, 2, 3]}
    ),
    "map": lambda: stream().map(lambda row: {"id": row["id"] * 10}),
    "map of batches": lambda: stream().map(
        lambda b: {"id": [-v for v in b["id"]]}, batched=True, batch_size=3
    ),
    "map to other numbers of rows": lambda: stream().map(twice, batched=True, batch_size=3),
    "filter": lambda: stream().filter(lambda row: row["id"] % 3 != 0),
    "filter of the generator": lambda: HUB["generator"]().filter(lambda row: row["id"] % 2 == 0),
    "filter that empties a shard": lambda: stream().filter(lambda row: not 8 <= row["id"] < 16),
    "skip": lambda: stream().skip(6),
    "skip of one shard": lambda: stream(20, 1).skip(6),
    "take": lambda: stream().take(10),
    "format": lambda: stream().with_format("numpy"),
    "repeat": lambda: stream(20, 2).repeat(2),
    "batch": lambda: stream().batch(3),
    "interleaved": lambda: datasets.interleave_datasets([stream(), stream(20, 4, 100)]),
    "interleaved by chance": lambda: datasets.interleave_datasets(
        [stream(), stream(20, 4, 100).filter(lambda row: row["id"] % 4 != 0)],
        probabilities=[0.6, 0.4],
        seed=3,
    ),
    "interleaved until all are exhausted": lambda: datasets.interleave_datasets(
        [stream(20, 2), stream(10, 2, 100)],
        probabilities=[0.5, 0.5],
        seed=1,
        stopping_strategy="all_exhausted",
    ),
    "concatenated": lambda: datasets.concatenate_datasets([stream(20, 2), stream(12, 3, 100)]),
}


def shard_by_shard(data: datasets.IterableDataset) -> list[list[Any]]:
    count = data.num_shards
    return [
        [plain(row) for row in data.shard(count, index, contiguous=False)] for index in range(count)
    ]


@pytest.mark.parametrize("kind", HUB)
@pytest.mark.parametrize(
    ("lane", "every"), [((0, 1), 4), ((1, 3), 256)], ids=["whole, own states", "lane 1 of 3"]
)
def test_a_hub_stream_yields_its_shards_and_resumes_at_every_row(
    kind: str, lane: tuple[int, int], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        _HubShards, "every", every
    )  # its own states come into play within a few rows
    data = HUB[kind]()
    expected = [row for rows in shard_by_shard(data)[lane[0] :: lane[1]] for row in rows]
    assert check_resume(lambda: ms.from_dataset(data), lane) == expected


def test_a_long_shard_resumes_from_the_streams_own_state() -> None:
    read: list[int] = []

    def watch(row: dict[str, int]) -> dict[str, int]:
        read.append(row["id"])
        return row

    data = stream(700, 1).map(watch)
    whole = iter(ms.from_dataset(data))
    for _ in range(600):
        next(whole)
    state = whole.state_dict()
    assert len(json.dumps(state)) < 1024 + 64
    read.clear()
    resumed = SingleLaneIterator(ms.from_dataset(data).node, 0, 1, 0)
    resumed.load_state_dict(state)
    assert next(resumed) == {"id": 600}
    assert len(read) <= 256


@pytest.mark.parametrize(
    "shuffled",
    [
        lambda: stream().shuffle(seed=1),
        lambda: stream().shuffle(seed=1, buffer_size=1),
        lambda: stream().shuffle(seed=1).map(lambda row: row).filter(bool).take(5),
        lambda: HUB["generator"]().shuffle(seed=1).with_format("numpy"),
        lambda: datasets.interleave_datasets([stream(), stream().shuffle(seed=1)]),
        lambda: datasets.concatenate_datasets(
            [stream().map(lambda row: row), stream().shuffle(seed=1)]
        ),
    ],
    ids=["arrow", "shards only", "below", "generator", "interleaved", "concatenated"],
)
def test_a_shuffled_hub_stream_is_refused_with_the_reason_and_the_alternative(
    shuffled: Callable[[], Any],
) -> None:
    with pytest.raises(
        ValueError,
        match=r"loses and repeats rows(.|\n)*from_dataset\(data\)\.shuffle\(seed, buffer_size=",
    ):
        ms.from_dataset(shuffled())


def test_a_table_shuffled_before_it_became_a_stream_is_taken() -> None:
    data = (
        datasets.Dataset.from_dict({"id": list(range(30))})
        .shuffle(seed=1)
        .to_iterable_dataset(num_shards=3)
    )
    assert check_resume(lambda: ms.from_dataset(data)) == [
        row for rows in shard_by_shard(data) for row in rows
    ]


@pytest.mark.parametrize("shards", [1, 4])
def test_a_hub_stream_split_by_node_is_refused(shards: int) -> None:
    """Lanes deal shards to ranks; a stream cut for a rank before that would lose rows, silently."""
    with pytest.raises(ValueError, match="split_dataset_by_node|split by node|rank"):
        ms.from_dataset(split_dataset_by_node(stream(40, shards), rank=0, world_size=2))


@pytest.mark.parametrize(
    "kind",
    ["arrow", "generator", "map of batches", "filter", "skip", "interleaved", "concatenated"],
)
def test_workers_read_every_row_of_a_hub_stream_once(kind: str) -> None:
    """Inside a torch worker a Hugging Face stream would shard itself once more."""
    data = HUB[kind]()
    ds = ms.from_dataset(data)
    batches = all_batches(ds, 2)
    assert batches == all_batches(ds)
    found = [json.dumps(row) for batch in batches for row in batch]
    assert sorted(found) == sorted(json.dumps(row) for rows in shard_by_shard(data) for row in rows)


@pytest.mark.parametrize("kind", ["arrow", "interleaved by chance"])
def test_a_hub_stream_resumes_with_other_workers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_HubShards, "every", 4)
    ds = ms.from_dataset(HUB[kind]())
    expected = all_batches(ds, batch_size=3)
    found, state = [], None
    for workers, count in ((2, 3), (0, 2), (2, 4), (1, None)):
        made = loader(ds, workers, batch_size=3)
        if state is not None:
            made.load_state_dict(state)
            assert made.state_dict() == state
        found.extend(plain(batch) for _, batch in zip(range(count or 1000), made))
        state = made.state_dict()
        made.close()
    assert found == expected


@pytest.mark.parametrize("persistent", [False, True])
def test_every_epoch_of_a_hub_stream_is_whole(persistent: bool) -> None:
    made = loader(ms.from_dataset(stream(24, 4)), 2, persistent_workers=persistent)
    epochs = [sorted(row["id"] for batch in made for row in batch) for _ in range(3)]
    made.close()
    assert epochs == [list(range(24))] * 3
    assert made.epoch == 3


def open_hub_generators() -> int:
    return sum(
        type(thing) is GeneratorType and thing.gi_code.co_filename.endswith("iterable_dataset.py")
        for thing in gc.get_objects()
    )


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        lambda ds: SingleLaneIterator(ds.node, 0, 1, 0),
        lambda ds: iter(ds),
        lambda ds: iter(
            ds.map(lambda row: row).filter(bool).shuffle(1, buffer_size=4).batch(2, collate_fn=list)
        ),
        lambda ds: iter(loader(ds)),
    ],
    ids=["run", "iter", "pipeline", "loader"],
)
def test_a_dropped_iterator_closes_its_hub_stream_at_once(
    run: Callable[[Dataset], Any], resumed: bool
) -> None:
    """Not when garbage is collected: that may be in a thread of the stream, which would wait for
    itself for ever.
    """
    ds = ms.from_dataset(datasets.interleave_datasets([stream(), stream()]))
    gc.collect()
    gc.disable()
    try:
        before = open_hub_generators()
        iterator = run(ds)
        next(iterator)
        assert open_hub_generators() > before
        if resumed and hasattr(iterator, "state_dict"):
            again = run(ds)
            again.load_state_dict(iterator.state_dict())
            next(again)
            del again
        del iterator
        assert open_hub_generators() == before
    finally:
        gc.enable()


def test_shards_and_columns_of_a_hub_stream_are_told() -> None:
    assert (
        repr(ms.from_dataset(stream(), name="web")).partition("  # ")[0]
        == "web: from_dataset(datasets.IterableDataset, 4 shards)"
    )
    with pytest.raises(TypeError, match="known only by reading"):
        len(ms.from_dataset(stream()))
    with pytest.raises(
        ValueError, match=r"'web' is an IterableDataset of 4 shards(.|\n)*num_shards=n"
    ):
        iter(loader(ms.from_dataset(stream(), name="web"), lanes=5))


def test_a_row_that_raises_in_a_hub_stream_is_told_and_the_rest_is_not_lost_in_silence() -> None:
    def parse(row: dict[str, int]) -> dict[str, int]:
        if row["id"] == 12:
            raise ValueError("twelve")
        return row

    run = iter(ms.from_dataset(stream().map(parse), name="web"))
    assert [next(run)["id"] for _ in range(12)] == list(range(12))
    with pytest.raises(ms.SampleError, match="twelve") as caught:
        next(run)
    assert caught.value.origin == ms.Origin("web", 0, 4 * 4 + 1)
    with pytest.raises(ms.SourceError, match=r"shard 1 raised at row 4(.|\n)*in \.map"):
        next(run)


# -- processes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path: Path) -> datasets.Dataset:
    data = datasets.Dataset.from_dict(
        {
            "id": list(range(5000)),
            "tokens": [list(range(row % 9)) for row in range(5000)],
            "text": ["word" * 9] * 5000,
        }
    )
    data.save_to_disk(str(tmp_path / "data"))
    return datasets.load_from_disk(str(tmp_path / "data"))


@pytest.mark.parametrize("view", ["whole", "range", "shuffled"])
def test_a_memory_mapped_dataset_pickles_as_a_path_and_reopens(
    mapped: datasets.Dataset, view: str
) -> None:
    data = VIEWS[view](mapped)
    ds = ms.from_dataset(data)
    expected = [plain(sample) for sample in ds.rows(range(min(len(data), 200)))]
    for _, _ in zip(range(600), ds):  # handles are open now, and stay behind
        pass
    text = pickle.dumps(ds)
    if view == "shuffled":
        assert len(text) < 10_000 + 8 * len(
            data
        )  # in-memory indices; with a cache file they are a path too
    else:
        assert len(text) < 10_000
    copy = pickle.loads(text)
    assert copy == ds
    assert [plain(sample) for sample in copy.rows(range(len(expected)))] == expected


def test_a_forked_worker_leaves_the_parents_handles_alone(mapped: datasets.Dataset) -> None:
    ds = ms.from_dataset(mapped.select(range(60)))
    expected = [plain(sample) for sample in ds]
    run = iter(ds)
    found = [plain(next(run)) for _ in range(20)]
    view = ds.rows([8])[0]["tokens"]
    batches = all_batches(ds, 2)
    assert [row for batch in batches for row in batch] == expected
    assert found + [plain(sample) for sample in run] == expected
    assert view.tolist() == list(range(8))


@pytest.mark.slow
def test_spawned_workers_read_what_the_main_process_reads(mapped: datasets.Dataset) -> None:
    ds = ms.interleave(
        {
            "mapped": ms.from_dataset(mapped.select(range(40))),
            "shuffled": ms.from_dataset(
                mapped.select(range(100)).shuffle(seed=1).select(range(40))
            ),
            "memory": ms.from_dataset(datasets.Dataset.from_dict({"id": list(range(40))})),
            "torch": ms.from_dataset(mapped.select(range(40)).with_format("torch", columns=["id"])),
            "hub": ms.from_dataset(HUB["generator"]()),
            "made": ms.from_iterable(shard_rows, num_shards=4),
            "map style": ms.from_dataset(OneByOne()).filter(bool),
        }
    ).map(lambda sample: sample)

    def read(workers: int, method: str = "fork") -> list[Any]:
        made = loader(ds, workers, method)
        found = [
            sample.origin if isinstance(sample, ms.SampleError) else plain(sample)
            for sample in drain(iter(made))
        ]
        made.close()
        return found

    assert read(1, "spawn") == read(0)


@pytest.mark.parametrize(
    "make",
    [
        lambda name, folder: ms.from_dataset([1], name=name),
        lambda name, folder: ms.from_iterable(lambda: [1], name=name),
        lambda name, folder: ms.read_json("x.jsonl", name=name),
        lambda name, folder: ms.read_parquet("x.parquet", name=name),
        lambda name, folder: ms.read_json(name),
        lambda name, folder: ms.read_parquet([f"{folder}/{name}"]),
        lambda name, folder: ms.interleave({"a": ms.from_dataset([1])}, name=name),
        lambda name, folder: ms.interleave({name: ms.from_dataset([1]), "b": ms.from_dataset([2])}),
    ],
)
def test_a_name_that_is_no_text_is_refused_where_it_is_given(make: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"text that UTF-8 can write; found '.*bad\\udc80'.*lone surrogate"
    ) as told:
        make("bad\udc80", tmp_path)
    assert not isinstance(told.value, UnicodeError)


@pytest.mark.parametrize("read", [ms.read_json, ms.read_parquet])
def test_a_file_whose_name_is_no_text_is_named_when_it_is_found(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = str(
        tmp_path / "bad\udc80"
    )  # as Linux lists a name in another encoding; other systems refuse to make one
    monkeypatch.setattr("midstream.sources.files.glob.glob", lambda *_, **__: [found])
    monkeypatch.setattr("midstream.sources.files.os.path.isfile", lambda path: True)
    with pytest.raises(ValueError, match=r"the name of a file is text.*bad\\udc80'"):
        len(read(f"{tmp_path}/*"))


# -- tables in many pieces -------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        pa.list_(pa.int32()),
        pa.large_list(pa.float64()),
        pa.list_(pa.int8(), 2),
        pa.int16(),
        pa.float32(),
        pa.bool_(),
    ]
)


@st.composite
def pieces(draw: Any) -> pa.ChunkedArray:
    """A column in pieces that lie anywhere in memory, in any order, cut, empty, some of them with
    nulls.
    """
    kind = draw(PIECES)
    inner = getattr(kind, "value_type", kind)
    number = st.booleans() if inner == pa.bool_() else st.integers(0, 9)
    if pa.types.is_floating(inner):
        number = number.map(float)
    if pa.types.is_fixed_size_list(kind):
        value: Any = st.lists(number, min_size=2, max_size=2)
    else:
        value = number if inner is kind else st.lists(number, max_size=4)
    nulls = draw(st.integers(0, 3)) == 0
    chunks = []
    for rows in draw(
        st.lists(
            st.lists(st.none() | value if nulls else value, max_size=6), min_size=1, max_size=7
        )
    ):
        whole = pa.array(rows, kind)
        start = draw(st.integers(0, len(rows)))
        chunks.append(
            whole.slice(start, draw(st.integers(0, len(rows) - start)))
            if draw(st.booleans())
            else whole
        )
    chunks = draw(st.permutations(chunks))
    if draw(st.booleans()):  # one after the other, as a file has them
        whole = pa.table({"x": pa.chunked_array(chunks, kind)})
        return pa.ipc.open_stream(_stream(whole)).read_all().column(0)
    return pa.chunked_array(chunks, kind)


@settings(max_examples=300)
@given(pieces(), st.data())
def test_a_column_in_pieces_gives_its_values(column: pa.ChunkedArray, data: Any) -> None:
    reader, expected = TableReader(pa.table({"x": column})), column.to_pylist()
    if not expected:
        return
    for _ in range(4):  # pieces are looked up when one of their rows is first asked for
        rows = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=12))
        found = reader.columns(np.array(rows)).columns[0]
        values = [
            value.tolist() if isinstance(value, np.ndarray) else value for value in found.values
        ]
        assert values == [expected[row] for row in rows]
        if found.dtype is not None:
            assert found.lengths.tolist() == [len(value) for value in values]
            assert all(not value.flags.writeable for value in found.values if len(value))


def test_a_view_keeps_the_memory_it_looks_into(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"x": [[number] * 50 for number in range(300)]}).save_to_disk(
        tmp_path
    )
    batches = pa.memory_map(str(next(tmp_path.glob("*.arrow"))))
    table = pa.ipc.open_stream(batches).read_all()
    table = pa.concat_tables([table.slice(start, 100) for start in (0, 100, 200)])
    views = TableReader(table).columns(np.array([5, 150, 299])).columns[0].values
    del table, batches
    gc.collect()
    assert [view.tolist() for view in views] == [[5] * 50, [150] * 50, [299] * 50]
    assert all(
        pickle.loads(pickle.dumps(view)).tolist() == view.tolist() and len(pickle.dumps(view)) < 700
        for view in views
    )


def test_threads_that_open_a_column_at_once_read_its_values() -> None:
    column = pa.chunked_array(
        [
            pa.array([[number] * 3 for number in range(start, start + 5)])
            for start in range(0, 200, 5)
        ]
    )
    numbers = pa.chunked_array([pa.array(range(start, start + 5)) for start in range(0, 200, 5)])
    table = pa.ipc.open_stream(_stream(pa.table({"x": column, "n": numbers}))).read_all()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            for seed in range(150):
                reader = TableReader(table)
                orders = [
                    np.random.default_rng((seed, number)).permutation(200)[:20]
                    for number in range(6)
                ]
                for order, found in zip(orders, pool.map(reader.columns, orders)):
                    assert [view.tolist() for view in found.columns[0].values] == [
                        [row] * 3 for row in order
                    ]
                    assert found.columns[1].values == order.tolist()
    finally:
        sys.setswitchinterval(interval)


def _stream(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
