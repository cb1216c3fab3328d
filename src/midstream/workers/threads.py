"""Readers in threads of the main process, instead of worker processes.

Each reader makes the batches that worker ``w`` of ``W`` would make, so order and checkpoints are
the same. It reads ahead until a given number of turns wait; the loader takes one from each reader
in turn.

    use threads where      reading waits (network, disks) or works outside the GIL (decoding, numpy,
                           pyarrow), or a batch costs less to make than to send from a process
    use processes where    samples are made by Python code: threads would wait for each other there

User code runs in this process: it shares memory with it, and ``torch.utils.data.get_worker_info()``
is None.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data._utils import pin_memory

from midstream.errors import WorkerError
from midstream.workers.messages import Turn
from midstream.workers.readers import Runner

__all__ = ["Launch", "ThreadReaders"]

_JOIN_S = 5.0

_ITEM, _END, _ERROR = range(3)


class _Line:
    """The queue of one reading thread: what waits, room for more, and whether it has ended."""

    def __init__(self, room: int) -> None:
        self.items: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.room = threading.Semaphore(room)
        self.stopped = False
        self.ended = False  # set by the reader of this queue


class ThreadReaders:
    """Iterates over the turns of all readers, in order.

    Args:
        runner: What the threads read.
        readers: How many threads.
        prefetch: How many turns each keeps ready.
        timeout: Seconds to wait for a turn; 0: without limit.
        init_fn: Called in each thread with its number.
        pin: Whether batches are pinned, in the thread.
    """

    workers: Sequence[Any] = ()
    is_usable = True

    def __init__(
        self,
        runner: Runner,
        readers: int,
        prefetch: int,
        timeout: float,
        init_fn: Callable[[int], None] | None,
        pin: bool,
    ) -> None:
        self._lines = [_Line(prefetch) for _ in range(readers)]
        self._turn = 0
        self._timeout = timeout or None
        pin = pin and torch.accelerator.is_available()
        threads = [
            threading.Thread(
                target=_read,
                args=(runner, number, line, init_fn, pin),
                name=f"midstream-reader-{number}",
                daemon=True,
            )
            for number, line in enumerate(self._lines)
        ]
        # Ends the threads when this object is collected, and before the interpreter ends: they must
        # not be in the middle of C code then.
        self._end = weakref.finalize(self, _stop, self._lines, threads)
        for thread in threads:
            thread.start()

    def __iter__(self) -> ThreadReaders:
        return self

    def __next__(self) -> Any:
        for _ in self._lines:
            line = self._lines[self._turn]
            while not line.ended:
                try:
                    kind, item = line.items.get(timeout=self._timeout)
                except queue.Empty:
                    raise RuntimeError(
                        f"DataLoader timed out after {self._timeout} seconds"
                    ) from None
                if kind == _ITEM:
                    line.room.release()
                    self._turn = (self._turn + 1) % len(self._lines)
                    return item
                line.ended = True
                if kind == _ERROR:
                    raise self._error(item)
            self._turn = (self._turn + 1) % len(self._lines)
        raise StopIteration

    def _error(self, error: BaseException) -> BaseException:
        if isinstance(error, Exception):
            return error
        failure = WorkerError(
            f"reading thread {self._turn} was ended by {type(error).__name__}: {error}. The"
            " position stays at the last batch handed out; to continue from there:"
            " loader.load_state_dict(loader.state_dict()), and iterate again."
        )
        failure.__cause__ = error
        return failure

    def shut(self) -> None:
        """End the threads; each after the batch that it is making."""
        self._end()
        for line in self._lines:
            line.ended = True


def _stop(lines: list[_Line], threads: list[threading.Thread]) -> None:
    for line in lines:
        line.stopped = True
        line.room.release()
    for thread in threads:
        if thread is not threading.current_thread():
            with contextlib.suppress(RuntimeError):  # not started
                thread.join(_JOIN_S)


def _read(
    runner: Runner, number: int, line: _Line, init_fn: Callable[[int], None] | None, pin: bool
) -> None:
    try:
        if init_fn is not None:
            init_fn(number)
        reader = runner.read(number, runner.epoch, runner.plan)
        while True:
            line.room.acquire()
            if line.stopped:
                return
            item = next(reader)
            if pin:
                item = _pinned(item)
            line.items.put((_ITEM, item))
            del item  # or it would live until the next one is made
    except StopIteration:
        line.items.put((_END, None))
    except BaseException as error:
        line.items.put((_ERROR, error))


def _pinned(turn: Turn) -> Turn:
    """The turn with its batches in pinned memory."""
    number, lane, messages = turn
    pin = pin_memory.pin_memory
    return number, lane, [each._replace(payload=pin(each.payload)) for each in messages]  # type: ignore[no-untyped-call]


class Launch:
    """Worker processes that start in the background, while the caller does something else.

    A new interpreter takes seconds to import torch.

    Args:
        start: Starts the processes, waits for them, and returns their `Readers`.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self._found: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(start,), name="midstream-start")
        self._thread.start()

    def _run(self, start: Callable[[], Any]) -> None:
        try:
            self._found = start()
        except BaseException as error:
            self._error = error

    def ready(self) -> Any:
        """Wait, then return or raise what ``start`` returned or raised. May be called once."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        found, self._found = self._found, None
        return found

    def shut(self) -> None:
        """End the processes as soon as they have started."""
        with contextlib.suppress(Exception):  # nobody will read from them
            self.ready().shut()
