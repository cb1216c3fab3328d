"""One comparison of `check_resume`: what is run, saved, resumed and compared."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from midstream.checkpoint.merge import merge_states
from midstream.errors import CheckpointError, MidstreamError
from midstream.testing.children import Child, Unreachable
from midstream.testing.content import name_samples
from midstream.testing.counting import counting_reads
from midstream.testing.drivers import Item, Saved, Session, Setup, Target, Topology, fitting_lanes
from midstream.testing.recording import Recording, record
from midstream.testing.report import Check, Difference, Outcome, ResumeReport, compare
from midstream.testing.ticker import Ticker

_WINDOW = 48


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Loaders that are made hundreds of times say what they have to say hundreds of times."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


class Plan:
    """The checks, one after the other, within the time there is."""

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
        self.ours, dataset = self.target.look()
        if dataset is not None:
            setup = replace(
                setup, lanes=fitting_lanes(dataset, ranks, workers, setup.batch_size, window)
            )
            self.can = frozenset(("num_workers", "rank", "world_size"))
        else:
            self.can = self.target.takes
        self.setup = setup
        self.report = ResumeReport(self.target.name, self._kind())
        if self.ours and dataset is None:
            window = self._over_lanes(window, given=steps is not None)
        self.window = window
        if "num_workers" not in self.can:
            if workers != (0,):
                self.report.notes.append(
                    "the function takes no num_workers, so there is one number of workers only"
                )
            workers = workers[:1]
        if not {"rank", "world_size"} <= self.can or not self.ours:
            if ranks != (1,):
                why = (
                    "the function takes no rank and world_size"
                    if self.ours
                    else "states of several ranks can be merged for midstream's loaders only"
                )
                self.report.notes.append(f"{why}, so there is one rank only")
            ranks = (1,)
        self.topologies = [Topology(r, w) for r in ranks for w in workers]
        self.references: dict[Topology, Recording] = {}

    def _over_lanes(self, window: int, *, given: bool) -> int:
        """A window in which every lane of a stream is stopped in its middle: else it is only tried
        whether lanes begin.
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
        if self.ours:
            return "midstream"
        loader = self.target.make(Topology(1, 0), 0, self.setup)
        module = type(loader).__module__.partition(".")[0]
        return f"{module}.{type(loader).__name__}"

    def run(self, kill: bool, expected: Iterable[Any] | None) -> ResumeReport:
        """Everything."""
        report = self.report
        pairs = [(s, t) for s in self.topologies for t in self.topologies]
        self.todo = (
            2 * len(self.topologies) + len(pairs) + len(self.topologies) + (3 if kill else 0)
        )
        for topology in self.topologies:
            self._look(topology)
        if not self.references:
            return self._close()
        first = next(iter(self.references.values()))
        if not any(item.samples for item in first.items):
            raise ValueError(f"{report.target} hands out nothing, so there is nothing to check")
        report.batches = sum(1 for item in first.items if not item.error)
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
        if expected is not None:
            self._expected(first, expected)
        if len(self.references) > 1:
            self._orders()
        for topology in self.references:
            self._pair(topology, topology)
        for topology in self.references:
            self._chain(topology)
        if kill:
            self._kills()
        for saved, resumed in pairs:
            if saved != resumed and {saved, resumed} <= set(self.references):
                self._pair(saved, resumed)
        return self._close()

    def _close(self) -> ResumeReport:
        self.report.seconds = time.perf_counter() - self.started
        return self.report

    def _begin(
        self,
        name: str,
        saved: Topology | None = None,
        resumed: Topology | None = None,
        **options: Any,
    ) -> Check:
        check = Check(name, str(saved or ""), str(resumed or ""), **options)
        self.report.checks.append(check)
        self.ticker.say(
            name
            + (
                f", saved on {saved}, resumed on {resumed}"
                if resumed
                else f", {saved}"
                if saved
                else ""
            )
        )
        self.todo -= 1
        check.seconds = -time.perf_counter()
        return check

    def _end(self, check: Check) -> None:
        check.seconds += time.perf_counter()

    def _steps(self, topology: Topology) -> int:
        return max(1, self.window // topology.ranks)

    def _cuts(self, reference: Recording, cost: float, of: list[int] | None = None) -> list[int]:
        """As many cuts as there is time for: the edges first, the others spread out."""
        every = list(range(len(reference.saves))) if of is None else of
        if self.seconds is None or cost <= 0:
            return every
        left = self.seconds - (time.perf_counter() - self.started)
        room = max(3, int(left / max(1, self.todo + 1) / cost))
        if room >= len(every):
            return every
        last = len(every) - 1
        wanted = [
            0,
            last,
            *(e for e in reference.edges if e <= last),
            1,
            *(e - 1 for e in reference.edges if e),
        ]
        spread = [round(i * last / max(1, room - 1)) for i in range(room)]
        chosen: list[int] = []
        for cut in (*wanted[: max(2, room // 2)], *spread):
            if cut not in chosen and cut <= last and len(chosen) < room:
                chosen.append(cut)
        return sorted(every[cut] for cut in chosen)

    # -- the checks ---------------------------------------------------------------------------------------------------

    def _look(self, topology: Topology) -> None:
        """Read twice and save in one of the two: the reference, and whether looking changes
        anything.
        """
        check = self._begin("saving changes nothing", topology, of=1, required=self.ours)
        steps = self._steps(topology)
        try:
            if topology.workers == 0 and self.ours:
                with counting_reads() as reads:
                    reference = record(
                        self.target,
                        topology,
                        self.setup,
                        steps=steps,
                        reads=reads,
                        watch=self.ticker.tick,
                    )
            else:
                reference = record(
                    self.target, topology, self.setup, steps=steps, watch=self.ticker.tick
                )
            plain = record(
                self.target, topology, self.setup, steps=steps, save=False, watch=self.ticker.tick
            )
        except Exception as error:
            check.required = True
            check.note("failed", text=_in_words(error))
            self._end(check)
            return
        self.references[topology] = reference
        if reference.stuck:
            self.report.notes.append(
                f"on {topology} this error comes for ever, so reading ended there:"
                f" {reference.stuck}"
            )
        outcome, difference = compare(
            (), reference.items, plain.items, "read once more", over=reference.over and plain.over
        )
        check.note(outcome, difference)
        if outcome != "exact":
            check.text = (
                "two runs from the start, one of them saved at every step, are not the same: an"
                " unseeded draw, or a state_dict() that changes what comes"
            )
        self._end(check)

    def _expected(self, reference: Recording, samples: Iterable[Any]) -> None:
        """Whether an epoch is what it should be."""
        check = self._begin(
            "an epoch has every sample once", reference.topology, of=len(reference.whole)
        )
        should: Counter[str] = Counter()
        content = not self.ours
        for sample in samples:
            should.update(name_samples([sample], self.setup.key))
        if not content:
            check.outcome, check.text = (
                "not run",
                "samples of midstream pipelines are known by origin: see progress()",
            )
        for epoch in reference.whole if content else ():
            did: Counter[str] = Counter(
                s for item in reference.items if item.epoch == epoch for s in item.samples
            )
            more, less = did - should, should - did
            if more or less:
                check.note(
                    "differs",
                    Difference(
                        f"epoch {epoch}",
                        f"{sum(should.values())} samples",
                        f"{sum(did.values())}",
                        sorted(more)[:20],
                        sorted(less)[:20],
                        sum(more.values()),
                        sum(less.values()),
                    ),
                )
            else:
                check.note("exact")
        self._end(check)

    def _orders(self) -> None:
        """Whether every topology hands out the same."""
        first = next(iter(self.references.values()))
        check = self._begin(
            "the same order for all", required=self.ours, of=len(self.references) - 1
        )
        for topology, other in list(self.references.items())[1:]:
            lanes = {first.num_lanes, other.num_lanes}
            if len(lanes) > 1:
                self.report.notes.append(
                    f"{first.topology} and {topology} have {lanes} lanes, so their orders differ"
                )
                continue
            over = first.over and other.over
            one, two = _batches(first.items), _batches(other.items)
            size = max(len(one), len(two)) if over else min(len(one), len(two))
            outcome, difference = compare(
                (),
                one[:size],
                two[:size],
                f"{topology} against {first.topology}",
                over=over,
                ordered=_promised(first, topology),
                slack=_slack(first, other),
            )
            check.note(outcome, difference)
        self._end(check)

    def _resume(
        self, reference: Recording, cut: int, topology: Topology, again: bool = False
    ) -> tuple[Outcome, Difference | None, str, Recording | None]:
        """Go on from a cut."""
        saved, at = reference.saves[cut], reference.starts[cut]
        expected = reference.items[at:]
        batches = None if reference.over else len(expected)
        bound = reference.places[cut]
        between: list[Item] = []
        try:
            if again:  # load, save at once, load that, read two steps, save, and load that
                session = Session(self.target, topology, self.setup, saved)
                try:
                    twice = session.save()
                finally:
                    session.close()
                if self.ours and topology == reference.topology and not _equal(saved, twice):
                    return (
                        "differs",
                        None,
                        f"{bound}: loaded and saved at once, the state is another",
                        None,
                    )
                part = record(
                    self.target, topology, self.setup, steps=2, saved=twice, watch=self.ticker.tick
                )
                between, saved = part.items, part.saves[-1]
                batches = None if batches is None else max(0, batches - len(between))
                bound += ", and again 2 steps later"
            found = record(
                self.target,
                topology,
                self.setup,
                batches=batches,
                saved=saved,
                save=False,
                watch=self.ticker.tick,
            )
        except Exception as error:
            refused = (
                isinstance(error, (CheckpointError, AssertionError, LookupError, KeyError))
                or not self.ours
            )
            return ("refused" if refused else "failed"), None, f"{bound}: {_in_words(error)}", None
        same_ranks = topology.ranks == reference.topology.ranks
        items = [*between, *found.items]
        before = reference.items[:at]
        if not self.ours and _flat(expected, items, longer=again or cut in reference.edges):
            return "exact", None, "", found
        if not same_ranks:
            before, expected, items = _batches(before), _batches(expected), _batches(items)
        outcome, difference = compare(
            before,
            expected,
            items,
            bound,
            over=reference.over,
            by_rank=same_ranks and topology.ranks > 1,
            ordered=None if same_ranks else _promised(reference, topology),
            slack=0 if same_ranks else _slack(reference, found, topology),
        )
        return outcome, difference, "", found

    def _pair(self, saved: Topology, resumed: Topology) -> None:
        """Stop everywhere on one topology, go on on another (or the same)."""
        reference = self.references[saved]
        name = "on other workers" if saved.ranks == resumed.ranks else "on other ranks"
        if saved == resumed:
            name = "stopped at every batch"
        check = self._begin(
            name, saved, resumed, required=self.ours or saved == resumed, of=len(reference.saves)
        )
        cost = self._cost(resumed, len(reference.starts) // 2)
        counted = self.ours and resumed == saved and saved.workers == 0 and saved.ranks == 1
        for cut in self._cuts(reference, cost):
            if counted:
                with counting_reads() as reads:
                    outcome, difference, text, found = self._resume(reference, cut, resumed)
                if found is not None:
                    again = reads.rows - (reference.reads[-1] - reference.reads[cut])
                    self.report.replayed_rows = max(self.report.replayed_rows or 0, again)
            else:
                outcome, difference, text, found = self._resume(reference, cut, resumed)
            if (
                found is not None
                and resumed.workers == min(t.workers for t in self.references)
                and found.items
            ):
                self.report.first_batch_seconds = max(
                    self.report.first_batch_seconds, found.first_seconds
                )
            check.note(outcome, difference, text)
            if self._late() and check.cuts >= 3:
                break
        self._end(check)

    def _late(self) -> bool:
        """Whether twice the time is over."""
        return self.seconds is not None and time.perf_counter() - self.started > 2 * self.seconds

    def _cost(self, topology: Topology, steps: float) -> float:
        reference = self.references[topology]
        return reference.first_seconds + steps * reference.batch_seconds

    def _chain(self, topology: Topology) -> None:
        """Stop again and again: after every step, after every second, ...; and save again right
        after a load.
        """
        reference = self.references[topology]
        total = len(reference.starts)
        strides = [stride for stride in (1, 2, 3, 7, 16) if stride < total] or [1]
        cost = {stride: self._cost(topology, 1) * total / stride for stride in strides}
        check = self._begin("stopped again and again", topology, topology, of=len(strides))
        chosen = list(strides)
        if self.seconds is not None:
            left = (self.seconds - (time.perf_counter() - self.started)) / max(1, self.todo + 1)
            chosen = [stride for stride in strides if cost[stride] <= max(left / 2, 0)] or strides[
                -1:
            ]
        for stride in chosen:
            outcome, difference, text = self._chained(reference, stride)
            check.note(outcome, difference, text)
        for cut in self._cuts(reference, 2 * self._cost(topology, total // 2))[::3]:
            outcome, difference, text, _ = self._resume(reference, cut, topology, again=True)
            check.of += 1
            check.note(outcome, difference, text)
            if self._late():
                break
        self._end(check)

    def _chained(self, reference: Recording, stride: int) -> tuple[Outcome, Difference | None, str]:
        saved: Saved | None = None
        items: list[Item] = []
        while True:
            try:
                part = record(
                    self.target,
                    reference.topology,
                    self.setup,
                    steps=stride,
                    saved=saved,
                    watch=self.ticker.tick,
                )
            except Exception as error:
                kind: Outcome = "refused" if not self.ours else "failed"
                return (
                    kind,
                    None,
                    f"stopped every {stride} steps, after {len(items)} batches: {_in_words(error)}",
                )
            items.extend(part.items)
            if not part.items or len(items) > len(reference.items) + 8:
                break
            if not reference.over and len(items) >= len(reference.items):
                break
            saved = part.saves[-1]
        if not reference.over:
            del items[len(reference.items) :]  # the reference goes no further
        if not self.ours and _flat(reference.items, items, longer=True):
            return "exact", None, ""
        outcome, difference = compare(
            (),
            reference.items,
            items,
            f"stopped every {stride} step{'s' * (stride > 1)}",
            over=reference.over,
            by_rank=reference.topology.ranks > 1,
        )
        return outcome, difference, ""

    def _kills(self) -> None:
        """Kill processes: the same topology twice; for midstream's, another one each time."""
        known = list(self.references)
        if self.ours:
            chains = [[known[-1], known[0], known[min(1, len(known) - 1)]]]
            if len(known) > 1:
                chains.append([known[min(1, len(known) - 1)]] * 3)
        else:
            chains = [[topology] * 3 for topology in known]
        for chain in chains:
            reference = self.references[chain[0]]
            resumed = " → ".join(dict.fromkeys(map(str, chain[1:])))
            name = "killed twice by SIGKILL" if os.name == "posix" else "killed twice"
            check = self._begin(name, chain[0], None, of=1)
            check.resumed = resumed
            try:
                outcome, difference, text = self._killed(reference, chain)
            except Unreachable as error:
                outcome, difference, text = "failed", None, str(error)
            check.note(outcome, difference, text)
            self._end(check)

    def _killed(
        self, reference: Recording, chain: list[Topology]
    ) -> tuple[Outcome, Difference | None, str]:
        """Run in processes of their own, each from the last checkpoint that the one before it got
        out.
        """
        total = len(reference.items)
        saved: Saved | None = None
        items: list[Item] = []
        for number, topology in enumerate(chain):
            last = number == len(chain) - 1
            target = total if last else max(1, total * (number + 1) // len(chain)) - len(items)
            batches = None if reference.over else max(1, total - len(items))
            with Child(self.target.given, topology, self.setup, saved, batches) as child:
                part: list[Item] = []
                for step in child.steps():
                    self.ticker.tick()
                    part.extend(step.items)
                    saved = step.saved
                    if not last and len(part) >= target:
                        child.kill()
                        child.wait()
                        break
            items.extend(part)
        if not self.ours and _flat(reference.items, items, longer=True):
            return "exact", None, ""
        same = all(topology.ranks == reference.topology.ranks for topology in chain)
        expected, found = (
            (reference.items, items) if same else (_batches(reference.items), _batches(items))
        )
        outcome, difference = compare(
            (),
            expected,
            found,
            "killed and resumed",
            over=reference.over,
            by_rank=same and reference.topology.ranks > 1,
            ordered=None if same else _promised(reference, chain[1]),
            slack=0 if same else _slack(reference, reference, *chain),
        )
        return outcome, difference, ""


def _flat(expected: Sequence[Item], found: Sequence[Item], *, longer: bool) -> bool:
    """Whether the same comes one after the other, wherever epochs end.

    Foreign loaders do not say in which epoch they are. After the last batch of one, some go on with
    the rest of it, which is empty, and some with the next: both are right, and then an epoch more
    comes at the end.
    """
    if len(found) < len(expected) or (len(found) > len(expected) and not longer):
        return False
    return all(a.same(b._replace(epoch=a.epoch)) for a, b in zip(expected, found))


def _batches(items: Sequence[Item]) -> list[Item]:
    """Without the errors, which are no batches."""
    return [item for item in items if not item.error]


def _promised(reference: Recording, topology: Topology) -> dict[int, int] | None:
    """Up to where the order is that of any number of ranks: of random access always, of streams
    until a lane has drained.
    """
    if topology.ranks == reference.topology.ranks:
        return None
    if reference.random_access:
        return _before_errors(reference.items)
    if any(reference.num_lanes % ranks for ranks in (topology.ranks, reference.topology.ranks)):
        return dict.fromkeys({item.epoch for item in reference.items}, 0)
    return reference.ordered


def _before_errors(items: Sequence[Item]) -> dict[int, int] | None:
    """A rank that loses whole batches to errors is ahead of the others by as many: from there on
    the order is another.
    """
    ordered: dict[int, int] = {}
    counts: Counter[int] = Counter()
    for item in items:
        if item.error:
            ordered.setdefault(item.epoch, counts[item.epoch])
        else:
            counts[item.epoch] += 1
    return ordered or None


def _slack(*parts: Recording | Topology) -> int:
    """Batches at the end of an epoch that do not go round all ranks, where they are dropped."""
    recordings = [part for part in parts if isinstance(part, Recording)]
    if not any(part.drops for part in recordings):
        return 0
    ranks = [part.topology.ranks if isinstance(part, Recording) else part.ranks for part in parts]
    return max(ranks) - 1


def _equal(one: Saved, other: Saved) -> bool:
    try:
        return merge_states(one.load()) == merge_states(other.load())
    except CheckpointError:
        return False


def _in_words(error: BaseException) -> str:
    text = str(error).strip() or "(no message)"
    lines = text.splitlines()
    if not isinstance(error, MidstreamError) and len(lines) > 6:
        lines = [*lines[:2], "…", *lines[-3:]]
    return f"{type(error).__name__}: " + "\n".join(lines)
