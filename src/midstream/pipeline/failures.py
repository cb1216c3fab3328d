"""Failures of single samples: `SampleFailure`, `FailedSample`, and the names of callables."""

from __future__ import annotations

import functools
import pickle
import traceback
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from midstream.common.plain_state import MISSING
from midstream.errors import Origin, SampleError
from midstream.pipeline.quarantine import Record

OnError = Literal["raise", "skip", "refill"]
"""How a node handles user code that raises on a sample: the argument ``on_error`` of the verbs."""

Outcome = Literal["raise", "skip", "exclude"]
"""How a failed sample ends: its error is raised, or it is skipped and counted, or it was excluded
by `DataLoader.exclude` and is counted as excluded.
"""


class ErrorRate(NamedTuple):
    """A limit for skipped samples, as a share of the samples that a rank reads.

    Attributes:
        rate: Share of the samples of a window, in (0, 1).
        window: Number of samples counted together. More than ``rate * window`` failures among any
            so many consecutive samples raise; the window starts empty at a resume.

    >>> import midstream as ms
    >>> ds = ms.from_dataset(range(1000)).map(
    ...     lambda x: 1 // (x % 100), on_error="skip", max_errors=ms.ErrorRate(0.02, 500))
    >>> sum(1 for _ in ds)
    990
    """

    rate: float
    window: int = 10_000

    @property
    def most(self) -> int:
        """The largest allowed number of failures in a window."""
        return int(self.rate * self.window + 1e-9)

    def __str__(self) -> str:
        return f"ErrorRate({self.rate:g}, window={self.window:,})"


def describe_callable(fn: Any) -> str:
    """``name @ file:line`` of a callable; the name alone where it has no Python code.

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
    """The qualified name of a callable, as it is recorded in a checkpoint."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    return str(name).replace("<locals>.", "")


class SampleFailure:
    """A failure of user code on one sample, or a sample that was excluded. Always picklable.

    Attributes:
        node: Path of the node.
        origin: Origin of the sample; None when a whole batch failed.
        function: The user's function as ``name @ file:line``; of a source, what failed: a function
            or a place in a file.
        outcome: ``"raise"``: the error is raised from ``next()``. ``"skip"``: the sample is counted
            as failed (``on_error="skip"``). ``"exclude"``: it is counted as excluded.
        limit: ``max_errors`` of the node, or None.
        error_type: Qualified name of the exception's type; empty for an excluded sample.
        message: ``str()`` of the exception.
        traceback: Formatted traceback; kept only where the error is raised.
        exception: The pickled exception, or empty where it cannot be pickled or is not raised.
        record: Written to the node's quarantine when the failure is counted, or None.
        rows: Origins of all rows that were lost, int64 [m, 5], where there are several; else None.
    """

    __slots__ = (
        "error_type",
        "exception",
        "function",
        "limit",
        "message",
        "node",
        "origin",
        "outcome",
        "record",
        "rows",
        "traceback",
    )

    def __init__(
        self,
        node: str,
        origin: Origin | None,
        function: str = "",
        error: BaseException | None = None,
        *,
        outcome: Outcome = "raise",
        limit: int | ErrorRate | None = None,
    ) -> None:
        self.node, self.origin, self.function = node, origin, function
        self.outcome, self.limit = outcome, limit
        self.error_type = self.message = self.traceback = ""
        self.exception = b""
        self.record: Record | None = None
        self.rows: npt.NDArray[np.int64] | None = None
        if error is not None:
            self.error_type, self.message = type(error).__qualname__, _message_of(error)
            if outcome == "raise":
                self.traceback, self.exception = _traceback_of(error), _pickle_exception(error)

    def quarantined(self, folder: str, error: BaseException, sample: Any) -> SampleFailure:
        """Add a record for the quarantine in ``folder``; returns this failure."""
        self.record = Record(
            folder,
            self.node,
            self.origin,
            self.function,
            self.error_type,
            self.message,
            _traceback_of(error),
            sample,
        )
        return self

    def error(self) -> SampleError:
        """The exception to raise; its cause is the original one where that could be pickled."""
        kind = self.node.split("/")[-1].split("#")[0]
        if kind in ("from_dataset", "read_parquet", "read_json", "from_iterable"):
            advice = "Mend or remove that row to be rid of it."
        elif kind == "pack":
            advice = "Mend such documents before .pack with .map, or drop them with .filter."
        elif self.origin is None:
            advice = "Look at the samples it was given: loader.trace() and ds.rows() help."
        else:
            advice = 'To skip and count such samples, give the node on_error="skip".'
        where = f"on {self.origin}" if self.origin is not None else "on a whole batch"
        message = (
            f"{self.node} raised {self.error_type} {where}: {self.message}\n"
            f"  node:      {self.node}\n"
            f"  sample:    {self.origin if self.origin is not None else 'all of one batch'}\n"
            f"  function:  {self.function}\n"
            f"  What next: the next next() returns the sample after it. {advice}\n"
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
                pass  # its type can be imported in the worker only; the text has all of it
        return error


class FailedSample:
    """Takes the place of a sample when user code failed on it, or on part of it.

    It flows through the pipeline like a sample, so that no exception of user code crosses a node.

    Attributes:
        errors: The failures, one or more.
        rest: The part of the sample that is left (a shorter batch), or `MISSING`.
    """

    __slots__ = ("errors", "rest")

    def __init__(self, errors: tuple[SampleFailure, ...], rest: Any = MISSING) -> None:
        self.errors, self.rest = errors, rest


def _indent(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _message_of(error: BaseException) -> str:
    """``str(error)``, or a substitute where its ``__str__`` raises."""
    try:
        return str(error)
    except Exception as second:
        return f"(its __str__ raised {type(second).__qualname__})"


def _traceback_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:
        return "".join(traceback.format_tb(error.__traceback__)) + type(error).__qualname__


def _pickle_exception(error: BaseException) -> bytes:
    """The pickled exception; empty where unpickling would not restore it (for instance a
    constructor with two arguments).
    """
    try:
        data = pickle.dumps(error)
        copy = pickle.loads(data)
        if type(copy) is type(error) and str(copy) == str(error):
            return data
    except Exception:
        pass
    return b""
