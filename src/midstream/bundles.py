"""Several envelopes a trip: what goes from a worker process to the main one costs some 0.2 ms, however small it is.

A worker bundles the envelopes it makes next, when they are quickly made and small. How many is told by the main process, which
sees what a bundle took, for each worker's first, second, ... bundle of an epoch, and for all workers alike: envelopes are
handed out one from each worker in turn, so that a worker whose bundles were larger would only be waited for by the others.

    worker 0   | a | c | e g i k | m o q s |        sizes   1 1 4 4
    worker 1   | b | d | f h j l | n p r t |        order   a b c d e f g h i j ...

A bundle that gets late (`_LATE_S`) or large (`_FULL` bytes) leaves as it is; what it lacks is owed, and the next one brings it.
In the main process at most ``MOST`` envelopes a worker wait besides those that torch prefetches.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch

from midstream.transport import Parcel

__all__ = ["MOST", "Bundle", "Bundler", "Unbundler", "new_sizes"]

MOST = 8
"""Envelopes in a bundle."""

_QUICK_S, _LATE_S = 1e-3, 4e-3
_FULL = 1 << 20


def new_sizes(prefetch: int) -> torch.Tensor:
    """How many envelopes each bundle is to hold, by its number: int64, shape [n], used in a ring, in shared memory."""
    sizes = torch.ones(prefetch + 8, dtype=torch.int64)
    return sizes.share_memory_()  # type: ignore[no-untyped-call, no-any-return]


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
        sizes: See `new_sizes`.
    """

    def __init__(self, reader: Iterator[Any], pack: Callable[[Any], Parcel], worker: int, sizes: torch.Tensor) -> None:
        self._reader, self._pack, self._worker = reader, pack, worker
        self._sizes = memoryview(sizes.numpy().data)
        self._number, self._owed = 0, 0
        self._error: Exception | None = None

    def __iter__(self) -> Bundler:
        return self

    def __next__(self) -> Bundle:
        if self._error is not None:
            raise self._error
        wanted = self._sizes[self._number % len(self._sizes)] + self._owed
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
            if len(parcels) >= min(wanted, MOST) or size >= _FULL or perf_counter() - start > _LATE_S:
                break
        self._owed = wanted - len(parcels)
        took = perf_counter() - start if size < _FULL else math.inf
        return Bundle(self._worker, parcels, took, False)


class Unbundler:
    """In the main process: iterates parcels, one from each worker in turn, and says how large bundles are to be.

    Args:
        inner: Torch's iterator over the bundles of all workers.
        workers: How many there are.
        prefetch: Bundles that torch lets each of them make ahead.
        sizes: See `new_sizes`; none of the workers may have begun with a bundle that it does not tell the size of.
    """

    def __init__(self, inner: Any, workers: int, prefetch: int, sizes: torch.Tensor) -> None:
        self._inner, self._prefetch = inner, prefetch
        self._lines: list[deque[Parcel]] = [deque() for _ in range(workers)]
        self._ended = [False] * workers
        self._turn = 0
        self._sizes = memoryview(sizes.numpy().data)
        self._size = self._sizes[0]
        self._rows, self._in_row, self._longest = 0, 0, 0.0

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
            self._receive(next(self._inner))  # with no worker left it lets them end, and raises StopIteration

    def _receive(self, bundle: Bundle) -> None:
        self._lines[bundle.worker].extend(bundle.parcels)
        if bundle.ended:
            self._ended[bundle.worker] = True
        self._longest = max(self._longest, bundle.took)
        self._in_row += 1
        if self._in_row >= len(self._lines):
            self._plan()

    def _plan(self) -> None:
        """A bundle of each worker is here: choose the size of one that none of them can have begun."""
        if self._longest < _QUICK_S:
            self._size = min(2 * self._size, MOST)
        elif self._longest > _LATE_S:
            self._size = max(1, self._size // 2)
        self._rows, self._in_row, self._longest = self._rows + 1, 0, 0.0
        self._sizes[(self._rows + self._prefetch + 1) % len(self._sizes)] = self._size

    @property
    def _workers(self) -> Any:
        """The processes."""
        return self._inner._workers

    def _shutdown_workers(self) -> None:
        self._inner._shutdown_workers()
