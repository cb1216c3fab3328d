"""Wrong arguments of verbs, each refused at construction with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import midstream as ms
from midstream.dataset import Dataset
from tests.helpers.pipelines import numbers, stream

A, B = numbers(6, "a"), numbers(6, "b")


TWO = {"a": A, "b": B}


WRONG: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("shuffle text", lambda: A.shuffle("x"), TypeError, "shuffle: seed is an integer; found 'x'"),  # type: ignore[arg-type]
    ("shuffle float", lambda: A.shuffle(1.5), TypeError, "seed is an integer; found 1.5"),  # type: ignore[arg-type]
    ("shuffle bool", lambda: A.shuffle(True), TypeError, "seed is an integer; found True"),
    (
        "shuffle buffer 0",
        lambda: A.shuffle(1, buffer_size=0),
        ValueError,
        "buffer_size is at least 1; found 0",
    ),
    (
        "shuffle buffer text",
        lambda: A.shuffle(buffer_size="8"),
        TypeError,
        "buffer_size is an integer",
    ),  # type: ignore[arg-type]
    (
        "shuffle window 0",
        lambda: A.shuffle(1, window_blocks=0),
        ValueError,
        "window_blocks is at least 1; found 0",
    ),
    (
        "shuffle stream",
        lambda: stream().shuffle(1),
        TypeError,
        r"needs random access(.|\n)*\.shuffle\(seed, buffer_size=10_000\)(.|\n)*filter",
    ),
    (
        "shuffle endless",
        lambda: A.repeat().shuffle(1),
        ValueError,
        r"Shuffle before \.repeat\(\)(.|\n)*repeat",
    ),
    ("map None", lambda: A.map(None), TypeError, "map takes a callable; found NoneType"),  # type: ignore[arg-type]
    ("map seed", lambda: A.map(str, seed="s"), TypeError, "map: seed is an integer"),  # type: ignore[arg-type]
    (
        "map on_error",
        lambda: A.map(str, on_error="ignore"),  # type: ignore[arg-type]
        ValueError,
        "on_error is one of 'raise', 'skip', 'refill'; found 'ignore'",
    ),
    ("map max_errors", lambda: A.map(str, max_errors=3), ValueError, 'goes with on_error="skip"'),
    (
        "map max -1",
        lambda: A.map(str, on_error="skip", max_errors=-1),
        ValueError,
        "max_errors is at least 0",
    ),
    ("filter number", lambda: A.filter(3), TypeError, "filter takes a callable; found int"),  # type: ignore[arg-type]
    (
        "filter refill",
        lambda: A.filter(bool, on_error="refill"),  # type: ignore[arg-type]
        ValueError,
        "on_error is one of 'raise', 'skip'; found 'refill'",
    ),
    (
        "filter max_errors",
        lambda: A.filter(bool, max_errors=3),
        ValueError,
        'goes with on_error="skip"',
    ),
    ("flat_map list", lambda: A.flat_map([1]), TypeError, "flat_map takes a callable; found list"),  # type: ignore[arg-type]
    (
        "flat_map max_errors",
        lambda: A.flat_map(str, max_errors=3),
        ValueError,
        'goes with on_error="skip"',
    ),
    ("repeat 0", lambda: A.repeat(0), ValueError, "num_epochs is at least 1; found 0"),
    ("repeat text", lambda: A.repeat("2"), TypeError, "num_epochs is an integer; found '2'"),  # type: ignore[arg-type]
    (
        "repeat endless",
        lambda: A.repeat().repeat(2),
        ValueError,
        "never gets to a second pass(.|\n)*a: from_dataset",
    ),
    ("take -1", lambda: A.take(-1), ValueError, "take: n is at least 0; found -1"),
    ("take float", lambda: A.take(2.5), TypeError, "take: n is an integer; found 2.5"),  # type: ignore[arg-type]
    ("take bool", lambda: A.take(True), TypeError, "take: n is an integer; found True"),
    ("skip -1", lambda: A.skip(-1), ValueError, "skip: n is at least 0; found -1"),
    ("skip None", lambda: A.skip(None), TypeError, "skip: n is an integer; found None"),  # type: ignore[arg-type]
    ("batch 0", lambda: A.batch(0), ValueError, "batch_size is at least 1; found 0"),
    ("batch float", lambda: A.batch(2.0), TypeError, "batch_size is an integer; found 2.0"),  # type: ignore[arg-type]
    ("batch collate", lambda: A.batch(2, collate_fn="x"), TypeError, "collate_fn takes a callable"),  # type: ignore[arg-type]
    (
        "concatenate none",
        lambda: ms.concatenate([]),
        ValueError,
        "at least one dataset; found none",
    ),
    (
        "concatenate lists",
        lambda: ms.concatenate([[1]]),
        TypeError,
        r"found list(.|\n)*midstream\.from_dataset",
    ),  # type: ignore[list-item]
    ("concatenate one", lambda: ms.concatenate(A), TypeError, r"concatenate(.|\n)*(list|\[)"),  # type: ignore[arg-type]
    ("concatenate number", lambda: ms.concatenate(3), TypeError, "concatenate"),  # type: ignore[arg-type]
    (
        "concatenate endless",
        lambda: ms.concatenate([A.repeat(), B]),
        ValueError,
        "dataset 0(.|\n)*what follows is never read",
    ),
    (
        "interleave list",
        lambda: ms.interleave([A, B]),
        TypeError,
        r"interleave\(\{'web': web, 'code': code\}\)",
    ),  # type: ignore[arg-type]
    ("interleave none", lambda: ms.interleave({}), ValueError, "at least one dataset"),
    (
        "interleave raw",
        lambda: ms.interleave({"a": [1]}),
        TypeError,
        r"interleave 'a'(.|\n)*midstream\.from_dataset",
    ),  # type: ignore[dict-item]
    ("interleave number as name", lambda: ms.interleave({1: A}), ValueError, "name is a string"),  # type: ignore[dict-item]
    (
        "interleave path as name",
        lambda: ms.interleave({"a/c": A}),
        ValueError,
        "without '/' and '|'; found 'a/c'",
    ),
    ("interleave empty name", lambda: ms.interleave({"": A}), ValueError, "found ''"),
    (
        "interleave other names",
        lambda: ms.interleave(TWO, {"a": 1, "c": 2}),
        ValueError,
        r"expected \['a', 'b'\], found \['a', 'c'\]",
    ),
    (
        "interleave negative",
        lambda: ms.interleave(TWO, {"a": -1, "b": 1}),
        ValueError,
        "weight of 'a' .* found -1",
    ),
    (
        "interleave nan",
        lambda: ms.interleave(TWO, {"a": float("nan"), "b": 1}),
        ValueError,
        "finite number",
    ),
    (
        "interleave inf",
        lambda: ms.interleave(TWO, {"a": float("inf"), "b": 1}),
        ValueError,
        "finite number",
    ),
    (
        "interleave text",
        lambda: ms.interleave(TWO, {"a": "x", "b": 1}),
        (TypeError, ValueError),
        "weight of 'a'",
    ),  # type: ignore[dict-item,list-item]
    (
        "interleave no weight",
        lambda: ms.interleave(TWO, {"a": None, "b": 1}),
        (TypeError, ValueError),
        "weight of 'a'",
    ),  # type: ignore[dict-item,list-item]
    (
        "interleave all 0",
        lambda: ms.interleave(TWO, {"a": 0, "b": 0}),
        ValueError,
        "at least one weight is above 0",
    ),
    (
        "interleave tiny",
        lambda: ms.interleave(TWO, {"a": 1e-9, "b": 1}),
        ValueError,
        "'a'(.|\n)*Give it 0 to leave it out",
    ),
    (
        "interleave seed",
        lambda: ms.interleave(TWO, seed="x"),
        TypeError,
        "interleave: seed is an integer",
    ),  # type: ignore[arg-type]
    (
        "interleave strategy",
        lambda: ms.interleave(TWO, stopping_strategy="last"),  # type: ignore[arg-type]
        ValueError,
        "one of 'first_exhausted', 'all_exhausted', 'all_exhausted_without_replacement'; found 'last'",
    ),
    ("interleave name number", lambda: ms.interleave(TWO, name=5), (TypeError, ValueError), "name"),  # type: ignore[arg-type,list-item]
    ("interleave name path", lambda: ms.interleave(TWO, name="x/y"), ValueError, "name"),
    (
        "interleave over nothing",
        lambda: len(ms.interleave({"a": A, "none": numbers(0)}, stopping_strategy="all_exhausted")),
        ValueError,
        "'none' has no rows(.|\n)*weight 0",
    ),
    (
        "rows of a stream",
        lambda: stream().rows([0]),
        TypeError,
        "only a random-access pipeline has rows",
    ),
    ("rows too far", lambda: A.rows([0, 6]), IndexError, r"in \[0, 6\); found 0 to 6"),
    ("rows negative", lambda: A.rows([-1]), IndexError, r"in \[0, 6\); found -1"),
    ("len of a stream", lambda: len(stream()), TypeError, "known only by reading it(.|\n)*filter"),
    ("len of endless", lambda: len(A.repeat()), TypeError, "no end, so it has no length"),
    ("epoch", lambda: A.set_epoch(-1), ValueError, "epoch is an integer of at least 0; found -1"),
    ("pad multiple 0", lambda: ms.pad(multiple=0), ValueError, "multiple is at least 1; found 0"),
    ("pad multiple text", lambda: ms.pad(multiple="8"), TypeError, "multiple"),  # type: ignore[arg-type]
    ("pad multiple float", lambda: ms.pad(multiple=1.5), TypeError, "multiple"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(
    ("make", "error", "match"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_wrong_arguments_are_refused_at_construction(
    make: Callable[[], Any], error: Any, match: str
) -> None:
    with pytest.raises(error, match=match):
        make()


def test_refusing_one_dataset_in_place_of_a_list_reads_nothing() -> None:
    read = []

    class Watched(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    with pytest.raises(TypeError):
        ms.concatenate(ms.from_dataset(Watched([1, 2, 3])))  # type: ignore[arg-type]
    assert read == []


def test_one_name_for_two_sources_is_refused_with_both_places() -> None:
    def again() -> Dataset:
        return ms.from_dataset([1], name="web")

    with pytest.raises(ValueError, match="'web': one at 'p/from_dataset', one at 'q/from_dataset'"):
        ms.interleave({"p": again(), "q": again().map(str)})
    with pytest.raises(ValueError, match="'web': one at '0/from_dataset', one at '1/from_dataset'"):
        ms.concatenate([again(), again().filter(bool)])
    inner = ms.interleave({"x": again(), "y": numbers(3)})
    with pytest.raises(ValueError, match="one at 'far/from_dataset', one at 'near/x/from_dataset'"):
        ms.interleave({"near": inner, "far": again()})


def test_integers_of_numpy_are_integers() -> None:
    ds = (
        numbers(20)
        .shuffle(np.int64(3))
        .take(np.int64(12))
        .skip(np.int32(2))
        .repeat(np.int64(2))
        .batch(np.int16(5))
    )
    plain = numbers(20).shuffle(3).take(12).skip(2).repeat(2).batch(5)
    assert [batch.tolist() for batch in ds] == [batch.tolist() for batch in plain]
    assert ds == plain
    json.dumps([ds.spec(), ds.state_dict()])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ms.Dataset([1, 2]), "Dataset wraps a node; found list.*from_dataset"),
        (lambda: ms.Dataset(ms.from_dataset([1])), "Dataset wraps a node; found Dataset"),
        (lambda: ms.DataLoader(ms.from_dataset([1]).node), r"Wrap it: midstream.Dataset\(node\)"),
        (
            lambda: ms.interleave({"a": ms.from_dataset([1]).node}),
            "found SequenceSource.*wrap|Wrap",
        ),
        (lambda: ms.concatenate([[1]]), "concatenate takes midstream datasets; found list"),
    ],
)
def test_what_is_no_dataset_is_refused_with_what_to_do(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_a_dataset_is_immutable() -> None:
    dataset = ms.from_dataset([1, 2])
    for name in ("node", "seed"):
        with pytest.raises(AttributeError, match="every verb returns a new one"):
            setattr(dataset, name, None)
