"""Sends several small parcels from a worker process to the main process at once.

One trip through the queue costs about 0.2 ms, however small it is. A worker therefore bundles the
messages that it makes next, as long as they are small and quick to make. The main process measures
how long bundles take and publishes the size of later ones as cumulative counts ("after bundle k you
have sent n messages"). The counts are the same for all workers: messages are handed out one from
each worker in turn, so a worker with larger bundles would only wait for the others.

    worker 0   | a | c | e g i k | m o q s |        counts  1 2 6 10
    worker 1   | b | d | f h j l | n p r t |        order   a b c d e f g h i j ...

A bundle that becomes late (`_LATE_S`) or large (`_FULL` bytes) leaves early. A worker that sent too
few messages, or missed an update of the counts, catches up with its next bundle, so workers never
drift apart. While one worker is far behind, the others send one message per bundle, so that few
messages wait in the main process, however long the run.

A message waits in the worker until its bundle is complete. Where the next row may come only after
the message was delivered (a source that the training loop feeds, for example), every message
travels alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch

from midstream.transport.parcel import Parcel

__all__ = ["MAX_PARCELS", "Bundle", "Bundler", "Unbundler", "new_counts", "restart_counts"]

MAX_PARCELS = 8
"""The most parcels in a bundle."""

_QUICK_S, _LATE_S = 1e-3, 4e-3  # bundles grow below the first, shrink above the second
_FULL = 1 << 20  # bytes


def new_counts(workers: int, prefetch: int) -> torch.Tensor:
    """The published counts: how many messages a worker has sent after each of its bundles.

    Args:
        workers: Number of workers.
        prefetch: Bundles that torch lets each worker make ahead.

    Returns:
        int64 in shared memory, a ring: the count for bundle ``k`` is at index ``k % len``.
    """
    counts = torch.arange(1, prefetch + workers + 9)
    return counts.share_memory_()  # type: ignore[no-untyped-call, no-any-return]


def restart_counts(counts: torch.Tensor) -> None:
    """Prepares the counts for another epoch of the same workers.

    All bundles are as large as the smallest of the last ones.
    """
    size = int(counts.sort().values.diff().min().clamp(1, MAX_PARCELS))
    counts.copy_(torch.arange(1, len(counts) + 1) * size)


class Bundle:
    """Parcels of one worker, in order.

    Attributes:
        worker: Number of the worker.
        parcels: One for each message.
        took: Seconds to make them; infinity if they are too large for a bundle.
        ended: Whether this is the worker's last bundle.
    """

    __slots__ = ("ended", "parcels", "took", "worker")

    def __init__(self, worker: int, parcels: list[Parcel], took: float, ended: bool) -> None:
        self.worker, self.parcels, self.took, self.ended = worker, parcels, took, ended

    def __reduce__(self) -> Any:
        return Bundle, (self.worker, self.parcels, self.took, self.ended)

    def pin_memory(self) -> Bundle:
        """Copies the parcels' tensors to pinned memory. Called by torch's pin-memory thread."""
        for parcel in self.parcels:
            parcel.pin_memory()
        return self


class Bundler:
    """Iterates bundles in a worker.

    Args:
        reader: Makes the worker's messages.
        pack: Packs one message.
        worker: Number of the worker.
        counts: See `new_counts`.
    """

    def __init__(
        self,
        reader: Iterator[Any],
        pack: Callable[[Any], Parcel],
        worker: int,
        counts: torch.Tensor,
    ) -> None:
        self._reader, self._pack, self._worker = reader, pack, worker
        self._counts = memoryview(counts.numpy().data)
        self._num_bundles, self._num_sent = 0, 0
        self._error: Exception | None = None

    def __iter__(self) -> Bundler:
        return self

    def __next__(self) -> Bundle:
        if self._error is not None:
            raise self._error
        count = self._counts[self._num_bundles % len(self._counts)]
        wanted = min(count - self._num_sent, MAX_PARCELS)
        self._num_bundles += 1
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
                self._error = error  # raised after the parcels that were made before it
                break
            parcels.append(parcel)
            size += parcel.size
            if len(parcels) >= wanted or size >= _FULL or perf_counter() - start > _LATE_S:
                break
        self._num_sent += len(parcels)
        took = perf_counter() - start if size < _FULL else math.inf
        return Bundle(self._worker, parcels, took, False)


class Unbundler:
    """Iterates parcels in the main process, one from each worker in turn, and publishes the counts.

    Args:
        inner: Torch's iterator over the bundles of all workers.
        workers: Number of workers.
        prefetch: Bundles that torch lets each worker make ahead.
        counts: See `new_counts`; the workers began with the same values.
        max_parcels: The most parcels in a bundle.
    """

    def __init__(
        self,
        inner: Any,
        workers: int,
        prefetch: int,
        counts: torch.Tensor,
        max_parcels: int = MAX_PARCELS,
    ) -> None:
        self._inner, self._prefetch, self._max_parcels = inner, prefetch, max_parcels
        self._waiting: list[deque[Parcel]] = [deque() for _ in range(workers)]  # by worker
        self._ended = [False] * workers
        self._turn = 0  # the worker whose parcel is handed out next
        self._counts = memoryview(counts.numpy().data)
        self._size = self._counts[0]  # messages in a bundle
        self._num_received = [0] * workers  # bundles of each worker
        self._rounds = 0  # bundles that every worker that has not ended has sent
        self._longest = 0.0  # seconds, of the bundles since the last round
        self._num_published = prefetch + 2  # bundles whose count will not change any more
        self._count = self._counts[self._num_published - 1]  # that of the last of them

    def __iter__(self) -> Unbundler:
        return self

    def __next__(self) -> Parcel:
        while True:
            turn = self._turn
            parcels = self._waiting[turn]
            if parcels or self._ended[turn]:
                self._turn = turn + 1 if turn + 1 < len(self._waiting) else 0
                if parcels:
                    return parcels.popleft()
                if any(self._waiting):
                    continue
            # When all workers have ended, torch's iterator stops them and raises StopIteration.
            self._receive(next(self._inner))

    def _receive(self, bundle: Bundle) -> None:
        self._waiting[bundle.worker].extend(bundle.parcels)
        self._num_received[bundle.worker] += 1
        if bundle.ended:
            self._ended[bundle.worker] = True
        self._longest = max(self._longest, bundle.took)
        alive = [count for count, ended in zip(self._num_received, self._ended) if not ended]
        if alive and min(alive) > self._rounds:
            self._rounds = min(alive)
            self._publish(len(alive))

    def _publish(self, alive: int) -> None:
        """Publishes the counts of the next bundles, which no worker can have begun.

        Called when a bundle of each of the ``alive`` workers has arrived.
        """
        if self._longest < _QUICK_S:
            self._size = min(2 * self._size, self._max_parcels)
        elif self._longest > _LATE_S:
            self._size = max(1, self._size // 2)
        self._longest = 0.0
        # For each worker that has ended, torch lets another one make one more bundle ahead.
        ahead = self._prefetch + -(-len(self._waiting) // alive) + 1
        size = self._size if max(map(len, self._waiting)) <= 2 * MAX_PARCELS else 1
        while self._num_published < self._rounds + ahead:
            self._count += size
            self._counts[self._num_published % len(self._counts)] = self._count
            self._num_published += 1

    @property
    def _workers(self) -> Any:
        """The worker processes, under the name that torch's iterator has for them."""
        return self._inner._workers

    def _shutdown_workers(self) -> None:
        self._inner._shutdown_workers()
