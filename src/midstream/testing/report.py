"""Compares a resumed run with the uninterrupted one, and reports the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from midstream.common.tables import column_sides, rich_table, table_lines
from midstream.testing.content import first_names
from midstream.testing.drivers import Item

__all__ = ["Check", "Difference", "ResumeError", "ResumeReport", "compare"]

Outcome = Literal["exact", "once", "differs", "refused", "failed", "not run"]

_WORDS: dict[str, str] = {
    "exact": "exact",
    "once": "exactly once, in another order",
    "differs": "DIFFERS",
    "refused": "refused",
    "failed": "FAILED",
    "not run": "not run",
}
_NAMED = 20


@dataclass(frozen=True)
class Difference:
    """The first difference between a resumed and the uninterrupted run, and the samples it cost.

    Attributes:
        place: The cut from which the run was resumed, and the number of the batch.
        expected: The batch of the uninterrupted run.
        found: The batch of the resumed run.
        repeated: Names of the first samples that were handed out too often.
        lost: Names of the first samples that were not handed out.
        num_repeated: Number of all repeated samples.
        num_lost: Number of all lost samples.
        to_the_end: Whether ``lost`` counts to the end of an epoch; else to the last batch read.
    """

    place: str
    expected: str
    found: str
    repeated: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    num_repeated: int = 0
    num_lost: int = 0
    to_the_end: bool = True

    def lines(self) -> list[str]:
        """Returns the difference as lines of text."""
        lines = [
            f"{self.place}: expected {self.expected}",
            f"{' ' * len(self.place)}     found {self.found}",
        ]
        if self.num_repeated:
            lines.append(f"  repeated {self.num_repeated}: {first_names(self.repeated)}")
        if self.num_lost:
            until = "" if self.to_the_end else " (in what was read)"
            lines.append(f"  lost {self.num_lost}{until}: {first_names(self.lost)}")
        if not self.num_repeated and not self.num_lost:
            lines.append("  no sample is lost or repeated: the order or the content differs")
        return lines


@dataclass
class Check:
    """One property that was checked at several cuts.

    Attributes:
        name: The property.
        saved: Ranks and workers of the run that saved.
        resumed: Ranks and workers of the run that resumed.
        required: Whether it counts for the verdict. Resuming a foreign loader on another number of
            workers does not, because it is not promised.
        cuts: Number of cuts that were tried.
        of: Number of cuts that there are.
        wrong: Number of cuts at which the outcome was not exact.
        outcome: The worst outcome.
        difference: The first difference.
        text: The error, if a resume was refused or failed; else a remark.
        seconds: Time that the check took.
        most_lost: Largest number of samples lost at one cut.
        most_repeated: Largest number of samples repeated at one cut.
    """

    name: str
    saved: str = ""
    resumed: str = ""
    required: bool = True
    cuts: int = 0
    of: int = 0
    wrong: int = 0
    outcome: Outcome = "exact"
    difference: Difference | None = None
    text: str = ""
    seconds: float = 0.0
    most_lost: int = 0
    most_repeated: int = 0

    _RANKING = ("not run", "exact", "once", "refused", "differs", "failed")

    @property
    def passed(self) -> bool:
        """Whether the outcome is exact, or the check was not run."""
        return self.outcome in ("exact", "once", "not run")

    def note(self, outcome: Outcome, difference: Difference | None = None, text: str = "") -> None:
        """Adds the outcome at one cut."""
        self.cuts += 1
        self.wrong += outcome not in ("exact", "once")
        if difference is not None:
            self.most_lost = max(self.most_lost, difference.num_lost)
            self.most_repeated = max(self.most_repeated, difference.num_repeated)
        if self._RANKING.index(outcome) > self._RANKING.index(self.outcome):
            self.outcome = outcome
            self.difference, self.text = difference or self.difference, text or self.text
        elif self.difference is None and difference is not None:
            self.difference = difference

    def verdict(self) -> str:
        """Returns the outcome in words."""
        text = _WORDS[self.outcome]
        if self.outcome in ("differs", "refused", "failed") and self.of > 1:
            text += f" at {self.wrong} of {self.cuts}"
        if self.most_lost or self.most_repeated:
            text += f" (up to {self.most_lost} lost, {self.most_repeated} repeated)"
        return text


class ResumeError(AssertionError):
    """A pipeline or loader does not resume exactly.

    Attributes:
        report: The `ResumeReport`.
    """

    def __init__(self, report: ResumeReport) -> None:
        super().__init__(str(report))
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.report,)


@dataclass
class ResumeReport:
    """The result of `check_resume`.

    Show it with ``print(report)``, or with ``report.show()``, which prints colours if rich is
    installed.

    Attributes:
        target: Name of the pipeline or loader.
        kind: ``"midstream"``, or the type of a foreign loader.
        checks: The checks, in the order in which they ran.
        batches: Number of batches of the uninterrupted run.
        samples: Number of samples in them.
        epochs: Number of epochs that were read to their end.
        state_bytes: Size of the largest checkpoint, over all ranks, without the pipeline's spec.
        first_batch_seconds: Longest time from making a loader to its first batch after a resume,
            without workers.
        replayed_rows: Largest number of source rows that a resume read again; None for foreign
            loaders.
        notes: Checks that could not be run, and why.
        seconds: Time that all checks took.
    """

    target: str
    kind: str = "midstream"
    checks: list[Check] = field(default_factory=list)
    batches: int = 0
    samples: int = 0
    epochs: int = 0
    state_bytes: int = 0
    first_batch_seconds: float = 0.0
    replayed_rows: int | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether all required checks passed."""
        return all(check.passed for check in self.checks if check.required)

    @property
    def first(self) -> Check | None:
        """The first required check that did not pass."""
        return next((check for check in self.checks if check.required and not check.passed), None)

    def raise_for_difference(self) -> None:
        """Raises `ResumeError` unless the report is exact."""
        if not self.exact:
            raise ResumeError(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that ``json`` can write."""
        return {"exact": self.exact, **asdict(self)}

    def rows(self) -> list[list[str]]:
        """Returns the table as text: a header, then one row per check."""
        table = [["ranks × workers", "saved", "resumed", "cuts", "outcome"]]
        last = ""
        for check in self.checks:
            cuts = f"{check.cuts} of {check.of}" if check.of else ""
            outcome = check.verdict() + ("" if check.required else " [not promised]")
            table.append(
                [
                    check.name if check.name != last else "",
                    check.saved,
                    check.resumed,
                    cuts,
                    outcome,
                ]
            )
            last = check.name
        return table

    def headline(self) -> str:
        """Returns the verdict as one line."""
        where = (
            f"{self.batches} batches, {self.samples} samples, {self.epochs} whole"
            f" epoch{'s' * (self.epochs != 1)}"
        )
        return (
            f"{'EXACT' if self.exact else 'NOT EXACT'}: {self.target} ({self.kind}), {where}, in"
            f" {self.seconds:.0f} s"
        )

    def costs(self) -> str:
        """Returns the costs of a resume as one line: state, first batch and rows read again."""
        first = f"{1000 * self.first_batch_seconds:.0f} ms"
        text = (
            f"state {self.state_bytes:,} bytes at most; first batch after a resume within {first}"
        )
        if self.replayed_rows is not None:
            text += f"; at most {self.replayed_rows:,} source rows read again"
        return text

    def details(self) -> list[str]:
        """Returns the first difference of each failed check, and the notes, as lines."""
        lines = []
        for check in self.checks:
            if check.passed:
                continue
            title = (
                f"{check.name}, saved on {check.saved}, resumed on {check.resumed}"
                if check.resumed
                else check.name
            )
            lines.append(f"{title}: {check.verdict()}")
            if check.difference is not None:
                lines.extend(f"  {line}" for line in check.difference.lines())
            if check.text:
                lines.extend(f"  {line}" for line in check.text.splitlines()[:6])
        return [*lines, *(f"note: {note}" for note in self.notes)]

    def __str__(self) -> str:
        table = (f"  {line}" for line in table_lines(self.rows(), left=5))
        return "\n".join([self.headline(), f"  {self.costs()}", *table, *self.details()])

    def __rich__(self) -> Any:
        """Returns the report as rich prints it."""
        from rich.console import Group
        from rich.text import Text

        header, *rows = self.rows()
        table = rich_table(header, column_sides(len(header), left=3, last=True))
        for row, check in zip(rows, self.checks):
            style = "green" if check.passed else "bold red" if check.required else "yellow"
            table.add_row(*(Text(cell) for cell in row[:-1]), Text(row[-1], style=style))
        color = "bold green" if self.exact else "bold red"
        details = Text("\n".join(self.details()))
        return Group(
            Text(self.headline(), style=color), Text(self.costs(), style="dim"), table, details
        )

    def show(self) -> None:
        """Prints the report, with colours if rich is installed."""
        try:
            from rich.console import Console
        except ImportError:
            print(self)
        else:
            Console(highlight=False).print(self)


def compare(
    before: Sequence[Item],
    expected: Sequence[Item],
    found: Sequence[Item],
    place: str,
    *,
    finished: bool,
    by_rank: bool = False,
    ordered: dict[int, int] | None = None,
    slack: int = 0,
) -> tuple[Outcome, Difference | None]:
    """Compares a resumed run with the rest of the uninterrupted run.

    Args:
        before: Items of the uninterrupted run before the cut.
        expected: Its items after the cut.
        found: Items of the resumed run.
        place: Name of the cut.
        finished: Whether both were read to the end of all epochs.
        by_rank: Whether to compare every rank by itself.
        ordered: For every epoch, the number of items that must come in the same order; the items
            after them may come in any. An epoch that is missing is ordered to its end. None: all
            epochs are.
        slack: Number of batches at the end of an epoch that may be missing or be added.

    Returns:
        The outcome, and the first difference if there is one.
    """
    if by_rank:
        for rank in sorted({item.rank for item in (*expected, *found)}):
            one, two, three = (
                [item for item in items if item.rank == rank] for items in (before, expected, found)
            )
            outcome, difference = compare(
                one, two, three, f"{place}, rank {rank}", finished=finished
            )
            if outcome != "exact":
                return outcome, difference
        return "exact", None
    if not finished and ordered is None:
        # Items beyond the last expected one cannot be compared, nor can the end of an epoch there.
        found = found[: len(expected)]
    epochs = sorted({item.epoch for item in (*expected, *found)})
    worst: Outcome = "exact"
    batches = 0
    for epoch in epochs:
        earlier, rest, came = (
            [item for item in items if item.epoch == epoch] for items in (before, expected, found)
        )
        open_end = epoch == epochs[-1] and not finished
        if not open_end and abs(len(rest) - len(came)) <= slack:
            size = min(len(rest), len(came))
            rest, came = rest[:size], came[:size]
        in_order = (
            None if ordered is None or epoch not in ordered else ordered[epoch] - len(earlier)
        )
        outcome, wrong = _compare_epoch(rest, came, open_end, in_order)
        if wrong is not None:
            title = f"{place}, batch {batches + wrong + 1}"
            return "differs", _difference(
                earlier,
                rest,
                came[: len(rest)] if open_end else came,
                wrong,
                title,
                to_the_end=not open_end,
            )
        if outcome == "once":
            worst = outcome
        batches += len(rest)
    return worst, None


def _compare_epoch(
    expected: Sequence[Item], found: Sequence[Item], open_end: bool, in_order: int | None
) -> tuple[Outcome, int | None]:
    """Compares the items of one epoch.

    Args:
        expected: The expected items.
        found: The items of the resumed run.
        open_end: Whether reading stopped inside the epoch, so that items may follow.
        in_order: Number of items that must come in the same order; None: all.

    Returns:
        The outcome, and the index of the first item that differs.
    """
    size = min(len(expected), len(found)) if open_end else max(len(expected), len(found))
    limit = size if in_order is None else min(size, max(0, in_order))
    wrong = next((i for i in range(limit) if not _same_at(expected, found, i)), None)
    if wrong is not None:
        return "differs", wrong
    if limit == size:
        return ("differs", size) if open_end and len(found) < len(expected) else ("exact", None)
    if open_end:
        return "exact", None  # items in any order cannot be distinguished from later ones
    if _counts(expected) != _counts(found):
        return "differs", next(i for i in range(size) if not _same_at(expected, found, i))
    same = len(expected) == len(found) and all(a.same(b) for a, b in zip(expected, found))
    return ("exact" if same else "once"), None


def _same_at(expected: Sequence[Item], found: Sequence[Item], index: int) -> bool:
    return index < len(expected) and index < len(found) and expected[index].same(found[index])


def _counts(items: Sequence[Item]) -> Counter[str]:
    return Counter(sample for item in items for sample in item.samples)


def _difference(
    earlier: Sequence[Item],
    rest: Sequence[Item],
    came: Sequence[Item],
    at: int,
    place: str,
    *,
    to_the_end: bool,
) -> Difference:
    should, did = _counts([*earlier, *rest]), _counts([*earlier, *came])
    more, less = did - should, should - did
    expected, found = rest[at] if at < len(rest) else None, came[at] if at < len(came) else None
    by_content = expected is not None and found is not None and expected.samples == found.samples
    return Difference(
        place=place,
        expected=_show(expected, by_content=by_content),
        found=_show(found, by_content=by_content),
        repeated=sorted(more)[:_NAMED],
        lost=sorted(less)[:_NAMED],
        num_repeated=sum(more.values()),
        num_lost=sum(less.values()),
        to_the_end=to_the_end,
    )


def _show(item: Item | None, *, by_content: bool) -> str:
    if item is None:
        return "the end"
    if item.error:
        return item.error
    if by_content:
        return f"{first_names(item.samples, 2)} as {item.content} (hash {item.digest})"
    return first_names(item.samples, 4)
