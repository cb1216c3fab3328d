"""Failures of rows that a source reads."""

from __future__ import annotations

from typing import Any

from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.node import BoundNode
from midstream.pipeline.rows import I64


def row_failure(bound: BoundNode, data: Any, origin: I64, error: Exception) -> FailedSample:
    """The hole of a row that could not be read."""
    if isinstance(error, StopIteration):
        error = RuntimeError(f"reading a row raised StopIteration({error})")
    return FailedSample(
        (
            SampleFailure(
                bound.path,
                bound.origin(origin.tolist()),
                f"{type(data).__qualname__}.__getitem__",
                error,
            ),
        )
    )


class ReturnedOthers(ValueError):
    """A dataset that returns another number of rows than it was asked for: no row could be told
    from another.
    """


def require_rows(bound: BoundNode, data: Any, found: int, expected: int) -> None:
    """Refuse an answer of another number of rows than was asked for."""
    if found != expected:
        raise ReturnedOthers(
            f"{bound.path}: {type(data).__name__} returned {found} rows where {expected} were asked"
            " for, so rows could not be told apart. A transform and __getitems__ return one row"
            " for each; drop rows with .filter, add some with .flat_map"
        )
