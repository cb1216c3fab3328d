"""PreemptionGuard: stops a training run between two steps, on all ranks after the same one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from typing import Any

from midstream.common.validation import require_int
from midstream.distributed.collectives import (
    ProcessGroup,
    destroy_group,
    is_initialized,
    largest,
    new_cpu_group,
)

__all__ = ["PreemptionGuard"]

_DEFAULT = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class PreemptionGuard:
    """Records the signals of a preemption, so that training can stop after the current step.

    Use it as a context manager and read `should_stop` after each step. Inside, a signal only makes
    `should_stop` true: the step in progress is finished, and the previous handlers are not called.
    They are restored on exit. A second signal has no effect, so a checkpoint being saved is not
    interrupted; a program that does not stop by itself can still be ended with SIGKILL.

    With ``torch.distributed`` initialised, the ranks agree: a signal on any of them stops all,
    after the same step. `should_stop` is a collective then (one number over gloo), so every rank
    has to read it equally often.

    Args:
        signals: The signals to handle.
        group: The process group that agrees; its backend handles CPU tensors. Left out, a gloo
            group of all ranks is made on first use, and destroyed on exit.
        every: Agree only at every so many readings; at the others `should_stop` is False.

    Raises:
        ValueError: If a signal cannot be handled.
        RuntimeError: On entering outside the main thread, where Python cannot handle signals.

    >>> import midstream as ms
    >>> with ms.PreemptionGuard() as guard:
    ...     for step in range(5):
    ...         if step == 2:
    ...             signal.raise_signal(signal.SIGTERM)  # the cluster does this
    ...         if guard.should_stop:
    ...             print(f"{guard.signal.name}: saved after step {step}")
    ...             break
    SIGTERM: saved after step 2
    """

    def __init__(
        self,
        signals: Sequence[int] = _DEFAULT,
        *,
        group: ProcessGroup | None = None,
        every: int = 1,
    ) -> None:
        require_int(every, "every", 1, "PreemptionGuard")
        self._signals = [signal.Signals(number) for number in signals]
        refused = [number.name for number in self._signals if number.name in ("SIGKILL", "SIGSTOP")]
        if refused or not self._signals:
            raise ValueError(
                "PreemptionGuard: signals is one or more that a program can handle, like"
                f" signals=[signal.SIGTERM]; found {', '.join(refused) or 'none'}"
            )
        self._group, self._every = group, every
        self._previous: dict[signal.Signals, Any] = {}
        self._own_group: ProcessGroup | None = None
        self._start()

    def _start(self) -> None:
        self._received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self._readings = 0

    def __enter__(self) -> PreemptionGuard:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "PreemptionGuard was entered in a thread, and Python handles signals only in the"
                " main thread. Enter it there, around the code that starts the thread; should_stop"
                " may be read in any thread."
            )
        if self._previous:
            raise RuntimeError(
                "this PreemptionGuard is entered already; use it, or make another one"
            )
        self._start()
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:  # keep a handler that was set meanwhile
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = {}
        if self._own_group is not None:
            destroy_group(self._own_group)
            self._own_group = None

    def _handle(self, number: int, frame: Any) -> None:
        if self._received is None:
            self._received = signal.Signals(number)

    @property
    def requested(self) -> bool:
        """Whether this process received one of the signals. Not a collective."""
        return self._received is not None

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that this process received first; else the one that the ranks stop for; else
        None.
        """
        return self._received or self._agreed

    @property
    def should_stop(self) -> bool:
        """Whether to save and stop now; the same on all ranks. Once true it stays true.

        Read it once between two steps, on every rank.
        """
        if self._agreed is not None:
            return True
        if not is_initialized():
            self._agreed = self._received
            return self._agreed is not None
        self._readings += 1
        if self._readings % self._every:
            return False
        group = self._group
        if group is None:
            if self._own_group is None:
                self._own_group = new_cpu_group()
            group = self._own_group
        if number := largest(self._received or 0, group):
            self._agreed = signal.Signals(number)
        return self._agreed is not None
