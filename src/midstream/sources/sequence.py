"""Sequences and map-style torch datasets: anything with ``__len__`` and ``__getitem__``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from midstream.common.plain_state import State
from midstream.pipeline.node import BoundNode, Node, row_origins
from midstream.pipeline.rows import I64, U64, Rows
from midstream.sources.source_rows import require_rows, row_failure


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

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(bound, passes, positions)
        index = positions.tolist()
        together = getattr(self.data, "__getitems__", None)
        samples: list[Any] | None = None
        if callable(together):
            try:
                samples = list(together(index))
            except Exception:
                samples = None  # one row at a time tells which one it was
            if samples is not None:
                require_rows(bound, self.data, len(samples), len(index))
        if samples is None:
            get, samples = self.data.__getitem__, []
            for row in index:
                try:
                    samples.append(get(row))
                except Exception as error:
                    samples.append(row_failure(bound, self.data, origins[len(samples)], error))
        return Rows(samples, origins)
