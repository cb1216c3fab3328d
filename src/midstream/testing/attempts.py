"""Single attempts to resume: from one cut, several times in a row, after kills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from midstream.checkpoint.merge import merge_states
from midstream.errors import CheckpointError, MidstreamError
from midstream.testing.children import Child
from midstream.testing.drivers import Item, Saved, Session, Setup, Target, Topology
from midstream.testing.promises import (
    droppable_batches,
    promised_order,
    same_over_epochs,
    without_errors,
)
from midstream.testing.recording import Recording, record
from midstream.testing.report import Difference, Outcome, compare

_REFUSALS = (CheckpointError, AssertionError, LookupError, KeyError)


class Attempt(NamedTuple):
    """The result of one attempt.

    Attributes:
        outcome: How the resumed run compares with the reference.
        difference: The first difference, if there is one.
        text: The error, if the attempt failed.
        found: The resumed run, if it could be read.
    """

    outcome: Outcome
    difference: Difference | None = None
    text: str = ""
    found: Recording | None = None


class Attempts:
    """Resumes a target and compares it with a reference, a recording of an uninterrupted run.

    Args:
        target: Makes the loaders.
        setup: How they are made and read.
        is_midstream: Whether they are midstream's.
        watch: Called after every step.
    """

    def __init__(
        self, target: Target, setup: Setup, is_midstream: bool, watch: Callable[[], None]
    ) -> None:
        self._target, self._setup, self._watch = target, setup, watch
        self._is_midstream = is_midstream

    def record(self, topology: Topology, **options: Any) -> Recording:
        """Reads the target on a topology; see `record` for the options."""
        return record(self._target, topology, self._setup, watch=self._watch, **options)

    def from_cut(
        self, reference: Recording, cut: int, topology: Topology, again: bool = False
    ) -> Attempt:
        """Resumes from one cut of the reference.

        Args:
            reference: The uninterrupted run.
            cut: Index of the cut.
            topology: Where to resume.
            again: Whether to resume three times: save right after the load, load that state, read
                two steps, save, and load that.
        """
        saved, start = reference.saves[cut], reference.starts[cut]
        title = reference.titles[cut]
        expected = reference.items[start:]
        batches = None if reference.finished else len(expected)
        between: list[Item] = []
        try:
            if again:
                session = Session(self._target, topology, self._setup, saved)
                try:
                    twice = session.save()
                finally:
                    session.close()
                own = self._is_midstream and topology == reference.topology
                if own and not _same_state(saved, twice):
                    text = f"{title}: loaded and saved at once, the state is another"
                    return Attempt("differs", text=text)
                part = self.record(topology, steps=2, saved=twice)
                between, saved = part.items, part.saves[-1]
                batches = None if batches is None else max(0, batches - len(between))
                title += ", and again 2 steps later"
            found = self.record(topology, batches=batches, saved=saved, save=False)
        except Exception as error:
            refused = isinstance(error, _REFUSALS) or not self._is_midstream
            outcome: Outcome = "refused" if refused else "failed"
            return Attempt(outcome, text=f"{title}: {error_text(error)}")
        items = [*between, *found.items]
        longer = again or cut in reference.edges
        if not self._is_midstream and same_over_epochs(expected, items, longer=longer):
            return Attempt("exact", found=found)
        attempt = self._compare(
            reference, items, title, [topology], start=start, droppable=(found, topology)
        )
        return attempt._replace(found=found)

    def in_pieces(self, reference: Recording, stride: int) -> Attempt:
        """Stops and resumes after every ``stride`` steps, to the end of the reference."""
        saved: Saved | None = None
        items: list[Item] = []
        while True:
            try:
                part = self.record(reference.topology, steps=stride, saved=saved)
            except Exception as error:
                outcome: Outcome = "failed" if self._is_midstream else "refused"
                done = f"stopped every {stride} steps, after {len(items)} batches"
                return Attempt(outcome, text=f"{done}: {error_text(error)}")
            items.extend(part.items)
            if not part.items or len(items) > len(reference.items) + 8:
                break
            if not reference.finished and len(items) >= len(reference.items):
                break
            saved = part.saves[-1]
        if not reference.finished:
            del items[len(reference.items) :]  # the reference ends there
        if not self._is_midstream and same_over_epochs(reference.items, items, longer=True):
            return Attempt("exact")
        title = f"stopped every {stride} step{'s' * (stride > 1)}"
        return self._compare(reference, items, title, [reference.topology])

    def after_kills(self, reference: Recording, chain: list[Topology]) -> Attempt:
        """Runs child processes, each from the last checkpoint of the one before, and kills them.

        Args:
            reference: The uninterrupted run.
            chain: Topology of each process. All but the last are killed.

        Raises:
            Unreachable: If the target does not run in another process.
        """
        total = len(reference.items)
        saved: Saved | None = None
        items: list[Item] = []
        for number, topology in enumerate(chain):
            last = number == len(chain) - 1
            goal = total if last else max(1, total * (number + 1) // len(chain)) - len(items)
            batches = None if reference.finished else max(1, total - len(items))
            with Child(self._target.given, topology, self._setup, saved, batches) as child:
                part: list[Item] = []
                for step in child.steps():
                    self._watch()
                    part.extend(step.items)
                    saved = step.saved
                    if not last and len(part) >= goal:
                        child.kill()
                        child.wait()
                        break
            items.extend(part)
        if not self._is_midstream and same_over_epochs(reference.items, items, longer=True):
            return Attempt("exact")
        return self._compare(
            reference, items, "killed and resumed", chain, droppable=(reference, *chain)
        )

    def _compare(
        self,
        reference: Recording,
        items: list[Item],
        title: str,
        chain: list[Topology],
        *,
        start: int = 0,
        droppable: tuple[Recording | Topology, ...] = (),
    ) -> Attempt:
        """Compares the items of a resumed run with those of the reference from ``start`` on.

        With the same number of ranks everything must be the same on every rank; with another one,
        the batches of all ranks together, in the promised order.
        """
        before, expected = reference.items[:start], reference.items[start:]
        same_ranks = all(topology.ranks == reference.topology.ranks for topology in chain)
        if same_ranks:
            outcome, difference = compare(
                before,
                expected,
                items,
                title,
                finished=reference.finished,
                by_rank=reference.topology.ranks > 1,
            )
        else:
            outcome, difference = compare(
                without_errors(before),
                without_errors(expected),
                without_errors(items),
                title,
                finished=reference.finished,
                ordered=promised_order(reference, chain[min(1, len(chain) - 1)]),
                slack=droppable_batches(reference, *droppable),
            )
        return Attempt(outcome, difference)


def _same_state(one: Saved, other: Saved) -> bool:
    try:
        return merge_states(one.load()) == merge_states(other.load())
    except CheckpointError:
        return False


def error_text(error: BaseException) -> str:
    """Returns type and message of an error, a long message of foreign code shortened."""
    text = str(error).strip() or "(no message)"
    lines = text.splitlines()
    if not isinstance(error, MidstreamError) and len(lines) > 6:
        lines = [*lines[:2], "…", *lines[-3:]]
    return f"{type(error).__name__}: " + "\n".join(lines)
