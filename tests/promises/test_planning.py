"""A run of 10,000 ranks with 8 workers each over 10**12 samples, planned in seconds."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.checkpoint.read import parse
from midstream.checkpoint.write import to_state
from midstream.dataset import Dataset
from midstream.distributed.topology import (
    Topology,
    batches_of_rank,
    choose_lanes,
    first_batch,
    lanes_of_worker,
)

RANKS, WORKERS, SAMPLES, BATCH = 10_000, 8, 10**12, 8
BATCHES = SAMPLES // BATCH


def _pipeline() -> ms.Dataset:
    return (
        ms.from_dataset(range(SAMPLES), name="all").shuffle(seed=7).batch(BATCH, collate_fn=tuple)
    )


@pytest.mark.parametrize("start", [0, 1, 123_456_789, BATCHES - 12_345])
@pytest.mark.parametrize("remainder", ["drop", "pad", "uneven"])
def test_the_shares_of_all_ranks_cover_the_run_and_are_balanced(start: int, remainder: str) -> None:
    shares = [batches_of_rank(BATCHES, start, rank, RANKS, remainder) for rank in range(RANKS)]
    left = BATCHES - start
    expected = {"drop": left - left % RANKS, "pad": left + -left % RANKS, "uneven": left}
    assert sum(shares) == expected[remainder]
    assert max(shares) - min(shares) <= (remainder == "uneven")


@settings(max_examples=300)
@given(start=st.integers(0, BATCHES - 1), ahead=st.integers(0, 10**7))
def test_every_batch_is_made_by_one_worker_of_one_rank(start: int, ahead: int) -> None:
    number = min(BATCHES - 1, start + ahead)
    makers = []
    for rank in (number % RANKS, (number + 1) % RANKS, (number - 1) % RANKS):
        turn, other = divmod(number - first_batch(start, rank, RANKS), RANKS)
        makers += [(rank, turn % WORKERS)] if other == 0 and turn >= 0 else []
    assert len(makers) == 1


def test_every_lane_is_in_one_slot_and_workers_are_balanced() -> None:
    lanes = choose_lanes(None, Topology(0, RANKS, WORKERS), None)
    assert lanes % RANKS == 0 and lanes % math.lcm(48, RANKS) == 0 and lanes >= RANKS * WORKERS
    for rank in range(0, RANKS, 997):
        mine = [
            lanes_of_worker(Topology(rank, RANKS, WORKERS), lanes, worker)
            for worker in range(WORKERS)
        ]
        assert sorted(lane for worker in mine for lane in worker if lane >= 0) == list(
            range(rank, lanes, RANKS)
        )
        assert len({len(worker) for worker in mine}) == 1


@pytest.mark.parametrize("rank", [0, 1, 4321, 9999])
@pytest.mark.parametrize("start", [0, 77, BATCHES - 5 * RANKS - 5])
def test_any_rank_goes_on_anywhere_with_the_right_rows_and_a_small_state(
    rank: int, start: int
) -> None:
    pipeline = _pipeline()
    loader = ms.DataLoader(pipeline, rank=rank, world_size=RANKS)
    state = loader.state_dict()
    run_state = parse(state)
    run_state.batches = start
    run_state.steps_done = start // RANKS
    loader.load_state_dict(to_state(run_state, state))
    batches = iter(loader)
    for turn in range(3):
        number = first_batch(start, rank, RANKS) + turn * RANKS
        assert next(batches) == tuple(
            Dataset(pipeline.node.inputs()[""]).rows(range(number * BATCH, (number + 1) * BATCH))
        )
    saved = loader.state_dict()
    assert (saved["batches"], saved["steps_done"]) == (start + 3 * RANKS, start // RANKS + 3)
    del saved["spec"]
    assert (
        len(json.dumps({**saved, "lanes": [lane for lane in saved["lanes"].values() if lane]}))
        < 400
    )
