"""pack: rows against a packer that goes token by token, resume at every row, what is counted, what
is refused.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.dataset import Dataset
from midstream.nodes.pack.fit import best_fit
from midstream.nodes.pack.rows import IGNORED
from midstream.pipeline.single_lane import SingleLaneIterator
from tests.cases import pieces, plain
from tests.helpers.loaders import through_json

SEQ = 8
HARD = [
    0,
    1,
    SEQ - 1,
    SEQ,
    SEQ + 1,
    10 * SEQ,
    3,
    0,
    0,
    SEQ,
    SEQ - 1,
    2 * SEQ,
    1,
    1,
    5,
    2,
    10 * SEQ + 3,
    0,
]
"""Lengths of documents."""


def documents(k: int, lengths: list[int]) -> list[dict[str, Any]]:
    """Documents whose every token is its own: document, source and place in it."""
    return [
        {"input_ids": np.arange(size, dtype=np.int32) + 1000 * row + 1_000_000 * k, "row": row}
        for row, size in enumerate(lengths)
    ]


def source(lengths: list[int], k: int = 0, **options: Any) -> Dataset:
    return ms.from_dataset(documents(k, lengths), **options)


def two(**options: Any) -> Dataset:
    return ms.interleave(
        {"web": source(HARD * 2).shuffle(1), "code": source(HARD[::-1], 1)},
        {"web": 2, "code": 1},
        stopping_strategy="all_exhausted_without_replacement",
    ).pack(SEQ, **options)


def tokens(rows: list[Any]) -> list[int]:
    """All tokens of rows, in order, without padding."""
    return [
        token
        for row in map(plain, rows)
        for ids, lengths in zip(np.atleast_2d(row["input_ids"]), np.atleast_2d(row["seq_lens"]))
        for token in ids[: sum(lengths)].tolist()
    ]


def run(ds: Dataset) -> list[Any]:
    return list(map(plain, ds))


# -- rows ---------------------------------------------------------------------------------------------------------------


def test_a_row_has_what_attention_and_the_loss_need() -> None:
    docs = [
        {"input_ids": [11, 12, 13], "m": [0, 1, 1], "w": [0.5, 1.0, 2.0], "t": [7, 7, 8]},
        {"input_ids": [21], "m": [True], "w": [4.0], "t": [9]},
    ]
    (row,) = ms.from_dataset(docs).pack(
        8, columns=["w", "t"], mask="m", separator=[1, 2], pad_id=99
    )
    assert plain(row) == {
        "input_ids": [11, 12, 13, 1, 2, 21, 1, 2],
        "labels": [-100, 12, 13, 1, 2, -100, 1, 2],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 2],
        "seq_lens": [5, 3],
        "w": [0.5, 1.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0],
        "t": [7, 7, 8, 8, 8, 9, 9, 9],
    }
    docs[0]["m"] = [0, 1, 0]
    (first,) = ms.from_dataset(docs).pack(6, columns=["w", "t"], mask="m", pad_id=99)
    assert plain(first)["labels"] == [-100, 12, -100, -100, -100, -100]
    assert plain(first)["input_ids"] == [11, 12, 13, 21, 99, 99]
    assert plain(first)["position_ids"] == [0, 1, 2, 0, 0, 1]
    assert plain(first)["t"] == [7, 7, 8, 9, 0, 0]


def test_dtypes_are_those_of_embeddings_losses_and_kernels() -> None:
    docs = [
        {"input_ids": np.array([1, 2], dtype=np.uint16), "w": np.array([1, 2], dtype=np.float64)}
    ]
    (row,) = ms.from_dataset(docs).pack(4, columns=["w"])
    assert {key: str(value.dtype) for key, value in row.items()} == {
        "input_ids": "int64",
        "labels": "int64",
        "position_ids": "int64",
        "seq_lens": "int32",
        "w": "float32",
    }


def test_samples_may_be_bare_and_of_any_kind() -> None:
    expected = [[1, 2, 3, 4]]
    for docs in (
        [[1, 2], [3, 4]],
        [np.array([1, 2]), np.array([3, 4], dtype=np.int8)],
        [torch.tensor([1, 2]), torch.tensor([3, 4])],
        [{"ids": (1, 2)}, {"ids": [3, 4]}],
    ):
        assert [
            row["input_ids"].tolist() for row in ms.from_dataset(docs).pack(4, key="ids")
        ] == expected


def test_rows_do_not_share_memory_with_the_data_or_each_other() -> None:
    docs = documents(0, [8, 8])
    for mode in ("concat", "fit"):
        for row in ms.from_dataset(docs).pack(4, mode=mode):
            arrays = [row[key] for key in ("input_ids", "labels", "position_ids")]
            for array in arrays:
                array[:] = -1
            assert all(
                not np.shares_memory(a, b)
                for a, b in itertools.combinations(
                    [*arrays, *(doc["input_ids"] for doc in docs)], 2
                )
            )
    assert docs[0]["input_ids"].tolist() == list(range(8))


@pytest.mark.parametrize("size", [1, 3])
def test_batches_fill_seq_lens_up_with_zeros(size: int) -> None:
    ds = source([3, 1, 4, 2, 2, 2, 2, 8]).pack(8)
    for batch, rows in zip(ds.batch(size), grouped(run(ds), size)):
        most = max(len(row["seq_lens"]) for row in rows)
        assert batch["seq_lens"].tolist() == [
            row["seq_lens"] + [0] * (most - len(row["seq_lens"])) for row in rows
        ]
        assert batch["seq_lens"].dtype == torch.int32
        assert batch["input_ids"].shape == (len(rows), 8)


def grouped(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


# -- against a packer that goes token by token ---------------------------------------------------------------------------


def reference_documents(lengths: list[int], overflow: str, separator: list[int]) -> list[list[int]]:
    """What is to be packed of each document."""
    result = []
    for row, size in enumerate(lengths):
        document = [1000 * row + token for token in range(size)]
        document += separator if document else []
        if len(document) > SEQ and overflow == "truncate":
            document = document[:SEQ]
        if len(document) > SEQ and overflow == "drop":
            document = []
        if document:
            result.append(document)
    return result


def reference_row(parts: list[list[int]]) -> dict[str, Any]:
    row: dict[str, Any] = {"input_ids": [], "labels": [], "position_ids": [], "seq_lens": []}
    for part in parts:
        for place, token in enumerate(part):
            row["input_ids"].append(token)
            row["labels"].append(token if place else IGNORED)
            row["position_ids"].append(place)
        row["seq_lens"].append(len(part))
    padding = SEQ - len(row["input_ids"])
    row["input_ids"] += [0] * padding
    row["labels"] += [IGNORED] * padding
    row["position_ids"] += range(padding)
    return row


def reference_concat(docs: list[list[int]], last: str) -> list[dict[str, Any]]:
    rows, parts, room = [], [], SEQ
    for document in docs:
        part: list[int] = []
        for token in document:
            part.append(token)
            room -= 1
            if not room:
                rows.append(reference_row([*parts, part]))
                parts, part, room = [], [], SEQ
        if part:
            parts.append(part)
    if parts and last == "pad":
        rows.append(reference_row(parts))
    return rows


def reference_fit(
    docs_by_input: list[list[int]], window: int, min_fill: float, last: str
) -> list[dict[str, Any]]:
    """Windows of inputs; best fit decreasing by looking at every row for every piece."""
    rows: list[dict[str, Any]] = []
    waited: list[list[int]] = []
    number = 0
    while True:
        inputs = docs_by_input[number : number + window]
        number += window
        ended = len(inputs) < window
        fresh = [document[a : a + SEQ] for document in inputs for a in range(0, len(document), SEQ)]
        parts = waited + fresh
        open_rows: list[list[int]] = []
        for index in sorted(range(len(parts)), key=lambda index: (-len(parts[index]), index)):
            fitting = [
                (SEQ - sum(len(parts[i]) for i in row), place)
                for place, row in enumerate(open_rows)
                if sum(len(parts[i]) for i in row) + len(parts[index]) <= SEQ
            ]
            if fitting:
                open_rows[min(fitting)[1]].append(index)
            else:
                open_rows.append([index])
        made = sorted(sorted(row) for row in open_rows)
        fill = [sum(len(parts[i]) for i in row) for row in made]
        waiting: list[int] = []
        if ended and last == "drop" and made and min(fill) < min_fill * SEQ:
            made.pop(fill.index(min(fill)))
        elif not ended:
            waiting = [
                i
                for row, full in zip(made, fill)
                if full < min_fill * SEQ and min(row) >= len(waited)
                for i in row
            ]
            made = [row for row in made if not set(row) & set(waiting)]
        rows.extend(reference_row([parts[i] for i in row]) for row in made)
        waited = [parts[i] for i in sorted(waiting)]
        if ended:
            return rows


def cut_and_go_on(ds: Dataset, cuts: list[int]) -> list[Any]:
    """The rows of a run that is saved, as JSON, and resumed after each of so many rows."""
    found: list[Any] = []
    state = None
    for cut in [*cuts, 10**9]:
        part = SingleLaneIterator(ds.node, 0, 1, 0)
        if state is not None:
            part.load_state_dict(state)
        found.extend(plain(row) for row in itertools.islice(part, cut))
        state = through_json(part.state_dict())
    return found


some_lengths = st.lists(
    st.integers(0, SEQ + 2) | st.sampled_from([SEQ, 3 * SEQ, 4 * SEQ + 1]), max_size=40
)
some_cuts = st.lists(st.integers(0, 5), max_size=6)
some_overflow = st.sampled_from(["split", "truncate", "drop"])
some_separator = st.sampled_from([[], [900], [900, 901]])


@settings(deadline=None, max_examples=150)
@given(some_lengths, some_overflow, some_separator, st.sampled_from(["pad", "drop"]), some_cuts)
def test_concat_is_what_going_token_by_token_makes(
    lengths: list[int], overflow: Any, separator: list[int], last: Any, cuts: list[int]
) -> None:
    ds = source(lengths).pack(SEQ, overflow=overflow, separator=separator, last=last)
    expected = reference_concat(reference_documents(lengths, overflow, separator), last)
    assert run(ds) == expected
    assert cut_and_go_on(ds, cuts) == expected


@settings(deadline=None, max_examples=200)
@given(
    some_lengths,
    some_overflow,
    some_separator,
    st.sampled_from(["pad", "drop"]),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    some_cuts,
)
def test_fit_is_what_trying_every_row_makes(
    lengths: list[int],
    overflow: Any,
    separator: list[int],
    last: Any,
    window: int,
    min_fill: float,
    cuts: list[int],
) -> None:
    ds = source(lengths).pack(
        SEQ,
        mode="fit",
        overflow=overflow,
        separator=separator,
        last=last,
        window=window,
        min_fill=min_fill,
    )
    by_input = []
    for row, size in enumerate(lengths):
        found = reference_documents([0] * row + [size], overflow, separator)
        by_input.append(found[0] if found else [])
    expected = reference_fit(by_input, window, min_fill, last)
    assert run(ds) == expected
    assert cut_and_go_on(ds, cuts) == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, SEQ), max_size=60), st.integers(1, 20))
def test_fit_cuts_no_document_that_fits_and_loses_none(lengths: list[int], window: int) -> None:
    rows = run(source(lengths).pack(SEQ, mode="fit", window=window))
    found = [(int(first) // 1000, int(size)) for row in rows for first, size in pieces(row)[0]]
    assert sorted(found) == list(enumerate(lengths))
    assert all(int(first) % 1000 == 0 for row in rows for first, _ in pieces(row)[0])


def first_fit(lengths: list[int]) -> int:
    rows: list[int] = []
    for length in lengths:
        place = next((place for place, used in enumerate(rows) if used + length <= SEQ), len(rows))
        rows[place : place + 1] = [(rows[place] if place < len(rows) else 0) + length]
    return len(rows)


def test_best_fit_decreasing_needs_no_more_rows_than_first_fit() -> None:
    rng = np.random.default_rng(0)
    better = 0
    for _ in range(200):
        lengths = rng.integers(1, SEQ + 1, rng.integers(1, 60)).tolist()
        rows = best_fit(lengths, SEQ)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(sum(lengths[index] for index in row) <= SEQ for row in rows)
        assert -(-sum(lengths) // SEQ) <= len(rows) <= first_fit(lengths)
        better += len(rows) < first_fit(lengths)
    assert better > 50


def test_waiting_rows_save_padding_and_the_padding_is_told() -> None:
    lengths = np.random.default_rng(1).integers(1, SEQ, 600).tolist()
    waste = {}
    for min_fill in (0.0, 1.0):
        loader = ms.DataLoader(
            source(lengths).pack(SEQ, mode="fit", window=10, min_fill=min_fill), 4, lanes=1
        )
        batches = list(loader)
        slots = sum(batch["input_ids"].numel() for batch in batches)
        progress = loader.progress()
        assert progress.tokens == sum(lengths)
        assert progress.unattributed == {"padding tokens": slots - sum(lengths)}
        waste[min_fill] = slots - sum(lengths)
    assert waste[1.0] < 0.8 * waste[0.0]


# -- resume -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overflow": "truncate", "separator": 900},
        {"last": "drop"},
        {"mode": "fit", "window": 5},
        {"mode": "fit", "window": 7, "min_fill": 0.0, "overflow": "drop"},
    ],
    ids=str,
)
@pytest.mark.processes
def test_saved_at_every_pack_no_token_is_lost_or_repeated(
    options: dict[str, Any], workers: int
) -> None:
    ds = two(**options)

    def loader(num_workers: int) -> ms.DataLoader:
        return ms.DataLoader(ds, batch_size=1, lanes=2, num_workers=num_workers)

    made = loader(workers)
    batches, states = [], [through_json(made.state_dict())]
    counted: Counter[int] = Counter()
    for batch in made:
        batches.append(plain(batch))
        states.append(through_json(made.state_dict()))
        counted.update(token // 1_000_000 for token in tokens([batch]) if token != 900)
        assert sum(origin.tokens for origin in made.trace()) == len(tokens([batch]))
        if "separator" not in options:
            found = ms.progress(states[-1]).sources
            assert {name: found[name].tokens for name in found} == {
                "web": counted[0],
                "code": counted[1],
            }
    made.close()
    stream = tokens(batches)
    own = [token for token in stream if token != 900]
    assert len(set(own)) == len(own)
    if not options:
        assert len(own) == 2 * sum(HARD) + sum(HARD)
    total = ms.progress(states[-1])
    for step, state in enumerate(states[:-1]):
        if workers and step % 10:
            continue  # at every row without, now and then with worker processes
        resumed = loader(2 if step % 20 == 10 else 0)
        resumed.load_state_dict(state)
        rest = [plain(batch) for batch in resumed]
        assert rest == batches[step:], f"saved after row {step}"
        assert ms.progress(resumed.state_dict()).sources == total.sources
        assert ms.progress(resumed.state_dict()).unattributed == total.unattributed
        resumed.close()


def test_a_chain_of_resumes_counts_nothing_twice() -> None:
    ds = source(HARD * 3).pack(SEQ, mode="fit", window=6, overflow="truncate", last="drop")
    whole = ms.DataLoader(ds, batch_size=1, lanes=1)
    batches = [plain(batch) for batch in whole]
    state, found = None, []
    while len(found) < len(batches):
        part = ms.DataLoader(ds, batch_size=1, lanes=1)
        if state is not None:
            part.load_state_dict(state)
        found.append(plain(next(iter(part))))
        state = part.state_dict()
    assert found == batches
    assert ms.progress(state).to_dict() == whole.progress().to_dict()


@pytest.mark.parametrize("options", [{}, {"mode": "fit", "window": 7}], ids=str)
def test_data_that_changed_is_a_diverged_replay(options: dict[str, Any]) -> None:
    lengths = [5, 2, 6, 3, 7, 1, 4, 4, 5, 5, 3, 3] * 3
    ds = source(lengths).pack(SEQ, **options)
    first = SingleLaneIterator(ds.node, 0, 1, 0)
    for _ in range(5):
        next(first)
    state = first.state_dict()
    changed = source([size + 1 for size in lengths]).pack(SEQ, **options)
    assert changed.fingerprint == ds.fingerprint
    again = SingleLaneIterator(changed.node, 0, 1, 0)
    again.load_state_dict(state)
    with pytest.raises(
        ms.ReplayDiverged, match="pack: reading again gave other .* expected .* found"
    ):
        next(again)


def test_failures_and_empty_documents_before_a_row_are_not_read_again() -> None:
    ds = ms.from_dataset(
        [*documents(0, [0] * 500), {"input_ids": "bad"}, *documents(0, [3, 9])]
    ).pack(SEQ)
    whole = SingleLaneIterator(ds.node, 0, 1, 0)
    with pytest.raises(ms.SampleError):
        next(whole)
    state = whole.state_dict()["state"]
    assert (state["taken"], state["tokens"], state["source"][:1]) == (0, 0, [501])
    assert state["source"][1] < 16


def test_fit_holds_no_views_of_chunks() -> None:
    docs = documents(0, [3, 4, 5, 6, 7])
    views = [{"input_ids": doc["input_ids"][:]} for doc in docs]
    iterator = iter(ms.from_dataset(views).pack(SEQ, mode="fit", window=5, min_fill=0.0))
    next(iterator)
    held = [
        columns[0]
        for group in iterator._output.iterator.held.values()
        for columns, _, _, _ in group
    ]
    assert len(held) == 5
    assert not any(np.shares_memory(a, doc["input_ids"]) for a in held for doc in docs)


# -- counting -----------------------------------------------------------------------------------------------------------


def test_documents_too_long_and_empty_are_counted() -> None:
    lengths = [4, 0, 20, 8, 9, 0]
    expected = {
        "split": ({"split": 2}, 2, 41),
        "truncate": ({"tokens dropped": 13, "truncated": 2}, 2, 28),
        "drop": ({"tokens dropped": 29}, 4, 12),
    }
    for mode, (overflow, (counts, dropped, delivered)) in itertools.product(
        ("concat", "fit"), expected.items()
    ):
        loader = ms.DataLoader(
            source(lengths, name="docs").pack(SEQ, mode=mode, overflow=overflow), 2, lanes=1
        )  # type: ignore[arg-type]
        rows = list(loader)
        found = loader.progress().sources["docs"]
        assert (found.counts, found.dropped, found.tokens) == (counts, dropped, delivered)
        assert len(tokens(rows)) == delivered
        assert found.samples == len(lengths) - dropped
        assert found.epochs == 1.0
        assert all(f"{count} {kind}" in str(loader.progress()) for kind, count in counts.items())
        assert loader.progress().to_dict()["docs/tokens"] == delivered


def test_the_last_row_is_padded_or_dropped_and_counted() -> None:
    for mode in ("concat", "fit"):
        ds = source([8, 6, 5], name="docs")
        padded = run(ds.pack(SEQ, mode=mode))  # type: ignore[arg-type]
        loader = ms.DataLoader(ds.pack(SEQ, mode=mode, last="drop"), 1, lanes=1)  # type: ignore[arg-type]
        assert [plain(batch)["input_ids"][0] for batch in loader] == [
            row["input_ids"] for row in padded[:-1]
        ]
        found = loader.progress().sources["docs"]
        lost = {"concat": 3, "fit": 5}[mode]
        assert (found.tokens, found.counts) == (19 - lost, {"tokens dropped": lost})
        assert found.epochs == 1.0
        assert found.dropped == {"concat": 0, "fit": 1}[mode]


def test_trace_names_documents_pieces_and_tokens() -> None:
    loader = ms.DataLoader(source([3, 10, 2], name="docs").pack(4), 1, lanes=1)
    found = []
    for _ in loader:
        found.append([(origin.row, origin.part, origin.tokens) for origin in loader.trace()])
    assert found == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 4)], [(1, 2, 4)], [(1, 3, 1), (2, 0, 2)]]
    assert str(loader.trace()[0]) == "docs[1] part 3 (1 token)"
    assert loader.progress().sources["docs"].samples == 3


def test_origins_of_documents_that_are_made_of_several_rows() -> None:
    ds = ms.from_dataset([[1, 2], [3], [4, 5, 6]], name="docs").batch(
        2, collate_fn=lambda docs: sum(docs, [])
    )
    loader = ms.DataLoader(ds.pack(4), 1, lanes=1)
    found = [[tuple(origin) for origin in loader.trace()] for _ in loader]
    assert found == [
        [("docs", 0, 0, 0, 3), ("docs", 0, 1, 0, 0), ("docs", 0, 2, 0, 1)],
        [("docs", 0, 2, 1, 2)],
    ]
    assert loader.progress().sources["docs"].tokens == 6


def test_parts_of_parts_are_counted_once() -> None:
    ds = ms.from_dataset([[[1, 2, 3], [4]], [[5, 6, 7]]], name="docs").flat_map(list).pack(2)
    loader = ms.DataLoader(ds, 1, lanes=1)
    origins = [origin for _ in loader for origin in loader.trace()]
    assert len(set(origins)) == len(origins)
    found = loader.progress().sources["docs"]
    assert (found.samples, found.tokens, found.epochs) == (3, 7, 1.0)


def test_what_is_above_a_pack_does_not_count_its_tokens_twice() -> None:
    ds = source([4, 4, 4, 4], name="docs").pack(8).flat_map(lambda row: [row, row, row])
    loader = ms.DataLoader(ds, 2, lanes=1)
    for _ in loader:
        pass
    assert loader.progress().tokens == 16


# -- errors -------------------------------------------------------------------------------------------------------------

GOOD = {"input_ids": [1, 2, 3], "mask": [1, 1, 1]}


@pytest.mark.parametrize("mode", ["concat", "fit"])
@pytest.mark.parametrize(
    ("bad", "options", "message"),
    [
        ({"input_ids": [1, 2], "mask": [1]}, {"mask": "mask"}, "lengths 'input_ids' 2, 'mask' 1"),
        ({"input_ids": [1, 2]}, {"mask": "mask"}, "no 'mask'; it has .*input_ids"),
        ({"text": "hello"}, {}, "no 'input_ids'; it has .*text.* tokenized with .map"),
        ({"input_ids": "hello"}, {}, "token ids, one for each token; found str"),
        ({"input_ids": None}, {}, "found NoneType"),
        ({"input_ids": [[1, 2], [3, 4]]}, {}, r"found an array of int64 and shape \(2, 2\)"),
        ({"input_ids": [0.5, 1.0]}, {}, "found an array of float64"),
        ({"input_ids": [[1], [2, 3]]}, {}, "inhomogeneous"),
        (
            {"input_ids": [1] * 7},
            {"overflow": "error"},
            'has 7 tokens, and a row has 6; overflow="split"',
        ),
        ([1, 2], {"columns": ["mask"]}, "are of a dict; found a sample that is list"),
    ],
)
def test_an_unusable_document_is_one_lost_sample(
    mode: Any, bad: Any, options: dict[str, Any], message: str
) -> None:
    docs = [GOOD, GOOD, bad, GOOD, GOOD]
    ds = ms.from_dataset(docs, name="docs").pack(6, mode=mode, **options)
    whole = SingleLaneIterator(ds.node, 0, 1, 0)
    rows = []
    state = None
    while True:
        try:
            rows.append(plain(next(whole)))
        except StopIteration:
            break
        except ms.SampleError as error:
            assert error.origin == ms.Origin("docs", 0, 2)
            assert error.node == "pack"
            assert state is None
            state, before = through_json(whole.state_dict()), len(rows)
            with pytest.raises(ms.SampleError, match=message):
                raise
            assert "before .pack" in str(error) or "overflow=" in str(error)
    good = [doc for doc in docs if doc is not bad]
    assert rows == run(ms.from_dataset(good).pack(6, mode=mode, **options))
    assert state is not None
    resumed = SingleLaneIterator(ds.node, 0, 1, 0)
    resumed.load_state_dict(state)
    assert [plain(row) for row in resumed] == rows[before:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len is at least 1"),
        ({"mode": "first_fit"}, "mode is one of 'concat', 'fit'"),
        ({"overflow": "raise"}, "overflow is one of"),
        ({"last": "keep"}, "last is one of"),
        ({"separator": range(8)}, "leaves no room in 8"),
        ({"separator": -1}, "separator is at least 0"),
        ({"columns": ["labels"]}, "'labels' is a column that pack makes.*mask="),
        ({"columns": ["input_ids"]}, "different names"),
        ({"columns": ["m"], "mask": "m"}, "different names"),
        ({"window": 5}, 'for mode="fit"'),
        ({"mode": "fit", "window": 5000}, "at most 1,024"),
        ({"mode": "fit", "min_fill": 95}, "a fraction of seq_len"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source([1]).pack(**{"seq_len": SEQ, **options})


def test_an_endless_input_of_which_nothing_is_left_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("midstream.pipeline.patience.MAX_FRUITLESS", 100)
    for options in ({}, {"mode": "fit"}):
        with pytest.raises(ms.SourceError, match="100 documents in a row"):
            next(iter(source([0, 20]).repeat().pack(SEQ, overflow="drop", **options)))


def test_options_are_part_of_the_fingerprint() -> None:
    made = [
        source([1]).pack(SEQ, **options)
        for options in (
            {},
            {"overflow": "drop"},
            {"columns": ["a"]},
            {"mask": "a"},
            {"separator": 1},
            {"separator": [1, 1]},
            {"pad_id": 1},
            {"last": "drop"},
            {"key": "ids"},
            {"mode": "fit"},
            {"mode": "fit", "window": 9},
            {"mode": "fit", "min_fill": 0.5},
        )
    ]
    assert len({ds.fingerprint for ds in made}) == len(made)
    assert source([1]).pack(SEQ, mode="fit", window=256) == source([1]).pack(SEQ, mode="fit")
    assert (
        repr(made[4]).splitlines()[0].partition("  # ")[0].rstrip()
        == "pack(seq_len=8, mode='concat', separator=[1])"
    )


# -- attention ----------------------------------------------------------------------------------------------------------


def packed() -> dict[str, torch.Tensor]:
    return next(iter(source([3, 9, 1, 5, 8, 2, 6]).pack(SEQ, mode="fit").batch(9)))


def test_no_token_attends_to_another_document_or_a_later_token() -> None:
    batch = packed()
    mask = ms.document_mask(batch["seq_lens"], SEQ)
    dense = mask.dense()
    assert dense.shape == (len(batch["input_ids"]), 1, SEQ, SEQ)
    document = batch["input_ids"] // 1000
    for row, q, kv in itertools.product(range(len(dense)), range(SEQ), range(SEQ)):
        real = batch["seq_lens"][row].sum()
        same = (q < real) == (kv < real) and (q >= real or document[row, q] == document[row, kv])
        assert bool(dense[row, 0, q, kv]) == (bool(same) and q >= kv), (row, q, kv)
    assert (mask.document_ids == -1).sum() == batch["input_ids"].numel() - batch["seq_lens"].sum()


def test_attention_over_a_packed_batch_is_attention_over_each_document() -> None:
    batch = packed()
    mask = ms.document_mask(batch["seq_lens"], batch["input_ids"].shape[-1])
    generator = torch.Generator().manual_seed(0)
    shape = (len(batch["input_ids"]), 2, SEQ, 4)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense())
    # The rows end to end, as attention kernels for variable lengths take them.
    flat = [x.transpose(1, 2).reshape(-1, 2, 4) for x in (q, k, v)]
    bounds = mask.cu_seqlens.tolist()
    assert bounds[-1] == batch["input_ids"].numel()
    assert mask.max_seqlen == max(b - a for a, b in zip(bounds, bounds[1:]))
    alone = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1)[None] for x in flat), is_causal=True
        )[0].transpose(0, 1)
        for a, b in zip(bounds, bounds[1:])
    ]
    expected = torch.cat(alone).reshape(shape[0], SEQ, 2, 4).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_positions_restart_where_documents_do() -> None:
    batch = packed()
    starts = ms.document_mask(batch["seq_lens"], SEQ).cu_seqlens[:-1].tolist()
    assert torch.nonzero(batch["position_ids"].reshape(-1) == 0).reshape(-1).tolist() == starts


def test_the_mask_function_is_one_that_flex_attention_takes() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    batch = packed()
    mask = ms.document_mask(batch["seq_lens"], SEQ)
    size = len(batch["input_ids"])
    found = flex.create_mask(mask.mask_mod, size, None, SEQ, SEQ, device="cpu")
    assert torch.equal(found, mask.dense())
    block = flex.create_block_mask(mask.mask_mod, size, None, SEQ, SEQ, device="cpu")
    assert block.shape == (size, 1, SEQ, SEQ)


def test_document_masks_of_one_row_of_lists_and_of_full_rows() -> None:
    whole = ms.document_mask(torch.tensor([[3, 5], [8, 0]], dtype=torch.int32))
    for lengths in ([[3, 5], [8]], [np.array([3, 5]), np.array([8])], np.array([[3, 5], [8, 0]])):
        mask = ms.document_mask(lengths)
        assert torch.equal(mask.document_ids, whole.document_ids)
        assert torch.equal(mask.cu_seqlens, whole.cu_seqlens)
        assert mask.cu_seqlens.dtype == torch.int32
    one = ms.document_mask([3, 5])
    assert torch.equal(one.document_ids, whole.document_ids[:1])


@pytest.mark.parametrize(
    ("lengths", "size", "message"),
    [
        ([[3, 5], [7]], None, "7 to 8 tokens.*give seq_len="),
        ([3, 6], 8, "9 tokens, more than seq_len=8"),
        ([], None, "lengths of documents"),
        ([[0]], None, "lengths of documents"),
        ([3, -1], None, "lengths of documents"),
        ([3], 0, "seq_len is at least 1"),
    ],
)
def test_document_mask_refuses_what_are_no_lengths(lengths: Any, size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ms.document_mask(lengths, size)
