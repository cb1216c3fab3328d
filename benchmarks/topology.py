"""Measures checkpoints: bytes per lane, time to save and load against lanes and position, and the
first batch on another topology.

    python benchmarks/topology.py

Every figure is of one run on this machine; times are medians. Bytes are without the pipeline's
spec.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import midstream as ms

ROWS = 4_000_000


def random_access() -> ms.Dataset:
    """Random access: shuffled rows."""
    return ms.from_dataset(range(ROWS), name="rows").shuffle(1)


def stream() -> ms.Dataset:
    """A stream: filtered, then shuffled in a buffer."""
    return (
        ms.from_dataset(range(ROWS), name="rows")
        .filter(lambda x: x % 7)
        .shuffle(2, buffer_size=10_000)
    )


def _median(work: Callable[[], Any], times: int = 9) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _size(state: dict[str, Any]) -> int:
    return len(json.dumps(state["lanes"]))


def lanes_table() -> None:
    """Against the number of lanes."""
    print("pipeline        lanes   bytes   per lane  state_dict    save    load  (ms)")
    for make in (random_access, stream):
        for lanes in (48, 512, 4096):
            loader = ms.DataLoader(make(), 8, lanes=lanes)
            iterator = iter(loader)
            for _ in islice(iterator, 2 * lanes):
                pass
            state = loader.state_dict()
            with tempfile.TemporaryDirectory() as root:
                took = [
                    _median(loader.state_dict),
                    _median(lambda: ms.checkpoint.save(root, loader)),  # noqa: B023
                ]
                took.append(_median(lambda: ms.checkpoint.load(root, ms.DataLoader(make(), 8))))  # noqa: B023
            shown = "  ".join(f"{1000 * seconds:8.2f}" for seconds in took)
            print(
                f"{make.__name__:14} {lanes:6} {_size(state):8} {_size(state) / lanes:9.0f}  {shown}"
            )


def position_table() -> None:
    """Against the position, and on another topology."""
    print(
        "\npipeline        batches    bytes    save    load  first batch on 3 ranks x 1 worker (ms)"
    )
    for make in (random_access, stream):
        loader = ms.DataLoader(make(), 8)
        iterator, done = iter(loader), 0
        for at in (480, 4_800, 48_000):
            for _ in islice(iterator, at - done):
                pass
            done = at
            with tempfile.TemporaryDirectory() as root:
                saved = _median(lambda: ms.checkpoint.save(root, loader), 5)  # noqa: B023
                loaded = _median(lambda: ms.checkpoint.load(root, ms.DataLoader(make(), 8)), 5)  # noqa: B023

                def first() -> None:
                    other = ms.DataLoader(make(), 8, num_workers=1, rank=1, world_size=3)  # noqa: B023
                    ms.checkpoint.load(root, other)
                    next(iter(other))
                    other.close()

                print(
                    f"{make.__name__:14} {at:8} {_size(loader.state_dict()):8} {1000 * saved:8.2f}{1000 * loaded:8.2f} "
                    f"{1000 * _median(first, 3):10.0f}"
                )


if __name__ == "__main__":
    lanes_table()
    position_table()
