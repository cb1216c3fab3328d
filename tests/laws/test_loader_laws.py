"""The laws of the loader, on rows of cases.py: batches do not depend on workers, ranks or resumes."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from tests.cases import BASE, CASES, FIVE, READERS, build, identify, plain
from tests.helpers.loaders import chain, loader, through_json, whole

pytestmark = pytest.mark.filterwarnings("ignore:the loader was left after batch:UserWarning")

ROWS = list(CASES)


@pytest.mark.parametrize("row", READERS)
@pytest.mark.processes
def test_batches_are_the_same_for_any_number_of_workers(row: str) -> None:
    ds = build(row)
    expected = whole(ds)
    assert expected
    assert whole(ds, 2) == expected


@pytest.mark.slow
@pytest.mark.parametrize("row", FIVE)
@pytest.mark.parametrize("workers", [1, 3, 4])
@pytest.mark.parametrize("persistent", [False, True])
def test_batches_are_the_same_for_more_workers_and_persistence(
    row: str, workers: int, persistent: bool
) -> None:
    ds = build(row)
    assert whole(ds, workers, persistent_workers=persistent) == whole(ds)


@pytest.mark.slow
@pytest.mark.parametrize("row", FIVE)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_batches_are_the_same_for_every_start_method(row: str, method: str) -> None:
    ds = build(row)
    assert whole(ds, 2, method=method) == whole(ds)


@pytest.mark.parametrize("row", READERS)
@pytest.mark.processes
def test_cut_anywhere_and_resumed_with_other_workers_five_times(row: str) -> None:
    ds = build(row)
    expected = whole(ds)
    size = len(expected)
    rng = random.Random(row)
    for workers in ([0, 0, 0, 0, 0, 0], [0, 2, 0, 2, 0, 2]):
        cuts = [rng.randrange(0, max(1, size // 5)) for _ in range(5)]
        pieces: list[tuple[int, int | None]] = [*zip(workers, cuts), (workers[5], None)]
        assert chain(ds, pieces) == expected, pieces


@pytest.mark.parametrize("row", READERS)
def test_resume_at_every_batch(row: str) -> None:
    ds = build(row)
    made = loader(ds)
    states = [through_json(made.state_dict())]
    batches = []
    for batch in made:
        batches.append(plain(batch))
        states.append(through_json(made.state_dict()))
    for step, state in enumerate(states[:-1]):
        resumed = loader(ds)
        resumed.load_state_dict(state)
        assert [plain(batch) for batch in resumed] == batches[step:]
        assert resumed.epoch == 1
    assert states[-1]["epoch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("row", FIVE)
def test_cut_anywhere_and_resumed_with_one_to_four_workers(row: str) -> None:
    ds = build(row)
    expected = whole(ds)
    step = max(1, len(expected) // 6)
    assert chain(ds, [(1, step), (3, step), (4, 1), (2, step), (3, 2), (1, None)]) == expected


@pytest.mark.parametrize(
    ("row", "workers"), [*((row, 0) for row in ROWS), *((row, 2) for row in READERS)]
)
def test_progress_and_trace_count_what_was_delivered(row: str, workers: int) -> None:
    case = CASES[row]
    ds = build(row)
    made = loader(ds, workers)
    delivered: Counter[int] = Counter()
    for step, batch in zip(range(9), made):
        found = identify(plain(batch))
        origins = made.trace()
        # A document that pack cut counts once.
        delivered.update(
            value // BASE
            for value, origin in zip(found, origins)
            if not (case.cuts and origin.part)
        )
        assert len(origins) == len(found)
        if "gz" not in row and row not in ("hub stream", "iterable"):
            assert [BASE * case.sources[origin.source] + origin.row for origin in origins] == found
        assert made.trace(step + 1) == origins
        progress = made.progress()
        assert {name: source.samples for name, source in progress.sources.items()} == {
            name: delivered[k] for name, k in case.sources.items()
        }
    made.close()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_make_the_same_global_order(row: str, world_size: int) -> None:
    ds = build(row)
    expected = whole(ds, remainder="uneven")
    ranks = [
        loader(ds, rank=rank, world_size=world_size, remainder="uneven")
        for rank in range(world_size)
    ]
    iterators = [iter(made) for made in ranks]
    found = []
    live = list(range(world_size))
    while live:
        for rank in list(live):
            try:
                found.append(plain(next(iterators[rank])))
            except StopIteration:
                live.remove(rank)
    if ds.random_access:
        assert found == expected
    else:
        assert sorted(map(json.dumps, found)) == sorted(
            map(json.dumps, expected)
        )  # lanes drain at different times
        prefix = (
            next(i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1])
            if found != expected
            else None
        )
        assert prefix is None or prefix > world_size
