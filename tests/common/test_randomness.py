"""What the random numbers and the orders made of them promise, beyond what test_orders.py has.

Everything is seeded, so nothing here fails by chance; the thresholds are five standard deviations.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, note, settings
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
from midstream.dataset import Dataset
from midstream.nodes.mix.interleave import Interleave, quotas
from midstream.pipeline.node import bind
from midstream.pipeline.rows import I64
from midstream.pipeline.single_lane import SingleLaneIterator
from midstream.sources import SequenceSource

STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")


def key(*values: int) -> Any:
    return np.array(values, dtype=np.uint64)


def anything(row: Any) -> bool:
    return True


def lane(
    ds: Dataset, index: int = 0, count: int = 1, epoch: int = 0, first: int | None = None
) -> list[int]:
    return list(itertools.islice(SingleLaneIterator(ds.node, index, count, epoch), first))


def chi_square(counts: Any) -> float:
    """How far counts that should be equal are from it, in standard deviations of the chi-square
    statistic.
    """
    counts = np.asarray(counts, dtype=float)
    freedom = counts.size - 1
    return float(
        (((counts - counts.mean()) ** 2).sum() / counts.mean() - freedom) / np.sqrt(2 * freedom)
    )


# -- draws ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_scalar_and_array_hashes_agree_in_any_shape(values: list[int]) -> None:
    array = np.array(values, dtype=np.uint64)
    assert mix_array(array).tolist() == [mix(value) for value in values]
    assert mix_array(array[:, None])[:, 0].tolist() == [mix(value) for value in values]
    assert fold_array(5, array).tolist() == [fold_array(5, key(value))[0] for value in values]
    assert fold_array(array, 7).tolist() == [fold_array(value, key(7))[0] for value in values]


def test_hashing_leaves_its_input_alone() -> None:
    values = key(1, 2, 3)
    mix_array(values)
    fold_array(1, values)
    pass_key(values, np.array([1, 0, 2]))
    assert values.tolist() == [1, 2, 3]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 50))
def test_a_draw_does_not_depend_on_where_the_call_begins(seed: int, start: int, count: int) -> None:
    together = draw(seed, start, count)
    assert together.tolist() == [int(draw(seed, start + index, 1)[0]) for index in range(count)]
    assert uniform32(seed, start, count).tolist() == [value >> 32 for value in together.tolist()]


def test_every_bit_of_a_draw_is_a_fair_coin_and_neighbours_are_unrelated() -> None:
    count = 1 << 15
    for stream in (
        draw(1, 0, count),
        np.array([fold(seed, 3) for seed in range(count)], dtype=np.uint64),
    ):
        bits = (stream[:, None] >> np.arange(64, dtype=np.uint64)[None, :]) & np.uint64(1)
        limit = 5 * np.sqrt(count) / 2
        assert (np.abs(bits.sum(axis=0) - count / 2) < limit).all()
        changes = (bits[1:] ^ bits[:-1]).sum(axis=0)
        assert (np.abs(changes - (count - 1) / 2) < limit).all()


def test_the_order_and_the_number_of_links_in_a_chain_count() -> None:
    chains = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (-1,)]
    assert len({fold(*chain) for chain in chains}) == len(chains)
    assert fold(-1) == fold(2**64 - 1)
    assert generator(1, 2).random() != generator(2, 1).random()
    assert generator(1, 2).random() == generator(1, 2).random()


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 5), min_size=1, max_size=10))
def test_passes_change_the_key_and_pass_zero_keeps_it(value: int, passes: list[int]) -> None:
    keys = pass_key(key(value), np.array(passes))
    assert keys.size in (1, len(passes))
    for index, number in enumerate(passes):
        found = int(keys[index if keys.size > 1 else 0])
        assert found == int(pass_key(key(value), np.array([number]))[0])
        assert (found == value) == (number == 0)


# -- permutations --------------------------------------------------------------------------------------------------------


def test_a_permutation_of_any_small_length_meets_every_row_once() -> None:
    for length in range(1, 301):
        for number in (0, 1, 2**63):
            found = permute(np.arange(length), length, 11, key(number))
            assert np.array_equal(np.sort(found), np.arange(length)), length


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2**62), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1), st.randoms()
)
def test_positions_of_a_permutation_of_any_length_stay_inside_and_apart(
    length: int, seed: int, number: int, rng: Any
) -> None:
    positions = np.array(
        sorted({0, length - 1, *(rng.randrange(length) for _ in range(200))}), dtype=np.int64
    )
    found = permute(positions, length, seed, key(number))
    assert found.min() >= 0
    assert found.max() < length
    assert len(set(found.tolist())) == len(positions)
    assert np.array_equal(permute(positions[::-1].copy(), length, seed, key(number)), found[::-1])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), st.randoms()
)
def test_mixed_keys_in_one_call_are_the_calls_of_their_own(
    length: int, keys: list[int], rng: Any
) -> None:
    each = [permute(np.arange(length), length, 3, key(value)) for value in keys]
    positions = np.array([rng.randrange(length) for _ in range(100)])
    which = np.array([rng.randrange(len(keys)) for _ in range(100)])
    together = permute(positions, length, 3, key(*keys)[which])
    assert together.tolist() == [int(each[w][p]) for w, p in zip(which, positions)]


@pytest.mark.slow
def test_all_permutations_of_few_rows_are_equally_likely() -> None:
    for length, rounds in ((3, 6000), (4, 12_000), (5, 24_000)):
        counts = Counter(
            tuple(permute(np.arange(length), length, fold(seed), key(0)).tolist())
            for seed in range(rounds)
        )
        whole = list(itertools.permutations(range(length)))
        assert abs(chi_square([counts[order] for order in whole])) < 5


@pytest.mark.parametrize("length", [5, 10, 64, 100, 1000])
def test_seeds_and_epochs_as_users_choose_them_give_uniform_orders(length: int) -> None:
    """Seeds 0, 1, 2, ... and epochs 0, 1, 2, ...: where rows 0 and 1 come from, how far apart, and
    from seed to seed.
    """
    source = ms.from_dataset(range(length))
    rounds = 2000
    of_seeds = np.array([source.shuffle(seed).rows([0, 1]) for seed in range(rounds)])
    of_epochs = np.array([source.shuffle(7).rows([0, 1], epoch) for epoch in range(rounds)])
    width = max(1, length // 100)
    for found in (of_seeds, of_epochs):
        for column in (found[:, 0], found[:, 1]):
            assert abs(chi_square(np.bincount(column // width, minlength=length // width))) < 5
            assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 5 / np.sqrt(rounds)
        apart = (found[:, 1] - found[:, 0]) % length
        assert apart.min() >= 1
        if length <= 100:
            assert abs(chi_square(np.bincount(apart, minlength=length)[1:])) < 5


# -- the window shuffle --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Blocks(SequenceSource):
    """A sequence whose rows come in blocks, as a parquet file's come in row groups."""

    sizes: tuple[int, ...] = ()
    kind = "blocks"

    def block_sizes(self) -> I64:
        return np.array(self.sizes, dtype=np.int64)


def blocks(sizes: list[int], start: int = 0, name: str | None = None) -> Dataset:
    return Dataset(Blocks(range(start, start + sum(sizes)), name, tuple(sizes)))


sizes_of_blocks = st.lists(st.integers(1, 9), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(sizes_of_blocks, st.integers(1, 6), st.integers(0, 50), st.integers(0, 2))
def test_a_window_mixes_whole_blocks_and_no_others(
    sizes: list[int], window: int, seed: int, epoch: int
) -> None:
    order = lane(blocks(sizes).shuffle(seed, window_blocks=window), epoch=epoch)
    assert sorted(order) == list(range(sum(sizes)))
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    at, seen = 0, []
    while at < len(order):
        found: list[int] = []
        inside = 0
        while len(found) < window and at + inside < len(order):
            block = int(block_of[order[at + inside]])
            if block not in found:
                found.append(block)
            inside += 1
        rows = sum(sizes[block] for block in found)
        assert Counter(block_of[order[at : at + rows]].tolist()) == {
            block: sizes[block] for block in found
        }
        seen += found
        at += rows
    assert sorted(seen) == list(range(len(sizes)))


@settings(max_examples=60, deadline=None)
@given(sizes_of_blocks, st.integers(1, 4), st.integers(0, 5), st.randoms())
def test_a_window_shuffle_is_random_access(
    sizes: list[int], window: int, passes: int, rng: Any
) -> None:
    ds = blocks(sizes).shuffle(1, window_blocks=window).repeat(passes + 1)
    order = lane(ds)
    positions = [rng.randrange(len(order)) for _ in range(50)]
    assert ds.rows(positions) == [order[position] for position in positions]


@settings(max_examples=60, deadline=None)
@given(sizes_of_blocks, sizes_of_blocks, st.integers(0, 40), st.integers(0, 60))
def test_blocks_of_parts_are_shuffled_in_windows_too(
    a: list[int], b: list[int], skipped: int, taken: int
) -> None:
    parts = ms.concatenate([blocks(a, 0, "a"), blocks(b, 1000, "b")]).skip(skipped).take(taken)
    order = [*range(sum(a)), *range(1000, 1000 + sum(b))][skipped:][:taken]
    assert sorted(lane(parts.shuffle(3, window_blocks=2))) == order
    sizes = parts.node.block_sizes()
    assert sizes is not None
    assert sizes.sum() == len(order)
    assert (sizes > 0).all()


def test_blocks_and_the_rows_of_a_window_are_uniformly_placed() -> None:
    sizes, rounds = [4] * 12, 3000
    first, place = np.zeros(12), np.zeros(12)
    for seed in range(rounds):
        order = blocks(sizes).shuffle(seed, window_blocks=3).rows(range(12))
        first[order[0] // 4] += 1
        window = sorted({row // 4 for row in order})
        place[4 * window.index(order[5] // 4) + order[5] % 4] += 1
    assert abs(chi_square(first)) < 5
    assert abs(chi_square(place)) < 5


@pytest.mark.slow
def test_no_window_and_windows_over_everything_are_full_permutations() -> None:
    sizes, rounds = [3] * 4, 3000
    for window in (None, 4, 16):
        counts = np.zeros((12, 12))
        for seed in range(rounds):
            order = blocks(sizes).shuffle(seed, window_blocks=window).rows(range(12))
            counts[np.arange(12), order] += 1
        assert abs(chi_square(counts.ravel()) * np.sqrt(143 / 121)) < 6


def test_windows_differ_between_epochs_seeds_and_places() -> None:
    source = blocks([5] * 40)
    two = source.shuffle(1, window_blocks=4)
    orders = [
        lane(two),
        lane(two, epoch=1),
        lane(source.shuffle(2, window_blocks=4)),
        lane(two.map(abs).shuffle(1)),
    ]
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other)) < 10


# -- the buffered shuffle ------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 300),
    st.integers(1, 90),
    st.integers(0, 9),
    st.sampled_from([(0, 1), (0, 3), (2, 3), (4, 5)]),
    st.integers(0, 2),
)
def test_buffered_shuffle_is_the_order_of_its_keys(
    length: int, buffer_size: int, seed: int, place: tuple[int, int], epoch: int
) -> None:
    """Sample i has the key i + b u(i): the output is the inputs in key order, and moves by at most
    b - 1 either way.
    """
    source = ms.from_dataset(range(length)).filter(anything)
    ds = source.shuffle(seed, buffer_size=buffer_size)
    before, after = lane(source, *place, epoch), lane(ds, *place, epoch)
    b = -(-buffer_size // place[1])
    from midstream.pipeline.passes import epoch_key

    own = fold(seed, bind(ds.node).salt, int(epoch_key(epoch)[0]), place[0])
    numbers = np.arange(len(before), dtype=np.int64)
    keys = (numbers << 32) + b * uniform32(own, 0, len(before)) if before else numbers
    order = np.argsort(keys, kind="stable")
    assert after == [before[index] for index in order]
    assert (np.abs(order - numbers) <= b - 1).all()


@pytest.mark.parametrize("buffer_size", [2, 7, 100])
def test_buffered_shuffle_holds_back_no_more_than_its_buffer(buffer_size: int) -> None:
    read = 0

    def rows() -> Iterator[int]:
        nonlocal read
        for row in range(400):
            read += 1
            yield row

    run = SingleLaneIterator(
        ms.from_iterable(rows).shuffle(1, buffer_size=buffer_size).node, 0, 1, 0
    )
    most = 0
    for given_out, _ in enumerate(run, start=1):
        most = max(most, read - given_out)
    assert buffer_size // 2 <= most <= buffer_size


def test_lanes_epochs_and_places_have_unrelated_buffers() -> None:
    source = ms.from_dataset([*range(600)]).filter(anything)
    ds = source.shuffle(3, buffer_size=300)
    moves: list[Any] = []
    for index, epoch in ((0, 0), (1, 0), (0, 1)):
        before, after = lane(source, index, 3, epoch), lane(ds, index, 3, epoch)
        moves.append([after.index(row) - number for number, row in enumerate(before)])
    twice = lane(ds.shuffle(3, buffer_size=300), 0, 3)
    once = lane(ds, 0, 3)
    moves.append([twice.index(row) - number for number, row in enumerate(once)])
    for one, other in itertools.combinations(moves, 2):
        inner = slice(100, -100) if len(one) > 250 else slice(None)
        assert abs(np.corrcoef(one[inner], other[inner])[0, 1]) < 5 / np.sqrt(len(one[inner]))


# -- the shares of a mix -------------------------------------------------------------------------------------------------


def check_shares(picked: list[int], weights: list[int]) -> None:
    """Strictly within 1 + share (k - 2) of the share, after every prefix."""
    used = [number for number, weight in enumerate(weights) if weight]
    if len(used) == 1:
        assert set(picked) <= set(used)
        return
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(np.array(picked)[:, None] == np.arange(len(weights))[None, :], axis=0)
    asked = np.arange(1, len(picked) + 1)[:, None] * shares[None, :]
    limits = np.where(shares > 0, 1 + shares * (len(used) - 2), 1e-9)
    assert (np.abs(counts - asked) < limits).all()


def endless(weights: list[int], seed: int, stream: bool) -> Dataset:
    parts = {}
    for number in range(len(weights)):
        part = ms.from_dataset([number]).repeat()
        parts[f"s{number}"] = part.filter(anything) if stream else part
    return ms.interleave(
        parts, {f"s{number}": weight for number, weight in enumerate(weights)}, seed=seed
    )


some_weights = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any)


@settings(max_examples=60, deadline=None)
@given(some_weights, st.integers(0, 1000), st.booleans(), st.integers(1, 4), st.integers(0, 3))
def test_shares_hold_after_every_prefix_in_every_lane(
    weights: list[int], seed: int, stream: bool, lanes: int, epoch: int
) -> None:
    ds = endless(weights, seed, stream)
    for index in range(lanes if stream else 1):
        check_shares(lane(ds, index, lanes if stream else 1, epoch, 700), weights)


@settings(max_examples=40, deadline=None)
@given(some_weights, st.integers(0, 1000), st.integers(0, 10**9))
def test_shares_hold_over_a_run_read_anywhere(weights: list[int], seed: int, start: int) -> None:
    """Random access far into the run gives the picks of the blocks there: every whole block has its
    exact quotas.
    """
    ds = endless(weights, seed, stream=False)
    mix = ds.node
    assert isinstance(mix, Interleave)
    found, block = quotas(dict(mix.weights))
    first = start // block * block
    picked = ds.rows(range(first, first + 2 * block))
    for part in (picked[:block], picked[block:]):
        assert [part.count(number) for number in range(len(weights))] == found
    check_shares(picked, weights)


@settings(max_examples=100, deadline=None)
@example(
    [384.0, 384.0, 0.0078125], 1.0
)  # 0.67 of a pick per block: the largest remainders are those of the others
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6), st.floats(1e-9, 1e9))
def test_quotas_are_the_weights_whatever_their_scale(weights: list[float], scale: float) -> None:
    named = {f"s{number}": weight for number, weight in enumerate(weights)}
    try:
        found, block = quotas(named)
    except ValueError:
        assume(min(weights) / sum(weights) > 2**-17)
        raise
    assert sum(found) == block
    exact = np.array(weights) / np.sum(weights) * block
    assert (np.abs(np.array(found) - exact) < 1 + 1e-6).all()
    scaled, again = quotas({name: weight * scale for name, weight in named.items()})
    assert (
        np.abs(np.array(scaled) / again - np.array(found) / block) <= 2 / min(block, again) + 1e-12
    ).all()


def test_every_pattern_of_the_pool_is_used_equally_and_lanes_choose_for_themselves() -> None:
    ds = endless([9, 1], 5, stream=False)
    mix = ds.node
    assert isinstance(mix, Interleave)
    picks = mix.picks()
    numbers = np.arange(16_000)
    chosen = [picks.choose(numbers, place) for place in range(4)]
    for one in chosen:
        assert abs(chi_square(np.bincount(one, minlength=16))) < 5
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 5 / np.sqrt(len(numbers))
    for one, other in itertools.combinations(chosen, 2):
        assert abs((one == other).sum() - 1000) < 5 * np.sqrt(1000)
    assert (
        len(np.unique(picks.pattern, axis=0)) > 4
    )  # one of ten picks is the small source's: ten are possible


# -- stopping, against a reading step by step ----------------------------------------------------------------------------


class Mix:
    """A mix by its definition: a choice sequence, and children that are read in turn."""

    def __init__(
        self, ds: Interleave, children: list[Callable[[int], Iterator[int]]], lane: int | None
    ) -> None:
        self.strategy, self.children = ds.stopping_strategy, children
        picks = ds.picks()
        self.used = [number for number, quota in enumerate(picks.quotas.tolist()) if quota]
        self.picks, self.lane = picks, lane

    def choices(self) -> Iterator[int]:
        for block in itertools.count():
            yield from self.picks.pattern[
                int(self.picks.choose(block, 0 if self.lane is None else 1 + self.lane)[0])
            ].tolist()


def random_access_mix(ds: Interleave, lengths: list[int | None]) -> Iterator[tuple[int, int]]:
    """(child, row counted over its passes) in order. Ends with the sample that decides the
    strategy.
    """
    mix = Mix(ds, [], None)
    taken = dict.fromkeys(mix.used, 0)

    def done(child: int) -> bool:
        length = lengths[child]
        return length is not None and taken[child] >= length

    ends = any if mix.strategy == "first_exhausted" else all
    if ends(done(child) for child in mix.used):
        return
    for child in mix.choices():
        if mix.strategy == "all_exhausted_without_replacement" and done(child):
            continue
        yield child, taken[child]
        taken[child] += 1
        if ends(done(number) for number in mix.used):
            return


inputs = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.sampled_from([1, 2, 0, 7, 3]),
        st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=4,
).filter(lambda parts: any(weight for _, weight, _ in parts))


@settings(max_examples=200, deadline=None)
@given(inputs, st.sampled_from(STRATEGIES), st.integers(0, 20))
def test_a_random_access_mix_is_its_reading_step_by_step(
    parts: list[tuple[int, int, bool]], strategy: Any, seed: int
) -> None:
    made: dict[str, Dataset] = {}
    lengths: list[int | None] = []
    for number, (count, _, forever) in enumerate(parts):
        source = ms.from_dataset([1000 * number + row for row in range(count)])
        made[f"s{number}"] = source.repeat() if forever else source
        lengths.append(None if forever and count else count)
    weights = {f"s{number}": weight for number, (_, weight, _) in enumerate(parts)}
    ds = ms.interleave(made, weights, seed=seed, stopping_strategy=strategy)
    mix = ds.node
    assert isinstance(mix, Interleave)
    note(repr(ds))
    empty = any(weight and not count for count, weight, _ in parts)
    if strategy == "all_exhausted" and empty:
        with pytest.raises(ValueError, match="has no rows"):
            ds.node.length()
        return
    limit = 400
    expected = [
        1000 * child + row % parts[child][0]
        for child, row in itertools.islice(random_access_mix(mix, lengths), limit)
    ]
    found = ds.rows(range(limit if ds.node.length() is None else min(limit, len(ds))))
    assert found == expected
    forever = [length is None for length, (_, weight, _) in zip(lengths, parts) if weight]
    assert (ds.node.length() is None) == (
        all(forever) if strategy == "first_exhausted" else any(forever)
    )
    assert lane(ds, first=limit) == expected
    backwards = ds.rows(range(len(expected) - 1, -1, -1))
    assert backwards == expected[::-1]


def stream_mix(ds: Interleave, rows: list[list[list[int]]], lane_index: int) -> Iterator[int]:
    """The rule for streams, in one lane; ``rows[child][pass]`` are its rows, the last pass standing for all after it.

    It ends where it would pick from a child that has run out (first) or when all have (all). A
    child without any row in the lane is passed over and does not count, from the moment it is
    picked on: only reading tells.
    """
    mix = Mix(ds, [], lane_index)
    full = list(mix.used)
    at, passes, out = dict.fromkeys(mix.used, 0), dict.fromkeys(mix.used, 0), set()
    for child in mix.choices():
        if child not in full or (child in out and mix.strategy != "all_exhausted"):
            continue
        if not rows[child][0]:
            full.remove(child)
            if not full or (mix.strategy != "first_exhausted" and len(out) == len(full)):
                return
            continue
        now = rows[child][min(passes[child], len(rows[child]) - 1)]
        if at[child] == len(now):
            out.add(child)
            if mix.strategy == "first_exhausted" or len(out) == len(full):
                return
            if mix.strategy != "all_exhausted":
                continue
            at[child], passes[child] = 0, passes[child] + 1
            now = rows[child][min(passes[child], len(rows[child]) - 1)]
        yield now[at[child]]
        at[child] += 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from([1, 2, 0, 7, 3])), min_size=1, max_size=4
    ).filter(lambda parts: any(weight for _, weight in parts)),
    st.sampled_from(STRATEGIES),
    st.integers(0, 20),
    st.integers(1, 4),
)
@example([(0, 1), (1, 2)], "all_exhausted", 0, 1)  # the empty one is picked after the other ran out
def test_a_mix_of_streams_is_its_reading_step_by_step_in_every_lane(
    parts: list[tuple[int, int]], strategy: Any, seed: int, lanes: int
) -> None:
    made: dict[str, Dataset] = {
        f"s{number}": ms.from_dataset([1000 * number + row for row in range(count)]).filter(
            anything
        )
        for number, (count, _) in enumerate(parts)
    }
    weights = {f"s{number}": weight for number, (_, weight) in enumerate(parts)}
    ds = ms.interleave(made, weights, seed=seed, stopping_strategy=strategy)
    mix = ds.node
    assert isinstance(mix, Interleave)
    note(repr(ds))
    together: Counter[int] = Counter()
    for index in range(lanes):
        rows = [[lane(child, index, lanes)] for child in made.values()]
        found = lane(ds, index, lanes)
        assert found == list(stream_mix(mix, rows, index))
        together.update(found)
    if strategy == "all_exhausted_without_replacement":
        assert together == Counter(
            1000 * number + row
            for number, (count, weight) in enumerate(parts)
            if weight
            for row in range(count)
        )


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(STRATEGIES),
    st.sampled_from(STRATEGIES),
    st.integers(0, 9),
)
def test_a_mix_of_mixes_is_its_reading_step_by_step(
    a: int, b: int, c: int, inner_strategy: Any, outer_strategy: Any, seed: int
) -> None:
    sources = {
        name: ms.from_dataset([1000 * number + row for row in range(count)])
        for number, (name, count) in enumerate(zip("abc", (a, b, c)))
    }
    inner = ms.interleave(
        {"a": sources["a"], "b": sources["b"]},
        {"a": 2, "b": 1},
        seed=seed,
        stopping_strategy=inner_strategy,
    )
    outer = ms.interleave(
        {"in": inner, "c": sources["c"]},
        {"in": 3, "c": 2},
        seed=seed,
        stopping_strategy=outer_strategy,
    )
    assert isinstance(inner.node, Interleave)
    assert isinstance(outer.node, Interleave)
    below = [
        1000 * child + row % (a, b)[child] for child, row in random_access_mix(inner.node, [a, b])
    ]
    children = [below, [2000 + row for row in range(c)]]
    expected = [
        children[child][row % len(children[child])]
        for child, row in random_access_mix(outer.node, list(map(len, children)))
    ]
    # An inner mix that starts over goes on with its own children's later passes: they are in one
    # order, so nothing changes.
    assert outer.rows(range(len(outer))) == expected


@settings(max_examples=60, deadline=None)
@given(some_weights, st.integers(0, 50), st.randoms())
def test_names_decide_and_not_the_order_of_the_dict(
    weights: list[int], seed: int, rng: Any
) -> None:
    names = [f"s{number}" for number in range(len(weights))]
    parts = {name: ms.from_dataset([f"{name} {row}" for row in range(20)]) for name in names}
    weighed = dict(zip(names, weights))
    one = ms.interleave(parts, weighed, seed=seed)
    rng.shuffle(names)
    other = ms.interleave(
        {name: parts[name] for name in names}, {name: weighed[name] for name in names}, seed=seed
    )
    assert one == other
    assert one.rows(range(len(one))) == other.rows(range(len(other)))
    streams = [
        ms.interleave(
            {name: parts[name].filter(anything) for name in order},
            {name: weighed[name] for name in order},
            seed=seed,
        )
        for order in (sorted(names), names)
    ]
    assert lane(streams[0], 1, 2) == lane(streams[1], 1, 2)


@pytest.mark.parametrize("length", [257, 1000, 65_537, 10**9, (1 << 40) + 3])
def test_few_positions_are_permuted_as_many_are(length: int) -> None:
    positions = np.concatenate([np.arange(64), length - 1 - np.arange(64)]).astype(np.int64)
    for seed, key in ((0, 0), (7, 2**63 + 5), (2**64 - 1, 2**64 - 1)):
        keys = np.array([key], dtype=np.uint64)
        whole = permute(positions, length, seed, keys)
        for size in (1, 3, 8):
            parts = [
                permute(positions[at : at + size], length, seed, keys)
                for at in range(0, len(positions), size)
            ]
            assert np.concatenate(parts).tolist() == whole.tolist()
