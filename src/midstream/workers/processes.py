"""Worker processes: torchdata's iterator over them, with our wait for batches."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator as Iter
from typing import Any

from torch.utils.data._utils import signal_handling
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.stateful_dataloader import _StatefulMultiProcessingDataLoaderIter

from midstream.errors import WorkerError
from midstream.workers.liveness import Wait, lost_in


def starts_slowly(context: Any) -> bool:
    return bool(context.get_context().get_start_method() != "fork")


class InnerLoader(StatefulDataLoader):  # type: ignore[misc]
    """The loader as torchdata is to see it."""

    def _get_iterator(self) -> Any:
        if self.num_workers == 0 or os.name != "posix":
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return ProcessIterator(self, self.next_iter_state)


class ProcessIterator(_StatefulMultiProcessingDataLoaderIter):  # type: ignore[misc]
    """torchdata's iterator over worker processes, with our wait.

    torch's handler is not to look at its workers: also not at exit, when multiprocessing ends those
    that still live.
    """

    _made_by = 0

    def _reset(self, loader: Any, first_iter: bool = False, prime_prefetch: bool = True) -> None:
        if first_iter:
            signal_handling._remove_worker_pids(id(self))  # type: ignore[attr-defined]
            self._worker_pids_set = False
            self.wait, self._made_by = Wait(self), os.getpid()
        self.wait.begin([])
        try:
            super()._reset(loader, first_iter, prime_prefetch)
        except BaseException:
            # Now: of a start that failed nobody else has this iterator, and an error that is kept
            # would keep its workers.
            self._shutdown_workers()
            raise
        self.wait.begin(self._workers_status)

    def _mark_worker_as_unavailable(self, worker_id: int, shutdown: bool = False) -> None:
        self.wait.let_go(worker_id)
        super()._mark_worker_as_unavailable(worker_id, shutdown)

    def __del__(self) -> None:
        if self._made_by in (
            0,
            os.getpid(),
        ):  # not the copy in a worker that was forked later: its workers are not there
            super().__del__()


def is_usable(iterator: Any) -> bool:
    """Whether its workers can make another epoch."""
    return not (
        isinstance(iterator, ProcessIterator) and (iterator._shutdown or iterator.wait.broken)
    )


def start_processes(double: InnerLoader) -> Any:
    """Start its workers, and wait until they are there."""
    try:
        return iter(double)
    except RuntimeError as error:
        lost = lost_in(error)
        if lost is None and "DataLoader worker" not in str(error):
            raise
        raise WorkerError(
            f"{lost or error}, before it had begun to read. The position is as it was; to go on"
            " from there: loader.load_state_dict(loader.state_dict()), and iterate again."
        ) from error


@contextlib.contextmanager
def quiet_vital() -> Iter[None]:
    """torchdata calls torch.set_vital, which torch 2.13 deprecates with a warning at every
    construction.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        yield
