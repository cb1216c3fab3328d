"""Iterables: shards, lanes, and generators that raise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import midstream as ms
from midstream.dataset import Dataset
from midstream.pipeline.single_lane import SingleLaneIterator
from tests.helpers.loaders import drain, through_json
from tests.helpers.sources import all_batches, check_resume, loader


def shard_rows(shard: int = 0) -> Iterator[int]:
    """Shards of 5, 6, 7, ... rows."""
    return (100 * shard + row for row in range(5 + shard))


def generator_that_dies(shard: int = 0) -> Iterator[int]:
    for row in range(10):
        if row == 4:
            raise OSError("connection lost")
        yield 100 * shard + row


class GoesOn:
    """An iterator of 10 rows that raises at row 4 and goes on."""

    def __init__(self, shard: int = 0, bad: int = 4) -> None:
        self.shard, self.row, self.bad = shard, -1, bad

    def __iter__(self) -> GoesOn:
        return self

    def __next__(self) -> int:
        self.row += 1
        if self.row == 10:
            raise StopIteration
        if self.row == self.bad:
            raise OSError("bad record")
        return 100 * self.shard + self.row


def test_an_iterable_is_made_afresh_for_every_pass() -> None:
    made: list[int] = []

    def make() -> list[int]:
        made.append(1)
        return [1, 2, 3]

    ds = ms.from_iterable(make, name="letters")
    assert made == []
    assert list(ds) == list(ds) == [1, 2, 3]
    assert list(ds.repeat(2)) == [1, 2, 3, 1, 2, 3]
    assert len(made) == 4


@pytest.mark.parametrize("lane", [(0, 1), (1, 3), (3, 4), (4, 5)])
def test_shard_i_feeds_lane_i_modulo_the_lanes(lane: tuple[int, int]) -> None:
    expected = [row for shard in range(lane[0], 4, lane[1]) for row in shard_rows(shard)]
    assert (
        check_resume(lambda: ms.from_iterable(shard_rows, name="s", num_shards=4), lane) == expected
    )


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 7])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_stride_gives_every_row_to_one_lane(num_lanes: int, num_shards: int) -> None:
    def make() -> Dataset:
        return ms.from_iterable(shard_rows, name="s", num_shards=num_shards, split="stride")

    found = [check_resume(make, (lane, num_lanes)) for lane in range(num_lanes)]
    everything = [row for shard in range(num_shards) for row in shard_rows(shard)]
    assert sorted(row for rows in found for row in rows) == sorted(everything)
    assert all(rows == sorted(rows) for rows in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_stride_serves_more_workers_than_shards(workers: int) -> None:
    ds = ms.from_iterable(lambda: range(50), name="s", split="stride")
    batches = all_batches(ds, workers, lanes=6)
    assert batches == all_batches(ds, 0, lanes=6)
    assert sorted(row for batch in batches for row in batch) == list(range(50))


def test_origins_of_an_iterable_name_row_and_shard() -> None:
    made = loader(ms.from_iterable(shard_rows, name="s", num_shards=3))
    batch = next(iter(made))
    assert batch == [0, 1, 2, 3]
    assert made.trace() == [ms.Origin("s", 0, 3 * row) for row in range(4)]


@pytest.mark.parametrize("split", ["shards", "stride"])
def test_a_generator_that_raises_is_dead_and_said_to_be(split: Any) -> None:
    def make() -> Dataset:
        return ms.from_iterable(generator_that_dies, name="net", num_shards=2, split=split)

    run = SingleLaneIterator(make().node, 0, 1, 0)
    assert [next(run) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ms.SampleError) as caught:
        next(run)
    assert caught.value.origin == ms.Origin("net", 0, 8)
    assert caught.value.original_message == "connection lost"
    assert "generator_that_dies @ " in caught.value.function
    state = through_json(run.state_dict())
    resumed = SingleLaneIterator(make().node, 0, 1, 0)
    resumed.load_state_dict(state)
    for stream in (
        run,
        run,
        resumed,
        resumed,
    ):  # again and again: never the next shard as if nothing had been lost
        with pytest.raises(
            ms.SourceError,
            match="shard 0 raised at row 4(.|\n)*every row after it is lost(.|\n)*in .map",
        ):
            next(stream)


def test_a_generator_that_raises_at_once_is_dead_and_said_to_be() -> None:
    def dies_at_once() -> Iterator[int]:
        raise OSError("no connection")
        yield 1

    run = iter(ms.from_iterable(dies_at_once, name="net"))
    with pytest.raises(ms.SampleError, match="no connection"):
        next(run)
    with pytest.raises(ms.SourceError, match="raised at row 0"):
        next(run)


@pytest.mark.parametrize("split", ["shards", "stride"])
@pytest.mark.parametrize("bad", [0, 4, 8])
def test_an_iterator_that_goes_on_after_raising_loses_one_sample(split: Any, bad: int) -> None:
    def make() -> Dataset:
        return ms.from_iterable(
            lambda shard: GoesOn(shard, bad), name="log", num_shards=2, split=split
        )

    whole = SingleLaneIterator(make().node, 0, 1, 0)
    found: list[Any] = []
    states = [whole.state_dict()]
    while True:
        try:
            found.append(next(whole))
        except StopIteration:
            break
        except ms.SampleError as error:
            found.append(error.origin)
        states.append(through_json(whole.state_dict()))
    expected: list[Any] = [100 * shard + row for shard in (0, 1) for row in range(10)]
    expected[bad], expected[10 + bad] = (
        ms.Origin("log", 0, 2 * bad),
        ms.Origin("log", 0, 2 * bad + 1),
    )
    assert found == expected
    for step, state in enumerate(states):
        resumed = SingleLaneIterator(make().node, 0, 1, 0)
        resumed.load_state_dict(state)
        assert [
            sample.origin if isinstance(sample, ms.SampleError) else sample
            for sample in drain(resumed)
        ] == found[step:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dead_generator_ends_a_loader_with_a_source_error(workers: int) -> None:
    def make(shard: int) -> Iterator[int]:
        return generator_that_dies(shard) if shard == 1 else shard_rows(shard)

    made = loader(ms.from_iterable(make, name="net", num_shards=2), workers, batch_size=2)
    iterator = iter(made)
    assert [next(iterator) for _ in range(4)] == [[0, 1], [100, 101], [2, 3], [102, 103]]
    with pytest.raises((ms.SampleError, ms.SourceError)):
        while True:
            next(iterator)
    with pytest.raises(ms.SourceError, match="shard 1 raised at row 4"):
        while True:
            try:
                next(iterator)
            except ms.SampleError:
                pass
    made.close()


def test_a_shard_that_cannot_be_opened_is_a_source_error_with_the_cause() -> None:
    def make() -> list[int]:
        raise FileNotFoundError("gone.csv")

    with pytest.raises(
        ms.SourceError, match=r"shard 0 cannot be opened: FileNotFoundError: gone\.csv"
    ) as caught:
        next(iter(ms.from_iterable(make, name="files")))
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(ms.SourceError, match="cannot be opened: TypeError"):
        next(iter(ms.from_iterable(lambda: 3, name="files")))  # type: ignore[arg-type,return-value]


def test_data_that_became_shorter_is_a_replay_that_diverged() -> None:
    whole = iter(ms.from_iterable(lambda: range(10), name="log"))
    for _ in range(6):
        next(whole)
    state = whole.state_dict()
    shorter = ms.from_iterable(lambda: range(4), name="log")
    resumed = SingleLaneIterator(shorter.node, 0, 1, 0)
    resumed.load_state_dict({**state, "fingerprint": shorter.fingerprint})
    with pytest.raises(ms.ReplayDiverged, match="ended at row 4 while rows up to 6"):
        next(resumed)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"make_iterable": [1, 2]}, TypeError, "from_iterable takes a callable; found list"),
        pytest.param(
            {"make_iterable": (x for x in "ab")},
            TypeError,
            "takes a callable; found generator",
            id="generator",
        ),
        ({"num_shards": 0}, ValueError, "num_shards is at least 1; found 0"),
        ({"num_shards": 2.0}, TypeError, "num_shards is an integer; found 2.0"),
        ({"num_shards": True}, TypeError, "num_shards is an integer; found True"),
        ({"split": "rows"}, ValueError, "split is one of 'shards', 'stride'; found 'rows'"),
        ({"name": 5}, ValueError, "name"),
        ({"name": "a|b"}, ValueError, "name"),
        ({"name": ""}, ValueError, "name"),
    ],
    ids=str,
)
def test_wrong_arguments_of_from_iterable_are_refused(
    options: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ms.from_iterable(**{"make_iterable": lambda: [1], "name": "x", **options})
