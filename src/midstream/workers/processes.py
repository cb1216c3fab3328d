"""Worker processes: torchdata's iterator over them, with midstream's own wait for batches.

The only file, beside the base class in loader/loader.py, that knows torchdata.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator as Iter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data._utils import signal_handling
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.stateful_dataloader import _StatefulMultiProcessingDataLoaderIter

from midstream.errors import WorkerError
from midstream.workers.liveness import Wait, lost_in
from midstream.workers.messages import collate_nothing
from midstream.workers.readers import Runner
from midstream.workers.signals import Context, WorkerInit


class InnerLoader(StatefulDataLoader):  # type: ignore[misc]
    """A loader as torchdata sees it: its dataset is the `Runner`, its batches are messages."""

    def _get_iterator(self) -> Any:
        if self.num_workers == 0 or os.name != "posix":
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return ProcessIterator(self, self.next_iter_state)


class ProcessIterator(_StatefulMultiProcessingDataLoaderIter):  # type: ignore[misc]
    """torchdata's iterator over worker processes, with midstream's own wait for batches.

    The workers are hidden from torch's SIGCHLD handler, also at exit, when multiprocessing ends
    those that are still alive.
    """

    _made_by = 0

    @property
    def workers(self) -> Sequence[Any]:
        """The processes, by number."""
        return self._workers  # type: ignore[no-any-return]

    @property
    def is_usable(self) -> bool:
        """Whether the workers can read another epoch."""
        return not (self._shutdown or self.wait.broken)

    def shut(self) -> None:
        """End the worker processes."""
        self._shutdown_workers()

    def _reset(self, loader: Any, first_iter: bool = False, prime_prefetch: bool = True) -> None:
        if first_iter:
            signal_handling._remove_worker_pids(id(self))  # type: ignore[attr-defined]
            self._worker_pids_set = False
            self.wait, self._made_by = Wait(self), os.getpid()
        self.wait.begin([])
        try:
            super()._reset(loader, first_iter, prime_prefetch)
        except BaseException:
            # The caller gets no iterator from a failed start, and an error that is kept would keep
            # the workers alive: end them now.
            self._shutdown_workers()
            raise
        self.wait.begin(self._workers_status)

    def _mark_worker_as_unavailable(self, worker_id: int, shutdown: bool = False) -> None:
        self.wait.finished(worker_id)
        super()._mark_worker_as_unavailable(worker_id, shutdown)

    def __del__(self) -> None:
        # A worker that is forked later holds a copy of this iterator: it must end nobody's workers.
        if self._made_by in (0, os.getpid()):
            super().__del__()


def inner_loader(loader: StatefulDataLoader, runner: Runner) -> InnerLoader:
    """The loader as torchdata sees it: it iterates ``runner`` and draws no global random numbers."""
    inner = object.__new__(InnerLoader)
    inner.__dict__.update(
        loader.__dict__,
        dataset=runner,
        collate_fn=collate_nothing,
        batch_size=None,
        drop_last=False,
        snapshot_every_n_steps=0,  # our messages carry the state; torchdata's own would be empty
        generator=torch.Generator().manual_seed(runner.epoch),
    )
    if loader.num_workers > 0 and os.name == "posix":
        inner.__dict__["worker_init_fn"] = WorkerInit(loader.worker_init_fn)
        inner.multiprocessing_context = Context(
            loader.multiprocessing_context or torch.multiprocessing
        )
    return inner


def starts_slowly(context: Any) -> bool:
    """Whether processes of this context import everything again, which takes seconds."""
    return bool(context.get_context().get_start_method() != "fork")


def start_processes(inner: InnerLoader) -> Any:
    """Start the workers of ``inner`` and wait until they run.

    Returns:
        An iterator over what they send.

    Raises:
        WorkerError: If one of them died before it had begun to read.
    """
    try:
        return iter(inner)
    except RuntimeError as error:
        lost = lost_in(error)
        if lost is None and "DataLoader worker" not in str(error):
            raise
        raise WorkerError(
            f"{lost or error}, before it had begun to read. The position is as it was; to continue"
            " from there: loader.load_state_dict(loader.state_dict()), and iterate again."
        ) from error


@contextlib.contextmanager
def quiet_vital() -> Iter[None]:
    """Silences a deprecation warning: torchdata calls `torch.set_vital` at every construction."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        yield
