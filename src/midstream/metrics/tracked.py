"""Totals of tracked metrics by node and source: merged, encoded, and kept for the last batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from midstream.errors import CheckpointError
from midstream.metrics.totals import Totals, empty_totals

_BUFFERED_SAMPLES = 1024

Tracked = dict[tuple[str, int], dict[str, Totals]]
"""Totals by name of the metric, for each (path of the node that tracks it, index of the source).

The index is -1 for samples made of rows of several sources.
"""


class MetricBuffer:
    """Collects the metric values of one node and source, and adds many to the totals at once.

    Args:
        kinds: The kind of each metric, by name.
    """

    __slots__ = ("_totals", "_values", "kinds")

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds = kinds
        self._values: list[tuple[Any, ...]] = []
        self._totals: dict[str, Totals] | None = None

    def add(self, values: Sequence[tuple[Any, ...]]) -> None:
        """Add the values of some samples: one value for each metric, in the order of ``kinds``."""
        self._values += values
        if len(self._values) >= _BUFFERED_SAMPLES:
            self.totals()

    def totals(self) -> dict[str, Totals]:
        """The totals of all values, by name of the metric."""
        if self._totals is None:
            self._totals = {name: empty_totals(kind) for name, kind in self.kinds.items()}
        for totals, column in zip(self._totals.values(), zip(*self._values)):
            totals.add(column)
        self._values.clear()
        return self._totals


def merge_totals(one: Mapping[str, Totals], other: Mapping[str, Totals]) -> dict[str, Totals]:
    """The totals of two parts together, by name of the metric. Neither part changes.

    Raises:
        CheckpointError: If a metric is of different kinds in the two parts.
    """
    merged = dict(one)
    for name, totals in other.items():
        known: Any = merged.get(name)
        if known is not None and known.kind != totals.kind:
            raise CheckpointError(
                f"the metric {name!r} was gathered as {known.kind} so far, and is {totals.kind}"
                " now, and totals of different kinds cannot be added. Track it as it was, or under"
                " another name."
            )
        merged[name] = totals if known is None else known.plus(totals)
    return merged


def encode_tracked(tracked: Tracked) -> str:
    """All totals as JSON, by path, source and name. Unchanged totals are not encoded again."""
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
    """The totals that `encode_tracked` encoded.

    Args:
        state: The JSON, decoded.

    Raises:
        ValueError: If it is no such JSON.
    """
    tracked: Tracked = {}
    try:
        for path, sources in state.items():
            for source, named in sources.items():
                found = tracked.setdefault((path, int(source)), {})
                for name, part in named.items():
                    found[name] = empty_totals(part[0])
                    found[name].load(part)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"no totals of metrics ({type(error).__name__}: {error})") from None
    return tracked


def merge_tracked(parts: Iterable[Tracked]) -> Tracked:
    """The totals of several lanes or ranks together."""
    tracked: Tracked = {}
    for part in parts:
        for key, named in part.items():
            known = tracked.get(key)
            tracked[key] = dict(named) if known is None else merge_totals(known, named)
    return tracked


_CHANGES_PER_SNAPSHOT = 32


class _Snapshot(NamedTuple):
    """Full totals after a message, and the changes of the messages after it."""

    number: int
    totals: Tracked
    changes: list[tuple[int, Tracked]]


class TotalsHistory:
    """Totals after each of the last messages.

    Storing full totals after every message would copy every bucket up to 1,024 times and cost more
    than the batch. So full totals are stored every 32 changes, and only the changes in between.

    Totals that `after` returned never change. If a signal handler reads while a change is in
    progress, it finds the totals from before.

    Args:
        totals: The totals before the first message, which has the number 1.
    """

    __slots__ = ("_last_answer", "_snapshots")

    def __init__(self, totals: Tracked) -> None:
        self._snapshots = [_Snapshot(0, totals, [])]
        self._last_answer = 0, totals  # (number, totals) of the last `after`, which starts there

    def add(self, number: int, change: Tracked) -> None:
        """Record the metrics of message ``number``. `after` that number counts them."""
        self._snapshots[-1].changes.append((number, change))

    def finish(self, number: int, oldest: int) -> None:
        """Record that message ``number`` is complete.

        Args:
            oldest: `after` will not be called again for numbers below ``oldest - 1``.
        """
        if len(self._snapshots[-1].changes) >= _CHANGES_PER_SNAPSHOT:
            self._snapshots.append(_Snapshot(number, self.after(number), []))
        while len(self._snapshots) > 1 and self._snapshots[1].number < oldest:
            del self._snapshots[0]

    def after(self, number: int) -> Tracked:
        """The totals after message ``number``."""
        start, totals, changes = next(
            snapshot for snapshot in reversed(self._snapshots) if snapshot.number <= number
        )
        if start <= self._last_answer[0] <= number:
            start, totals = self._last_answer
        if new := [change for at, change in changes if start < at <= number]:
            totals = merge_tracked([totals, merge_tracked(new)])
        self._last_answer = number, totals
        return totals

    def undo_to(self, number: int) -> None:
        """Forget all messages after ``number``."""
        snapshots = [snapshot for snapshot in self._snapshots if snapshot.number <= number]
        start, totals, changes = snapshots[-1]
        kept = [change for change in changes if change[0] <= number]
        snapshots[-1] = _Snapshot(start, totals, kept)
        self._snapshots, self._last_answer = snapshots, (start, totals)


def is_tracked_state(state: Any) -> bool:
    """Whether `decode_tracked` accepts a state."""
    try:
        decode_tracked(state)
    except ValueError:
        return False
    return True
