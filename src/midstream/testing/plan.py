"""The checks of `check_resume`, one after the other, within the time that is given."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from midstream.testing.attempts import Attempt, Attempts, error_text
from midstream.testing.children import Unreachable
from midstream.testing.content import name_samples
from midstream.testing.counting import counting_reads
from midstream.testing.drivers import Setup, Target, Topology, fitting_lanes
from midstream.testing.promises import droppable_batches, promised_order, without_errors
from midstream.testing.recording import Recording
from midstream.testing.report import Check, Difference, ResumeReport, compare
from midstream.testing.ticker import Ticker

_WINDOW = 48
_LOADER_OPTIONS = frozenset(("num_workers", "rank", "world_size"))


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Hides log lines up to warnings: hundreds of loaders would repeat the same ones."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


class Plan:
    """Runs all checks on one target.

    Args:
        given: What the user passed to `check_resume`.
        workers: Numbers of worker processes.
        ranks: Numbers of ranks.
        steps: Batches to read over all ranks; None to choose.
        setup: How loaders are made and read.
        seconds: About how long it may take; None: as long as it needs.
        ticker: Shows progress.
    """

    def __init__(
        self,
        given: Any,
        workers: tuple[int, ...],
        ranks: tuple[int, ...],
        steps: int | None,
        setup: Setup,
        seconds: float | None,
        ticker: Ticker,
    ) -> None:
        self.target, self.ticker = Target(given), ticker
        window = steps or _WINDOW
        self.started, self.seconds = time.perf_counter(), seconds
        self.is_midstream, dataset = self.target.probe()
        if dataset is not None:
            setup = replace(
                setup, lanes=fitting_lanes(dataset, ranks, workers, setup.batch_size, window)
            )
        self.setup = setup
        self.report = ResumeReport(self.target.name, self._kind())
        if self.is_midstream and dataset is None:
            window = self._window_over_lanes(window, given=steps is not None)
        self.window = window
        options = self.target.takes if dataset is None else _LOADER_OPTIONS
        self.topologies = self._topologies(workers, ranks, options)
        self.references: dict[Topology, Recording] = {}
        self.attempts = Attempts(self.target, setup, self.is_midstream, ticker.tick)

    def _topologies(
        self, workers: tuple[int, ...], ranks: tuple[int, ...], options: frozenset[str]
    ) -> list[Topology]:
        """Returns the topologies that the target can run on, and notes those it cannot."""
        if "num_workers" not in options:
            if workers != (0,):
                self.report.notes.append(
                    "the function takes no num_workers, so there is one number of workers only"
                )
            workers = workers[:1]
        if not {"rank", "world_size"} <= options or not self.is_midstream:
            if ranks != (1,):
                why = (
                    "the function takes no rank and world_size"
                    if self.is_midstream
                    else "states of several ranks can be merged for midstream's loaders only"
                )
                self.report.notes.append(f"{why}, so there is one rank only")
            ranks = (1,)
        return [Topology(r, w) for r in ranks for w in workers]

    def _window_over_lanes(self, window: int, *, given: bool) -> int:
        """Returns a window long enough to stop every lane of a stream in its middle.

        A shorter one would only check that lanes begin.

        Args:
            window: Number of batches to read.
            given: Whether the user chose it; then it stays, and a note says what it misses.
        """
        loader = self.target.make(Topology(1, 0), 0, self.setup)
        if loader.run.pipeline.random_access:
            return window
        lanes = loader.state_dict()["num_lanes"]
        if window >= 3 * lanes:
            return window
        if given:
            self.report.notes.append(
                f"the loader has {lanes} lanes, so few of them were stopped in their middle: read"
                f" steps={3 * lanes} or more, or give the loader fewer lanes here"
            )
            return window
        return 3 * int(lanes)

    def _kind(self) -> str:
        if self.is_midstream:
            return "midstream"
        loader = self.target.make(Topology(1, 0), 0, self.setup)
        module = type(loader).__module__.partition(".")[0]
        return f"{module}.{type(loader).__name__}"

    def run(self, kill: bool, expected: Iterable[Any] | None) -> ResumeReport:
        """Runs the checks.

        Args:
            kill: Whether to kill processes too.
            expected: The samples of an epoch, if they are known.

        Raises:
            ValueError: If the target hands out nothing.
        """
        pairs = [(s, t) for s in self.topologies for t in self.topologies]
        self.todo = 3 * len(self.topologies) + len(pairs) + (3 if kill else 0)
        for topology in self.topologies:
            self._check_saving(topology)
        if not self.references:
            return self._close()
        first = next(iter(self.references.values()))
        self._describe(first)
        if expected is not None:
            self._check_epochs(first, expected)
        if len(self.references) > 1:
            self._check_orders()
        for topology in self.references:
            self._check_cuts(topology, topology)
        for topology in self.references:
            self._check_pieces(topology)
        if kill:
            self._check_kills()
        for saved, resumed in pairs:
            if saved != resumed and {saved, resumed} <= set(self.references):
                self._check_cuts(saved, resumed)
        return self._close()

    def _describe(self, first: Recording) -> None:
        """Fills in the report's facts about the uninterrupted run."""
        report = self.report
        if not any(item.samples for item in first.items):
            raise ValueError(f"{report.target} hands out nothing, so there is nothing to check")
        report.batches = len(without_errors(first.items))
        report.samples = sum(len(item.samples) for item in first.items)
        report.epochs = len(first.whole)
        report.state_bytes = max(
            saved.num_bytes for found in self.references.values() for saved in found.saves
        )
        if not first.whole:
            report.notes.append(
                f"no epoch ended within {self.window} batches, so the ends of epochs were not seen:"
                " give steps=, or less data"
            )

    def _close(self) -> ResumeReport:
        self.report.seconds = self._elapsed()
        return self.report

    # -- time --------------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    def _time_left(self) -> float:
        """Returns the seconds left for each check that is still to come."""
        assert self.seconds is not None
        return (self.seconds - self._elapsed()) / max(1, self.todo + 1)

    def _late(self) -> bool:
        """Whether twice the given time has passed."""
        return self.seconds is not None and self._elapsed() > 2 * self.seconds

    def _cost(self, topology: Topology, steps: float) -> float:
        """Returns the seconds that it takes to make the loaders and read so many steps."""
        reference = self.references[topology]
        return reference.first_seconds + steps * reference.batch_seconds

    def _cuts(self, reference: Recording, cost: float) -> list[int]:
        """Returns as many cuts as there is time for: the ends of epochs first, the others spread.

        Args:
            reference: The recording that has the cuts.
            cost: Seconds that one cut takes.
        """
        last = len(reference.saves) - 1
        every = list(range(last + 1))
        if self.seconds is None or cost <= 0:
            return every
        room = max(3, int(self._time_left() / cost))
        if room > last:
            return every
        wanted = [
            0,
            last,
            *(edge for edge in reference.edges if edge <= last),
            1,
            *(edge - 1 for edge in reference.edges if edge),
        ]
        spread = [round(i * last / max(1, room - 1)) for i in range(room)]
        chosen: list[int] = []
        for cut in (*wanted[: max(2, room // 2)], *spread):
            if cut not in chosen and cut <= last and len(chosen) < room:
                chosen.append(cut)
        return sorted(chosen)

    # -- the checks --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _check(
        self,
        name: str,
        saved: Topology | None = None,
        resumed: Topology | None = None,
        **options: Any,
    ) -> Iterator[Check]:
        """Adds a check to the report, shows its name while it runs, and measures its time."""
        check = Check(name, str(saved or ""), str(resumed or ""), **options)
        self.report.checks.append(check)
        if resumed:
            name += f", saved on {saved}, resumed on {resumed}"
        elif saved:
            name += f", {saved}"
        self.ticker.show(name)
        self.todo -= 1
        start = time.perf_counter()
        yield check
        check.seconds = time.perf_counter() - start

    def _check_saving(self, topology: Topology) -> None:
        """Reads twice, saving in the first run only: saving must change nothing.

        The first run becomes the topology's reference.
        """
        with self._check(
            "saving changes nothing", topology, of=1, required=self.is_midstream
        ) as check:
            steps = max(1, self.window // topology.ranks)
            try:
                if topology.workers == 0 and self.is_midstream:
                    with counting_reads() as reads:
                        reference = self.attempts.record(topology, steps=steps, reads=reads)
                else:
                    reference = self.attempts.record(topology, steps=steps)
                plain = self.attempts.record(topology, steps=steps, save=False)
            except Exception as error:
                check.required = True
                check.note("failed", text=error_text(error))
                return
            self.references[topology] = reference
            if reference.stuck:
                self.report.notes.append(
                    f"on {topology} this error is raised for ever, so reading stopped there:"
                    f" {reference.stuck}"
                )
            outcome, difference = compare(
                (),
                reference.items,
                plain.items,
                "read once more",
                finished=reference.finished and plain.finished,
            )
            check.note(outcome, difference)
            if outcome != "exact":
                check.text = (
                    "two runs from the start, one of them saved at every step, are not the same: an"
                    " unseeded draw, or a state_dict() that changes the samples"
                )

    def _check_epochs(self, reference: Recording, samples: Iterable[Any]) -> None:
        """Compares the samples of each epoch of a foreign loader with those that are expected."""
        with self._check(
            "an epoch has every sample once", reference.topology, of=len(reference.whole)
        ) as check:
            if self.is_midstream:
                check.outcome = "not run"
                check.text = "samples of midstream pipelines are known by origin: see progress()"
                return
            expected: Counter[str] = Counter()
            for sample in samples:
                expected.update(name_samples([sample], self.setup.key))
            for epoch in reference.whole:
                found: Counter[str] = Counter()
                for item in reference.items:
                    found.update(item.samples if item.epoch == epoch else ())
                if found == expected:
                    check.note("exact")
                    continue
                repeated, lost = found - expected, expected - found
                difference = Difference(
                    f"epoch {epoch}",
                    f"{sum(expected.values())} samples",
                    f"{sum(found.values())}",
                    sorted(repeated)[:20],
                    sorted(lost)[:20],
                    sum(repeated.values()),
                    sum(lost.values()),
                )
                check.note("differs", difference)

    def _check_orders(self) -> None:
        """Compares the uninterrupted runs on all topologies with the first one."""
        first, *others = self.references.values()
        with self._check(
            "the same order for all", required=self.is_midstream, of=len(others)
        ) as check:
            for other in others:
                topology = other.topology
                lanes = {first.num_lanes, other.num_lanes}
                if len(lanes) > 1:
                    self.report.notes.append(
                        f"{first.topology} and {topology} have {lanes} lanes, so their orders"
                        " differ"
                    )
                    continue
                finished = first.finished and other.finished
                one, two = without_errors(first.items), without_errors(other.items)
                size = max(len(one), len(two)) if finished else min(len(one), len(two))
                outcome, difference = compare(
                    (),
                    one[:size],
                    two[:size],
                    f"{topology} against {first.topology}",
                    finished=finished,
                    ordered=promised_order(first, topology),
                    slack=droppable_batches(first, other),
                )
                check.note(outcome, difference)

    def _check_cuts(self, saved: Topology, resumed: Topology) -> None:
        """Stops at every cut on one topology, and resumes on the same or on another one."""
        reference = self.references[saved]
        name = "on other workers" if saved.ranks == resumed.ranks else "on other ranks"
        if saved == resumed:
            name = "stopped at every batch"
        with self._check(
            name,
            saved,
            resumed,
            required=self.is_midstream or saved == resumed,
            of=len(reference.saves),
        ) as check:
            cost = self._cost(resumed, len(reference.starts) // 2)
            fewest_workers = min(topology.workers for topology in self.references)
            for cut in self._cuts(reference, cost):
                attempt = self._resume(reference, cut, resumed)
                found = attempt.found
                if found is not None and found.items and resumed.workers == fewest_workers:
                    self.report.first_batch_seconds = max(
                        self.report.first_batch_seconds, found.first_seconds
                    )
                check.note(attempt.outcome, attempt.difference, attempt.text)
                if self._late() and check.cuts >= 3:
                    break

    def _resume(self, reference: Recording, cut: int, topology: Topology) -> Attempt:
        """Resumes from a cut, and counts the source rows read again where all are read here."""
        if not self.is_midstream or topology != reference.topology or topology != (1, 0):
            return self.attempts.from_cut(reference, cut, topology)
        with counting_reads() as reads:
            attempt = self.attempts.from_cut(reference, cut, topology)
        if attempt.found is not None:
            again = reads.rows - (reference.reads[-1] - reference.reads[cut])
            self.report.replayed_rows = max(self.report.replayed_rows or 0, again)
        return attempt

    def _check_pieces(self, topology: Topology) -> None:
        """Stops after every step, every second, ...; and saves again right after a load."""
        reference = self.references[topology]
        total = len(reference.starts)
        strides = [stride for stride in (1, 2, 3, 7, 16) if stride < total] or [1]
        with self._check("stopped again and again", topology, topology, of=len(strides)) as check:
            chosen = strides
            if self.seconds is not None:
                cost = self._cost(topology, 1) * total  # with a stop after every step
                left = max(self._time_left() / 2, 0)
                chosen = [stride for stride in strides if cost / stride <= left] or strides[-1:]
            for stride in chosen:
                attempt = self.attempts.in_pieces(reference, stride)
                check.note(attempt.outcome, attempt.difference, attempt.text)
            for cut in self._cuts(reference, 2 * self._cost(topology, total // 2))[::3]:
                attempt = self.attempts.from_cut(reference, cut, topology, again=True)
                check.of += 1
                check.note(attempt.outcome, attempt.difference, attempt.text)
                if self._late():
                    break

    def _check_kills(self) -> None:
        """Kills processes: twice on one topology, and midstream's on changing topologies too."""
        known = list(self.references)
        if self.is_midstream:
            chains = [[known[-1], known[0], known[min(1, len(known) - 1)]]]
            if len(known) > 1:
                chains.append([known[min(1, len(known) - 1)]] * 3)
        else:
            chains = [[topology] * 3 for topology in known]
        name = "killed twice by SIGKILL" if os.name == "posix" else "killed twice"
        for chain in chains:
            with self._check(name, chain[0], of=1) as check:
                check.resumed = " → ".join(dict.fromkeys(map(str, chain[1:])))
                try:
                    attempt = self.attempts.after_kills(self.references[chain[0]], chain)
                except Unreachable as error:
                    attempt = Attempt("failed", text=str(error))
                check.note(attempt.outcome, attempt.difference, attempt.text)
