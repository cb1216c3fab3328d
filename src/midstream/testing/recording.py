"""Reads a target's loaders and records every batch, with a checkpoint after every step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from midstream.testing.counting import Reads
from midstream.testing.drivers import Item, Saved, Session, Setup, Step, Target, Topology


@dataclass
class Recording:
    """The batches that a session handed out, and its checkpoints.

    A cut is a point at which the state was saved: before the first batch, after a step, after the
    end of an epoch.

    Attributes:
        topology: Ranks and workers of the session.
        items: All batches and errors, in the run's order.
        starts: For every cut, the number of items before it.
        saves: For every cut, the checkpoint.
        titles: For every cut, its name in reports.
        edges: The cuts at the end of an epoch: after its last batch, and after its end was seen.
        finished: Whether all epochs were read to their end; else reading stopped at a limit.
        stuck: The error that was raised again and again, and at which reading stopped; else empty.
        whole: The epochs that were read from beginning to end.
        ordered: For every epoch of a stream, the number of its items before the first lane drained.
        reads: For every cut, the number of source rows read so far, if they are counted.
        first_seconds: Time from making the loaders to the first batch.
        seconds: Time of everything.
        num_lanes: Number of lanes; 0 for foreign loaders.
        random_access: Whether the pipeline is random access.
        drops: Whether ranks drop the batches at the end of an epoch that not all of them can have.
    """

    topology: Topology
    items: list[Item] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    saves: list[Saved] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    edges: list[int] = field(default_factory=list)
    finished: bool = False
    stuck: str = ""
    whole: list[int] = field(default_factory=list)
    ordered: dict[int, int] = field(default_factory=dict)
    reads: list[int] = field(default_factory=list)
    first_seconds: float = 0.0
    seconds: float = 0.0
    num_lanes: int = 0
    random_access: bool = True
    drops: bool = False

    @property
    def batch_seconds(self) -> float:
        """Mean time of a step after the first."""
        return (self.seconds - self.first_seconds) / max(1, len(self.starts) - 1)


def record(
    target: Target,
    topology: Topology,
    setup: Setup,
    *,
    steps: int | None = None,
    batches: int | None = None,
    saved: Saved | None = None,
    save: bool = True,
    reads: Reads | None = None,
    watch: Callable[[], None] | None = None,
) -> Recording:
    """Reads a target on one topology, and saves after every step.

    Args:
        target: Makes the loaders.
        topology: Ranks and workers.
        setup: How the loaders are made and read.
        steps: Largest number of steps; None: all epochs.
        batches: Stop after this many batches and errors, of all ranks.
        saved: The checkpoint to resume from.
        save: Whether to save.
        reads: Counter of source rows.
        watch: Called after every step.
    """
    start = time.perf_counter()
    session = Session(target, topology, setup, saved)
    try:
        recorder = _Recorder(session, saved, save, reads, start)
        recorder.cut("before the first batch")
        found = recorder.found
        while (steps is None or recorder.steps < steps) and (
            batches is None or len(found.items) < batches
        ):
            step = session.step()
            if step is None:
                recorder.finish()
                break
            recorder.add(step)
            if watch is not None and not step.end:
                watch()
        if not found.finished and setup.epochs == 1 and found.whole:
            found.finished = True
        if session.is_midstream:
            found.num_lanes, _ = session.lanes()
            found.random_access = not session.stream
            found.drops = session.loaders[0].remainder == "drop"
    finally:
        session.close()
    found.seconds = time.perf_counter() - start
    return found


class _Recorder:
    """Fills a `Recording` step by step."""

    def __init__(
        self, session: Session, saved: Saved | None, save: bool, reads: Reads | None, start: float
    ) -> None:
        self.found = Recording(session.topology)
        self.steps = 0
        self._session, self._saved, self._save, self._reads = session, saved, save, reads
        self._start = start
        self._batches: Counter[int] = Counter()  # by epoch

    def cut(self, title: str) -> None:
        """Saves the state, if states are to be saved and there is one already."""
        if not self._save:
            return
        try:
            self.found.saves.append(self._session.save())
        except EOFError:
            return
        self.found.starts.append(len(self.found.items))
        self.found.titles.append(title)
        self.found.reads.append(self._reads.rows if self._reads is not None else 0)

    def add(self, step: Step) -> None:
        """Records a step."""
        found = self.found
        if not found.first_seconds:
            found.first_seconds = time.perf_counter() - self._start
        if step.end:
            self._end_epoch()
            return
        self.steps += 1
        batches = [item for item in step.items if not item.error]
        self._batches.update(item.epoch for item in batches)
        found.items.extend(step.items)
        epoch = step.items[-1].epoch if step.items else 0
        title = f"after step {self.steps}"
        self.cut(f"{title} (batch {self._batches[epoch]} of epoch {epoch})" if epoch else title)
        session = self._session
        if self._save and session.is_midstream and session.stream and epoch not in found.ordered:
            _, drained = session.lanes()
            if drained:
                before = self._batches[epoch] - session.topology.ranks - len(batches)
                found.ordered[epoch] = max(0, before)

    def _end_epoch(self) -> None:
        found = self.found
        epoch = found.items[-1].epoch if found.items else 0
        if self._save and found.saves:
            found.edges.append(len(found.saves) - 1)
            self.cut(f"after the end of epoch {epoch}")
            found.edges.append(len(found.saves) - 1)
        if self._saved is None or epoch > self._saved.epoch:
            found.whole.append(epoch)

    def finish(self) -> None:
        """Records that all epochs are over, or that one error is raised again and again."""
        self.found.finished = True
        if self.found.items and self.found.items[-1].error and self._session.stuck:
            self.found.stuck = self.found.items[-1].error
