"""Totals of tracked metrics by node and source: joined, encoded, and of the last batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from midstream.errors import CheckpointError
from midstream.metrics.totals import Totals, totals_of

_TOGETHER = 1024

Tracked = dict[tuple[str, int], dict[str, Totals]]
"""Totals by name of the metric, by path of the node that tracks it and index of the source (-1: of
several).
"""


class Gathered:
    """Values of the metrics of one place and source, put together many at a time."""

    __slots__ = ("kinds", "summed", "values")

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds, self.values = kinds, list[tuple[Any, ...]]()
        self.summed: dict[str, Totals] | None = None

    def add(self, values: Sequence[tuple[Any, ...]]) -> None:
        """Take in the values of some samples: for each of them one by metric, in the order of
        ``kinds``.
        """
        self.values += values
        if len(self.values) >= _TOGETHER:
            self.totals()

    def totals(self) -> dict[str, Totals]:
        """The totals of all, by name."""
        if self.summed is None:
            self.summed = {name: totals_of(kind) for name, kind in self.kinds.items()}
        for totals, column in zip(self.summed.values(), zip(*self.values)):
            totals.add(column)
        self.values.clear()
        return self.summed


def join(one: Mapping[str, Totals], other: Mapping[str, Totals]) -> dict[str, Totals]:
    """The totals of two parts, by name. Neither changes.

    Raises:
        CheckpointError: If a metric was gathered in another way before.
    """
    joined = dict(one)
    for name, totals in other.items():
        known: Any = joined.get(name)
        if known is not None and known.kind != totals.kind:
            raise CheckpointError(
                f"the metric {name!r} was gathered as {known.kind} so far, and is {totals.kind}"
                " now: their totals do not add up. Track it as it was, or under another name."
            )
        joined[name] = totals if known is None else known.plus(totals)
    return joined


def encode_tracked(tracked: Tracked) -> str:
    """All totals as JSON: by path, source and name. What did not change is not encoded again."""
    paths: dict[str, list[str]] = {}
    for (path, source), named in sorted(tracked.items()):
        inner = ",".join(
            f"{json.dumps(name)}:{totals.text()}" for name, totals in sorted(named.items())
        )
        paths.setdefault(path, []).append(f'"{source}":{{{inner}}}')
    return (
        "{"
        + ",".join(f"{json.dumps(path)}:{{{','.join(parts)}}}" for path, parts in paths.items())
        + "}"
    )


def decode_tracked(state: Any) -> Tracked:
    """The inverse, of the decoded JSON.

    Raises:
        ValueError: If it is not what `encode_tracked` gave.
    """
    tracked: Tracked = {}
    try:
        for path, sources in state.items():
            for source, named in sources.items():
                found = tracked.setdefault((path, int(source)), {})
                for name, part in named.items():
                    found[name] = totals_of(part[0])
                    found[name].load(part)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"no totals of metrics ({type(error).__name__}: {error})") from None
    return tracked


def join_tracked(parts: Iterable[Tracked]) -> Tracked:
    """The totals of several lanes or ranks."""
    tracked: Tracked = {}
    for part in parts:
        for key, named in part.items():
            known = tracked.get(key)
            tracked[key] = dict(named) if known is None else join(known, named)
    return tracked


_APART = 32


class History:
    """Totals after each of the last deliveries: whole after every 32 that brought anything, else what each brought.

    Whole ones after each would be up to a thousand copies of all buckets, and the copying dearer
    than the batch. Nothing that was handed out changes, and a reader that interrupts a change, a
    signal handler say, finds what was there before.
    """

    __slots__ = ("_known", "_parts")

    def __init__(self, totals: Tracked) -> None:
        self._parts: list[tuple[int, Tracked, list[tuple[int, Tracked]]]] = [(0, totals, [])]
        self._known = 0, totals  # the last answer: the next one goes on from there

    def add(self, number: int, more: Tracked) -> None:
        """What delivery ``number`` brings; it counts once `at` is asked for that number."""
        self._parts[-1][2].append((number, more))

    def settle(self, number: int, oldest: int) -> None:
        """Delivery ``number`` is done; nobody asks for a number below ``oldest - 1`` any more."""
        if len(self._parts[-1][2]) >= _APART:
            self._parts.append((number, self.at(number), []))
        while len(self._parts) > 1 and self._parts[1][0] < oldest:
            del self._parts[0]

    def at(self, number: int) -> Tracked:
        """The totals after delivery ``number``."""
        start, totals, added = next(part for part in reversed(self._parts) if part[0] <= number)
        if start <= self._known[0] <= number:
            start, totals = self._known
        if more := [each for at, each in added if start < at <= number]:
            totals = join_tracked([totals, join_tracked(more)])
        self._known = number, totals
        return totals

    def undo_to(self, number: int) -> None:
        """Forget all deliveries after ``number``."""
        parts = [part for part in self._parts if part[0] <= number]
        start, totals, added = parts[-1]
        parts[-1] = start, totals, [each for each in added if each[0] <= number]
        self._parts, self._known = parts, (start, totals)


def valid(state: Any) -> bool:
    """Whether `decode_tracked` takes it."""
    try:
        decode_tracked(state)
    except ValueError:
        return False
    return True
