"""The laws, on every row of cases.py: an iterator by itself, in one lane and as one of three.

Those that need nothing but a dataset are in `midstream.testing.laws`, where people who write nodes
have them too; here are those that know what the rows of cases.py are made of.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection

import numpy as np
import pytest
import torch

import midstream as ms
import midstream.nodes
import midstream.sources
from midstream.pipeline.node import Node, bind
from midstream.testing import laws
from midstream.testing.laws import LANES, items, run
from tests.cases import BASE, CASES, CORE, Case, Counted, build, identify
from tests.helpers.loaders import through_json

ROWS = list(CASES)
every_row = pytest.mark.parametrize("row", ROWS)
every_lane = pytest.mark.parametrize("lane", LANES, ids=lambda lane: f"lane {lane[0]} of {lane[1]}")


@pytest.mark.parametrize("rows", [CASES, CORE], ids=["all", "core"])
def test_every_exported_node_and_source_has_a_case(rows: Collection[str]) -> None:
    exported = {
        value
        for module in (midstream.nodes, midstream.sources)
        for value in map(module.__dict__.get, module.__all__)
        if isinstance(value, type) and issubclass(value, Node)
    }
    used = {type(place.node) for row in rows for place in bind(build(row).node).walk()}
    assert exported - used == set()


@every_row
def test_the_same_description_yields_the_same_samples(row: str) -> None:
    laws.same_description_same_samples(lambda: build(row))


@every_row
@every_lane
def test_restore_at_every_step_continues_identically(row: str, lane: tuple[int, int]) -> None:
    laws.restore_at_every_step(lambda: build(row), lane)


@every_row
def test_states_do_not_depend_on_where_the_run_was_resumed(row: str) -> None:
    laws.states_do_not_depend_on_resumes(lambda: build(row))


@every_row
@every_lane
def test_second_and_third_resume_continue_identically(row: str, lane: tuple[int, int]) -> None:
    laws.chained_resumes(lambda: build(row), lane)


@every_row
def test_a_state_before_the_first_sample_and_right_after_a_load_restores(row: str) -> None:
    laws.fresh_states_restore(lambda: build(row))


@every_row
@every_lane
def test_a_state_at_and_after_the_end_yields_nothing(row: str, lane: tuple[int, int]) -> None:
    laws.the_end_is_a_state(lambda: build(row), lane)


@every_row
def test_load_then_state_dict_is_the_state(row: str) -> None:
    laws.load_then_state_is_the_state(lambda: build(row))


@every_row
def test_loading_onto_a_running_iterator_goes_back(row: str) -> None:
    laws.loading_goes_back(lambda: build(row))


@every_row
def test_state_is_plain_with_stable_keys_and_shares_nothing(row: str) -> None:
    laws.state_is_plain_and_shares_nothing(lambda: build(row))


@every_row
def test_state_stays_within_its_bound(row: str) -> None:
    laws.state_is_small(lambda: build(row))


@every_row
def test_state_does_not_grow_over_sixty_resumes(row: str) -> None:
    laws.state_does_not_grow(lambda: build(row))


@every_row
def test_description_and_state_survive_pickling(row: str) -> None:
    laws.pickling_keeps_everything(lambda: build(row))


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


@every_row
def test_rows_at_any_positions_are_those_of_the_stream(row: str) -> None:
    laws.rows_are_the_stream(lambda: build(row))


def is_sharded(row: str) -> bool:
    """Sources whose row numbers are (row of the shard, shard) in one."""
    return row in ("json lines gz", "hub stream", "iterable")


@every_row
def test_no_origin_comes_twice_in_an_epoch(row: str) -> None:
    laws.no_origin_comes_twice(lambda: build(row))


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
    laws.looking_changes_nothing(lambda: build(row))


@every_row
def test_global_generators_are_untouched(row: str) -> None:
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    laws.global_generators_are_untouched(lambda: build(row))


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
            assert BASE * case.sources[
                error.origin.source
            ] + error.origin.row == victim or is_sharded(row)
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
        # The cursor doubles its chunks, so it may have read as much again ahead; a filter reads on
        # until one passes.
        assert Counted.reads <= 2 * (case.replay + 16)
