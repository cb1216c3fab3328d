"""Orders: frozen for ever, uniform where they claim to be, and close to the asked shares after every prefix.

An order, once released, never changes within a format version: the values under golden/ are a
promise to everyone who has a checkpoint. ``python -m tests.promises.test_orders`` writes them anew, which is
a new format version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.common.randomness import (
    draw,
    fold,
    fold_array,
    generator,
    mix,
    mix_array,
    pass_key,
    permute,
    uniform32,
)
from midstream.pipeline.single_lane import SingleLaneIterator

GOLDEN = Path(__file__).parent.parent / "golden" / "format-1.json"


def key(value: int) -> Any:
    return np.array([value], dtype=np.uint64)


def lane(
    ds: ms.Dataset, index: int = 0, count: int = 1, epoch: int = 0, first: int = 64
) -> list[int]:
    return [
        int(sample)
        for _, sample in zip(range(first), SingleLaneIterator(ds.node, index, count, epoch))
    ]


def orders() -> dict[str, Any]:
    numbers = ms.from_dataset(range(5000))
    mixed = {
        name: ms.from_dataset(range(start, start + 1000))
        for name, start in (("a", 0), ("b", 10_000), ("c", 20_000))
    }
    weights = {"a": 7, "b": 2, "c": 1}
    streams = {name: part.filter(lambda x: True) for name, part in mixed.items()}
    return {
        "mix": [mix(value) for value in (0, 1, 2**63)],
        "fold": [fold(), fold(1), fold(1, 2), fold(-1, 2**64 - 1, 5)],
        "uniform32": uniform32(7, 1000, 8).tolist(),
        "generator": generator(1, 2, 3).integers(0, 2**32, 4).tolist(),
        "permute 100": permute(np.arange(64), 100, 5, key(0)).tolist(),
        "permute 1e6": permute(np.arange(64), 10**6, 5, key(3)).tolist(),
        "permute 1e12": permute(np.arange(8), 10**12, 5, key(3)).tolist(),
        "shuffle": lane(numbers.shuffle(3)),
        "shuffle, epoch 2": lane(numbers.shuffle(3), epoch=2),
        "shuffle, repeated": lane(ms.from_dataset(range(40)).shuffle(3).repeat(2)),
        "buffered shuffle": lane(numbers.shuffle(3, buffer_size=48)),
        "buffered shuffle, lane 5 of 48": lane(numbers.shuffle(3, buffer_size=960), 5, 48),
        "interleave": lane(ms.interleave(mixed, weights, seed=1)),
        "interleave, large block": lane(
            ms.interleave(mixed, {"a": 0.123456789, "b": 0.5, "c": 0.3}, seed=1)
        ),
        "interleave of streams, lane 1 of 3": lane(ms.interleave(streams, weights, seed=1), 1, 3),
        "map with rng": [
            round(x, 12)
            for x in ms.from_dataset(range(8)).map(lambda x, rng: rng.random(), with_rng=True)
        ],
    }


def test_orders_are_those_that_were_released() -> None:
    golden = json.loads(GOLDEN.read_text())
    found = orders()
    assert set(found) == set(golden)
    for name, values in golden.items():
        assert found[name] == values, name


# -- hashes and permutations ---------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_one_value_and_an_array_hash_alike(a: int, b: int) -> None:
    assert mix(a) == int(mix_array(key(a))[0])
    assert fold(a, b) == int(fold_array(fold(a), key(b))[0])
    assert fold(a, 3) == int(draw(fold(a), 3, 1)[0])


def test_pass_zero_keeps_its_key() -> None:
    keys = pass_key(key(9), np.array([0, 1, 0, 2]))
    assert keys[0] == keys[2] == 9
    assert len(set(keys.tolist())) == 3
    assert pass_key(key(9), np.array([0, 0])) is not None


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**63), 2**64), st.integers(0, 2**64 - 1))
def test_a_permutation_meets_every_row_once(length: int, seed: int, pass_: int) -> None:
    assert sorted(permute(np.arange(length), length, seed, key(pass_)).tolist()) == list(
        range(length)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([5, 200, 257, 1000, 10**9]),
    st.lists(st.integers(0, 4), min_size=2, max_size=40),
    st.randoms(),
)
def test_passes_in_one_call_are_those_of_calls_of_their_own(
    length: int, passes: list[int], rng: Any
) -> None:
    positions = np.array([rng.randrange(length) for _ in passes])
    together = permute(positions, length, 7, np.array(passes, dtype=np.uint64))
    assert together.tolist() == [
        int(permute(positions[i : i + 1], length, 7, key(p))[0]) for i, p in enumerate(passes)
    ]


def sigmas(counts: Any, expected: float, freedom: int) -> float:
    """How far a chi-square statistic is from its mean, in standard deviations."""
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("length", [3, 10, 64, 256, 257, 300])
@pytest.mark.slow
def test_every_row_is_equally_likely_at_every_position(length: int) -> None:
    rounds = 4000
    counts = np.zeros((length, length))
    neighbours = np.zeros(length)
    for seed in range(rounds):
        order = permute(np.arange(length), length, fold(seed), key(1))
        counts[np.arange(length), order] += 1
        neighbours[(order[1] - order[0]) % length] += 1
    assert abs(sigmas(counts, rounds / length, (length - 1) ** 2)) < 5
    assert abs(sigmas(neighbours[1:], rounds / (length - 1), max(1, length - 2))) < 5


@pytest.mark.parametrize("length", [100, 5000])
def test_seeds_epochs_and_places_have_unrelated_orders(length: int) -> None:
    source = ms.from_dataset(range(length))
    two = ms.interleave({"a": source.shuffle(1), "b": source.shuffle(1)})
    both = [int(row) for row in two]
    many = [
        lane(source.shuffle(1), first=length),
        lane(source.shuffle(2), first=length),
        lane(source.shuffle(1), epoch=1, first=length),
        lane(source.shuffle(1).shuffle(1), first=length),
    ]
    from midstream.pipeline.iterator import Lane
    from midstream.pipeline.ledger import Ledger
    from midstream.pipeline.node import bind
    from midstream.pipeline.rows import as_origin_array
    from midstream.pipeline.single_lane import LaneOutput

    delivery = LaneOutput(bind(two.node), Lane(0, 1, 1, Ledger()), 0, 0)
    halves: dict[int, list[int]] = {0: [], 1: []}
    for _ in both:
        sample, origin = delivery.next()
        halves[int(as_origin_array(origin)[0, 0])].append(sample)
    many += [half[: len(both) // 2 - 2] for half in halves.values()]
    for first in range(len(many)):
        for second in range(first):
            same = sum(a == b for a, b in zip(many[first], many[second]))
            assert same < 12, (first, second)  # one is expected by chance
            size = min(len(many[first]), len(many[second]))
            correlation = np.corrcoef(many[first][:size], many[second][:size])[0, 1]
            assert abs(correlation) < 5 / np.sqrt(size)


# -- the buffered shuffle ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 120),
    st.integers(0, 1000),
    st.sampled_from([(0, 1), (1, 3)]),
)
def test_buffered_shuffle_moves_no_sample_further_than_its_buffer(
    length: int, buffer_size: int, seed: int, place: tuple[int, int]
) -> None:
    source = ms.from_dataset(range(length)).filter(lambda x: True)
    before = lane(source, *place, first=length)
    after = lane(source.shuffle(seed, buffer_size=buffer_size), *place, first=length)
    assert sorted(after) == sorted(before)
    reach = -(-buffer_size // place[1])
    position = {row: number for number, row in enumerate(before)}
    for number, row in enumerate(after):
        assert abs(number - position[row]) <= reach


def test_buffered_shuffle_shuffles() -> None:
    moved = np.array(
        lane(ms.from_dataset(range(20_000)).shuffle(1, buffer_size=1000), first=20_000)
    ) - np.arange(20_000)
    inside = moved[2000:-2000]
    assert abs(inside.mean()) < 30
    assert 280 < inside.std() < 298  # 1000 times the deviation of a uniform number: 1000 / sqrt(12)
    assert abs(np.corrcoef(inside[:-1], inside[1:])[0, 1]) < 0.05


# -- the shares of a mix -------------------------------------------------------------------------------------------------

WEIGHTS: list[dict[str, float]] = [
    {"a": 7, "b": 3},
    {"a": 97, "b": 1, "c": 1, "d": 1},
    {"s0": 81, **{f"s{i}": 1 for i in range(1, 20)}},
    {"a": 1, "b": 1},
    {"a": 0.5, "b": 0.3, "c": 0.2},
    {"a": 1, "b": 2, "c": 3, "d": 4, "e": 0},
]


def check_shares(picked: list[int], weights: dict[str, float]) -> None:
    shares = np.array(list(weights.values())) / sum(weights.values())
    k = int((shares > 0).sum())
    counts = np.cumsum(np.array(picked)[:, None] == np.arange(len(shares))[None, :], axis=0)
    asked = np.arange(1, len(picked) + 1)[:, None] * shares[None, :]
    assert (np.abs(counts - asked) < 1 + shares * max(0, k - 2) + 1e-9).all()


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.slow
def test_shares_hold_after_every_prefix(weights: dict[str, float], stream: bool) -> None:
    rows = 30_000
    parts = {}
    for number, name in enumerate(weights):
        part = ms.from_dataset([number]).repeat()
        parts[name] = part.filter(lambda x: True) if stream else part
    mixed = ms.interleave(parts, weights, seed=3)
    for place in [(0, 1), (2, 5)] if stream else [(0, 1)]:
        check_shares(lane(mixed, *place, first=rows), weights)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 100))
def test_shares_hold_for_any_small_weights(weights: list[int], seed: int) -> None:
    named = {f"s{number}": float(weight) for number, weight in enumerate(weights)}
    parts = {name: ms.from_dataset([number]).repeat() for number, name in enumerate(named)}
    check_shares(lane(ms.interleave(parts, named, seed=seed), first=600), named)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 6)), min_size=1, max_size=4).filter(
        lambda x: any(w for _, w in x)
    ),
    st.integers(0, 50),
)
def test_stopping_strategies_are_what_a_step_by_step_reading_gives(
    inputs: list[tuple[int, int]], seed: int
) -> None:
    parts = {
        f"s{i}": ms.from_dataset([100 * i + row for row in range(n)])
        for i, (n, _) in enumerate(inputs)
    }
    weights = {f"s{i}": w for i, (_, w) in enumerate(inputs)}
    endless = ms.interleave(
        {name: part.repeat() for name, part in parts.items()}, weights, seed=seed
    )
    picks = [row // 100 for row in lane(endless, first=30 * sum(n for n, _ in inputs) + 400)]
    live = [i for i, (_, weight) in enumerate(inputs) if weight]

    def simulate(strategy: str) -> list[int]:
        taken = dict.fromkeys(live, 0)
        out: list[int] = []
        for pick in picks:
            size = inputs[pick][0]
            if strategy == "all_exhausted_without_replacement" and taken[pick] >= size:
                continue
            out.append(100 * pick + taken[pick] % size)
            taken[pick] += 1
            done = [taken[i] >= inputs[i][0] for i in live]
            if any(done) if strategy == "first_exhausted" else all(done):
                return out
        raise AssertionError("the reading was too short")

    for strategy in ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement"):
        mixed = ms.interleave(parts, weights, seed=seed, stopping_strategy=strategy)  # type: ignore[arg-type]
        expected = simulate(strategy)
        assert list(mixed) == expected
        assert len(mixed) == len(expected)


def test_the_order_of_a_dict_changes_nothing() -> None:
    parts = {name: ms.from_dataset([f"{name}{row}" for row in range(50)]) for name in "abc"}
    weights = {"a": 1, "b": 1, "c": 4889}
    other = {name: parts[name] for name in "cab"}
    assert list(ms.interleave(parts, weights)) == list(
        ms.interleave(other, {name: weights[name] for name in "bca"})
    )
    assert ms.interleave(parts, weights) == ms.interleave(other, weights)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(orders(), indent=1) + "\n")
