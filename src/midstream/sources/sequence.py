"""Sequences and map-style torch datasets: anything with ``__len__`` and ``__getitem__``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.common.plain_state import State
from midstream.pipeline.failures import Failure, Hole
from midstream.pipeline.node import Node, Place
from midstream.pipeline.rows import I64, U64, Rows


@dataclass(frozen=True, eq=False, repr=False)
class SequenceSource(Node):
    """Rows of a sequence or of a map-style dataset, read with ``__getitems__`` where it has one.

    A row whose ``__getitem__`` raises is one lost sample, reported with its row number.

    State: none but the position.
    Resume: reads nothing again.
    """

    data: Any
    name: str | None = None
    kind = "from_dataset"
    _by_value = ("data",)

    @property
    def infinite(self) -> bool:
        """Never."""
        return False

    def _length(self) -> int | None:
        return len(self.data)

    def spec_fields(self) -> dict[str, State]:
        """Kind of data and number of rows."""
        return {"data": type(self.data).__name__, "length": self.length()}

    def summary(self) -> str:
        """Kind of data and number of rows."""
        return f"{self.kind}({type(self.data).__name__}, {self.length():,} rows)"

    def _rows(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(at, passes, positions)
        index = positions.tolist()
        together = getattr(self.data, "__getitems__", None)
        samples: list[Any] | None = None
        if callable(together):
            try:
                samples = list(together(index))
            except Exception:
                samples = None  # one row at a time tells which one it was
            if samples is not None:
                require_rows(at, self.data, len(samples), len(index))
        if samples is None:
            get, samples = self.data.__getitem__, []
            for row in index:
                try:
                    samples.append(get(row))
                except Exception as error:
                    samples.append(row_failure(at, self.data, origins[len(samples)], error))
        return Rows(samples, origins)


def row_origins(at: Place, passes: I64, rows: I64) -> I64:
    """Origins of rows of a source that are about to be read: int64, shape [k, 5]."""
    origins = np.zeros((len(rows), 5), dtype=np.int64)
    origins[:, 0], origins[:, 1], origins[:, 2] = at.source, passes, rows
    if at.trail is not None:
        at.trail.rows(origins)
    return origins


def row_failure(at: Place, data: Any, origin: I64, error: Exception) -> Hole:
    """The hole of a row that could not be read."""
    if isinstance(error, StopIteration):
        error = RuntimeError(f"reading a row raised StopIteration({error})")
    return Hole((Failure(at.path, at.origin(origin.tolist()), f"{type(data).__qualname__}.__getitem__", error),))


class ReturnedOthers(ValueError):
    """A dataset that returns another number of rows than it was asked for: no row could be told from another."""


def require_rows(at: Place, data: Any, found: int, expected: int) -> None:
    """Refuse an answer of another number of rows than was asked for."""
    if found != expected:
        raise ReturnedOthers(
            f"{at.path}: {type(data).__name__} returned {found} rows where {expected} were asked for, so rows could not be "
            f"told apart. A transform and __getitems__ return one row for each; drop rows with .filter, add some with .flat_map"
        )
