"""Ledger: counts what a lane dropped, each event once; `check_limits` enforces max_errors."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from midstream.errors import TooManyErrors, bullet_list
from midstream.metrics.tracked import MetricBuffer, Tracked
from midstream.pipeline.failures import ErrorRate, SampleFailure
from midstream.pipeline.quarantine import write_record


class LaneReport(NamedTuple):
    """The news of a lane since its last report, sent with a batch.

    Attributes:
        events: Counts, keyed ``kind|path|source index``.
        notices: Warnings for the user: (key, text).
        limits: ``max_errors`` of the nodes that failed, by path.
        tracked: Totals of the tracked metrics.
    """

    events: dict[str, int]
    notices: list[tuple[str, str]]
    limits: dict[str, int | ErrorRate]
    tracked: Tracked


_NEVER = [-1, -1]  # before the first mark


class Ledger:
    """Counts the samples that one lane dropped or failed on, once however often they are replayed.

    Attributes:
        marks: For each node that drops samples, the highest [pass, input number] it has counted.
            They are saved with the lane's state.
        moved: The marks that changed since their text was last encoded.
        events: Counts since the last report, keyed ``kind|path|source index``.
        tracked: Metrics since the last report, by (path, source index).
        tracks: Whether tracked metrics are collected.
        notices: (key, text) of warnings for the user, each shown once.
        limits: ``max_errors`` of the nodes that failed since the last report.
        writes: Whether quarantines are written; False for previews.
        reads: Grows with every read of a source. A pass without reads is empty; one with reads
            and without samples dropped them all.
    """

    __slots__ = (
        "events",
        "limits",
        "marks",
        "moved",
        "notices",
        "reads",
        "tracked",
        "tracks",
        "writes",
    )

    def __init__(self, *, writes: bool = True, tracks: bool = False) -> None:
        self.marks: dict[str, list[int]] = {}
        self.moved: set[str] = set()
        self.events: dict[str, int] = {}
        self.notices: list[tuple[str, str]] = []
        self.limits: dict[str, int | ErrorRate] = {}
        self.tracked: dict[tuple[str, int], MetricBuffer] = {}
        self.writes, self.tracks = writes, tracks
        self.reads = 0

    def dropped(
        self, kind: str, path: str, source: int, pass_: int, number: int, count: int = 1
    ) -> None:
        """Count ``count`` samples that node ``path`` dropped at input ``number`` of pass ``pass_``,
        unless they were counted before.
        """
        self.count(path, pass_, number, {f"{kind}|{path}|{source}": count})

    def count(self, mark: str, pass_: int, number: int, counts: Mapping[str, int]) -> None:
        """Add to counts, unless ``mark`` has reached ``number`` of pass ``pass_`` before."""
        if self.first_time(mark, pass_, number):
            for key, count in counts.items():
                self.events[key] = self.events.get(key, 0) + count

    def first_time(self, mark: str, pass_: int, number: int) -> bool:
        """Move ``mark`` to ``number`` of pass ``pass_``; False if it was there or beyond."""
        if self.marks.get(mark, _NEVER) >= [pass_, number]:
            return False
        self.marks[mark] = [pass_, number]
        self.moved.add(mark)
        return True

    def track(
        self, path: str, source: int, kinds: Mapping[str, str], values: Sequence[tuple[Any, ...]]
    ) -> None:
        """Collect tracked metrics: for each sample a tuple of values, in the order of ``kinds``."""
        if self.tracks:
            found = self.tracked.get((path, source))
            if found is None:
                found = self.tracked[path, source] = MetricBuffer(kinds)
            found.add(values)

    def failed(self, failure: SampleFailure, source: int) -> None:
        """Count a skipped or excluded sample, and write it to its quarantine.

        It needs no mark: failures pass every buffer at once, and replays do not return them.
        """
        kind = "excluded" if failure.outcome == "exclude" else f"failed {failure.error_type}"
        key = f"{kind}|{failure.node}|{source}"
        self.events[key] = self.events.get(key, 0) + 1
        if failure.limit is not None:
            self.limits[failure.node] = failure.limit
        if failure.record is not None and self.writes:
            problem = write_record(failure.record)
            if problem:
                self.notice(f"quarantine|{failure.node}", f"{failure.node}: {problem}")

    def notice(self, key: str, text: str) -> None:
        """Add a warning for the user."""
        self.notices.append((key, text))

    def take(self) -> LaneReport | None:
        """Report everything since the last call and reset it; None when there is nothing."""
        if not (self.events or self.notices or self.tracked):
            return None
        tracked = {key: found.totals() for key, found in self.tracked.items()}
        taken = LaneReport(self.events, self.notices, self.limits, tracked)
        self.events, self.notices, self.limits, self.tracked = {}, [], {}, {}
        return taken


def add_counts(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """The sum of two counts, key by key."""
    total = dict(counts)
    for key, count in more.items():
        total[key] = total.get(key, 0) + count
    return total


def failed_in(events: Mapping[str, int]) -> int:
    """Number of failed samples, over all nodes."""
    return sum(count for key, count in events.items() if key.startswith("failed "))


class RecentFailures:
    """Counts recent failures for limits that are rates (`ErrorRate`).

    For each node it keeps the failures of one window: after how many samples, and how many.
    """

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._last: dict[str, deque[tuple[int, int]]] = {}

    def begin(self, events: Mapping[str, int]) -> None:
        """Start empty: the failures in ``events`` are not counted."""
        self._known, self._last = _failed_by_node(events), {}

    def add(self, path: str, failed: int, seen: int, limit: ErrorRate) -> int:
        """Number of failures of a node within the current window.

        Args:
            path: The node.
            failed: Its failures in all.
            seen: Samples of the rank so far.
            limit: Its limit.
        """
        last = self._last.setdefault(path, deque())
        new = failed - self._known.get(path, 0)
        if new > 0:
            last.append((seen, new))
        self._known[path] = failed
        while last and last[0][0] <= seen - limit.window:
            last.popleft()
        return sum(count for _, count in last)


def check_limits(
    events: Mapping[str, int],
    limits: Mapping[str, int | ErrorRate],
    recent: RecentFailures,
    seen: int,
) -> None:
    """Compare the failures counted so far with every node's ``max_errors``.

    Args:
        events: Counts of the rank.
        limits: ``max_errors`` of the nodes that failed since the last check, by path.
        recent: Recent failures, for limits that are rates.
        seen: Samples of the rank so far, failed ones included.

    Raises:
        TooManyErrors: If a node is over its limit.
    """
    for path, limit in limits.items():
        failed = {
            key: count
            for key, count in events.items()
            if key.startswith("failed ") and key.split("|")[1] == path
        }
        kinds = [
            f"{count} x {key.split('|')[0].removeprefix('failed ')}"
            for key, count in sorted(failed.items())
        ]
        total = sum(failed.values())
        if isinstance(limit, ErrorRate):
            found = recent.add(path, total, seen, limit)
            if found > limit.most:
                raise TooManyErrors(
                    f"{path} skipped {found:,} of the last {min(seen, limit.window):,} samples,"
                    f" more than max_errors={limit} allows ({limit.most:,}); in"
                    f" all:{bullet_list(kinds)}\nLook at one of them with on_error='raise' or in a"
                    " quarantine=..., or raise max_errors."
                )
        elif total > limit:
            raise TooManyErrors(
                f"{path} skipped {total} samples, more than"
                f" max_errors={limit}:{bullet_list(kinds)}\nLook at one of them with"
                " on_error='raise' or in a quarantine=..., or raise max_errors."
            )


def _failed_by_node(events: Mapping[str, int]) -> dict[str, int]:
    failed: dict[str, int] = {}
    for key, count in events.items():
        kind, path, _ = key.split("|")
        if kind.startswith("failed "):
            failed[path] = failed.get(path, 0) + count
    return failed
