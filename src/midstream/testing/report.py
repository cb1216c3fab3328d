"""What a check found: told in words, as a table, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from midstream.testing.content import some
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
    """The first place where a resumed run is not the run that was left alone, and what it makes of the samples.

    Attributes:
        place: Where it was resumed, and how many batches later.
        expected: The batch of the run that was left alone.
        found: That of the resumed one.
        repeated: Names of samples that came more often than they should (the first ones).
        lost: Names of samples that did not come.
        num_repeated: How many those are.
        num_lost: How many those are.
        to_the_end: Whether ``lost`` is to the end of an epoch; else to the end of what was read.
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
        """In words."""
        lines = [
            f"{self.place}: expected {self.expected}",
            f"{' ' * len(self.place)}     found {self.found}",
        ]
        if self.num_repeated:
            lines.append(f"  repeated {self.num_repeated}: {some(self.repeated)}")
        if self.num_lost:
            until = "" if self.to_the_end else " (in what was read)"
            lines.append(f"  lost {self.num_lost}{until}: {some(self.lost)}")
        if not self.num_repeated and not self.num_lost:
            lines.append("  no sample is lost or repeated: the order or the content is another")
        return lines


@dataclass
class Check:
    """One thing that was tried, at several cuts.

    Attributes:
        name: What.
        saved: Ranks and workers of the run that saved.
        resumed: Of the run that went on.
        required: Whether it counts. What nobody promised (a foreign loader on another number of
            workers) does not.
        cuts: Places at which it was tried.
        of: Places there are.
        wrong: Cuts at which the outcome was not exact.
        outcome: The worst.
        difference: The first.
        text: Of the error, where it was refused or failed; else a remark.
        seconds: What it took.
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
        """Whether nothing was wrong."""
        return self.outcome in ("exact", "once", "not run")

    def note(self, outcome: Outcome, difference: Difference | None = None, text: str = "") -> None:
        """Count the outcome at one cut."""
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
        """The outcome in words."""
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
    """What `check_resume` found. ``print(report)``; a table with colours where rich is installed: ``report.show()``.

    Attributes:
        target: What was checked.
        kind: ``"midstream"``, or the type of a foreign loader.
        checks: What was tried.
        batches: Batches of the run that was left alone.
        samples: Samples in them.
        epochs: Epochs that were read to their end.
        state_bytes: Size of the largest checkpoint, over all ranks, a pipeline's spec aside.
        first_batch_seconds: Longest time from making a loader to its first batch after a resume,
            without workers.
        replayed_rows: Source rows that a resume read again, at most; None for foreign loaders.
        notes: What could not be tried, and why.
        seconds: What all of it took.
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
        """Whether everything that counts passed."""
        return all(check.passed for check in self.checks if check.required)

    @property
    def first(self) -> Check | None:
        """The first check that counts and did not pass."""
        return next((check for check in self.checks if check.required and not check.passed), None)

    def raise_for_difference(self) -> None:
        """Raise `ResumeError` unless all is exact."""
        if not self.exact:
            raise ResumeError(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``json`` takes them."""
        return {"exact": self.exact, **asdict(self)}

    def rows(self) -> list[list[str]]:
        """The table as text: a header, then one row per check."""
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
        """The verdict in a line."""
        where = (
            f"{self.batches} batches, {self.samples} samples, {self.epochs} whole"
            f" epoch{'s' * (self.epochs != 1)}"
        )
        return (
            f"{'EXACT' if self.exact else 'NOT EXACT'}: {self.target} ({self.kind}), {where}, in"
            f" {self.seconds:.0f} s"
        )

    def costs(self) -> str:
        """State and replay in a line."""
        first = f"{1000 * self.first_batch_seconds:.0f} ms"
        text = (
            f"state {self.state_bytes:,} bytes at most; first batch after a resume within {first}"
        )
        if self.replayed_rows is not None:
            text += f"; at most {self.replayed_rows:,} source rows read again"
        return text

    def details(self) -> list[str]:
        """The first difference of each check that has one, and the notes."""
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
        table = self.rows()
        widths = [max(len(row[column]) for row in table) for column in range(5)]
        lines = [self.headline(), f"  {self.costs()}"]
        for row in table:
            cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
            lines.append(f"  {cells}".rstrip())
        return "\n".join([*lines, *self.details()])

    def __rich__(self) -> Any:
        """As rich shows it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        header, *rows = self.rows()
        for column in header:
            table.add_column(
                column, justify="right" if column == "cuts" else "left", overflow="fold"
            )
        for row, check in zip(rows, self.checks):
            style = "green" if check.passed else "bold red" if check.required else "yellow"
            table.add_row(*(Text(cell) for cell in row[:-1]), Text(row[-1], style=style))
        color = "bold green" if self.exact else "bold red"
        details = Text("\n".join(self.details()))
        return Group(
            Text(self.headline(), style=color), Text(self.costs(), style="dim"), table, details
        )

    def show(self) -> None:
        """Print it, with colours where rich is installed."""
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
    """Set what a resumed run handed out against the rest of the run that was left alone.

    Args:
        before: What was handed out before the cut.
        expected: The rest.
        found: What the resumed run handed out.
        place: Where the cut is, in words.
        finished: Whether both were read to the end of all epochs.
        by_rank: Compare every rank by itself.
        ordered: For every epoch, so many of its items come in the promised order, those after them
            in any; an epoch that is not there is ordered to its end. None: all of them are.
        slack: So many batches at the end of an epoch may be missing or there in addition.
    """
    if by_rank:
        for rank in sorted({item.rank for item in (*expected, *found)}):
            one, two, three = (
                [item for item in items if item.rank == rank] for items in (before, expected, found)
            )
            of_rank, difference = compare(
                one, two, three, f"{place}, rank {rank}", finished=finished
            )
            if of_rank != "exact":
                return of_rank, difference
        return "exact", None
    if not finished and ordered is None:
        found = found[
            : len(expected)
        ]  # what comes after is known of neither, the end of an epoch there included
    epochs = sorted({item.epoch for item in (*expected, *found)})
    outcome: Outcome = "exact"
    at = 0
    for epoch in epochs:
        earlier, rest, came = (
            [i for i in items if i.epoch == epoch] for items in (before, expected, found)
        )
        last = epoch == epochs[-1] and not finished
        if slack and not last and abs(len(rest) - len(came)) <= slack:
            size = min(len(rest), len(came))
            rest, came = rest[:size], came[:size]
        if last:
            size = min(len(rest), len(came))  # both end where reading was stopped
            short = len(came) < len(rest)
            came = came[: len(rest)]
        else:
            size, short = max(len(rest), len(came)), False
        limit = (
            size
            if ordered is None or epoch not in ordered
            else max(0, ordered[epoch] - len(earlier))
        )
        wrong = next((i for i in range(min(size, limit)) if not _same_at(rest, came, i)), None)
        if wrong is None and limit < size:
            if last:
                continue  # what comes in any order cannot be told from what comes later
            if _counts(rest) == _counts(came):
                in_order = len(rest) == len(came) and all(a.same(b) for a, b in zip(rest, came))
                outcome = outcome if in_order else "once"
            else:
                wrong = next(i for i in range(size) if not _same_at(rest, came, i))
        if wrong is None and short:
            wrong = size
        if wrong is not None:
            return "differs", _difference(
                earlier, rest, came, wrong, f"{place}, batch {at + wrong + 1}", to_the_end=not last
            )
        at += len(rest)
    return outcome, None


def _same_at(rest: Sequence[Item], came: Sequence[Item], index: int) -> bool:
    return index < len(rest) and index < len(came) and rest[index].same(came[index])


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
        return f"{some(item.samples, 2)} as {item.content} (hash {item.digest})"
    return some(item.samples, 4)
