"""A pipeline in words: its repr, the paths of its nodes, its tree in a notebook."""

from __future__ import annotations

import midstream as ms
from midstream.dataset import Dataset
from midstream.pipeline.node import bind
from tests.helpers.pipelines import numbers, stream


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
