"""A source over a Hugging Face ``datasets.Dataset``: zero-copy views of its Arrow table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.common.plain_state import State
from midstream.pipeline.failures import FailedSample
from midstream.pipeline.node import BoundNode, Node, row_origins
from midstream.pipeline.rows import I64, U64, Rows
from midstream.sources.arrow_table import TableReader
from midstream.sources.source_rows import (
    WrongNumberOfRows,
    read_one_by_one,
    require_num_rows,
    row_failure,
)


@dataclass(frozen=True, eq=False, repr=False)
class ArrowSource(Node):
    """Rows of a Hugging Face dataset.

    Plain columns are read from Arrow directly, without the Hugging Face formatters (50 µs a row):
    numeric lists as read-only numpy views of the stored dtype, numbers, strings and nested values
    as Python objects. A dataset with a format of its own (``with_format``, a transform) or with
    features that need decoding (images, audio) is read through its own ``__getitems__``.

    State: only the position.
    Resume: reads nothing again.
    """

    data: Any
    name: str | None = None
    kind = "from_dataset"
    infinite = False

    def _length(self) -> int | None:
        return len(self.data)

    def spec_fields(self) -> dict[str, State]:
        """The columns and the number of rows."""
        return {
            "data": "datasets.Dataset",
            "columns": list(self.data.column_names),
            "length": self.length(),
        }

    def summary(self) -> str:
        """The columns and the number of rows."""
        return (
            f"{self.kind}(datasets.Dataset[{', '.join(self.data.column_names)}], {self.length():,}"
            " rows)"
        )

    def _open(self) -> Any:
        data = self.data
        if _formats_itself(data):
            return None, None
        # datasets has no public accessor for the indices mapping of select() and shuffle().
        mapping = getattr(data, "_indices", None)
        indices = (
            None if mapping is None else mapping.column(0).to_numpy().astype(np.int64, copy=False)
        )
        return TableReader(data.data.table.select(data.column_names)), indices

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(bound, passes, positions)
        function = f"{type(self.data).__qualname__}.__getitem__"

        def failed(index: int, error: Exception) -> FailedSample:
            return row_failure(bound, origins[index], function, error)

        reader, indices = self._handle()
        if reader is not None:
            rows = positions if indices is None else indices[positions]
            try:
                return Rows(None, origins, None, reader.columns(rows))
            except Exception:  # for example text that is not UTF-8, in one of the rows
                return Rows(list(read_one_by_one(rows, reader.row, failed)), origins)
        numbers = positions.tolist()
        try:
            samples = self.data.__getitems__(numbers)
            require_num_rows(bound, self.data, len(samples), len(numbers))
        except WrongNumberOfRows:
            raise
        except Exception:
            samples = list(read_one_by_one(numbers, self.data.__getitem__, failed))
        return Rows(samples, origins)


def _formats_itself(data: Any) -> bool:
    """Whether a row differs from what Arrow stores: a format, a transform or a decoding feature."""
    if data.format["type"] is not None or data.format["columns"] != data.column_names:
        return True
    return any(_decodes(feature) for feature in data.features.values())


def _decodes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_decodes, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(_decodes, feature))
    if hasattr(feature, "decode_example"):
        return bool(getattr(feature, "decode", True))
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _decodes(inner)
    return type(feature).__name__ in ("Array2D", "Array3D", "Array4D", "Array5D")
