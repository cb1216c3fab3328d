"""Detects dead workers while the loader waits for a batch.

The error is raised from ``next()``, at once, never from a signal handler. torch's own handler of
SIGCHLD raises wherever the main thread happens to be: in the middle of an optimizer step, after
which no checkpoint is right, or in the callback of a weak reference, where the error is printed and
lost. torch needs it because a process that waits for a pipe does not see another one die, and would
wait forever for a batch of which half is in the pipe.

Here a wait is for the pipe and for the ends of all workers at once, and every read of the pipe
waits that way. So nothing has to be interrupted. It works in every thread, and costs less than a
poll of multiprocessing, which makes a selector each time.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import selectors
import signal
import time
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Lost", "Wait", "exit_status", "lost_in"]

_LOOK_S = 1.0
"""Seconds between two looks at the workers during a wait.

Also how long the rest of a batch may take once its worker may be dead.
"""

_NAP_S = 0.05


class Lost(RuntimeError):
    """Workers ended that should have sent more, or the pipe cannot be read any more.

    Attributes:
        numbers: The numbers of these workers.
    """

    def __init__(self, text: str, numbers: list[int]) -> None:
        super().__init__(text)
        self.numbers = numbers


def lost_in(error: BaseException) -> Lost | None:
    """The `Lost` that is behind an error, if any: torch raises an error of its own from it."""
    found = error if isinstance(error, Lost) else error.__cause__
    return found if isinstance(found, Lost) else None


def exit_status(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "ended, and another process has taken its exit status"
    if code >= 0:
        return f"ended with exit status {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


class Wait:
    """Waits for the pipe of torch's result queue, and for the ends of all workers.

    The queue calls it in the one thread that reads the pipe: the loader's, or torch's thread that
    pins memory.

    Args:
        iterator: torch's iterator over worker processes. Its queue waits here from now on.
    """

    def __init__(self, iterator: Any) -> None:
        batches = iterator._worker_result_queue
        reader = batches._reader  # not kept in a field: it holds this object
        self._pipe = reader.fileno()
        self._dead: set[int] = set()
        self._finished: set[int] = set()
        self._status: list[bool] = []
        self._torn = self._reported = False
        self._workers = iterator._workers
        self._alive = set(range(len(self._workers)))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe, selectors.EVENT_READ)
        for number, worker in enumerate(self._workers):
            self._selector.register(worker.sentinel, selectors.EVENT_READ, number)
        batches._poll, batches._recv_bytes, reader._recv = (
            self.poll,
            partial(self.receive, reader),
            self.read,
        )
        self._pinned: queue.Queue[Any] | None = None
        if hasattr(iterator, "_pin_memory_thread"):
            self._pinned = iterator._data_queue
            iterator._data_queue = _Pinned(self._pinned)

    def begin(self, status: list[bool]) -> None:
        """Begin an epoch: all workers have batches to send.

        Args:
            status: torch's list of the workers that have not ended, by number.
        """
        self._finished.clear()
        self._status = status

    def finished(self, number: int) -> None:
        """Note that a worker has sent everything.

        Called before the worker is asked to end: torch's ``status`` changes later, in another
        thread.
        """
        self._finished.add(number)

    @property
    def broken(self) -> bool:
        """Whether a worker is dead, or the pipe stands in the middle of a batch."""
        return self._torn or bool(self._dead)

    def poll(self, timeout: float = 0.0) -> bool:
        """Whether something arrives within ``timeout`` seconds.

        Raises:
            Lost: If everything sent was taken, and a worker ended that should have sent more.
        """
        until = time.monotonic() + timeout
        while True:
            left = max(0.0, until - time.monotonic())
            if self._ready(0.0 if self._owing() and not self._reported else min(left, _LOOK_S)):
                return True
            if self._torn or self._owing():
                self._report()
            if self._torn or left == 0.0:
                return False

    def receive(self, reader: Connection) -> bytes:
        """The bytes of a batch."""
        try:
            return reader.recv_bytes()
        except BaseException:  # Ctrl-C, too
            self._torn = True
            raise

    def read(self, size: int) -> io.BytesIO:
        """``size`` bytes of the pipe."""
        found, before = io.BytesIO(), self._dead.copy()
        while (left := size - found.tell()) > 0:
            doubtful = False
            while not self._ready(_LOOK_S):
                if doubtful:  # nothing more comes: a dead worker should have sent the rest
                    self._torn = True
                    self._report()
                    raise queue.Empty
                doubtful = not before.issuperset(self._owing())
            chunk = os.read(self._pipe, left)
            if not chunk:
                raise EOFError("no worker can send any more")
            found.write(chunk)
        return found

    def _ready(self, timeout: float) -> bool:
        """Whether the pipe has something. If not, everything that dead workers sent was taken."""
        if self._torn:
            time.sleep(min(timeout, _NAP_S))
            return False
        ready = [key.data for key, _ in self._selector.select(timeout)]
        if None in ready:
            return True
        # A process that a worker started may hold the sentinel that shows its end.
        ready += [
            number for number in self._alive if not ready and not self._workers[number].is_alive()
        ]
        for number in ready:
            self._alive.remove(number)
            self._dead.add(number)
            self._selector.unregister(self._workers[number].sentinel)
        return False

    def _owing(self) -> list[int]:
        """Dead workers that have not sent everything."""
        if not self._dead:
            return []
        return [
            number
            for number in sorted(self._dead - self._finished)
            if not self._status or self._status[number]
        ]

    def _report(self) -> None:
        """Raise `Lost`, or put it where the pinning thread passes it on. Once."""
        if self._reported:
            return
        numbers = self._owing()
        words = []
        for number in numbers:
            worker, until = self._workers[number], time.monotonic() + _LOOK_S
            # A process closes its files before its exit status is there.
            while worker.is_alive() and time.monotonic() < until:
                time.sleep(0.001)
            words.append(
                f"DataLoader worker {number} (pid {worker.pid}) {exit_status(worker.exitcode)}"
            )
        lost = Lost(
            "; ".join(words)
            or "DataLoader worker: reading was interrupted in the middle of a batch",
            numbers,
        )
        if self._pinned is None:
            raise lost
        self._reported = True
        self._pinned.put(lost)


class _Pinned:
    """The queue from the thread that pins memory, as the loader reads it."""

    def __init__(self, batches: queue.Queue[Any]) -> None:
        self._batches = batches

    def get(self, timeout: float | None = None) -> Any:
        """The next batch.

        Raises:
            Lost: If a worker has died.
        """
        found = self._batches.get(timeout=timeout)
        if isinstance(found, Lost):
            self._batches.put(found)  # nothing else comes after it
            raise found
        return found
