"""Records everything that a loader hands out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from midstream.testing.counting import Reads
from midstream.testing.drivers import Item, Saved, Session, Setup, Target, Topology


@dataclass
class Recording:
    """What a session handed out.

    Attributes:
        items: All of it, in the run's order.
        starts: For every cut, how many items came before it.
        saves: For every cut, the checkpoint.
        places: For every cut, where it is, in words.
        edges: The cuts at the end of an epoch: after its last batch, and after its end was seen.
        over: Whether all epochs came to their end (else the window did).
        stuck: The error that came for ever, where one did: reading ended there.
        whole: The epochs that were read from beginning to end.
        ordered: For every epoch, after how many of its items the first lane of a stream had
            drained.
        reads: For every cut, source rows read so far, where they are counted.
        first_seconds: From making the loaders to the first batch.
        seconds: All of it.
    """

    topology: Topology
    items: list[Item] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    saves: list[Saved] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    edges: list[int] = field(default_factory=list)
    over: bool = False
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
        """Of one step after the first."""
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
    """Read, and save after every step.

    Args:
        steps: At most so many steps; None: all epochs.
        batches: Until so many batches (and errors) came, of all ranks.
        saved: Where to go on.
        save: Whether to save.
        reads: What counts source rows.
        watch: Called after every step.
    """
    start = time.perf_counter()
    found = Recording(topology)
    session = Session(target, topology, setup, saved)
    try:
        counts: dict[int, int] = {}

        def cut(where: str) -> None:
            if save:
                try:
                    found.saves.append(session.save())
                except EOFError:
                    return
                found.starts.append(len(found.items))
                found.places.append(where)
                found.reads.append(reads.rows if reads is not None else 0)

        cut("before the first batch")
        done, first = 0, True
        while (steps is None or done < steps) and (batches is None or len(found.items) < batches):
            step = session.step()
            if step is None:
                found.over = True
                if found.items and found.items[-1].error and session.stuck:
                    found.stuck = found.items[-1].error
                break
            if first:
                found.first_seconds, first = time.perf_counter() - start, False
            if step.end:
                epoch = found.items[-1].epoch if found.items else 0
                if save and found.saves:
                    found.edges.append(len(found.saves) - 1)
                    cut(f"after the end of epoch {epoch}")
                    found.edges.append(len(found.saves) - 1)
                if saved is None or epoch > saved.epoch:
                    found.whole.append(epoch)
                continue
            done += 1
            made = [item for item in step.items if not item.error]
            for item in made:
                counts[item.epoch] = counts.get(item.epoch, 0) + 1
            found.items.extend(step.items)
            epoch = step.items[-1].epoch if step.items else 0
            cut(
                f"after step {done}"
                + (f" (batch {counts.get(epoch, 0)} of epoch {epoch})" if epoch else "")
            )
            if save and session.ours and session.stream and epoch not in found.ordered:
                _, drained = session.lanes()
                if drained:
                    found.ordered[epoch] = max(0, counts.get(epoch, 0) - topology.ranks - len(made))
            if watch is not None:
                watch()
        if not found.over and setup.epochs == 1 and found.whole:
            found.over = True
        if session.ours:
            found.num_lanes, _ = session.lanes()
            found.random_access = not session.stream
            found.drops = session.loaders[0].remainder == "drop"
    finally:
        session.close()
    found.seconds = time.perf_counter() - start
    return found
