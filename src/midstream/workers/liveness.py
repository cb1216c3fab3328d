"""The wait for worker processes: one that dies is told when a batch is asked for, at once, and nowhere else.

torch has its handler of SIGCHLD raise wherever the main thread happens to be: in the middle of a
step of the optimizer, after which no checkpoint is right, or in the callback of a weak reference,
where the error is printed and lost. It needs that, since whoever waits for a pipe does not see a
process die, and a batch that is half in the pipe is waited for forever. Here the wait is for the
pipe and for the ends of all workers at once, and every read of the pipe waits that way, so nothing
has to be interrupted. It works in every thread, and costs less than a poll of multiprocessing,
which makes a selector each time.
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

_LOOK_S = 1.0  # a wait looks that often by itself; and so long the rest of a batch may take once its worker may be dead
_NAP_S = 0.05


class Lost(RuntimeError):
    """Workers ended that should have sent more, or the pipe is of no use any more.

    Attributes:
        numbers: Of the workers.
    """

    def __init__(self, text: str, numbers: list[int]) -> None:
        super().__init__(text)
        self.numbers = numbers


def lost_in(error: BaseException) -> Lost | None:
    """That, if it is behind an error; torch raises one of its own from it."""
    found = error if isinstance(error, Lost) else error.__cause__
    return found if isinstance(found, Lost) else None


def exit_status(code: int | None) -> str:
    """What became of a process, in words."""
    if code is None:
        return "ended, and somebody else was told how"
    if code >= 0:
        return f"ended with exit status {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


class Wait:
    """What a queue calls for its pipe, in the one thread that reads it: the loader's, or torch's that pins memory.

    Args:
        iterator: torch's, over worker processes; its queue waits here from now on.
    """

    def __init__(self, iterator: Any) -> None:
        batches = iterator._worker_result_queue
        reader = batches._reader  # not held here: it holds this
        self._pipe = reader.fileno()
        self._dead: set[int] = set()
        self._through: set[int] = set()
        self._status: list[bool] = []
        self._torn = self._told = False
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
        """Another epoch, of which all workers owe batches until `let_go` or until they are False in
        torch's ``status``.
        """
        self._through.clear()
        self._status = status

    def let_go(self, number: int) -> None:
        """That worker has sent all. Said before it is told to end: torch's ``status`` changes
        later, in another thread.
        """
        self._through.add(number)

    @property
    def broken(self) -> bool:
        """Whether a worker is gone, or what comes next begins in the middle."""
        return self._torn or bool(self._dead)

    def poll(self, timeout: float = 0.0) -> bool:
        """Whether something comes within so many seconds.

        Raises:
            Lost: When all that was sent is taken, and a worker ended that should have sent more.
        """
        until = time.monotonic() + timeout
        while True:
            left = max(0.0, until - time.monotonic())
            if self._ready(0.0 if self._owing() and not self._told else min(left, _LOOK_S)):
                return True
            if self._torn or self._owing():
                self._tell()
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
        """So many bytes of the pipe."""
        found, before = io.BytesIO(), self._dead.copy()
        while (left := size - found.tell()) > 0:
            doubtful = False
            while not self._ready(_LOOK_S):
                if doubtful:  # nothing more comes: the rest was the dead one's
                    self._torn = True
                    self._tell()
                    raise queue.Empty
                doubtful = not before.issuperset(self._owing())
            chunk = os.read(self._pipe, left)
            if not chunk:
                raise EOFError("no worker can send any more")
            found.write(chunk)
        return found

    def _ready(self, timeout: float) -> bool:
        """Whether the pipe has something. If not, all that the dead have sent was taken."""
        if self._torn:
            time.sleep(min(timeout, _NAP_S))
            return False
        ready = [key.data for key, _ in self._selector.select(timeout)]
        if None in ready:
            return True
        # A process that a worker started may hold what tells of its end.
        ready += [
            number for number in self._alive if not ready and not self._workers[number].is_alive()
        ]
        for number in ready:
            self._alive.remove(number)
            self._dead.add(number)
            self._selector.unregister(self._workers[number].sentinel)
        return False

    def _owing(self) -> list[int]:
        """Dead workers that have not sent all."""
        if not self._dead:
            return []
        return [
            number
            for number in sorted(self._dead - self._through)
            if not self._status or self._status[number]
        ]

    def _tell(self) -> None:
        if self._told:
            return
        numbers = self._owing()
        words = []
        for number in numbers:
            worker, until = self._workers[number], time.monotonic() + _LOOK_S
            while (
                worker.is_alive() and time.monotonic() < until
            ):  # it closes what it holds before its status is there
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
        self._told = True
        self._pinned.put(lost)


class _Pinned:
    """The queue between the thread that pins memory and the loader, as the loader sees it."""

    def __init__(self, batches: queue.Queue[Any]) -> None:
        self._batches = batches

    def get(self, timeout: float | None = None) -> Any:
        """What comes next.

        Raises:
            Lost: When that is the end of a worker.
        """
        found = self._batches.get(timeout=timeout)
        if isinstance(found, Lost):
            self._batches.put(found)  # nor does anything else come after it
            raise found
        return found
