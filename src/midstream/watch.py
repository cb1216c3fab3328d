"""The wait for worker processes: one that dies is noticed when a batch is asked for, and nowhere else.

torch has its handler of SIGCHLD raise wherever the main thread happens to be: in the middle of a step of the optimizer,
after which no checkpoint is right, or in the callback of a weak reference, where the error is printed and lost. It needs
that, since whoever waits for a pipe does not see a process die, and a batch that is half in the pipe is waited for forever.
Here the wait is for the pipe and for the ends of all workers at once, and every read of the pipe waits that way, so nothing
has to be interrupted. It works in every thread, and costs less than a poll of multiprocessing, which makes a selector each
time.
"""

from __future__ import annotations

import io
import os
import queue
import selectors
import time
import weakref
from typing import Any

from torch.utils.data._utils import signal_handling

__all__ = ["watch"]

_REAPED_S = 1.0  # a process closes what it holds shortly before its status can be asked for
_HALF_S = 1.0  # how long the rest of a batch is waited for, once a worker was killed


def watch(iterator: Any) -> None:
    """Have torch's iterator over worker processes notice deaths while it waits, and not by a signal; others stay as they are.

    Nothing raises at exit either, when multiprocessing ends workers that still live.
    """
    if getattr(iterator, "_worker_pids_set", False):
        batches = iterator._worker_result_queue
        wait = _Wait(iterator, batches._reader.fileno())
        batches._poll, batches._reader._recv = wait.poll, wait.read
        signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
        iterator._worker_pids_set = False


class _Wait:
    """What a queue calls for its pipe, in the one thread that reads it."""

    def __init__(self, iterator: Any, pipe: int) -> None:
        self._iterator = weakref.ref(iterator)
        self._pipe = pipe
        self._alive = dict(enumerate(iterator._workers))
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)
        for number, worker in self._alive.items():
            self._selector.register(worker.sentinel, selectors.EVENT_READ, number)
        self._lacking = self._killed = self._torn = False

    def poll(self, timeout: float = 0.0) -> bool:
        """Whether something comes within so many seconds; False at once when a worker ended that should have sent more."""
        until = time.monotonic() + timeout
        while not self._ready(left := max(0.0, until - time.monotonic())):
            if self._lacking or left == 0.0:
                self._lacking = False
                return False
        return True

    def read(self, size: int) -> io.BytesIO:
        """So many bytes of the pipe."""
        found = io.BytesIO()
        while (left := size - found.tell()) > 0:
            self._killed = waited = False
            while not self._ready(_HALF_S):
                if waited:  # what is here already is of the one that was killed: whoever lives would have gone on
                    self._torn = True
                    raise queue.Empty  # nothing came: torch then looks which workers are alive
                for number, worker in list(self._alive.items()):
                    if not worker.is_alive():  # and a process that it had started holds what tells of its end
                        self._ended(number)
                waited = self._killed
            chunk = os.read(self._pipe, left)
            if not chunk:
                raise EOFError("no worker can send any more")
            found.write(chunk)
        return found

    def _ready(self, timeout: float) -> bool:
        """Whether the pipe has something. If not, workers may have ended, and all they sent was taken."""
        if self._torn:  # what comes now begins in the middle
            time.sleep(timeout)
            return False
        ready = [key.data for key, _ in self._selector.select(timeout)]
        if None in ready:
            return True
        for number in ready:
            self._ended(number)
        return False

    def _ended(self, number: int) -> None:
        worker = self._alive.pop(number)
        self._selector.unregister(worker.sentinel)
        until = time.monotonic() + _REAPED_S
        while worker.is_alive() and time.monotonic() < until:
            time.sleep(0.001)
        iterator = self._iterator()
        self._killed |= worker.exitcode != 0
        self._lacking |= iterator is not None and iterator._workers_status[number]
