"""Several envelopes a trip: what goes from a worker process to the main one costs some 0.2 ms, however small it is.

A worker bundles the envelopes it makes next, when they are quickly made and small. How many is told
by the main process, which sees what a bundle took, for each worker's first, second, ... bundle of
an epoch, and for all workers alike: envelopes are handed out one from each worker in turn, so that
a worker whose bundles were larger would only be waited for by the others.

    worker 0   | a | c | e g i k | m o q s |        totals  1 2 6 10
    worker 1   | b | d | f h j l | n p r t |        order   a b c d e f g h i j ...

A bundle that gets late (`_LATE_S`) or large (`_FULL` bytes) leaves as it is. What is told are
totals: the next ones bring what it lacks, and no difference between workers stays, whatever each of
them saw told. As long as one is far behind, the others get no more than one envelope a bundle: so
few wait in the main process, however long the run.

What is made waits for the rest of its bundle. Where the next row may never come before it arrives
(a source that the training loop feeds, say), each envelope goes alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch

from midstream.transport.parcel import Parcel

__all__ = ["MOST", "Bundle", "Bundler", "Unbundler", "begin_anew", "new_totals"]

MOST = 8
"""Envelopes in a bundle."""

_QUICK_S, _LATE_S = 1e-3, 4e-3
_FULL = 1 << 20


def new_totals(workers: int, prefetch: int) -> torch.Tensor:
    """How many envelopes a worker is to have sent with each bundle, by its number: int64, used in a
    ring, in shared memory.
    """
    totals = torch.arange(1, prefetch + workers + 9)
    return totals.share_memory_()  # type: ignore[no-untyped-call, no-any-return]


def begin_anew(totals: torch.Tensor) -> None:
    """For the next epoch of living workers: bundles as small as the smallest of late."""
    size = int(totals.sort().values.diff().min().clamp(1, MOST))
    totals.copy_(torch.arange(1, len(totals) + 1) * size)


class Bundle:
    """Envelopes of one worker, packed, in their order.

    Attributes:
        worker: Its number.
        parcels: One for each envelope.
        took: Seconds to make them; infinitely many where they are too large for a bundle.
        ended: Whether the worker makes no more.
    """

    __slots__ = ("ended", "parcels", "took", "worker")

    def __init__(self, worker: int, parcels: list[Parcel], took: float, ended: bool) -> None:
        self.worker, self.parcels, self.took, self.ended = worker, parcels, took, ended

    def __reduce__(self) -> Any:
        return Bundle, (self.worker, self.parcels, self.took, self.ended)

    def pin_memory(self) -> Bundle:
        """The same in pinned memory: what torch's thread calls."""
        for parcel in self.parcels:
            parcel.pin_memory()
        return self


class Bundler:
    """In a worker: iterates bundles of what a reader makes.

    Args:
        reader: Makes envelopes.
        pack: Packs one.
        worker: The worker's number.
        totals: See `new_totals`.
    """

    def __init__(
        self,
        reader: Iterator[Any],
        pack: Callable[[Any], Parcel],
        worker: int,
        totals: torch.Tensor,
    ) -> None:
        self._reader, self._pack, self._worker = reader, pack, worker
        self._totals = memoryview(totals.numpy().data)
        self._number, self._sent = 0, 0
        self._error: Exception | None = None

    def __iter__(self) -> Bundler:
        return self

    def __next__(self) -> Bundle:
        if self._error is not None:
            raise self._error
        wanted = min(self._totals[self._number % len(self._totals)] - self._sent, MOST)
        self._number += 1
        parcels: list[Parcel] = []
        size, start = 0, perf_counter()
        while True:
            try:
                parcel = self._pack(next(self._reader))
            except StopIteration as error:
                self._error = error
                return Bundle(self._worker, parcels, perf_counter() - start, True)
            except Exception as error:
                if not parcels:
                    raise
                self._error = error  # after what was made before it
                break
            parcels.append(parcel)
            size += parcel.size
            if len(parcels) >= wanted or size >= _FULL or perf_counter() - start > _LATE_S:
                break
        self._sent += len(parcels)
        took = perf_counter() - start if size < _FULL else math.inf
        return Bundle(self._worker, parcels, took, False)


class Unbundler:
    """In the main process: iterates parcels, one from each worker in turn, and says how large bundles are to be.

    Args:
        inner: Torch's iterator over the bundles of all workers.
        workers: How many there are.
        prefetch: Bundles that torch lets each of them make ahead.
        totals: See `new_totals`; as it was when the workers began with it.
        most: Envelopes in a bundle.
    """

    def __init__(
        self, inner: Any, workers: int, prefetch: int, totals: torch.Tensor, most: int = MOST
    ) -> None:
        self._inner, self._prefetch, self._most = inner, prefetch, most
        self._lines: list[deque[Parcel]] = [deque() for _ in range(workers)]
        self._ended = [False] * workers
        self._turn = 0
        self._totals = memoryview(totals.numpy().data)
        self._size = self._totals[0]
        self._received = [0] * workers  # bundles
        self._rows, self._longest = 0, 0.0
        self._told = prefetch + 2  # of how many bundles the total is settled
        self._total = self._totals[self._told - 1]

    def __iter__(self) -> Unbundler:
        return self

    def __next__(self) -> Parcel:
        while True:
            turn = self._turn
            line = self._lines[turn]
            if line or self._ended[turn]:
                self._turn = turn + 1 if turn + 1 < len(self._lines) else 0
                if line:
                    return line.popleft()
                if any(self._lines):
                    continue
            self._receive(
                next(self._inner)
            )  # with no worker left it lets them end, and raises StopIteration

    def _receive(self, bundle: Bundle) -> None:
        self._lines[bundle.worker].extend(bundle.parcels)
        self._received[bundle.worker] += 1
        if bundle.ended:
            self._ended[bundle.worker] = True
        self._longest = max(self._longest, bundle.took)
        alive = [count for count, ended in zip(self._received, self._ended) if not ended]
        if alive and min(alive) > self._rows:
            self._rows = min(alive)
            self._plan(len(alive))

    def _plan(self, alive: int) -> None:
        """A bundle of each worker is here: choose the size of one that none of them can have begun."""
        if self._longest < _QUICK_S:
            self._size = min(2 * self._size, self._most)
        elif self._longest > _LATE_S:
            self._size = max(1, self._size // 2)
        self._longest = 0.0
        # Of each worker that ended, torch has the others make one bundle more ahead.
        ahead = self._prefetch + -(-len(self._lines) // alive) + 1
        size = self._size if max(map(len, self._lines)) <= 2 * MOST else 1
        while self._told < self._rows + ahead:
            self._total += size
            self._totals[self._told % len(self._totals)] = self._total
            self._told += 1

    @property
    def _workers(self) -> Any:
        """The processes."""
        return self._inner._workers

    def _shutdown_workers(self) -> None:
        self._inner._shutdown_workers()
