"""Arrow tables: rows as Hugging Face has them, quickly; datasets with a format of their own."""

from __future__ import annotations

import datetime
import decimal
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from datasets.table import InMemoryTable

import midstream as ms
from midstream.dataset import Dataset
from tests.cases import plain
from tests.helpers.loaders import drain
from tests.helpers.sources import VIEWS, N, all_batches


def column(type_: pa.DataType, make: Callable[[int], Any]) -> pa.Array:
    return pa.array([make(row) for row in range(N)], type_)


def test_column_names_and_rows_are_told_without_reading() -> None:
    ds = ms.from_dataset(datasets.Dataset.from_dict({"a": [1, 2], "b": ["x", "y"]}), name="pairs")
    assert repr(ds).partition("  # ")[0] == "pairs: from_dataset(datasets.Dataset[a, b], 2 rows)"
    assert len(ds) == 2


DAY = datetime.datetime(2024, 2, 29, 12, 30)


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
    assert all_batches(ds) == []


def test_reading_calls_no_formatter_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(COLUMNS)
    ds = ms.from_dataset(data.shuffle(seed=1))

    def refuse(*_: Any) -> None:
        raise AssertionError("went through the Hugging Face formatter")

    monkeypatch.setattr(datasets.Dataset, "__getitem__", refuse)
    monkeypatch.setattr(datasets.Dataset, "__getitems__", refuse)
    assert len(list(ds)) == N


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
