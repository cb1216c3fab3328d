"""Mixes that tests of interleave and of set_weights use."""

from __future__ import annotations

import warnings
from typing import Any

import midstream as ms
from midstream.dataset import Dataset
from tests.helpers.simulate import Cluster

NAMES = ("web", "code", "math")


def source(k: int, count: int) -> Dataset:
    return ms.from_dataset(range(10_000 * k, 10_000 * k + count), name=NAMES[k])


def keep(row: int) -> bool:
    return row % 10 != 3


def tokens(row: int) -> int:
    return (row * 7) % 41


def mixed(kind: str, weights: Any = None, rows: int = 240, **options: Any) -> Dataset:
    """A mix of two sources, named "mix", by positions ("rows"), as a stream, by tokens, or below
    other nodes.
    """
    parts: dict[str, Dataset] = {
        "web": source(0, rows).shuffle(1),
        "code": source(1, rows).shuffle(2),
    }
    if kind != "rows":
        parts = {name: part.filter(keep) for name, part in parts.items()}
    by = {"weights_by": tokens} if kind in ("tokens", "buffered") else {}
    mix = ms.interleave(parts, weights or {"web": 7, "code": 3}, name="mix", **by, **options)
    if kind == "buffered":
        mix = mix.map(int).shuffle(5, buffer_size=60).flat_map(lambda row: [row])
    if kind == "nested":
        mix = ms.interleave({"inner": mix, "math": source(2, rows)}, {"inner": 3, "math": 1})
    return mix.batch(3, collate_fn=tuple)


KINDS = ("rows", "streams", "tokens", "buffered", "nested")


def flat(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch]


def cluster(pipeline: Dataset, ranks: int, workers: int, state: Any = None) -> Cluster:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Cluster(
            pipeline, ranks, workers, state, lanes=None if state else 12, remainder="uneven"
        )
