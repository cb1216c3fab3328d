"""Sequences and map-style torch datasets: anything with ``__len__`` and ``__getitem__``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from midstream.common.plain_state import State
from midstream.pipeline.node import BoundNode, Node, row_origins
from midstream.pipeline.rows import I64, U64, Rows
from midstream.sources.source_rows import (
    read_one_by_one,
    require_num_rows,
    row_failure,
)


@dataclass(frozen=True, eq=False, repr=False)
class SequenceSource(Node):
    """Rows of a sequence or of a map-style dataset, read with ``__getitems__`` if it has one.

    If ``__getitem__`` raises, that one sample is lost and reported with its row number.

    State: only the position.
    Resume: reads nothing again.
    """

    data: Any
    name: str | None = None
    kind = "from_dataset"
    infinite = False
    _by_value = ("data",)

    def _length(self) -> int | None:
        return len(self.data)

    def spec_fields(self) -> dict[str, State]:
        """The class of the data and the number of rows."""
        return {"data": type(self.data).__name__, "length": self.length()}

    def summary(self) -> str:
        """The class of the data and the number of rows."""
        return f"{self.kind}({type(self.data).__name__}, {self.length():,} rows)"

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(bound, passes, positions)
        index = positions.tolist()
        get_many = getattr(self.data, "__getitems__", None)
        if callable(get_many):
            samples: list[Any] | None
            try:
                samples = list(get_many(index))
            except Exception:
                samples = None  # the loop below finds the row that failed
            if samples is not None:
                require_num_rows(bound, self.data, len(samples), len(index))
                return Rows(samples, origins)
        function = f"{type(self.data).__qualname__}.__getitem__"
        one_by_one = read_one_by_one(
            index,
            self.data.__getitem__,
            lambda row, error: row_failure(bound, origins[row], function, error),
        )
        return Rows(list(one_by_one), origins)
