"""The readers of a loader behind one interface: in this process, in threads, or in processes."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator as Iter
from typing import Any

import torch

from midstream.distributed.topology import Topology
from midstream.pipeline.breadcrumbs import new_table
from midstream.pipeline.node import BoundNode, Node
from midstream.transport.arena import Arena
from midstream.transport.bundles import MAX_PARCELS, Unbundler, new_counts, restart_counts
from midstream.workers.processes import (
    InnerLoader,
    ProcessIterator,
    inner_loader,
    start_processes,
    starts_slowly,
)
from midstream.workers.readers import Runner
from midstream.workers.threads import Launch, ThreadReaders


class Readers:
    """The readers of one pass over a loader.

    Attributes:
        turns: Iterates over the turns of the readers: see `unpack_turn`.
        background: The processes or threads that read; None where this process reads by itself.
        workers: The processes by number; empty where no process reads.
    """

    def __init__(
        self, turns: Iter[Any], background: ProcessIterator | ThreadReaders | None = None
    ) -> None:
        self.turns, self.background = turns, background
        self.workers = background.workers if background is not None else ()

    @property
    def iterator(self) -> Any:
        """The iterator that torch's loader would keep: of the processes or threads, if any."""
        return self.turns if self.background is None else self.background

    @property
    def is_usable(self) -> bool:
        """Whether the readers can read another epoch."""
        return self.background is None or self.background.is_usable

    def ready(self) -> Readers:
        """Itself: `Launch.ready` waits for readers that are still starting."""
        return self

    def shut(self) -> None:
        """End the processes or threads."""
        if self.background is not None:
            self.background.shut()


class Pool:
    """Starts the readers of a loader, keeps those that live on, and shuts them down.

    The loader is passed to each call and not kept: no reference cycle keeps workers alive.

    Args:
        log_once: Logs a text the first time that its key is given.

    Attributes:
        runner: What the readers run; None before the first pass and after a state was loaded.
        readers: The readers of the last pass.
    """

    def __init__(self, log_once: Callable[[str, str], None]) -> None:
        self._log_once = log_once
        self.runner: Runner | None = None
        self.readers: Readers | None = None

    @staticmethod
    def in_threads(loader: Any) -> bool:
        """Whether threads of this process read for the loader."""
        if loader.num_workers == 0:
            return bool(loader.prefetch_factor)
        return bool(loader.worker_type == "thread")

    def can_reuse(self, loader: Any, topology: Topology, pipeline: Node) -> bool:
        """Whether living worker processes can read another epoch of this pipeline."""
        return (
            loader.persistent_workers
            and loader.num_workers > 0
            and not self.in_threads(loader)
            and self.readers is not None
            and self.readers.is_usable
            and self.runner is not None
            and self.runner.topology == topology
            and self.runner.dataset is pipeline
        )

    def reuse(self, epoch: int) -> None:
        """Let the living workers read ``epoch`` from its start when they are started next."""
        assert self.runner is not None
        self.runner.epoch = epoch
        if self.runner.bundle_counts is not None:
            restart_counts(self.runner.bundle_counts)
        self.runner.announce(renewed=False)

    def renew(self, loader: Any, runner: Runner) -> None:
        """Prepare to start readers for ``runner``; those of the pass before are let go."""
        self.let_go()
        if loader.num_workers > 0 and not self.in_threads(loader):
            if loader.persistent_workers:
                runner.shared = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
            runner.crumbs = new_table(loader.num_workers)
            runner.bundle_counts = new_counts(loader.num_workers, loader.prefetch_factor)
            runner.arena = self._arena(loader)
        runner.announce(renewed=True)
        self.runner = runner

    def start(self, loader: Any, bound: BoundNode, early: bool) -> Readers | Launch:
        """Start reading for ``runner``.

        Args:
            loader: Whose arguments apply.
            bound: The pipeline that runs.
            early: Do not wait for processes that take seconds to start; see `Launch`.
        """
        runner = self.runner
        assert runner is not None
        if self.in_threads(loader):
            threads = ThreadReaders(
                runner,
                runner.topology.readers,
                loader.prefetch_factor or 2,
                loader.timeout,
                loader.worker_init_fn if loader.num_workers else None,
                loader.pin_memory,
            )
            self.readers = Readers(threads, threads)
        elif loader.num_workers == 0 and not loader.pin_memory:
            # torchdata's iterator would cost more per batch than a small batch itself.
            self.readers = Readers(runner.read(0, runner.epoch, runner.plan))
        else:
            inner = inner_loader(loader, runner)
            most = 1 if any(each.node.runs_user_iterable for each in bound.walk()) else MAX_PARCELS
            context = inner.multiprocessing_context
            if early and context is not None and starts_slowly(context):
                return Launch(lambda: _start(inner, runner, most))
            self.readers = _start(inner, runner, most)
        return self.readers

    def let_go(self) -> None:
        """Forget the readers: the next pass needs others."""
        readers, self.readers = self.readers, None
        if readers is not None and not readers.is_usable:
            # Now, not when the garbage collector runs: an error that is kept would keep them too.
            readers.shut()

    def close(self) -> None:
        """Shut down the readers."""
        readers, self.readers = self.readers, None
        if readers is not None:
            readers.shut()

    def _arena(self, loader: Any) -> Arena | None:
        """Shared memory for the batches that are ready, one that is made, and a few in use."""
        try:
            return Arena(loader.num_workers, (loader.prefetch_factor + 1) * MAX_PARCELS + 4)
        except (OSError, ValueError) as error:
            self._log_once(
                "memory",
                f"no shared memory for batches ({error}): they go through a pipe, which is slower.",
            )
            return None


def _start(inner: InnerLoader, runner: Runner, most: int) -> Readers:
    """Start torchdata's readers: worker processes, or one reader that pins memory.

    Args:
        inner: The loader as torchdata sees it.
        runner: What the workers run.
        most: Batches that a worker may send at once.
    """
    turns = start_processes(inner)
    background = turns if isinstance(turns, ProcessIterator) else None
    if runner.bundle_counts is not None:
        turns = Unbundler(
            turns, inner.num_workers, inner.prefetch_factor, runner.bundle_counts, most
        )
    return Readers(turns, background)
