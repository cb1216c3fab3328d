"""Counts what a lane dropped, each event once, and checks the limits (max_errors)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from midstream.errors import (
    TooManyErrors,
    bullet_list,
)
from midstream.metrics.tracked import MetricBuffer, Tracked
from midstream.pipeline.failures import ErrorRate, Excluded, SampleFailure
from midstream.pipeline.quarantine import write_record


class LaneReport(NamedTuple):
    """What a lane has to tell with a delivery: counts, warnings, limits of the nodes that failed,
    and tracked metrics.
    """

    events: dict[str, int]
    notices: list[tuple[str, str]]
    limits: dict[str, int | ErrorRate]
    tracked: Tracked


_NEVER = [-1, -1]


class Ledger:
    """What one lane lost or dropped, counted once however often it is replayed.

    Attributes:
        marks: For each node that drops samples the highest (pass, input number) it has counted.
        moved: Which of them moved since whoever keeps their text has looked.
        events: Counts since the last delivery, keyed ``kind|path|source index``.
        tracks: Whether somebody takes what is tracked.
        notices: (key, text) of warnings for the user, to be given once.
        limits: ``max_errors`` of the nodes that failed.
        writes: Whether quarantines are written; not where somebody only looks.
        reads: Grows when a source of the lane gives anything: tells an empty pass from one of which
        nothing was left.
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
        """Count what node ``path`` dropped on its input ``number`` of pass ``pass_``, unless a
        replay did already.
        """
        self.count(path, pass_, number, {f"{kind}|{path}|{source}": count})

    def count(self, mark: str, pass_: int, number: int, counts: Mapping[str, int]) -> None:
        """Count several things at once, unless the mark has been at ``number`` of pass ``pass_``
        already.
        """
        if self.first_time(mark, pass_, number):
            for key, count in counts.items():
                self.events[key] = self.events.get(key, 0) + count

    def first_time(self, mark: str, pass_: int, number: int) -> bool:
        """Whether the mark comes by ``number`` of pass ``pass_`` for the first time; remembers that
        it did.
        """
        if self.marks.get(mark, _NEVER) >= [pass_, number]:
            return False
        self.marks[mark] = [pass_, number]
        self.moved.add(mark)
        return True

    def track(
        self, path: str, source: int, kinds: Mapping[str, str], values: Sequence[tuple[Any, ...]]
    ) -> None:
        """Take in what was tracked of some samples: for each of them a value by metric, in the
        order of ``kinds``.
        """
        if self.tracks:
            found = self.tracked.get((path, source))
            if found is None:
                found = self.tracked[path, source] = MetricBuffer(kinds)
            found.add(values)

    def failed(self, failure: SampleFailure, source: int) -> None:
        """Count a skipped sample. It is met once: failures pass every buffer at once and replays
        swallow them.
        """
        kind = "excluded" if type(failure) is Excluded else f"failed {failure.error_type}"
        key = f"{kind}|{failure.node}|{source}"
        self.events[key] = self.events.get(key, 0) + 1
        if failure.limit is not None:
            self.limits[failure.node] = failure.limit
        if failure.record is not None and self.writes:
            trouble = write_record(failure.record)
            if trouble:
                self.notice(f"quarantine|{failure.node}", f"{failure.node}: {trouble}")

    def notice(self, key: str, text: str) -> None:
        """Leave a warning for the user."""
        self.notices.append((key, text))

    def take(self) -> LaneReport | None:
        """What there is to tell since the last call; None when there is nothing."""
        if not (self.events or self.notices or self.tracked):
            return None
        tracked = {key: found.totals() for key, found in self.tracked.items()}
        taken = LaneReport(self.events, self.notices, self.limits, tracked)
        self.events, self.notices, self.limits, self.tracked = {}, [], {}, {}
        return taken


def add_counts(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Two counts as one."""
    total = dict(counts)
    for key, count in more.items():
        total[key] = total.get(key, 0) + count
    return total


def failed_in(events: Mapping[str, int]) -> int:
    """Samples that failed, of all nodes."""
    return sum(count for key, count in events.items() if key.startswith("failed "))


class RecentFailures:
    """The last failures of nodes that have a rate for a limit: after how many samples, and how
    many, for each node.
    """

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._last: dict[str, deque[tuple[int, int]]] = {}

    def begin(self, events: Mapping[str, int]) -> None:
        """What failed before does not count."""
        self._known, self._last = _failed_by_node(events), {}

    def add(self, path: str, failed: int, seen: int, limit: ErrorRate) -> int:
        """Failures of a node among the last samples, when it has ``failed`` in all after ``seen``
        samples of the rank.
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
    windows: RecentFailures,
    seen: int,
) -> None:
    """Compare the failures counted so far with every node's ``max_errors``.

    Args:
        events: Counts of the rank.
        limits: Of the nodes that failed just now.
        windows: What is remembered for limits that are rates.
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
            recent = windows.add(path, total, seen, limit)
            if recent > limit.most:
                raise TooManyErrors(
                    f"{path} skipped {recent:,} of the last {min(seen, limit.window):,} samples,"
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
