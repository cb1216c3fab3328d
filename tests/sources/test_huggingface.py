"""Hugging Face streams: shards, resuming, workers, and iterators that are dropped."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any

import datasets
import pytest
from datasets.distributed import split_dataset_by_node

import midstream as ms
from midstream.dataset import Dataset
from midstream.pipeline.single_lane import SingleLaneIterator
from midstream.sources.huggingface import _HubShards
from tests.cases import plain
from tests.helpers.sources import all_batches, check_resume, loader, stream


def from_shards(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        for row in range(7 + shard):
            yield {"id": 100 * shard + row}


def twice(batch: dict[str, list[int]]) -> dict[str, list[int]]:
    return {"id": [value for value in batch["id"] for _ in range(value % 3)]}


HUB: dict[str, Callable[[], datasets.IterableDataset]] = {
    "arrow": stream,
    "arrow, one shard": lambda: stream(20, 1),
    "arrow, uneven shards": lambda: stream(23, 5),
    "generator": lambda: datasets.IterableDataset.from_generator(
        from_shards, gen_kwargs={"shards": [0, 1, 2, 3]}
    ),
    "map": lambda: stream().map(lambda row: {"id": row["id"] * 10}),
    "map of batches": lambda: stream().map(
        lambda b: {"id": [-v for v in b["id"]]}, batched=True, batch_size=3
    ),
    "map to other numbers of rows": lambda: stream().map(twice, batched=True, batch_size=3),
    "filter": lambda: stream().filter(lambda row: row["id"] % 3 != 0),
    "filter of the generator": lambda: HUB["generator"]().filter(lambda row: row["id"] % 2 == 0),
    "filter that empties a shard": lambda: stream().filter(lambda row: not 8 <= row["id"] < 16),
    "skip": lambda: stream().skip(6),
    "skip of one shard": lambda: stream(20, 1).skip(6),
    "take": lambda: stream().take(10),
    "format": lambda: stream().with_format("numpy"),
    "repeat": lambda: stream(20, 2).repeat(2),
    "batch": lambda: stream().batch(3),
    "interleaved": lambda: datasets.interleave_datasets([stream(), stream(20, 4, 100)]),
    "interleaved by chance": lambda: datasets.interleave_datasets(
        [stream(), stream(20, 4, 100).filter(lambda row: row["id"] % 4 != 0)],
        probabilities=[0.6, 0.4],
        seed=3,
    ),
    "interleaved until all are exhausted": lambda: datasets.interleave_datasets(
        [stream(20, 2), stream(10, 2, 100)],
        probabilities=[0.5, 0.5],
        seed=1,
        stopping_strategy="all_exhausted",
    ),
    "concatenated": lambda: datasets.concatenate_datasets([stream(20, 2), stream(12, 3, 100)]),
}


def shard_by_shard(data: datasets.IterableDataset) -> list[list[Any]]:
    count = data.num_shards
    return [
        [plain(row) for row in data.shard(count, index, contiguous=False)] for index in range(count)
    ]


@pytest.mark.parametrize("kind", HUB)
@pytest.mark.parametrize(
    ("lane", "every"), [((0, 1), 4), ((1, 3), 256)], ids=["whole, own states", "lane 1 of 3"]
)
@pytest.mark.slow
def test_a_hub_stream_yields_its_shards_and_resumes_at_every_row(
    kind: str, lane: tuple[int, int], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        _HubShards, "rows_per_state", every
    )  # its own states come into play within a few rows
    data = HUB[kind]()
    expected = [row for rows in shard_by_shard(data)[lane[0] :: lane[1]] for row in rows]
    assert check_resume(lambda: ms.from_dataset(data), lane) == expected


def test_a_long_shard_resumes_from_the_streams_own_state() -> None:
    read: list[int] = []

    def watch(row: dict[str, int]) -> dict[str, int]:
        read.append(row["id"])
        return row

    data = stream(700, 1).map(watch)
    whole = iter(ms.from_dataset(data))
    for _ in range(600):
        next(whole)
    state = whole.state_dict()
    assert len(json.dumps(state)) < 1024 + 64
    read.clear()
    resumed = SingleLaneIterator(ms.from_dataset(data).node, 0, 1, 0)
    resumed.load_state_dict(state)
    assert next(resumed) == {"id": 600}
    assert len(read) <= 256


@pytest.mark.parametrize(
    "shuffled",
    [
        lambda: stream().shuffle(seed=1),
        lambda: stream().shuffle(seed=1, buffer_size=1),
        lambda: stream().shuffle(seed=1).map(lambda row: row).filter(bool).take(5),
        lambda: HUB["generator"]().shuffle(seed=1).with_format("numpy"),
        lambda: datasets.interleave_datasets([stream(), stream().shuffle(seed=1)]),
        lambda: datasets.concatenate_datasets(
            [stream().map(lambda row: row), stream().shuffle(seed=1)]
        ),
    ],
    ids=["arrow", "shards only", "below", "generator", "interleaved", "concatenated"],
)
def test_a_shuffled_hub_stream_is_refused_with_the_reason_and_the_alternative(
    shuffled: Callable[[], Any],
) -> None:
    with pytest.raises(
        ValueError,
        match=r"loses and repeats rows(.|\n)*from_dataset\(data\)\.shuffle\(seed, buffer_size=",
    ):
        ms.from_dataset(shuffled())


def test_a_table_shuffled_before_it_became_a_stream_is_taken() -> None:
    data = (
        datasets.Dataset.from_dict({"id": list(range(30))})
        .shuffle(seed=1)
        .to_iterable_dataset(num_shards=3)
    )
    assert check_resume(lambda: ms.from_dataset(data)) == [
        row for rows in shard_by_shard(data) for row in rows
    ]


@pytest.mark.parametrize("shards", [1, 4])
def test_a_hub_stream_split_by_node_is_refused(shards: int) -> None:
    """Lanes deal shards to ranks; a stream cut for a rank before that would lose rows, silently."""
    with pytest.raises(ValueError, match="split_dataset_by_node|split by node|rank"):
        ms.from_dataset(split_dataset_by_node(stream(40, shards), rank=0, world_size=2))


@pytest.mark.parametrize(
    "kind",
    ["arrow", "generator", "map of batches", "filter", "skip", "interleaved", "concatenated"],
)
@pytest.mark.processes
def test_workers_read_every_row_of_a_hub_stream_once(kind: str) -> None:
    """Inside a torch worker a Hugging Face stream would shard itself once more."""
    data = HUB[kind]()
    ds = ms.from_dataset(data)
    batches = all_batches(ds, 2)
    assert batches == all_batches(ds)
    found = [json.dumps(row) for batch in batches for row in batch]
    assert sorted(found) == sorted(json.dumps(row) for rows in shard_by_shard(data) for row in rows)


@pytest.mark.parametrize("kind", ["arrow", "interleaved by chance"])
@pytest.mark.processes
def test_a_hub_stream_resumes_with_other_workers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_HubShards, "rows_per_state", 4)
    ds = ms.from_dataset(HUB[kind]())
    expected = all_batches(ds, batch_size=3)
    found, state = [], None
    for workers, count in ((2, 3), (0, 2), (2, 4), (1, None)):
        made = loader(ds, workers, batch_size=3)
        if state is not None:
            made.load_state_dict(state)
            assert made.state_dict() == state
        found.extend(plain(batch) for _, batch in zip(range(count or 1000), made))
        state = made.state_dict()
        made.close()
    assert found == expected


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.processes
def test_every_epoch_of_a_hub_stream_is_whole(persistent: bool) -> None:
    made = loader(ms.from_dataset(stream(24, 4)), 2, persistent_workers=persistent)
    epochs = [sorted(row["id"] for batch in made for row in batch) for _ in range(3)]
    made.close()
    assert epochs == [list(range(24))] * 3
    assert made.epoch == 3


def open_hub_generators() -> int:
    return sum(
        type(thing) is GeneratorType and thing.gi_code.co_filename.endswith("iterable_dataset.py")
        for thing in gc.get_objects()
    )


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        lambda ds: SingleLaneIterator(ds.node, 0, 1, 0),
        lambda ds: iter(ds),
        lambda ds: iter(
            ds.map(lambda row: row).filter(bool).shuffle(1, buffer_size=4).batch(2, collate_fn=list)
        ),
        lambda ds: iter(loader(ds)),
    ],
    ids=["run", "iter", "pipeline", "loader"],
)
@pytest.mark.slow
def test_a_dropped_iterator_closes_its_hub_stream_at_once(
    run: Callable[[Dataset], Any], resumed: bool
) -> None:
    """Not when garbage is collected: that may be in a thread of the stream, which would wait for
    itself for ever.
    """
    ds = ms.from_dataset(datasets.interleave_datasets([stream(), stream()]))
    gc.collect()
    gc.disable()
    try:
        before = open_hub_generators()
        iterator = run(ds)
        next(iterator)
        assert open_hub_generators() > before
        if resumed and hasattr(iterator, "state_dict"):
            again = run(ds)
            again.load_state_dict(iterator.state_dict())
            next(again)
            del again
        del iterator
        assert open_hub_generators() == before
    finally:
        gc.enable()


def test_shards_and_columns_of_a_hub_stream_are_told() -> None:
    assert (
        repr(ms.from_dataset(stream(), name="web")).partition("  # ")[0]
        == "web: from_dataset(datasets.IterableDataset, 4 shards)"
    )
    with pytest.raises(TypeError, match="known only by reading"):
        len(ms.from_dataset(stream()))
    with pytest.raises(
        ValueError, match=r"'web' is an IterableDataset of 4 shards(.|\n)*num_shards=n"
    ):
        iter(loader(ms.from_dataset(stream(), name="web"), lanes=5))


def test_a_row_that_raises_in_a_hub_stream_is_told_and_the_rest_is_not_lost_in_silence() -> None:
    def parse(row: dict[str, int]) -> dict[str, int]:
        if row["id"] == 12:
            raise ValueError("twelve")
        return row

    run = iter(ms.from_dataset(stream().map(parse), name="web"))
    assert [next(run)["id"] for _ in range(12)] == list(range(12))
    with pytest.raises(ms.SampleError, match="twelve") as caught:
        next(run)
    assert caught.value.origin == ms.Origin("web", 0, 4 * 4 + 1)
    with pytest.raises(ms.SourceError, match=r"shard 1 raised at row 4(.|\n)*in \.map"):
        next(run)
