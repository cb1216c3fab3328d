"""Orders of whole compositions, frozen: an order once released never changes within a format version.

Whoever has a checkpoint of format 1 resumes in these orders. A change here means: a new `FORMAT`, a
new file under golden/, and a line under **Order** in the changelog. ``python -m
tests.promises.test_golden --write`` writes the file of the present format; without ``--write`` it says what differs. The
orders of single nodes are in test_orders.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import midstream as ms
from midstream.common.plain_state import FORMAT
from midstream.common.randomness import (
    draw,
    fold,
    fold_array,
    generator,
    mix_array,
    pass_key,
    permute,
    salt,
)
from midstream.dataset import Dataset
from midstream.pipeline.rows import I64
from midstream.pipeline.single_lane import SingleLaneIterator
from midstream.sources import SequenceSource

FILE = Path(__file__).parent.parent / "golden" / f"compositions-{FORMAT}.json"
FIRST = 64


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Blocks(SequenceSource):
    """A sequence in blocks of 7, 1, 20, 7, 1, 20, ... rows."""

    kind = "blocks"

    def block_sizes(self) -> I64:
        return np.resize(np.array([7, 1, 20], dtype=np.int64), len(self.data) // 28 * 3)


def source(k: int = 0, count: int = 1000) -> Dataset:
    return ms.from_dataset(range(10_000 * k, 10_000 * k + count))


def is_odd(row: int) -> bool:
    return row % 2 == 1


def parts(row: int) -> list[int]:
    return [row] * (row % 3)


def noisy(row: int, rng: np.random.Generator) -> list[Any]:
    return [row, round(rng.random(), 12), int(rng.integers(1000))]


def mix(stream: bool = False, **options: Any) -> Dataset:
    made = {
        name: source(k, 60 * (k + 1)).shuffle(1) for k, name in enumerate(("web", "code", "math"))
    }
    if stream:
        made = {name: part.filter(is_odd) for name, part in made.items()}
    return ms.interleave(made, {"web": 6, "code": 3, "math": 1}, **options)


def first(ds: Dataset, lane: int = 0, lanes: int = 1, epoch: int = 0) -> list[Any]:
    return list(itertools.islice(SingleLaneIterator(ds.node, lane, lanes, epoch), FIRST))


def batches(ds: Dataset, **options: Any) -> list[Any]:
    loader = ms.DataLoader(ds, batch_size=4, collate_fn=list, **options)
    return list(itertools.islice(loader, FIRST // 4))


ORDERS = {
    # numbers
    "salt": lambda: [salt(name) for name in ("", "shuffle", "web/shuffle")],
    "mix": lambda: mix_array(np.arange(4, dtype=np.uint64)).tolist(),
    "fold": lambda: [fold(0), fold(3, 1), fold(1, 3), fold(-1), int(fold_array(9, 4)[0])],
    "draw": lambda: draw(5, 2**40, 4).tolist(),
    "pass keys": lambda: pass_key(np.array([7], dtype=np.uint64), np.arange(4)).tolist(),
    "permute, one row more than is drawn whole": lambda: permute(
        np.arange(257), 257, 1, np.array([0], dtype=np.uint64)
    )[:FIRST].tolist(),
    "generator": lambda: generator(4, 2).random(3).tolist(),
    # nodes that test_orders.py leaves out
    "window shuffle": lambda: first(Dataset(Blocks(range(1120))).shuffle(3, window_blocks=3)),
    "window shuffle, sixteen blocks": lambda: first(Dataset(Blocks(range(1120))).shuffle(3)),
    "window shuffle, second pass": lambda: first(
        Dataset(Blocks(range(28))).shuffle(3, window_blocks=2).repeat(3).skip(28)
    ),
    "buffered shuffle, lane 1 of 48": lambda: first(
        source(0, 20_000).shuffle(3, buffer_size=480), 1, 48
    ),
    "shuffle of a shuffle": lambda: first(source().shuffle(1).shuffle(1)),
    "map with a generator": lambda: first(
        source(0, 20).shuffle(2).map(noisy, with_rng=True, seed=5)
    ),
    # mixes
    "mix, all": lambda: first(mix(stopping_strategy="all_exhausted"), epoch=1),
    "mix, each once, the end": lambda: mix(
        stopping_strategy="all_exhausted_without_replacement"
    ).rows(range(296, 360)),
    "mix, second time round": lambda: (
        mix(seed=4).repeat(2).rows(range(len(mix(seed=4)), len(mix(seed=4)) + FIRST))
    ),
    "mix of streams, all": lambda: first(mix(stream=True, stopping_strategy="all_exhausted"), 1, 3),
    "mix of streams, each once": lambda: first(
        mix(True, stopping_strategy="all_exhausted_without_replacement"), 2, 3
    ),
    "mix of mixes": lambda: first(
        ms.interleave({"a": mix(), "b": source(7, 90)}, {"a": 1, "b": 1}, seed=2), epoch=3
    ),
    # streams of streams, and the loader
    "everything": lambda: first(
        mix(stream=True).flat_map(parts).shuffle(9, buffer_size=40).repeat(2).skip(5), 0, 2, epoch=1
    ),
    "loader, random access": lambda: batches(mix().map(int)),
    "loader, streams": lambda: batches(mix(stream=True).shuffle(1, buffer_size=96), lanes=12),
    "loader, rank 1 of 3": lambda: batches(mix(stream=True), lanes=12, rank=1, world_size=3),
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_is_the_one_that_was_released(name: str) -> None:
    assert json.loads(json.dumps(ORDERS[name]())) == json.loads(FILE.read_text())[name]


def test_nothing_is_frozen_that_is_not_looked_at() -> None:
    assert list(json.loads(FILE.read_text())) == list(ORDERS)


def main() -> None:
    found = {name: json.loads(json.dumps(order())) for name, order in ORDERS.items()}
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    changed = [name for name in found if known.get(name) != found[name]]
    print(
        f"{FILE.name}: {len(changed)} of {len(found)} orders differ: {', '.join(changed) or 'none'}"
    )
    if "--write" in sys.argv[1:]:
        lines = [f"{json.dumps(name)}: {json.dumps(order)}" for name, order in found.items()]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
