"""Many ranks and workers in one process: what the loaders of a whole cluster do, without a single
process more.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torchdata.stateful_dataloader import StatefulDataLoader

import midstream as ms
from midstream.distributed.topology import first_batch
from midstream.workers import readers


class _Workers:
    """The readers of all workers of a rank, asked in turn as torch asks them."""

    def __init__(self, loader: Any) -> None:
        runner = loader.dataset
        runner.frozen = True  # no process was forked, so there is nothing to freeze
        self.readers: list[Any] = []
        for worker in range(max(1, loader.num_workers)):
            with mock.patch.object(
                readers, "get_worker_info", lambda worker=worker: types.SimpleNamespace(id=worker)
            ):
                self.readers.append(iter(runner))
        self.turn = 0

    def __iter__(self) -> _Workers:
        return self

    def __next__(self) -> Any:
        while any(reader is not None for reader in self.readers):
            worker, self.turn = self.turn, (self.turn + 1) % len(self.readers)
            if self.readers[worker] is not None:
                try:
                    return next(self.readers[worker])
                except StopIteration:
                    self.readers[worker] = None
        raise StopIteration


@contextmanager
def simulated_workers() -> Iterator[None]:
    """Inside, loaders with ``num_workers`` start no process."""
    with mock.patch.object(StatefulDataLoader, "__iter__", lambda loader: _Workers(loader)):
        yield


def _first(loader: Any) -> int:
    """The first batch of the rank in the pass in progress (or, where weights were set, in the one
    that goes on for it).
    """
    if loader.run.position is not None:
        return int(loader.run.position.first)
    return first_batch(loader.run.loaded[0].batches, loader.rank, loader.world_size)


class Cluster:
    """The loaders of all ranks, in step.

    Attributes:
        steps: What each step handed out since the cluster was made: a list per step, a batch per
            rank that had one, in the run's order.
    """

    def __init__(
        self, pipeline: ms.Dataset, ranks: int, workers: int, state: Any = None, **options: Any
    ) -> None:
        self.loaders = [
            ms.DataLoader(pipeline, rank=rank, world_size=ranks, num_workers=workers, **options)
            for rank in range(ranks)
        ]
        if state is not None:
            for loader in self.loaders:
                loader.load_state_dict(state)
        self.steps: list[list[Any]] = []
        self.epoch = self.loaders[0].epoch
        with simulated_workers():
            self.iterators = [iter(loader) for loader in self.loaders]
        self.over = False

    def step(self) -> bool:
        """One step on every rank; False when no rank has anything more."""
        batches = []
        for rank in sorted(range(len(self.loaders)), key=lambda rank: _first(self.loaders[rank])):
            try:
                batches.append(next(self.iterators[rank]))
            except StopIteration:
                continue
        if batches:
            self.steps.append(batches)
        self.over = not batches
        return bool(batches)

    def run(self, steps: int | None = None) -> None:
        """So many steps, or to the end of the epoch."""
        while steps is None or steps > 0:
            if not self.step():
                return
            if steps is not None:
                steps -= 1

    def states(self) -> list[dict[str, Any]]:
        """The states of all ranks."""
        return [loader.state_dict() for loader in self.loaders]

    @property
    def sequence(self) -> list[Any]:
        """All batches in the run's order."""
        return [batch for step in self.steps for batch in step]


def run_alone(pipeline: ms.Dataset, lanes: int) -> list[Any]:
    """All batches of an epoch on one rank, in the run's order."""
    cluster = Cluster(pipeline, 1, 0, lanes=lanes)
    cluster.run()
    return cluster.sequence
