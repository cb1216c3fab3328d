"""Checks that tests of several sources use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import datasets

from midstream.dataset import Dataset
from midstream.pipeline.single_lane import SingleLaneIterator
from tests.cases import plain
from tests.helpers import loaders
from tests.helpers.loaders import through_json

N = 24


loader = functools.partial(loaders.loader, lanes=None)


all_batches = functools.partial(loaders.whole, lanes=None)


def check_resume(make: Callable[[], Dataset], lane: tuple[int, int] = (0, 1)) -> list[Any]:
    """Cut after every sample, in chains of 1, 2, 3 and 7, each state saved again right after its
    load.
    """
    whole = SingleLaneIterator(make().node, *lane, 0)
    samples, states = [], [through_json(whole.state_dict())]
    for sample in whole:
        samples.append(plain(sample))
        states.append(through_json(whole.state_dict()))
    for step, state in enumerate(states):
        resumed = SingleLaneIterator(make().node, *lane, 0)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        again = SingleLaneIterator(make().node, *lane, 0)
        again.load_state_dict(resumed.state_dict())
        assert [plain(sample) for sample in again] == samples[step:], f"resumed after sample {step}"
    for stride in (1, 2, 3, 7):
        found, state = [], states[0]
        while True:
            part = SingleLaneIterator(make().node, *lane, 0)
            part.load_state_dict(state)
            taken = [plain(sample) for _, sample in zip(range(stride), part)]
            found.extend(taken)
            state = part.state_dict()
            if len(taken) < stride:
                break
        assert found == samples, f"pieces of {stride}"
    return samples


VIEWS: dict[str, Callable[[datasets.Dataset], datasets.Dataset]] = {
    "whole": lambda d: d,
    "shuffled": lambda d: d.shuffle(seed=3),
    "selected": lambda d: d.select([17, 3, 3, 22, 0, 9]),
    "range": lambda d: d.select(range(5, 19)),
    "range from the middle of a chunk, one row": lambda d: d.select(range(12, 13)),
    "range of shuffled": lambda d: d.shuffle(seed=3).select(range(4, 15)),
    "shuffled range": lambda d: d.select(range(4, 15)).shuffle(seed=3),
    "train_test_split": lambda d: d.train_test_split(0.4, seed=1)["test"],
    "shard": lambda d: d.shard(3, 1, contiguous=True),
    "every third": lambda d: d.shard(3, 1, contiguous=False),
    "concatenated": lambda d: datasets.concatenate_datasets(
        [d.select(range(7)), d, d.select(range(20, 24))]
    ),
    "concatenated with a shuffled one": lambda d: datasets.concatenate_datasets(
        [d.shuffle(seed=1), d]
    ),
    "columns selected": lambda d: d.select_columns(["struct", "int8", "list int32 null"]),
    "one column": lambda d: d.select_columns(["list float32"]),
    "columns removed": lambda d: d.remove_columns(["int8", "string", "dictionary"]),
    "columns renamed": lambda d: d.rename_columns({"int8": "string2", "list int32": "tokens"}),
}


def stream(n: int = 32, shards: int = 4, start: int = 0) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"id": list(range(start, start + n))}).to_iterable_dataset(
        num_shards=shards
    )
