"""Nodes: what each refuses, how trees are named and shown, what user code may do, and how batches
are made.
"""

from __future__ import annotations

import collections
import json
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import midstream as ms
from midstream.dataset import Dataset
from midstream.pipeline.node import bind
from midstream.pipeline.single_lane import SingleLaneIterator
from tests.helpers.loaders import drain, loader, through_json


def numbers(n: int = 30, name: str | None = None) -> Dataset:
    return ms.from_dataset(range(n), name=name)


def stream(n: int = 30) -> Dataset:
    return numbers(n).filter(lambda _: True)


def until_too_many(iterator: Iterator[Any]) -> tuple[list[Any], ms.TooManyErrors]:
    found = []
    with pytest.raises(ms.TooManyErrors) as caught:
        for sample in iterator:
            found.append(sample)
    return found, caught.value


# -- wrong arguments ----------------------------------------------------------------------------------------------------

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


# -- trees --------------------------------------------------------------------------------------------------------------


def tree() -> Dataset:
    inner = ms.interleave(
        {"news": numbers(5), "books": numbers(4).filter(bool)}, {"news": 2, "books": 1}, name="text"
    )
    mixed = ms.interleave({"inner": inner.map(str), "code": numbers(6, "git").shuffle(2)}, seed=7)
    return (
        ms.concatenate([mixed, numbers(3, "tail")])
        .shuffle(1, buffer_size=8)
        .batch(2, drop_last=True)
    )


def test_the_repr_is_the_tree() -> None:
    lines = [line.split("  # ") for line in repr(tree()).splitlines()]
    assert [line.rstrip() for line, _ in lines] == [
        "batch(batch_size=2, drop_last=True)",
        "└─ shuffle(seed=1, buffer_size=8)",
        "   └─ concatenate()",
        "      ├─ interleave(weights={inner: 1, code: 1}, seed=7)",
        "      │  ├─ map(fn='str')",
        "      │  │  └─ interleave(weights={news: 2, books: 1}, seed=0, label='text')",
        "      │  │     ├─ 0/inner/news: from_dataset(range, 5 rows)",
        "      │  │     └─ filter(fn='bool')",
        "      │  │        └─ 0/inner/books: from_dataset(range, 4 rows)",
        "      │  └─ shuffle(seed=2)",
        "      │     └─ git: from_dataset(range, 6 rows)",
        "      └─ tail: from_dataset(range, 3 rows)",
    ]
    again = "stream, a resume reads again at most 9/lanes + 1 inputs of a lane"
    assert [access for _, access in lines] == [
        *("stream", again, "stream", "stream", "stream", "stream"),
        *(
            "random access, 5",
            "stream",
            "random access, 4",
            "random access, 6",
            "random access, 6",
            "random access, 3",
        ),
    ]


def test_paths_are_the_names_chosen_on_the_way_down() -> None:
    place = bind(tree().node)
    assert [at.path for at in place.walk()] == [
        "batch",
        "shuffle",
        "concatenate",
        "0/interleave",
        "0/inner/map",
        "0/inner/text",
        "0/inner/news/from_dataset",
        "0/inner/books/filter",
        "0/inner/books/from_dataset",
        "0/code/shuffle",
        "0/code/from_dataset",
        "1/from_dataset",
    ]
    assert place.names == ["git", "0/inner/books", "0/inner/news", "tail"]
    assert [
        at.path for at in bind(numbers().map(str).map(str).shuffle(1).map(str).node).walk()
    ] == [
        "map#3",
        "shuffle",
        "map#2",
        "map",
        "from_dataset",
    ]
    assert bind(numbers().node).names == ["data"]


def test_a_path_does_not_depend_on_the_order_in_which_names_were_given() -> None:
    one = ms.interleave({"a": numbers(4), "b": numbers(5)}, {"a": 1, "b": 2})
    other = ms.interleave({"b": numbers(5), "a": numbers(4)}, {"b": 2, "a": 1})
    assert bind(one.node).names == bind(other.node).names == ["a", "b"]
    assert list(one) == list(other)


def test_two_shuffles_of_one_seed_differ_by_their_place() -> None:
    ds = ms.concatenate([numbers(50).shuffle(1), numbers(50).shuffle(1)])
    found = list(ds)
    assert found[:50] != found[50:]
    assert sorted(found[:50]) == sorted(found[50:]) == list(range(50))
    assert list(numbers(50).shuffle(1).shuffle(1)) != list(numbers(50).shuffle(1))


def test_the_html_tree_is_nested_and_escaped() -> None:
    ds = ms.interleave(
        {"<b>&'": numbers(3), "plain": numbers(4).map(lambda x: x).repeat()},
        {"<b>&'": 1, "plain": 0.5},
    )
    html = ds._repr_html_()
    assert "<b>&'" not in html.replace("<b>&lt;b&gt;&amp;&#x27;</b>", "")
    assert "&lt;b&gt;&amp;&#x27;" in html
    assert "&lt;lambda&gt;" in html
    assert "<lambda>" not in html
    assert html.count("<details") == html.count("</details>") == 3
    assert html.count("<div") == html.count("</div>")
    order = [
        html.index(part)
        for part in ("interleave(", "&lt;b&gt;&amp;&#x27;</b>: from_dataset", "repeat(", "map(")
    ]
    assert order == sorted(order)
    assert "random access, endless" in html
    assert "random access, 3" in html
    assert "stream, endless" in stream().repeat()._repr_html_()


# -- what user code may do ----------------------------------------------------------------------------------------------


def none_at_5(x: int) -> int | None:
    return None if x == 5 else x


def stop_at_5(x: int) -> int:
    if x == 5:
        raise StopIteration("five")
    return x


def fail_at(*bad: int) -> Callable[[int], int]:
    def check(x: int) -> int:
        if x in bad:
            raise ValueError(f"bad {x}")
        return x

    return check


@pytest.mark.parametrize("source", [numbers, stream])
def test_map_that_returns_none_is_an_error_that_names_filter(
    source: Callable[[int], Dataset],
) -> None:
    found = drain(iter(source(8).map(none_at_5)))
    assert [x for x in found if not isinstance(x, ms.SampleError)] == [0, 1, 2, 3, 4, 6, 7]
    assert found[5].error_type == "TypeError"
    assert "returned None" in found[5].original_message
    assert ".filter" in found[5].original_message


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


@pytest.mark.parametrize("source", [numbers, stream])
def test_stop_iteration_out_of_collate_is_an_error_and_no_end(
    source: Callable[[int], Dataset],
) -> None:
    found = drain(iter(source(12).batch(3, collate_fn=lambda batch: [stop_at_5(x) for x in batch])))
    assert [x for x in found if not isinstance(x, ms.SampleError)] == [
        [0, 1, 2],
        [6, 7, 8],
        [9, 10, 11],
    ]
    assert "StopIteration" in str(found[1])
    assert found[1].origin is None


@pytest.mark.parametrize("source", [numbers, stream])
def test_a_collate_function_that_returns_none_loses_its_batch(
    source: Callable[[int], Dataset],
) -> None:
    found = drain(iter(source(9).batch(3, collate_fn=lambda batch: None if 3 in batch else batch)))
    assert [x for x in found if not isinstance(x, ms.SampleError)] == [[0, 1, 2], [6, 7, 8]]
    assert "returned None" in found[1].original_message


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
def test_repeat_of_nothing_ends(nothing: str, times: int | None) -> None:
    ds = NOTHING[nothing]().repeat(times)
    assert list(ds) == []
    for workers in (0, 2 if nothing == "nothing passes" else 0):
        made = loader(ds, workers, lanes=None)
        assert list(made) == []
        made.close()


# -- errors that are skipped --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collated", [False, True])
def test_a_batch_of_random_access_is_made_when_it_is_taken(collated: bool) -> None:
    made: list[Any] = []

    def note(samples: list[Any]) -> list[Any]:
        made.append(samples)
        if samples[0] == 6:
            raise ValueError("not these")
        return samples

    ds = numbers(12).batch(3, collate_fn=note)
    if collated:  # what is above the batch asks for many at once
        ds = ds.map(lambda batch: batch)
    batches = iter(ds)
    assert next(batches) == [0, 1, 2] and (collated or made == [[0, 1, 2]])
    assert next(batches) == [3, 4, 5] and (collated or made == [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(ms.SampleError, match="not these"):
        next(batches)
    state = batches.state_dict()
    assert list(batches) == [[9, 10, 11]]
    ds.load_state_dict(state)
    assert list(ds) == [[9, 10, 11]]


def test_skip_leaves_a_hole_and_its_batch_is_shorter() -> None:
    ds = numbers(16).map(fail_at(5, 6, 13), on_error="skip").batch(4, collate_fn=list)
    assert ds.random_access
    assert list(ds) == [[0, 1, 2, 3], [4, 7], [8, 9, 10, 11], [12, 14, 15]]
    assert len(ds) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_which_all_failed_vanishes_and_is_counted(workers: int) -> None:
    ds = numbers(16).map(fail_at(4, 5, 6, 7, 13), on_error="skip")
    made = loader(ds, workers)
    assert list(made) == [[0, 1, 2, 3], [8, 9, 10, 11], [12, 14, 15]]
    progress = made.progress()
    assert progress.sources["data"].failures == {"ValueError": 5}
    assert progress.samples == 11
    assert progress.sources["data"].epochs == 1.0
    assert made.epoch == 1
    made.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_refill_keeps_batches_full_and_counts(workers: int) -> None:
    ds = numbers(18).map(fail_at(1, 5, 6), on_error="refill")
    assert not ds.random_access
    assert list(ds.batch(4, collate_fn=list)) == [
        [0, 2, 3, 4],
        [7, 8, 9, 10],
        [11, 12, 13, 14],
        [15, 16, 17],
    ]
    made = loader(ds, workers, lanes=2)
    batches = list(made)
    assert [len(batch) for batch in batches] in ([4, 4, 4, 3], [4, 4, 4, 2, 1])
    assert sorted(x for batch in batches for x in batch) == [
        x for x in range(18) if x not in (1, 5, 6)
    ]
    assert made.progress().sources["data"].failures == {"ValueError": 3}
    made.close()


@pytest.mark.parametrize(
    "node",
    [
        lambda ds: ds.filter(lambda x: fail_at(5, 7)(x) % 2, on_error="skip"),
        lambda ds: ds.flat_map(lambda x: [fail_at(5, 7)(x)] * (x % 2), on_error="skip"),
    ],
    ids=["filter", "flat_map"],
)
def test_skip_of_a_stream_node_leaves_out_and_counts(node: Callable[[Dataset], Dataset]) -> None:
    ds = node(numbers(12))
    assert list(ds) == [1, 3, 9, 11]
    made = loader(ds, lanes=1)
    assert list(made) == [[1, 3, 9, 11]]
    assert made.progress().sources["data"].failures == {"ValueError": 2}


def test_every_kind_of_failure_is_counted_by_its_type_and_source() -> None:
    def parse(x: int) -> int:
        if x % 5 == 1:
            raise KeyError(x)
        if x % 5 == 3:
            raise ValueError(x)
        return x

    ds = ms.interleave(
        {"a": numbers(20).map(parse, on_error="skip"), "b": numbers(20)},
        stopping_strategy="all_exhausted_without_replacement",
    )
    made = loader(ds)
    list(made)
    assert made.progress().sources["a"].failures == {"KeyError": 4, "ValueError": 4}
    assert made.progress().sources["b"].failures == {}
    assert made.progress().sources["a"].samples == 12


MODES = ["skip", "refill"]


def limited(mode: Any, limit: int | None) -> Dataset:
    return numbers(30).map(fail_at(5, 6, 13, 22), on_error=mode, max_errors=limit)


@pytest.mark.parametrize("mode", MODES)
def test_more_errors_than_max_errors_are_too_many(mode: str) -> None:
    found, error = until_too_many(iter(limited(mode, 2)))
    assert found == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert "map skipped 3 samples, more than max_errors=2" in str(error)
    assert "3 x ValueError" in str(error)
    assert len(list(limited(mode, 4))) == 26
    assert until_too_many(iter(limited(mode, 0)))[0] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_too_many_errors_end_the_loader_again_and_again(mode: str, workers: int) -> None:
    made = loader(limited(mode, 2), workers, lanes=2)
    iterator = iter(made)
    found, error = until_too_many(iterator)
    assert found == list(loader(limited(mode, None), lanes=2))[: len(found)]
    assert "more than max_errors=2" in str(error)
    with pytest.raises(ms.TooManyErrors):
        next(iterator)
    made.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_the_state_after_too_many_errors_is_that_of_the_last_batch_handed_out(
    mode: str, workers: int
) -> None:
    made = loader(limited(mode, 2), workers, lanes=2)
    found, _ = until_too_many(iter(made))
    state = through_json(made.state_dict())
    assert state["steps_done"] == len(found)
    made.close()
    resumed = loader(limited(mode, None), lanes=2)
    resumed.load_state_dict(state)
    assert found + list(resumed) == list(loader(limited(mode, None), lanes=2))


@pytest.mark.parametrize("mode", MODES)
def test_the_state_after_too_many_errors_is_that_of_the_last_sample_handed_out(mode: str) -> None:
    run = SingleLaneIterator(limited(mode, 2).node, 0, 1, 0)
    found, _ = until_too_many(run)
    with pytest.raises(ms.TooManyErrors):
        next(run)
    resumed = SingleLaneIterator(limited(mode, None).node, 0, 1, 0)
    resumed.load_state_dict(through_json(run.state_dict()))
    assert found + list(resumed) == [x for x in range(30) if x not in (5, 6, 13, 22)]


def test_errors_before_a_resume_count_towards_the_limit() -> None:
    run = SingleLaneIterator(limited("skip", 2).node, 0, 1, 0)
    assert [next(run) for _ in range(8)] == [0, 1, 2, 3, 4, 7, 8, 9]
    resumed = SingleLaneIterator(limited("skip", 2).node, 0, 1, 0)
    resumed.load_state_dict(run.state_dict())
    assert until_too_many(resumed)[0] == [10, 11, 12]
    made = loader(limited("skip", 2), lanes=2)
    iterator = iter(made)
    assert [next(iterator) for _ in range(2)] == [[0, 1, 2, 3], [4, 7]]
    again = loader(limited("skip", 2), 2, lanes=2)
    again.load_state_dict(made.state_dict())
    assert until_too_many(iter(again))[0] == [[8, 9, 10, 11]]
    again.close()


# -- a filter that lets almost nothing pass -----------------------------------------------------------------------------


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
        monkeypatch.setattr("midstream.nodes.filter._GIVE_UP", 5000)
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


# -- randomness in user code --------------------------------------------------------------------------------------------


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


# -- collate ------------------------------------------------------------------------------------------------------------

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


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, collections.abc.Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


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


# -- pad ----------------------------------------------------------------------------------------------------------------


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
