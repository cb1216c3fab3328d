"""Sources in worker processes, forked and spawned."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest

import midstream as ms
from tests.cases import plain
from tests.helpers.loaders import drain
from tests.helpers.sources import VIEWS, all_batches, loader
from tests.sources.test_huggingface import HUB
from tests.sources.test_iterable import shard_rows
from tests.sources.test_sequence import OneByOne


@pytest.fixture
def mapped(tmp_path: Path) -> datasets.Dataset:
    data = datasets.Dataset.from_dict(
        {
            "id": list(range(5000)),
            "tokens": [list(range(row % 9)) for row in range(5000)],
            "text": ["word" * 9] * 5000,
        }
    )
    data.save_to_disk(str(tmp_path / "data"))
    return datasets.load_from_disk(str(tmp_path / "data"))


@pytest.mark.parametrize("view", ["whole", "range", "shuffled"])
def test_a_memory_mapped_dataset_pickles_as_a_path_and_reopens(
    mapped: datasets.Dataset, view: str
) -> None:
    data = VIEWS[view](mapped)
    ds = ms.from_dataset(data)
    expected = [plain(sample) for sample in ds.rows(range(min(len(data), 200)))]
    for _, _ in zip(range(600), ds):  # handles are open now, and stay behind
        pass
    text = pickle.dumps(ds)
    if view == "shuffled":
        assert len(text) < 10_000 + 8 * len(
            data
        )  # in-memory indices; with a cache file they are a path too
    else:
        assert len(text) < 10_000
    copy = pickle.loads(text)
    assert copy == ds
    assert [plain(sample) for sample in copy.rows(range(len(expected)))] == expected


@pytest.mark.processes
def test_a_forked_worker_leaves_the_parents_handles_alone(mapped: datasets.Dataset) -> None:
    ds = ms.from_dataset(mapped.select(range(60)))
    expected = [plain(sample) for sample in ds]
    run = iter(ds)
    found = [plain(next(run)) for _ in range(20)]
    view = ds.rows([8])[0]["tokens"]
    batches = all_batches(ds, 2)
    assert [row for batch in batches for row in batch] == expected
    assert found + [plain(sample) for sample in run] == expected
    assert view.tolist() == list(range(8))


@pytest.mark.slow
def test_spawned_workers_read_what_the_main_process_reads(mapped: datasets.Dataset) -> None:
    ds = ms.interleave(
        {
            "mapped": ms.from_dataset(mapped.select(range(40))),
            "shuffled": ms.from_dataset(
                mapped.select(range(100)).shuffle(seed=1).select(range(40))
            ),
            "memory": ms.from_dataset(datasets.Dataset.from_dict({"id": list(range(40))})),
            "torch": ms.from_dataset(mapped.select(range(40)).with_format("torch", columns=["id"])),
            "hub": ms.from_dataset(HUB["generator"]()),
            "made": ms.from_iterable(shard_rows, num_shards=4),
            "map style": ms.from_dataset(OneByOne()).filter(bool),
        }
    ).map(lambda sample: sample)

    def read(workers: int, method: str = "fork") -> list[Any]:
        made = loader(ds, workers, method)
        found = [
            sample.origin if isinstance(sample, ms.SampleError) else plain(sample)
            for sample in drain(iter(made))
        ]
        made.close()
        return found

    assert read(1, "spawn") == read(0)
