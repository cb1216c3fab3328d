"""collate and pad: batches like torch makes them, and errors that name the column."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import midstream as ms
from tests.helpers.loaders import loader


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, collections.abc.Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


Pair = collections.namedtuple("Pair", ["x", "y"])


DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]


def array(dtype: str, *shape: int, start: int = 0) -> Any:
    return (np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape) + start).astype(dtype)


GRID: dict[str, list[Any]] = {
    "int": [1, 2, 3],
    "float": [0.5, 1.5],
    "int and float": [1, 2.5],
    "bool": [True, False],
    "str": ["a", "bc"],
    "bytes": [b"a", b"bc"],
    "numpy text": [np.str_("a"), np.str_("b")],
    **{f"array {dtype}": [array(dtype, 2, 3), array(dtype, 2, 3, start=1)] for dtype in DTYPES},
    **{
        f"0-d array {dtype}": [array(dtype), array(dtype, start=1)]
        for dtype in DTYPES
        if dtype != "uint64"
    },
    **{
        f"scalar {dtype}": [np.dtype(dtype).type(0), np.dtype(dtype).type(1)]
        for dtype in DTYPES
        if dtype != "uint64"
    },
    "mixed dtypes int": [array("int32", 2), array("int64", 2)],
    "mixed dtypes int and float": [array("int32", 2), array("float32", 2)],
    "mixed dtypes float": [array("float32", 2), array("float64", 2)],
    "mixed dtypes bool": [array("bool", 2), array("uint8", 2)],
    "empty arrays": [array("int32", 0), array("int32", 0)],
    "strided arrays": [array("int32", 4, 6)[::2, ::3], array("int32", 6, 4).T[::2, ::3]],
    "tensors": [torch.arange(3), torch.arange(3) + 1],
    "0-d tensors": [torch.tensor(1.5), torch.tensor(2.5)],
    "bfloat16 tensors": [torch.ones(2, dtype=torch.bfloat16)] * 2,
    "dict": [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}],
    "dict in another order": [{"x": 1, "y": 2.5}, {"y": 3.5, "x": 4}],
    "nested": [
        {"a": {"b": [1, (2.5, "c")]}, "d": array("int8", 2)},
        {"a": {"b": [3, (4.5, "e")]}, "d": array("int8", 2)},
    ],
    "tuple": [(1, 2.5), (2, 3.5)],
    "tuple of text": [(1, "a"), (2, "b")],
    "list": [[1, 2], [3, 4]],
    "list of text": [["a", "b"], ["c", "d"]],
    "namedtuple": [Pair(1, array("float32", 2)), Pair(2, array("float32", 2))],
    "namedtuple of text": [Pair(1, "a"), Pair(2, "b")],
    "tuple of dicts": [({"x": 1}, 2), ({"x": 3}, 4)],
    "ordered dict": [collections.OrderedDict(x=1, y=2), collections.OrderedDict(x=3, y=4)],
    "default dict": [collections.defaultdict(int, x=1), collections.defaultdict(int, x=2)],
    "user dict": [collections.UserDict(x=1), collections.UserDict(x=2)],
    "empty dict": [{}, {}],
    "empty list": [[], []],
    "one sample": [{"x": array("int32", 3), "y": 1.5}],
}


def same(found: Any, expected: Any) -> bool:
    if type(found) is not type(expected):
        return False
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, collections.abc.Mapping):
        return list(found) == list(expected) and all(
            same(found[key], expected[key]) for key in expected
        )
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("kind", GRID)
def test_collate_equals_default_collate(kind: str) -> None:
    found, expected = ms.collate(GRID[kind]), default_collate(GRID[kind])
    assert same(found, expected), f"{found!r} is not {expected!r}"
    (batch,) = ms.from_dataset(GRID[kind]).batch(len(GRID[kind]))
    assert same(batch, expected)


REFUSED: dict[str, tuple[list[Any], str]] = {
    "ragged arrays": (
        [array("int32", 2), array("int32", 3)],
        r"differ in shape(.|\n)*\(2,\), \(3,\)(.|\n)*midstream\.pad",
    ),
    "ragged column": (
        [{"x": array("int32", 2)}, {"x": array("int32", 3)}],
        r"sample\['x'\](.|\n)*\(2,\), \(3,\)(.|\n)*pad",
    ),
    "ragged lists": ([[1], [1, 2]], r"differ in shape(.|\n)*\(1,\), \(2,\)(.|\n)*midstream\.pad"),
    "ragged tensors": (
        [torch.ones(2), torch.ones(3)],
        r"differ in shape(.|\n)*\(2,\), \(3,\)(.|\n)*midstream\.pad",
    ),
    "ragged in a tuple": (
        [(array("int8", 2), 1), (array("int8", 3), 1)],
        r"differ in shape(.|\n)*\(2,\), \(3,\)",
    ),
    "ragged in a list in a dict": (
        [{"x": [array("int8", 2)]}, {"x": [array("int8", 3)]}],
        r"\['x'\](.|\n)*\(2,\), \(3,\)",
    ),
    "ragged in a namedtuple": (
        [Pair(array("int8", 2), 1), Pair(array("int8", 3), 1)],
        r"\(2,\), \(3,\)",
    ),
    "dimensions": ([array("int32", 2, 3), array("int32", 6)], r"\(2, 3\), \(6,\)"),
    "None": ([None, None], "is None"),
    "None in the first": (
        [{"x": None}, {"x": 1}],
        r"sample\['x'\] is None(.|\n)*[Ff]ill or filter",
    ),
    "None in the second": ([{"x": 1}, {"x": None}], r"sample\['x'\] is None"),
    "None for an array": ([{"x": array("int8", 2)}, {"x": None}], r"sample\['x'\] is None"),
    "None for a tensor": ([{"x": torch.ones(2)}, {"x": None}], r"sample\['x'\] is None"),
    "None for a dict": ([{"x": {"y": 1}}, {"x": None}], r"sample\['x'\]"),
    "None in a tuple": ([(1, None), (2, None)], "is None"),
    "missing key": (
        [{"a": 1, "b": 2}, {"a": 1}],
        r"different keys(.|\n)*'b'(.|\n)*\.map before \.batch",
    ),
    "missing key of another type": (
        [{"a": 1, 2: 2}, {"a": 1}],
        r"different keys(.|\n)*\.map before \.batch",
    ),
    "missing nested key": ([{"m": {"a": 1}}, {"m": {}}], r"different keys(.|\n)*'m'"),
    "dates": ([array("int64", 1).view("M8[s]")] * 2, "datetime64"),
    "objects": ([object(), object()], "collate_fn"),
    "object arrays": ([np.array([{}], dtype=object)] * 2, "object"),
    "sets": ([{1}, {2}], "collate_fn"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_collate_names_the_place_and_the_way_out(kind: str) -> None:
    samples, match = REFUSED[kind]
    with pytest.raises(ValueError, match=match):
        ms.collate(samples)
    ds = ms.from_dataset(samples).batch(2)
    if samples[0] is not None:
        with pytest.raises(ms.SampleError, match=match):
            list(ds)


@pytest.mark.parametrize(
    "kind", ["dates", "objects", "object arrays", "sets", "None in a tuple", "None for an array"]
)
def test_what_does_not_differ_in_shape_is_not_said_to(kind: str) -> None:
    with pytest.raises(ValueError) as caught:
        ms.collate(REFUSED[kind][0])
    assert "differ in shape" not in str(caught.value)


def test_pad_works_where_collate_refuses() -> None:
    samples = [{"x": array("int32", 2), "y": 1}, {"x": array("int32", 3), "y": 2}]
    with pytest.raises(ms.SampleError, match=r"midstream\.pad"):
        list(ms.from_dataset(samples).batch(2))
    (batch,) = ms.from_dataset(samples).batch(2, collate_fn=ms.pad)
    assert batch["x"].tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch["y"].tolist() == [1, 2]


def views() -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"ids": [[row, row + 1] for row in range(8)], "y": list(range(8))}
    )


@pytest.mark.parametrize(
    "shape",
    [
        lambda r: r,
        lambda r: r["ids"],
        lambda r: (r["ids"], r["y"]),
        lambda r: [r["ids"]],
        lambda r: Pair(r["ids"], r["y"]),
        lambda r: {"deep": {"er": [r["ids"]]}},
        lambda r: collections.OrderedDict(r),
    ],
    ids=["dict", "array", "tuple", "list", "namedtuple", "nested", "ordered dict"],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_collate_takes_read_only_views_at_any_depth(
    shape: Callable[[Any], Any], batch_size: int
) -> None:
    """Without a warning (which is an error here), and what is written into a batch does not reach
    the data.
    """
    ds = ms.from_dataset(views()).map(shape)
    expected = [plain(batch) for batch in ds.batch(batch_size)]
    for batch in ds.batch(batch_size):
        scribble(batch)
    assert [plain(batch) for batch in ds.batch(batch_size)] == expected


def scribble(batch: Any) -> None:
    if isinstance(batch, torch.Tensor):
        batch.fill_(-1)
    elif isinstance(batch, collections.abc.Mapping):
        for item in batch.values():
            scribble(item)
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            scribble(item)


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(12).reshape(6, 2),
        lambda: torch.arange(12).reshape(6, 2),
        lambda: [np.arange(2) for _ in range(6)],
        lambda: [torch.arange(2) for _ in range(6)],
        lambda: [{"x": np.arange(2), "y": torch.ones(1)} for _ in range(6)],
    ],
    ids=["array", "tensor", "arrays", "tensors", "dicts"],
)
@pytest.mark.parametrize("collate_fn", [None, ms.pad], ids=["collate", "pad"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_owns_its_memory(make: Callable[[], Any], collate_fn: Any, batch_size: int) -> None:
    data = make()
    before = (
        plain([data[row] for row in range(6)])
        if not isinstance(data, np.ndarray)
        else data.tolist()
    )
    text = repr(before)
    for batch in ms.from_dataset(data).batch(batch_size, collate_fn=collate_fn):
        scribble(batch)
    after = (
        plain([data[row] for row in range(6)])
        if not isinstance(data, np.ndarray)
        else data.tolist()
    )
    assert repr(after) == text


def test_pad_fills_up_to_the_longest_and_tells_lengths() -> None:
    batch = ms.pad(
        [
            {"x": [1, 2, 3], "s": "ab", "n": 1},
            {"x": [], "s": "c", "n": 2},
            {"x": [4], "s": "", "n": 3},
        ]
    )
    assert list(batch) == ["x", "x_lengths", "s", "n"]
    assert batch["x"].tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    assert batch["x_lengths"].tolist() == [3, 0, 1]
    assert batch["x_lengths"].dtype == torch.int64
    assert batch["s"] == ["ab", "c", ""]
    assert batch["n"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(("multiple", "length"), [(1, 5), (2, 6), (4, 8), (5, 5), (8, 8), (64, 64)])
def test_pad_goes_on_to_a_multiple(multiple: int, length: int) -> None:
    samples = [{"x": np.arange(5)}, {"x": np.arange(2)}]
    assert ms.pad(samples, multiple=multiple)["x"].shape == (2, length)
    assert ms.pad(multiple=multiple)(samples)["x"].shape == (2, length)
    tensor, lengths = ms.pad([sample["x"] for sample in samples], multiple=multiple)
    assert tensor.shape == (2, length)
    assert lengths.tolist() == [5, 2]


def test_pad_fills_with_a_value_for_all_or_by_name() -> None:
    samples = [
        {"ids": [1, 2], "labels": [3, 4], "mask": [1]},
        {"ids": [1], "labels": [3], "mask": [1, 1]},
    ]
    for value, filled in ((7, [7, 7, 7]), ({"labels": -100, "mask": 9}, [0, -100, 9])):
        batch = ms.pad(samples, value=value)
        assert [batch["ids"][1, 1], batch["labels"][1, 1], batch["mask"][0, 1]] == filled
    assert ms.pad([[1, 2], [3]], value=9)[0].tolist() == [[1, 2], [3, 9]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_pad_keeps_the_dtype(dtype: str) -> None:
    batch = ms.pad([{"x": array(dtype, 3)}, {"x": array(dtype, 1)}, {"x": array(dtype, 0)}])
    assert batch["x"].dtype == torch.from_numpy(array(dtype, 1)).dtype
    assert batch["x"].shape == (3, 3)
    empty = ms.pad([{"x": array(dtype, 0)}] * 2)
    assert empty["x"].dtype == batch["x"].dtype
    assert empty["x"].shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.bfloat16], ids=str)
def test_pad_takes_tensors_of_any_dtype(dtype: torch.dtype) -> None:
    batch = ms.pad([{"x": torch.ones(3, dtype=dtype)}, {"x": torch.ones(1, dtype=dtype)}])
    assert batch["x"].dtype == dtype
    assert batch["x"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_pad_takes_sequences_of_more_dimensions() -> None:
    batch = ms.pad(
        [
            {"x": array("float32", 2, 3)},
            {"x": array("float32", 4, 3)},
            {"x": array("float32", 0, 3)},
        ],
        value=-1,
    )
    assert batch["x"].shape == (3, 4, 3)
    assert batch["x"].dtype == torch.float32
    assert batch["x"][0, 2:].eq(-1).all()
    assert batch["x"][2].eq(-1).all()
    assert batch["x_lengths"].tolist() == [2, 4, 0]


@pytest.mark.parametrize(
    "column",
    [
        [array("float32", 2, 3), array("float32", 2, 1)],
        [array("float32", 2, 3), array("float32", 2, 2)],
        [array("float32", 2, 3), array("float32", 3)],
        [array("float32", 3), array("float32", 1, 3)],
    ],
    ids=["broadcast", "width", "2-d and 1-d", "1-d and 2-d"],
)
def test_pad_refuses_what_differs_beyond_the_first_dimension(column: list[Any]) -> None:
    with pytest.raises(ValueError, match="'x'"):
        ms.pad([{"x": value} for value in column])
    with pytest.raises(ValueError, match="dimension"):
        ms.pad(column)


def test_pad_takes_lists_of_any_numbers() -> None:
    assert ms.pad([{"x": [1.5]}, {"x": [1, 2]}])["x"].tolist() == [[1.5, 0], [1, 2]]
    assert ms.pad([{"x": [True]}, {"x": [True, True]}])["x"].dtype == torch.bool
    assert ms.pad([{"x": [np.int64(1)]}, {"x": [np.int64(1), np.int64(2)]}])["x"].tolist() == [
        [1, 0],
        [1, 2],
    ]
    assert ms.pad([{"x": (1,)}, {"x": [2, 3]}])["x"].tolist() == [[1, 0], [2, 3]]


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        ([{"x": array("int8", 2)}, {"x": None}], r"'x'(.|\n)*None"),
        ([{"x": [1]}, {"y": [1]}], "'x'"),
        ([(array("int8", 2), 1), (array("int8", 3), 2)], r"(tuple|\.map)"),
        (["ab", "c"], r"(str|\.map)"),
        ([1, 2], r"(int|\.map)"),
    ],
    ids=["None", "missing key", "tuples", "text", "numbers"],
)
def test_pad_refuses_what_is_no_sequence_of_numbers_in_its_own_words(
    samples: list[Any], match: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        ms.pad(samples)
    assert "inhomogeneous" not in str(caught.value)
    assert "unsized" not in str(caught.value)


def test_pad_does_not_overwrite_a_column_that_has_the_name_of_its_lengths() -> None:
    samples = [{"x": [1, 2], "x_lengths": 7}, {"x": [3], "x_lengths": 8}]
    try:
        batch = ms.pad(samples)
    except ValueError as error:
        assert "x_lengths" in str(error)
    else:
        assert batch["x_lengths"].tolist() == [7, 8]


def test_pad_with_the_value_of_an_unknown_column_is_an_error() -> None:
    with pytest.raises(ValueError, match="idz"):
        ms.pad([{"ids": [1]}, {"ids": [1, 2]}], value={"idz": -100})


def test_pad_with_a_value_that_the_dtype_cannot_hold_is_an_error() -> None:
    for value, dtype in ((-100, "uint8"), (0.5, "int64"), (float("nan"), "int32")):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            ms.pad([{"x": array(dtype, 1)}, {"x": array(dtype, 2)}], value=value)


@pytest.mark.parametrize("workers", [0, 2])
def test_pad_in_a_pipeline_reads_views_and_travels(workers: int) -> None:
    rows = {"ids": [list(range(row % 4)) for row in range(12)], "y": list(range(12))}
    ds = ms.from_dataset(datasets.Dataset.from_dict(rows)).batch(
        3, collate_fn=ms.pad(multiple=4, value={"ids": -1})
    )
    made = loader(ds, workers)
    batches = list(made)
    made.close()
    assert [batch["ids"].shape for batch in batches] == [(3, 4)] * 4
    assert [batch["ids_lengths"].tolist() for batch in batches] == [
        [0, 1, 2],
        [3, 0, 1],
        [2, 3, 0],
        [1, 2, 3],
    ]
    assert batches[1]["ids"].tolist() == [[0, 1, 2, -1], [-1] * 4, [0, -1, -1, -1]]
    assert batches[3]["ids"].dtype == torch.int64
