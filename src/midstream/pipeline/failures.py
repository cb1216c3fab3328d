"""What goes wrong with one sample, and how it is counted."""

from __future__ import annotations

import functools
import pickle
import traceback
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from midstream.common.plain_state import MISSING
from midstream.errors import (
    Origin,
    SampleError,
)
from midstream.pipeline.quarantine import Record


class ErrorRate(NamedTuple):
    """How many samples a node may skip, as a part of those that a rank reads.

    Attributes:
        rate: Part of the samples of a window, in (0, 1).
        window: Samples looked at together. More than ``rate * window`` failures among so many
            raise, wherever they lie; the window begins anew at a resume.

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


class SampleFailure:
    """What is known of a sample that user code raised on. Picklable whatever was raised.

    Attributes:
        node: Path of the node.
        origin: Where the sample came from; None when a whole batch failed.
        quiet: Counted (``on_error="skip"``) instead of raised.
        limit: ``max_errors`` of the node, or None.
        record: What is written to the node's quarantine when it is counted, or None.
        rows: Origins of all that was lost with it, as int64 [m, 5], where it was more than one row;
        else None.
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
        self.node, self.origin, self.function, self.quiet, self.limit = (
            node,
            origin,
            function,
            quiet,
            limit,
        )
        self.error_type = type(error).__qualname__
        self.message = _words(error)
        # The first frame is ours: the call of the user's function.
        self.traceback = "" if quiet else _traceback(error)
        self.exception = b"" if quiet else _pickle_exception(error)
        self.record: Record | None = None
        self.rows: npt.NDArray[np.int64] | None = None

    def quarantined(self, folder: str, error: BaseException, sample: Any) -> SampleFailure:
        """The same, to be written to a quarantine when it is counted."""
        self.record = Record(
            folder,
            self.node,
            self.origin,
            self.function,
            self.error_type,
            self.message,
            _traceback(error),
            sample,
        )
        return self

    def error(self) -> SampleError:
        """The exception to raise for it, with the original as its cause where that could be carried
        over.
        """
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


class Excluded(SampleFailure):
    """A sample that `DataLoader.exclude` left out: it goes the way of a quiet failure, and is
    counted as what it is.
    """

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
    """The exception as bytes, or nothing where it would not survive (a constructor with two
    arguments, say).
    """
    try:
        data = pickle.dumps(error)
        copy = pickle.loads(data)
        if type(copy) is type(error) and str(copy) == str(error):
            return data
    except Exception:
        pass
    return b""


class FailedSample:
    """Stands in a sample's place when user code failed on it, or on part of it.

    Attributes:
        errors: What failed, one or more.
        rest: The sample that is left (a shorter batch), or `MISSING`.
    """

    __slots__ = ("errors", "rest")

    def __init__(self, errors: tuple[SampleFailure, ...], rest: Any = MISSING) -> None:
        self.errors, self.rest = errors, rest


OnError = Literal["raise", "skip", "refill"]
