"""The laws, on every row of cases.py: an iterator by itself, in one lane and as one of three."""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import midstream as ms
import midstream.nodes
import midstream.sources
from cases import BASE, CASES, Case, Counted, identify, plain
from midstream.core import Dataset, Delivery, Lane, Run, as_origin_array, bind, epoch_key
from midstream.failures import Failure, Ledger

LANES = [(0, 1), (1, 3)]
ROWS = list(CASES)
every_row = pytest.mark.parametrize("row", ROWS)
every_lane = pytest.mark.parametrize("lane", LANES, ids=lambda lane: f"lane {lane[0]} of {lane[1]}")


def run(ds: Dataset, lane: tuple[int, int] = (0, 1), epoch: int = 0) -> Run:
    return Run(ds, lane[0], lane[1], epoch)


def rest(iterator: Iterator[Any]) -> list[Any]:
    return [plain(sample) for sample in iterator]


def build(row: str, bomb: frozenset[int] = frozenset()) -> Dataset:
    return CASES[row].build(bomb)


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def test_every_exported_node_and_source_has_a_case() -> None:
    exported = {
        value
        for module in (midstream.nodes, midstream.sources)
        for value in map(module.__dict__.get, module.__all__)
        if isinstance(value, type) and issubclass(value, Dataset)
    }
    used = {type(place.node) for row in ROWS for place in bind(build(row)).walk()}
    assert exported - used == set()


@every_row
def test_the_same_description_yields_the_same_samples(row: str) -> None:
    ds = build(row)
    first = rest(iter(ds))
    assert first
    assert rest(iter(ds)) == first
    assert rest(iter(build(row))) == first


@every_row
@every_lane
def test_restore_at_every_step_continues_identically(row: str, lane: tuple[int, int]) -> None:
    ds = build(row)
    whole = run(ds, lane)
    samples, states = [], [through_json(whole.state_dict())]
    for sample in whole:
        samples.append(plain(sample))
        states.append(through_json(whole.state_dict()))
    assert samples
    for step, state in enumerate(states):
        resumed = run(build(row), lane)
        resumed.load_state_dict(state)
        assert rest(resumed) == samples[step:], f"resumed after sample {step}"


@every_row
def test_states_do_not_depend_on_where_the_run_was_resumed(row: str) -> None:
    ds = build(row)
    whole = run(ds)
    states = [whole.state_dict(), *(whole.state_dict() for _ in whole)]
    for step in range(0, len(states), 7):
        resumed = run(ds)
        resumed.load_state_dict(states[step])
        assert [resumed.state_dict(), *(resumed.state_dict() for _ in resumed)] == states[step:]


@every_row
@every_lane
def test_second_and_third_resume_continue_identically(row: str, lane: tuple[int, int]) -> None:
    ds = build(row)
    expected = rest(run(ds, lane))
    for stride in (1, 2, 3, 5):
        found, state = [], None
        for _ in range(4):
            part = run(ds, lane)
            if state is not None:
                part.load_state_dict(state)
            for _, sample in zip(range(stride), part):
                found.append(plain(sample))
            state = through_json(part.state_dict())
        part = run(ds, lane)
        part.load_state_dict(state)
        found.extend(rest(part))
        assert found == expected, f"four pieces of {stride}, then the rest"


@every_row
def test_a_state_before_the_first_sample_and_right_after_a_load_restores(row: str) -> None:
    ds = build(row)
    expected = rest(run(ds))
    fresh = run(ds)
    state = fresh.state_dict()
    for _ in range(3):
        fresh = run(ds)
        fresh.load_state_dict(state)
        state = fresh.state_dict()
    assert rest(fresh) == expected


@every_row
@every_lane
def test_a_state_at_and_after_the_end_yields_nothing(row: str, lane: tuple[int, int]) -> None:
    ds = build(row)
    whole = run(ds, lane)
    at_the_end = [whole.state_dict() for _ in whole][-1]
    after_the_end = whole.state_dict()
    for state in (at_the_end, after_the_end, after_the_end):
        resumed = run(ds, lane)
        resumed.load_state_dict(state)
        assert rest(resumed) == []
        assert rest(resumed) == []
        again = run(ds, lane)
        again.load_state_dict(resumed.state_dict())
        assert rest(again) == []


@every_row
def test_load_then_state_dict_is_the_state(row: str) -> None:
    ds = build(row)
    whole = run(ds)
    for _ in zip(range(5), whole):
        pass
    state = whole.state_dict()
    resumed = run(build(row))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert resumed.state_dict() == state
    whole.load_state_dict(state)  # onto an iterator that is running
    assert whole.state_dict() == state


@every_row
def test_loading_onto_a_running_iterator_goes_back(row: str) -> None:
    ds = build(row)
    whole = run(ds)
    state = whole.state_dict()
    samples = rest(whole)
    whole.load_state_dict(state)
    assert rest(whole) == samples


def plain_types(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain_types(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(plain_types, value))
    return value is None or type(value) in (int, str, bool, float)


@every_row
def test_state_is_plain_with_stable_keys_and_shares_nothing(row: str) -> None:
    whole = run(build(row))
    first = whole.state_dict()
    keys = set(first)
    kept = []
    for _, _ in zip(range(12), whole):
        state = whole.state_dict()
        assert plain_types(state)
        assert set(state) == keys
        kept.append((state, json.dumps(state)))
        scribble(whole.state_dict())  # what the caller does with a state is the caller's affair
    assert all(json.dumps(state) == text for state, text in kept)
    expected = rest(run(build(row)))[12:]
    assert rest(whole) == expected


def scribble(value: Any) -> None:
    if isinstance(value, dict):
        for item in value.values():
            scribble(item)
        value.clear()
    elif isinstance(value, list):
        for item in value:
            scribble(item)
        value.clear()


@every_row
def test_state_stays_within_its_bound(row: str) -> None:
    """300 bytes over random access; 1 KB and 64 bytes per source for a stream."""
    ds = build(row)
    bound = 300 if ds.random_access else 1024 + 64 * len(bind(ds).names)
    whole = run(ds)
    sizes = [len(json.dumps(whole.state_dict(), separators=(",", ":"))) for _ in whole]
    assert max(sizes) <= bound


@every_row
def test_state_does_not_grow_over_sixty_resumes(row: str) -> None:
    ds = build(row)
    state = run(ds).state_dict()
    keys, sizes = set(state), []
    taken = 0
    for _ in range(60):
        part = run(ds)
        part.load_state_dict(state)
        taken += sum(1 for _ in zip(range(1), part))
        state = part.state_dict()
        assert set(state) == keys
        sizes.append(len(json.dumps(state)))
    assert max(sizes[30:]) <= max(sizes[:30]) + 40  # more digits, no more entries


@every_row
def test_description_and_state_survive_pickling(row: str) -> None:
    ds = build(row)
    data = pickle.dumps(ds)
    copy = pickle.loads(data)
    assert copy == ds
    assert hash(copy) == hash(ds)
    assert rest(iter(copy)) == rest(iter(ds))
    whole = run(ds)
    next(whole)
    state = pickle.loads(pickle.dumps(whole.state_dict()))
    resumed = run(copy)
    resumed.load_state_dict(state)
    assert rest(resumed) == rest(whole)


def items(ds: Dataset, lane: tuple[int, int] = (0, 1), epoch: int = 0) -> list[tuple[Any, list[ms.Origin]]]:
    place = bind(ds)
    delivery = Delivery(place, Lane(*lane, 1, Ledger()), int(epoch_key(epoch)[0]), epoch)
    out = []
    while True:
        try:
            sample, origins = delivery.next()
        except StopIteration:
            return out
        assert not isinstance(sample, Failure)
        out.append((sample, [place.origin(origin) for origin in as_origin_array(origins).tolist()]))


@every_row
@every_lane
def test_origins_name_the_rows_a_sample_was_made_of(row: str, lane: tuple[int, int]) -> None:
    case = CASES[row]
    for sample, origins in items(build(row), lane):
        assert origins
        found = [BASE * case.sources[origin.source] + origin.row for origin in origins]
        if not is_sharded(row):
            assert found == identify(sample)
        else:
            assert len(found) == len(identify(sample))


def is_sharded(row: str) -> bool:
    """Sources whose row numbers are (row of the shard, shard) in one."""
    return row in ("json lines gz", "hub stream", "iterable")


@every_row
def test_no_origin_comes_twice_in_an_epoch(row: str) -> None:
    for epoch in (0, 1):
        seen = Counter(origin for _, origins in items(build(row), epoch=epoch) for origin in origins)
        assert max(seen.values()) == 1
    both = [origin for epoch in (0, 1) for _, origins in items(build(row), epoch=epoch) for origin in origins]
    assert len(set(both)) == len(both), "two epochs share an origin"


@every_row
@pytest.mark.parametrize("num_lanes", [1, 3, 5])
def test_each_epoch_is_exactly_once_over_all_lanes(row: str, num_lanes: int) -> None:
    case = CASES[row]
    found = [
        value
        for lane in range(num_lanes)
        for sample in run(build(row), (lane, num_lanes))
        for value in identify(sample)
    ]
    if case.epoch is not None:
        assert sorted(found) == sorted(case.epoch)
    elif not case.cuts and "all" not in row and row not in ("everything", "two buffered shuffles"):
        assert max(Counter(found).values()) == 1


@every_row
def test_looking_changes_nothing(row: str) -> None:
    expected = rest(run(build(row)))
    ds = build(row)
    whole = run(ds)
    found = []
    for sample in whole:
        found.append(plain(sample))
        if len(found) in (1, 4, 9):
            repr(ds)
            ds._repr_html_()
            ds == build(row)
            if ds.random_access:
                len(ds)
                ds.rows([0])
            whole.state_dict()
            for _ in zip(range(3), iter(ds)):
                pass
            pickle.dumps(ds)
    assert found == expected


@every_row
def test_global_generators_are_untouched(row: str) -> None:
    def fingerprint() -> tuple[Any, ...]:
        name, keys, *others = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), others

    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    before = fingerprint()
    ds = build(row)
    whole = run(ds)
    for _ in zip(range(20), whole):
        whole.state_dict()
    loader = ms.DataLoader(ds, lanes=12)
    for _ in zip(range(3), loader):
        loader.state_dict()
    assert fingerprint() == before


@every_row
def test_an_error_in_user_code_loses_one_sample(row: str) -> None:
    case: Case = CASES[row]
    flat = [value for sample in run(build(row)) for value in identify(sample)]
    victim = flat[len(flat) // 2]
    whole = run(build(row, frozenset({victim})))
    found, errors, state = [], 0, None
    while True:
        try:
            found.extend(identify(next(whole)))
        except StopIteration:
            break
        except ms.SampleError as error:
            errors += 1
            assert error.origin is not None
            assert BASE * case.sources[error.origin.source] + error.origin.row == victim or is_sharded(row)
            assert error.node.split("/")[-1].startswith("map")
            assert "Bomb @ " in error.function
            assert error.error_type == "Boom"
            assert f"{victim}: bad row" in str(error)
            assert "in __call__" in error.original_traceback
            if state is None:
                state, tail = through_json(whole.state_dict()), len(found)
    assert errors >= 1
    expected = [value for value in flat if value != victim]
    if not case.shifts:
        assert found == expected
    else:
        assert victim not in found
        assert abs(len(found) - len(expected)) <= 8
    # A checkpoint taken right after the error does not meet it again.
    resumed = run(build(row, frozenset({victim})))
    resumed.load_state_dict(state)
    again, met = [], 0
    while True:
        try:
            again.extend(identify(next(resumed)))
        except StopIteration:
            break
        except ms.SampleError:
            met += 1
    assert again == found[tail:]
    assert met == errors - 1


@every_row
def test_resume_reads_no_more_than_it_states(row: str) -> None:
    case = CASES[row]
    ds = build(row)
    whole = run(ds)
    states = [whole.state_dict() for _ in whole]
    for state in states[:: max(1, len(states) // 8)]:
        resumed = run(ds)
        resumed.load_state_dict(state)
        Counted.reads = 0
        next(resumed, None)
        # The cursor doubles its chunks, so it may have read as much again ahead; a filter reads on until one passes.
        assert Counted.reads <= 2 * (case.replay + 16)
