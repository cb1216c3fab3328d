"""What goes wrong with one sample, and how it is counted."""

from __future__ import annotations

import functools
import pickle
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from midstream.common.plain_state import MISSING
from midstream.errors import Origin, SampleError, TooManyErrors, bullet_list
from midstream.metrics.metric import Gathered, Tracked
from midstream.pipeline.quarantine import Record, write_record

__all__ = [
    "ErrorRate",
    "Excluded",
    "Failure",
    "Hole",
    "Ledger",
    "Notes",
    "Windows",
    "add_counts",
    "callable_name",
    "check_limits",
    "describe_callable",
    "failed_in",
]


class ErrorRate(NamedTuple):
    """How many samples a node may skip, as a part of those that a rank reads.

    Attributes:
        rate: Part of the samples of a window, in (0, 1).
        window: Samples looked at together. More than ``rate * window`` failures among so many raise, wherever they lie; the
            window begins anew at a resume.

    >>> import midstream as ms
    >>> ds = ms.from_dataset(range(1000)).map(lambda x: 1 // (x % 100), on_error="skip", max_errors=ms.ErrorRate(0.02, 500))
    >>> sum(1 for _ in ds)
    990
    """

    rate: float
    window: int = 10_000

    @property
    def most(self) -> int:
        """Failures that a window may have."""
        return int(self.rate * self.window + 1e-9)

    def __str__(self) -> str:
        return f"ErrorRate({self.rate:g}, window={self.window:,})"


def describe_callable(fn: Any) -> str:
    """``name @ file:line`` of a callable, as far as it can be known.

    >>> def tokenize(x): return x
    >>> describe_callable(tokenize).startswith("tokenize @ ")
    True
    """
    while isinstance(fn, functools.partial):
        fn = fn.func
    inner = getattr(fn, "__func__", fn)
    code = getattr(inner, "__code__", None)
    if code is None:
        code = getattr(type(fn).__call__, "__code__", None)
    name = callable_name(fn)
    return f"{name} @ {code.co_filename}:{code.co_firstlineno}" if code is not None else name


def callable_name(fn: Any) -> str:
    """The qualified name of a callable: what a checkpoint remembers of it."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    return str(name).replace("<locals>.", "")


class Failure:
    """What is known of a sample that user code raised on. Picklable whatever was raised.

    Attributes:
        node: Path of the node.
        origin: Where the sample came from; None when a whole batch failed.
        quiet: Counted (``on_error="skip"``) instead of raised.
        limit: ``max_errors`` of the node, or None.
        record: What is written to the node's quarantine when it is counted, or None.
        rows: Origins of all that was lost with it, as int64 [m, 5], where it was more than one row; else None.
    """

    __slots__ = (
        "error_type",
        "exception",
        "function",
        "limit",
        "message",
        "node",
        "origin",
        "quiet",
        "record",
        "rows",
        "traceback",
    )

    def __init__(
        self,
        node: str,
        origin: Origin | None,
        function: str,
        error: BaseException,
        *,
        quiet: bool = False,
        limit: int | ErrorRate | None = None,
    ) -> None:
        self.node, self.origin, self.function, self.quiet, self.limit = node, origin, function, quiet, limit
        self.error_type = type(error).__qualname__
        self.message = _words(error)
        # The first frame is ours: the call of the user's function.
        self.traceback = "" if quiet else _traceback(error)
        self.exception = b"" if quiet else _pickle_exception(error)
        self.record: Record | None = None
        self.rows: npt.NDArray[np.int64] | None = None

    def quarantined(self, folder: str, error: BaseException, sample: Any) -> Failure:
        """The same, to be written to a quarantine when it is counted."""
        self.record = Record(
            folder, self.node, self.origin, self.function, self.error_type, self.message, _traceback(error), sample
        )
        return self

    def error(self) -> SampleError:
        """The exception to raise for it, with the original as its cause where that could be carried over."""
        kind = self.node.split("/")[-1].split("#")[0]
        if kind in ("from_dataset", "read_parquet", "read_json", "from_iterable"):
            advice = "Mend or remove that row to be rid of it."
        elif kind == "pack":
            advice = "Mend such documents before .pack with .map, or drop them with .filter."
        elif self.origin is None:
            advice = "Look at the samples it was given: loader.trace() and ds.rows() help."
        else:
            advice = 'To skip and count such samples, give the node on_error="skip".'
        place = f"on {self.origin}" if self.origin is not None else "on a whole batch"
        message = (
            f"{self.node} raised {self.error_type} {place}: {self.message}\n"
            f"  node:      {self.node}\n"
            f"  sample:    {self.origin if self.origin is not None else 'all of one batch'}\n"
            f"  function:  {self.function}\n"
            f"  What next: the next next() goes on with the sample after it. {advice}\n"
            f"  Original traceback:\n{_indent(self.traceback)}"
        )
        error = SampleError(message)
        error.node, error.origin, error.function = self.node, self.origin, self.function
        error.error_type, error.original_message = self.error_type, self.message
        error.original_traceback = self.traceback
        if self.exception:
            try:
                error.__cause__ = pickle.loads(self.exception)
            except Exception:
                pass  # a type that only the worker could import; the text has it all
        return error


class Excluded(Failure):
    """A sample that `DataLoader.exclude` left out: it goes the way of a quiet failure, and is counted as what it is."""

    __slots__ = ()

    def __init__(self, node: str, origin: Origin) -> None:
        self.node, self.origin, self.function, self.quiet, self.limit = node, origin, "", True, None
        self.error_type = self.message = self.traceback = ""
        self.exception, self.record, self.rows = b"", None, None


def _indent(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _words(error: BaseException) -> str:
    """``str(error)``, whatever its author did to it."""
    try:
        return str(error)
    except Exception as second:
        return f"(its __str__ raised {type(second).__qualname__})"


def _traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:
        return "".join(traceback.format_tb(error.__traceback__)) + type(error).__qualname__


def _pickle_exception(error: BaseException) -> bytes:
    """The exception as bytes, or nothing where it would not survive (a constructor with two arguments, say)."""
    try:
        data = pickle.dumps(error)
        copy = pickle.loads(data)
        if type(copy) is type(error) and str(copy) == str(error):
            return data
    except Exception:
        pass
    return b""


class Hole:
    """Stands in a sample's place when user code failed on it, or on part of it.

    Attributes:
        errors: What failed, one or more.
        rest: The sample that is left (a shorter batch), or `MISSING`.
    """

    __slots__ = ("errors", "rest")

    def __init__(self, errors: tuple[Failure, ...], rest: Any = MISSING) -> None:
        self.errors, self.rest = errors, rest


class Notes(NamedTuple):
    """What a lane has to tell with a delivery: counts, warnings, limits of the nodes that failed, and tracked metrics."""

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
        reads: Grows when a source of the lane gives anything: tells an empty pass from one of which nothing was left.
    """

    __slots__ = ("events", "limits", "marks", "moved", "notices", "reads", "tracked", "tracks", "writes")

    def __init__(self, *, writes: bool = True, tracks: bool = False) -> None:
        self.marks: dict[str, list[int]] = {}
        self.moved: set[str] = set()
        self.events: dict[str, int] = {}
        self.notices: list[tuple[str, str]] = []
        self.limits: dict[str, int | ErrorRate] = {}
        self.tracked: dict[tuple[str, int], Gathered] = {}
        self.writes, self.tracks = writes, tracks
        self.reads = 0

    def dropped(self, kind: str, path: str, source: int, pass_: int, number: int, count: int = 1) -> None:
        """Count what node ``path`` dropped on its input ``number`` of pass ``pass_``, unless a replay did already."""
        self.count(path, pass_, number, {f"{kind}|{path}|{source}": count})

    def count(self, mark: str, pass_: int, number: int, counts: Mapping[str, int]) -> None:
        """Count several things at once, unless the mark has been at ``number`` of pass ``pass_`` already."""
        if self.first_time(mark, pass_, number):
            for key, count in counts.items():
                self.events[key] = self.events.get(key, 0) + count

    def first_time(self, mark: str, pass_: int, number: int) -> bool:
        """Whether the mark comes by ``number`` of pass ``pass_`` for the first time; remembers that it did."""
        if self.marks.get(mark, _NEVER) >= [pass_, number]:
            return False
        self.marks[mark] = [pass_, number]
        self.moved.add(mark)
        return True

    def track(self, path: str, source: int, kinds: Mapping[str, str], values: Sequence[tuple[Any, ...]]) -> None:
        """Take in what was tracked of some samples: for each of them a value by metric, in the order of ``kinds``."""
        if self.tracks:
            found = self.tracked.get((path, source))
            if found is None:
                found = self.tracked[path, source] = Gathered(kinds)
            found.add(values)

    def failed(self, failure: Failure, source: int) -> None:
        """Count a skipped sample. It is met once: failures pass every buffer at once and replays swallow them."""
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

    def take(self) -> Notes | None:
        """What there is to tell since the last call; None when there is nothing."""
        if not (self.events or self.notices or self.tracked):
            return None
        tracked = {key: found.totals() for key, found in self.tracked.items()}
        taken = Notes(self.events, self.notices, self.limits, tracked)
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


class Windows:
    """The last failures of nodes that have a rate for a limit: after how many samples, and how many, for each node."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._last: dict[str, deque[tuple[int, int]]] = {}

    def begin(self, events: Mapping[str, int]) -> None:
        """What failed before does not count."""
        self._known, self._last = _failed_by_node(events), {}

    def add(self, path: str, failed: int, seen: int, limit: ErrorRate) -> int:
        """Failures of a node among the last samples, when it has ``failed`` in all after ``seen`` samples of the rank."""
        last = self._last.setdefault(path, deque())
        new = failed - self._known.get(path, 0)
        if new > 0:
            last.append((seen, new))
        self._known[path] = failed
        while last and last[0][0] <= seen - limit.window:
            last.popleft()
        return sum(count for _, count in last)


def check_limits(events: Mapping[str, int], limits: Mapping[str, int | ErrorRate], windows: Windows, seen: int) -> None:
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
            key: count for key, count in events.items() if key.startswith("failed ") and key.split("|")[1] == path
        }
        kinds = [f"{count} x {key.split('|')[0].removeprefix('failed ')}" for key, count in sorted(failed.items())]
        total = sum(failed.values())
        if isinstance(limit, ErrorRate):
            recent = windows.add(path, total, seen, limit)
            if recent > limit.most:
                raise TooManyErrors(
                    f"{path} skipped {recent:,} of the last {min(seen, limit.window):,} samples, more than "
                    f"max_errors={limit} allows ({limit.most:,}); in all:{bullet_list(kinds)}\n"
                    f"Look at one of them with on_error='raise' or in a quarantine=..., or raise max_errors."
                )
        elif total > limit:
            raise TooManyErrors(
                f"{path} skipped {total} samples, more than max_errors={limit}:{bullet_list(kinds)}\n"
                f"Look at one of them with on_error='raise' or in a quarantine=..., or raise max_errors."
            )


def _failed_by_node(events: Mapping[str, int]) -> dict[str, int]:
    failed: dict[str, int] = {}
    for key, count in events.items():
        kind, path, _ = key.split("|")
        if kind.startswith("failed "):
            failed[path] = failed.get(path, 0) + count
    return failed
