"""Origins and failures of rows that a source reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.node import BoundNode
from midstream.pipeline.rows import I64

R = TypeVar("R")


def row_failure(bound: BoundNode, origin: I64, function: str, error: Exception) -> FailedSample:
    """A placeholder for a row that could not be read.

    Args:
        bound: The source.
        origin: int64, shape [5].
        function: The name of the function that raised, or the place in a file, for the message.
        error: The exception.
    """
    if isinstance(error, StopIteration):
        error = RuntimeError(f"reading a row raised StopIteration({error})")
    failure = SampleFailure(bound.path, bound.origin(origin.tolist()), function, error)
    return FailedSample((failure,))


def read_one_by_one(
    rows: Iterable[R], read: Callable[[R], Any], failed: Callable[[int, Exception], FailedSample]
) -> Iterator[Any]:
    """Read each row by itself, so that a row that cannot be read is the only one lost.

    Reading many rows in one call is faster, but an exception does not say which row caused it.

    Args:
        rows: Any description of the rows that ``read`` understands.
        read: Returns the sample of one row.
        failed: Called with the index in ``rows`` and the exception of a row whose ``read`` raised.
            Returns the placeholder to use in its stead.
    """
    for index, row in enumerate(rows):
        try:
            sample = read(row)
        except Exception as error:
            sample = failed(index, error)
        yield sample


class WrongNumberOfRows(ValueError):
    """A dataset returned another number of rows than it was asked for, so that no row can be
    assigned to its number.
    """


def require_num_rows(bound: BoundNode, data: Any, found: int, expected: int) -> None:
    """Check that a dataset returned as many rows as it was asked for.

    Raises:
        WrongNumberOfRows: If it did not.
    """
    if found != expected:
        raise WrongNumberOfRows(
            f"{bound.path}: {type(data).__name__} returned {found} rows where {expected} were asked"
            " for, so rows could not be assigned to their numbers. A transform and __getitems__"
            " must return one row for each number; drop rows with .filter, add some with .flat_map"
        )
