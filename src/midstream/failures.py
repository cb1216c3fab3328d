"""What goes wrong with one sample, and how it is counted."""

from __future__ import annotations

import functools
import pickle
import traceback
from collections.abc import Mapping
from typing import Any

from midstream._state import MISSING
from midstream.errors import Origin, SampleError, TooManyErrors, bullet_list

__all__ = ["Failure", "Hole", "Ledger", "callable_name", "check_limits", "describe_callable"]


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
    """

    __slots__ = ("error_type", "exception", "function", "limit", "message", "node", "origin", "quiet", "traceback")

    def __init__(
        self,
        node: str,
        origin: Origin | None,
        function: str,
        error: BaseException,
        *,
        quiet: bool = False,
        limit: int | None = None,
    ) -> None:
        self.node, self.origin, self.function, self.quiet, self.limit = node, origin, function, quiet, limit
        self.error_type = type(error).__qualname__
        self.message = _words(error)
        # The first frame is ours: the call of the user's function.
        self.traceback = "" if quiet else _traceback(error)
        self.exception = b"" if quiet else _pickle_exception(error)

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


class Ledger:
    """What one lane lost or dropped, counted once however often it is replayed.

    Attributes:
        marks: For each node that drops samples the highest (pass, input number) it has counted.
        events: Counts since the last delivery, keyed ``kind|path|source index``.
        notices: (key, text) of warnings for the user, to be given once.
        limits: ``max_errors`` of the nodes that failed.
        reads: Grows when a source of the lane gives anything: tells an empty pass from one of which nothing was left.
    """

    __slots__ = ("events", "limits", "marks", "notices", "reads")

    def __init__(self) -> None:
        self.marks: dict[str, list[int]] = {}
        self.events: dict[str, int] = {}
        self.notices: list[tuple[str, str]] = []
        self.limits: dict[str, int] = {}
        self.reads = 0

    def dropped(self, kind: str, path: str, source: int, pass_: int, number: int, count: int = 1) -> None:
        """Count what node ``path`` dropped on its input ``number`` of pass ``pass_``, unless a replay did already."""
        self.count(path, pass_, number, {f"{kind}|{path}|{source}": count})

    def count(self, mark: str, pass_: int, number: int, counts: Mapping[str, int]) -> None:
        """Count several things at once, unless the mark has been at ``number`` of pass ``pass_`` already."""
        if self.marks.get(mark, [-1, -1]) < [pass_, number]:
            self.marks[mark] = [pass_, number]
            for key, count in counts.items():
                self.events[key] = self.events.get(key, 0) + count

    def failed(self, failure: Failure, source: int) -> None:
        """Count a skipped sample. It is met once: failures pass every buffer at once and replays swallow them."""
        key = f"failed {failure.error_type}|{failure.node}|{source}"
        self.events[key] = self.events.get(key, 0) + 1
        if failure.limit is not None:
            self.limits[failure.node] = failure.limit

    def notice(self, key: str, text: str) -> None:
        """Leave a warning for the user."""
        self.notices.append((key, text))

    def take(self) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
        """Events, notices and limits since the last call."""
        taken = (self.events, self.notices, self.limits)
        self.events, self.notices, self.limits = {}, [], {}
        return taken


def check_limits(events: Mapping[str, int], limits: Mapping[str, int]) -> None:
    """Compare the failures counted so far with every node's ``max_errors``.

    Raises:
        TooManyErrors: If a node is over its limit.
    """
    for path, limit in limits.items():
        failed = {
            key: count for key, count in events.items() if key.startswith("failed ") and key.split("|")[1] == path
        }
        if sum(failed.values()) > limit:
            kinds = [f"{count} x {key.split('|')[0].removeprefix('failed ')}" for key, count in sorted(failed.items())]
            raise TooManyErrors(
                f"{path} skipped {sum(failed.values())} samples, more than max_errors={limit}:{bullet_list(kinds)}\n"
                f"Look at one of them with on_error='raise', or raise max_errors."
            )
