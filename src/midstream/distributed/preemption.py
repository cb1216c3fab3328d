"""Stop a training run between two steps when the cluster asks for it, on all ranks at the same
step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from midstream.common.validation import require_int

__all__ = ["PreemptionGuard"]

_DEFAULT = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class PreemptionGuard:
    """Turns the signals of a preemption into a question that the training loop asks after each step.

    While it is entered, the signals do nothing but make `should_stop` true: the step in progress is
    finished, and what was set to handle them before is not called (it is back in place on leaving).
    A second signal changes nothing either, so a checkpoint being saved is not interrupted; what
    ends a program that does not stop by itself is SIGKILL.

    With ``torch.distributed`` initialised, the ranks agree: a signal on any of them stops all,
    after the same step. Every rank has to ask equally often, because asking is a collective (one
    number over gloo).

    Args:
        signals: The signals to expect.
        group: The process group that agrees; one with a backend for CPU tensors. Left out, a gloo
            group of all ranks is made when first asked, and destroyed on leaving.
        every: Agree at every so many questions only; between them the answer is no.

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
        group: dist.ProcessGroup | None = None,
        every: int = 1,
    ) -> None:
        require_int(every, "every", 1, "PreemptionGuard")
        self._signals = [signal.Signals(number) for number in signals]
        never = [number.name for number in self._signals if number.name in ("SIGKILL", "SIGSTOP")]
        if never or not self._signals:
            raise ValueError(
                "PreemptionGuard: signals is one or more that a program can handle, like"
                f" signals=[signal.SIGTERM]; found {', '.join(never) or 'none'}"
            )
        self._group, self._every = group, every
        self._previous: dict[signal.Signals, Any] = {}
        self._own_group: Any = None
        self._start()

    def _start(self) -> None:
        self._received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self._asked = 0

    def __enter__(self) -> PreemptionGuard:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "PreemptionGuard was entered in a thread, and Python handles signals in the main"
                " thread alone. Enter it there, around whatever starts the thread; should_stop may"
                " be asked from any one."
            )
        if self._previous:
            raise RuntimeError(
                "this PreemptionGuard is entered already; make another one, or use the one at hand"
            )
        self._start()
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:  # who took it over meanwhile keeps it
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = {}
        if self._own_group is not None:
            with contextlib.suppress(
                Exception
            ):  # all of torch.distributed may have been shut down before
                dist.destroy_process_group(self._own_group)
            self._own_group = None

    def _handle(self, number: int, frame: Any) -> None:
        if self._received is None:
            self._received = signal.Signals(number)

    @property
    def requested(self) -> bool:
        """Whether this process received one of the signals. Asks no other rank."""
        return self._received is not None

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that this process received first, else the one that the ranks agreed to stop
        for, else None.
        """
        return self._received or self._agreed

    @property
    def should_stop(self) -> bool:
        """Whether to save and stop now: the same answer on all ranks. Once true it stays true.

        Ask between two steps, once each, on every rank.
        """
        if self._agreed is not None:
            return True
        if not (dist.is_available() and dist.is_initialized()):
            self._agreed = self._received
            return self._agreed is not None
        self._asked += 1
        if self._asked % self._every:
            return False
        group = self._group
        if group is None:
            if self._own_group is None:
                self._own_group = dist.new_group(backend="gloo")
            group = self._own_group
        found = torch.tensor([self._received or 0], dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        if number := int(found):
            self._agreed = signal.Signals(number)
        return self._agreed is not None
