"""interleave: closed forms against a reading step by step, tokens, schedules, max_epochs, frozen orders."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.dataset import Dataset
from midstream.nodes.mix.interleave import Interleave
from midstream.pipeline.single_lane import SingleLaneIterator
from tests.helpers.loaders import through_json
from tests.helpers.mixes import KINDS, NAMES, cluster, flat, keep, mixed, source, tokens

STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")


GOLDEN = Path(__file__).parent.parent / "golden" / "mixing-1.json"


mixes = st.integers(1, 4).flatmap(
    lambda k: st.tuples(
        st.lists(st.integers(0, 25), min_size=k, max_size=k),
        st.lists(
            st.tuples(
                st.integers(1, 30),
                st.lists(st.sampled_from([1, 1, 2, 0, 5]), min_size=k, max_size=k).filter(any),
            ),
            min_size=1,
            max_size=4,
        ),
    )
)


def step_by_step(
    ds: Dataset, lengths: list[int], lane: int | None = None, share: Any = int
) -> list[tuple[int, int]]:
    """What a mix gives by its definition: dataset and row, counted over its passes."""
    mix = ds.node
    assert isinstance(mix, Interleave)
    strategy = mix.stopping_strategy
    k, out, taken, phase = len(lengths), [], [0] * len(lengths), 0
    borders = [share(border) for border, _ in mix.phases]
    weights = [[weight for _, weight in pairs] for _, pairs in mix.phases]
    pick = 0
    while True:
        gone = [taken[c] >= lengths[c] for c in range(k)]
        while phase + 1 < len(borders) and len(out) >= borders[phase + 1]:
            phase, pick = phase + 1, 0
        here = [c for c in range(k) if weights[phase][c]]
        to_come = [c for c in range(k) if any(w[c] for w in weights[phase:])]
        if strategy == "first_exhausted" and any(gone[c] for c in here):
            return out
        if strategy != "first_exhausted" and all(gone[c] for c in to_come):
            return out
        if strategy == "all_exhausted_without_replacement" and all(gone[c] for c in here):
            if phase + 1 == len(borders):
                return out
            phase, pick = phase + 1, 0
            continue
        picks = mix.picks(phase)
        block, inside = divmod(pick, picks.block)
        chosen = int(picks.of(int(picks.choose(block, 0 if lane is None else 1 + lane)[0]))[inside])
        pick += 1
        if strategy == "all_exhausted_without_replacement" and gone[chosen]:
            continue
        out.append((chosen, taken[chosen]))
        taken[chosen] += 1
        if strategy == "all_exhausted" and len(out) > 3000:
            return out


def _make(
    lengths: list[int], steps: list[tuple[int, list[int]]], strategy: Any, seed: int, stream: bool
) -> Dataset:
    names = [f"s{c}" for c in range(len(lengths))]
    borders = [0, *itertools.accumulate(length for length, _ in steps[:-1])]
    plan = ms.schedule(
        [(border, dict(zip(names, weights))) for border, (_, weights) in zip(borders, steps)]
    )
    parts: dict[str, Dataset] = {
        name: ms.from_dataset([100 * c + row for row in range(length)], name=name)
        for c, (name, length) in enumerate(zip(names, lengths))
    }
    if stream:
        parts = {name: part.filter(lambda row: True) for name, part in parts.items()}
    return ms.interleave(parts, plan, seed=seed, stopping_strategy=strategy)


@settings(max_examples=250, deadline=None)
@given(mixes, st.sampled_from(STRATEGIES), st.integers(0, 20))
def test_a_schedule_by_position_is_its_reading_step_by_step(
    made: Any, strategy: Any, seed: int
) -> None:
    lengths, steps = made
    mix = _make(lengths, steps, strategy, seed, stream=False)
    if strategy == "all_exhausted" and any(
        length == 0 and any(weights[c] for _, weights in steps) for c, length in enumerate(lengths)
    ):
        with pytest.raises(ValueError, match="has no rows"):
            len(mix)
        return
    expected = step_by_step(mix, lengths)
    assert len(mix) == len(expected)
    assert list(mix) == [100 * c + row % max(1, lengths[c]) for c, row in expected]
    layout = mix.node.layout()
    for position in range(0, len(expected) + 1, 7):
        counts = Counter(c for c, _ in expected[:position])
        assert layout.counts(position).tolist() == [counts[c] for c in range(len(lengths))]


@settings(max_examples=150, deadline=None)
@given(mixes, st.integers(0, 20), st.sampled_from([(0, 1), (1, 3), (0, 2)]))
def test_a_schedule_of_streams_is_its_reading_step_by_step_in_every_lane(
    made: Any, seed: int, lane: tuple[int, int]
) -> None:
    lengths, steps = made
    mix = _make(lengths, steps, "all_exhausted_without_replacement", seed, stream=True)
    index, lanes = lane
    own = [
        [100 * c + row for row in range(index, length, lanes)] for c, length in enumerate(lengths)
    ]
    expected = step_by_step(
        mix, list(map(len, own)), index, lambda border: border // lanes + (index < border % lanes)
    )
    assert list(SingleLaneIterator(mix.node, index, lanes, 0)) == [
        own[c][row] for c, row in expected
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=30), min_size=1, max_size=5),
    st.lists(st.integers(1, 9), min_size=5, max_size=5),
    st.integers(0, 9),
    st.integers(0, 4),
)
def test_by_tokens_the_source_furthest_behind_comes_next(
    sizes: list[list[int]], weights: list[int], seed: int, lane: int
) -> None:
    names = [f"s{c}" for c in range(len(sizes))]
    parts = {
        name: ms.from_dataset([(c, size) for size in sizes[c]], name=name)
        for c, name in enumerate(names)
    }
    mix = ms.interleave(
        parts, dict(zip(names, weights)), seed=seed, weights_by=lambda sample: sample[1]
    )
    given, total = np.zeros(len(sizes)), sum(weights[: len(sizes)])
    shares = np.array(weights[: len(sizes)]) / total
    longest = [max(size) for size in sizes]
    found = list(SingleLaneIterator(mix.node, 0, 1, lane))
    for c, size in found:
        behind = shares * given.sum() - given
        assert behind[c] == behind.max()
        given[c] += size
        assert (given - shares * given.sum() <= np.array(longest) + 1e-6).all()
    left = Counter(c for c, _ in found)
    assert any(
        left[c] == len(size) for c, size in enumerate(sizes)
    )  # it ended because one had run out


@pytest.mark.parametrize("lanes", [4])
def test_short_and_long_documents_are_mixed_by_tokens(lanes: int) -> None:
    """1:1 between documents of 50 and of 5,000 tokens, nine of ten of one dropped by its own
    filter.
    """
    short = ms.from_dataset(range(60_000), name="short").filter(lambda row: row // 4 % 10 == 0)
    long = ms.from_dataset(range(100_000, 100_080), name="long")
    mix = ms.interleave(
        {"short": short, "long": long}, weights_by=lambda row: 5000 if row >= 100_000 else 50
    )
    runs = [SingleLaneIterator(mix.node, lane, lanes, 0) for lane in range(lanes)]
    total = np.zeros(2)
    given = np.zeros((lanes, 2))
    documents = 0
    for step in range(1000):
        for lane, run in enumerate(runs):
            row = next(run)
            kind = int(row >= 100_000)
            given[lane, kind] += (50, 5000)[kind]
            total[kind] += (50, 5000)[kind]
            documents += 1
            if step >= 20:
                assert abs(given[lane, 0] - given[lane].sum() / 2) <= 5000
            if documents > 20 * lanes:
                assert abs(total[0] - total.sum() / 2) <= 4 * 5000
    assert given[:, 1].min() >= 5 * 5000


def test_what_cannot_be_counted_is_one_failed_sample() -> None:
    parts = {"web": ms.from_dataset([3, -1, 2, 5]), "code": ms.from_dataset([1, 1, 1, 1, 1, 1])}
    run = SingleLaneIterator(
        ms.interleave(
            parts, weights_by=lambda row: row, stopping_strategy="all_exhausted_without_replacement"
        ).node,
        0,
        1,
        0,
    )
    found, errors = [], 0
    while True:
        try:
            found.append(next(run))
        except ms.SampleError as error:
            errors += 1
            assert "whole numbers of at least 0" in str(error)
        except StopIteration:
            break
    assert (sorted(found), errors) == ([1, 1, 1, 1, 1, 1, 2, 3, 5], 1)


def test_a_column_may_be_counted_by_its_length() -> None:
    short = ms.from_dataset([{"text": "ab"} for _ in range(50)])
    long = ms.from_dataset([{"text": "abcdefghij"} for _ in range(50)])
    found = list(ms.interleave({"short": short, "long": long}, weights_by="text"))[:36]
    assert Counter(len(sample["text"]) for sample in found) == {2: 30, 10: 6}


PLAN = [(0, {"web": 7, "code": 3}), (100, {"web": 1, "code": 1}), (190, {"web": 1, "code": 9})]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_schedule_crossing_its_border_in_a_batch_resumes_around_it(kind: str) -> None:
    """100 is in the middle of batch 33 (and of a lane's batch, on streams): before, on and after
    it, other topologies.
    """
    by_tokens = kind in ("tokens", "buffered")
    plan = ms.schedule(
        [(20 * border if by_tokens else border, weights) for border, weights in PLAN]
    )
    pipeline = mixed(kind, plan)
    whole = cluster(pipeline, 1, 0)
    whole.run()
    reference = whole.sequence
    for step in (0, 15, 16, 17, 22, 31, 33, 34):
        first = cluster(pipeline, 2, 1)
        first.run(step)
        second = cluster(pipeline, 3, 2, first.states())
        second.run(1)
        third = cluster(pipeline, 1, 3, second.states())
        third.run(14)
        found = first.sequence + second.sequence + third.sequence
        assert len(found) == 2 * step + 17
        assert found == reference[: len(found)], f"resumed after step {step}"
    if kind == "rows":
        shares = [
            sum(row < 10_000 for row in flat(reference)[a:b]) for a, b in ((0, 100), (100, 190))
        ]
        assert shares == [70, 45]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["rows", "tokens"])
@pytest.mark.processes
def test_a_schedule_resumes_with_real_workers_at_every_batch_around_its_border(
    kind: str, workers: int
) -> None:
    pipeline = mixed(
        kind, ms.schedule([(0, {"web": 7, "code": 3}), (23, {"web": 1, "code": 9})]), rows=40
    )
    reference = list(ms.DataLoader(pipeline, lanes=4))
    loader = ms.DataLoader(pipeline, lanes=4, num_workers=workers)
    states = [loader.state_dict(), *(loader.state_dict() for _ in loader)]
    resumed = ms.DataLoader(pipeline, num_workers=2 - workers)
    for step in (6, 7, 8):
        resumed.load_state_dict(states[step])
        assert list(resumed) == reference[step:]


def breaks(row: int) -> int:
    raise ValueError(row)


def counts_nothing(kind: str) -> Dataset:
    """Web fails, is filtered or counts 0, in all its rows or (code's first pass apart) after a
    while; code is 12 rows.
    """
    web = source(0, 7).shuffle(1).filter(lambda row: kind != "filtered")
    if kind in ("failing", "failing by position"):
        web = (source(0, 7) if kind == "failing by position" else web).map(
            breaks, on_error="skip", max_errors=99
        )
    by = breaks if kind == "uncountable" else lambda row: 0
    mix = ms.interleave(
        {"web": web, "code": source(1, 12).filter(lambda row: True)},
        {"web": 3, "code": 1},
        weights_by=lambda row: 2 if row >= 10_000 else by(row),
        stopping_strategy="all_exhausted",
    )
    return mix.batch(2, collate_fn=tuple)


@pytest.mark.parametrize("kind", ["failing", "failing by position", "filtered", "zero"])
@pytest.mark.parametrize("lanes", [1, 4])
def test_what_counts_nothing_in_a_whole_pass_does_not_start_over(kind: str, lanes: int) -> None:
    """Else it would be furthest below its share for ever, and the mix would never end."""
    loader = ms.DataLoader(counts_nothing(kind), lanes=lanes)
    states = [loader.state_dict()]
    batches = []
    for batch in itertools.islice(loader, 50):
        batches.append(batch)
        states.append(loader.state_dict())
    assert loader.epoch == 1  # it ended
    rows = Counter(flat(batches))
    assert {row for row in rows if row >= 10_000} == set(range(10_000, 10_012))
    assert all(count == 1 for count in rows.values())
    assert {row for row in rows if row < 10_000} == (set(range(7)) if kind == "zero" else set())
    for done, state in enumerate(states[:-1]):
        again = ms.DataLoader(counts_nothing(kind), lanes=lanes)
        again.load_state_dict(through_json(state))
        assert list(again) == batches[done:]
        assert again.state_dict() == states[-1]


def test_what_can_never_be_counted_fails_once_each_and_the_mix_ends() -> None:
    run, errors, found = SingleLaneIterator(counts_nothing("uncountable").node, 0, 1, 0), 0, []
    while errors <= 7:
        try:
            found.append(next(run))
        except ms.SampleError:
            errors += 1
        except StopIteration:
            break
    assert (errors, sorted(flat(found))) == (7, list(range(10_000, 10_012)))


@pytest.mark.parametrize(
    "weights", [[2, 1], [2], [], (0.7, 0.3), np.array([2, 1]), 2, "web", [("web", 2), ("code", 1)]]
)
def test_weights_without_names_are_refused_for_what_they_are(weights: Any) -> None:
    with pytest.raises(
        TypeError, match=r"interleave takes weights by name.*\{'web': 1, 'code': 1\}.*found "
    ):
        ms.interleave({"web": source(0, 9), "code": source(1, 9)}, weights)
    with pytest.raises(TypeError, match="interleave takes datasets by name.*found list"):
        ms.interleave([source(0, 9), source(1, 9)], weights)  # type: ignore[arg-type]


def test_weights_of_other_names_are_told_whatever_the_names_are() -> None:
    with pytest.raises(ValueError, match=r"expected \['code', 'web'\], found \[0, 'web'\]"):
        ms.interleave({"web": source(0, 9), "code": source(1, 9)}, {"web": 1, 0: 2})  # type: ignore[dict-item]


@pytest.mark.parametrize("stream", [False, True])
def test_passes_nested_too_deep_are_refused_before_anything_is_read(stream: bool) -> None:
    """They are numbered in 64 bits: one more factor, and it was an epoch in the middle of a run
    that could not be read.
    """

    def part(k: int) -> Dataset:
        data = source(k, 3 + k)
        return data.filter(lambda row: True) if stream else data

    two = ms.interleave({"web": part(0), "code": part(1)}, stopping_strategy="all_exhausted")
    inner = ms.interleave(
        {"inner": two, "math": part(2)}, stopping_strategy="all_exhausted", name="outer"
    )
    for pipeline in (inner.repeat(2).repeat(), inner.repeat(1 << 7)):
        if stream:
            path = "repeat > outer > inner/interleave: endless passes"
            with pytest.raises(
                ValueError,
                match=path.replace("repeat >", "repeat#2 > repeat >")
                if pipeline.node.infinite
                else path,
            ):
                ms.DataLoader(pipeline, batch_size=2, lanes=1)
        else:  # by position it is known how many passes there are
            assert next(iter(ms.DataLoader(pipeline, batch_size=None))) >= 0
    deepest = ms.DataLoader(inner.repeat(1 << 6), batch_size=2, lanes=1)
    deepest.set_epoch((1 << 16) - 1)
    assert len(list(itertools.islice(deepest, 40))) == 40


def _planned(phases: Any, strategy: Any) -> Dataset:
    parts = {"web": source(0, 20).shuffle(1), "code": source(1, 12)}
    return ms.interleave(parts, ms.schedule(phases), name="mix", stopping_strategy=strategy)


def _one_after_the_other(mix: Dataset, part: str, batched: bool) -> Any:
    """The mix between two others, batch by batch across their borders or each in batches of its
    own.
    """
    part_ = {"mix": mix, "map": mix.map(int), "take": mix.take(9), "skip": mix.skip(4)}[part]
    parts = [
        ms.from_dataset(range(-7, 0), name="before"),
        part_,
        ms.from_dataset(range(90_000, 90_011), name="after"),
    ]
    if batched:
        return ms.DataLoader(ms.concatenate([each.batch(2, collate_fn=tuple) for each in parts]))
    return ms.DataLoader(ms.concatenate(parts), batch_size=3, collate_fn=tuple)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["mix", "map", "take", "skip"]),
    st.booleans(),
    st.sampled_from(STRATEGIES),
    st.lists(
        st.tuples(st.integers(0, 14), st.sampled_from([(1, 1), (1, 9), (5, 0)])),
        min_size=1,
        max_size=3,
    ),
)
def test_below_concatenate_weights_change_as_a_schedule_says(
    part: str, batched: bool, strategy: Any, changes: list[tuple[int, tuple[int, int]]]
) -> None:
    """From the first row of the mix that was not delivered; when there is none, in the next epoch."""
    plan: list[tuple[int, dict[str, int]]] = [(0, {"web": 2, "code": 1})]
    loader = _one_after_the_other(_planned(plan, strategy), part, batched)
    loop, got = iter(loader), []
    for steps, (web, code) in changes:
        got += itertools.islice(loop, steps)
        if loader.epoch:
            break
        given = sum(0 <= row < 90_000 for row in flat(got)) + 4 * (part == "skip")
        weights = {"web": web, "code": code}
        loader.set_weights("mix", weights)
        if given < len(_planned(plan, strategy)):
            plan = [*(phase for phase in plan if phase[0] < given), (given, weights)]
    got += loop
    assert got == list(_one_after_the_other(_planned(plan, strategy), part, batched))
    last = ms.weights_history(loader.state_dict())[-1]["weights"]
    expected = _one_after_the_other(
        _planned([(0, last if isinstance(last, dict) else plan[0][1])], strategy), part, batched
    )
    expected.set_epoch(1)
    assert list(loader) == list(expected)


def test_max_epochs_end_the_mix_or_share_the_weight() -> None:
    parts = {"web": source(0, 20).shuffle(1), "code": source(1, 30), "math": source(2, 50)}
    for stream in (False, True):
        made = {
            name: part.filter(lambda row: True) if stream else part for name, part in parts.items()
        }
        stop = list(ms.interleave(made, {"web": 2, "code": 1, "math": 1}, max_epochs={"web": 2}))
        assert sorted(row for row in stop if row < 10_000) == sorted([*range(20), *range(20)])
        assert stop[:10] != stop[20:30]
        share = list(
            ms.interleave(
                made,
                {"web": 2, "code": 1, "math": 1},
                max_epochs={"web": 1, "code": 2, "math": 1},
                then="share",
            )
        )
        assert Counter(row // 10_000 for row in share) == {0: 20, 1: 60, 2: 50}
        alone = share[45:100]  # web is through after 20 of 40: the others have equal weights
        assert abs(sum(row >= 20_000 for row in alone) - len(alone) / 2) <= 3
        endless = ms.interleave(made, max_epochs={"web": 1}, then="share")
        assert Counter(row // 10_000 for row in itertools.islice(iter(endless), 500))[0] == 20
        with pytest.raises(TypeError, match="no end|only by reading"):
            len(endless)


def test_a_lane_without_rows_of_what_ends_the_mix_ends() -> None:
    for by in (None, tokens):
        mix = ms.interleave(
            {"web": source(0, 5).filter(keep), "code": source(1, 30).filter(keep)},
            max_epochs={"web": 2},
            weights_by=by,
        )
        found = Counter(flat(ms.DataLoader(mix, batch_size=3, lanes=12, collate_fn=tuple)))
        assert all(found[row] == 2 for row in range(5) if keep(row))


def test_max_epochs_that_contradict_are_refused() -> None:
    parts = {"web": source(0, 20), "code": source(1, 30)}
    with pytest.raises(ValueError, match="takes no stopping_strategy"):
        ms.interleave(parts, max_epochs=2, stopping_strategy="all_exhausted")
    with pytest.raises(ValueError, match="names of the datasets"):
        ms.interleave(parts, max_epochs={"wet": 2})
    with pytest.raises(ValueError, match="at least 1; found 0"):
        ms.interleave(parts, max_epochs=0)
    with pytest.raises(ValueError, match="'web' never ends"):
        ms.interleave({**parts, "web": parts["web"].repeat()}, max_epochs=2)
    with pytest.raises(ValueError, match="then= says what follows max_epochs"):
        ms.interleave(parts, then="stop")


@pytest.mark.parametrize(
    ("phases", "error"),
    [
        ([], TypeError),
        ({0: {"a": 1}}, TypeError),
        ([(0, 1)], TypeError),
        ([(0.5, {"a": 1})], TypeError),
        ([(1, {"a": 1})], ValueError),
        ([(0, {"a": 1}), (0, {"a": 1})], ValueError),
        ([(0, {"a": 1}), (9, {"a": 1}), (5, {"a": 1})], ValueError),
    ],
)
def test_schedules_that_are_none_are_refused(phases: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="schedule"):
        ms.schedule(phases)
    with pytest.raises(ValueError, match="names of the datasets"):
        ms.interleave({"a": source(0, 5)}, ms.schedule([(0, {"a": 1}), (9, {"b": 1})]))


@pytest.mark.parametrize("by", [None, tokens])
def test_states_of_a_hundred_sources_stay_within_their_bound(by: Any) -> None:
    names = [f"source{index:03d}" for index in range(100)]
    weights = {name: 1 + index for index, name in enumerate(names)}
    plan = ms.schedule([(0, weights), (5000, dict.fromkeys(names, 1))])
    parts: dict[str, Dataset] = {
        name: ms.from_dataset(range(10_000 * index, 10_000 * index + 5000), name=name).shuffle(
            index
        )
        for index, name in enumerate(names)
    }
    if by is None:
        parts = {name: part.filter(keep) for name, part in parts.items()}
    loader = ms.DataLoader(ms.interleave(parts, plan, weights_by=by), batch_size=64, lanes=2)
    iterator = iter(loader)
    for _ in range(150):
        next(iterator)
    loader.set_weights("interleave", weights)
    for _ in range(10):
        next(iterator)
    for text in loader.state_dict()["lanes"].values():
        lane = json.loads(text)["lane"]
        assert len(json.dumps(lane, separators=(",", ":"))) <= 1024 + 64 * 100


def _orders() -> dict[str, Any]:
    plan = ms.schedule(
        [(0, {"web": 6, "code": 3, "math": 1}), (40, {"web": 1, "code": 1, "math": 1})]
    )
    parts: dict[str, Dataset] = {
        name: source(k, 60 * (k + 1)).shuffle(1) for k, name in enumerate(NAMES)
    }
    streams: dict[str, Dataset] = {name: part.filter(keep) for name, part in parts.items()}
    edited = ms.DataLoader(ms.interleave(parts, plan, name="mix"), batch_size=4, collate_fn=list)
    lanes = ms.DataLoader(
        ms.interleave(streams, plan, name="mix"), batch_size=4, collate_fn=list, lanes=2
    )

    def first(ds: Dataset, lane: int = 0, lanes: int = 1) -> list[Any]:
        return list(itertools.islice(SingleLaneIterator(ds.node, lane, lanes, 0), 80))

    def after(loader: Any) -> list[Any]:
        found = []
        for number, batch in enumerate(loader):
            found.append(batch)
            if number == 5:
                loader.set_weights("mix", {"web": 1, "code": 0, "math": 3})
            if number == 15:
                break
        return found

    return {
        "schedule": first(ms.interleave(parts, plan, seed=1)),
        "schedule of streams, lane 1 of 2": first(ms.interleave(streams, plan, seed=1), 1, 2),
        "by tokens": first(
            ms.interleave(parts, {"web": 5, "code": 3, "math": 1}, weights_by=tokens)
        ),
        "by tokens with a schedule, lane 2 of 3": first(
            ms.interleave(streams, plan, weights_by=tokens, seed=2), 2, 3
        ),
        "max_epochs": first(
            ms.interleave(parts, max_epochs={"web": 1, "code": 1, "math": 1}, then="share")
        ),
        "set_weights": after(edited),
        "set_weights on streams": after(lanes),
    }


def test_the_orders_are_those_that_were_released() -> None:
    assert json.loads(json.dumps(_orders())) == json.loads(GOLDEN.read_text())


if __name__ == "__main__" and "--write" in sys.argv:
    GOLDEN.write_text(
        "{\n"
        + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in _orders().items())
        + "\n}\n"
    )
