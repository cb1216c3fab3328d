"""Worker processes that signals do not kill: they obey only their parent, and die with it.

A cluster that preempts a job sends SIGTERM or SIGUSR1 to every process of it; Ctrl-C in a terminal
sends SIGINT to all. The main process decides what happens then, and needs its workers until it has
saved. So the signals in `SIGNALS`

    are blocked         from the first instruction of a worker (`Context` blocks them around its start)
    do nothing          from worker_init_fn on: their handler is an empty function (`WorkerInit`)

They are neither ignored nor blocked to the end, because programs that user code starts in a worker
would inherit that, and would not react to their own ``terminate()``. A handler is not inherited.

Since SIGTERM does nothing, ``terminate()`` sends SIGKILL here. When the parent is gone, a thread of
the worker ends it.

With the start method ``forkserver`` the server must survive too. Where the first worker starts it,
it has these signals blocked for good. So have other processes that the program starts with it,
until they unblock them.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from collections.abc import Iterator as Iter
from multiprocessing import connection, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["SIGNALS", "Context", "WorkerInit"]

SIGNALS = frozenset(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)

_LOOK_S = 1.0


class Context(BaseContext):
    """A multiprocessing context whose processes start with `SIGNALS` blocked."""

    def __init__(self, context: Any) -> None:
        self._context = context.get_context()
        self._name = self._context.get_start_method()
        if self._name != "fork":
            with _blocked():  # by itself the tracker ignores only SIGINT and SIGTERM
                resource_tracker.ensure_running()

    def get_context(self, method: str | None = None) -> Any:
        """The real context, which makes queues and events."""
        return self._context

    def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:  # noqa: N802
        """A process of the real context, started with the signals blocked."""
        process: Any = self._context.Process(*args, **kwargs)

        def start() -> None:
            del process.start  # or it would be pickled with the process
            try:
                with _blocked():
                    process.start()
                _terminate_is_kill(process)
            except BaseException:
                if process.pid is not None:  # Ctrl-C during the start: nobody would end it later
                    process.kill()
                raise

        process.start = start
        return process  # type: ignore[no-any-return]


@contextlib.contextmanager
def _blocked() -> Iter[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _terminate_is_kill(process: Any) -> None:
    """Let ``terminate`` send SIGKILL, also where multiprocessing itself calls it at exit."""
    popen = weakref.ref(process._popen)  # no cycle: the pipes of a process close with it

    def terminate() -> None:
        if (there := popen()) is not None:
            there.kill()

    process._popen.terminate = terminate


class WorkerInit:
    """The ``worker_init_fn`` that is called before the user's own.

    Args:
        init_fn: The user's, or None.
    """

    def __init__(self, init_fn: Callable[[int], None] | None) -> None:
        self.init_fn = init_fn

    def __call__(self, worker: int) -> None:
        """Protect this process from signals, then call the user's function."""
        threading.Thread(target=_die_with_parent, name="midstream-parent", daemon=True).start()
        signal.set_wakeup_fd(-1)  # a fork shares it with the parent, whose event loop would wake up
        _handle(_nothing)
        sys.excepthook = _HangUps(sys.excepthook)
        # An interpreter that ends (spawn) removes handlers, but not this.
        atexit.register(_handle, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.init_fn is not None:
            self.init_fn(worker)


class _HangUps:
    """An excepthook that is silent when the receiver of a tensor has closed its connection.

    Tensors leave a worker as file descriptors, sent by a thread of multiprocessing that calls
    `sys.excepthook` for its errors. When the main process stops receiving half-way (another worker
    died, or Ctrl-C), this worker has not failed. Other threads use `threading.excepthook`.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if threading.current_thread() is threading.main_thread() or not isinstance(
            error, (EOFError, ConnectionError)
        ):
            self.hook(kind, error, trace)


def _handle(handler: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)
        signal.siginterrupt(number, False)  # system calls are not interrupted


def _nothing(number: int, frame: Any) -> None:
    pass


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    # Workers that were forked later hold the parent's end of this one's pipe too, so it may close
    # late. Below a fork server the process above is the server, and the pipe closes in time.
    mine = os.getppid()
    direct = mine == parent.pid
    while not connection.wait([parent.sentinel], timeout=_LOOK_S):
        if direct and os.getppid() != mine:
            break
    os._exit(1)
