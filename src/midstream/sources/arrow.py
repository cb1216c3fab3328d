"""Hugging Face ``datasets.Dataset``: Arrow tables read as zero-copy views.

`TableReader` turns an Arrow table into rows without pyarrow's ``take`` (whose cost grows with the
number of chunks) and without the Hugging Face formatters (50 µs a row); the parquet source reads
its row groups with it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.common.plain_state import State
from midstream.pipeline.node import BoundNode, Node, row_origins
from midstream.pipeline.rows import I64, U64, Rows
from midstream.sources.arrow_table import TableReader
from midstream.sources.source_rows import ReturnedOthers, require_rows, row_failure


@dataclass(frozen=True, eq=False, repr=False)
class ArrowSource(Node):
    """Rows of a Hugging Face dataset.

    Plain columns are read from Arrow directly: numeric lists as read-only numpy views of the stored
    dtype, numbers, strings and nested values as Python objects. A dataset with a format of its own
    (``with_format``, a transform) or with features that decode (images, audio) is read through its
    own ``__getitems__``.

    State: none but the position.
    Resume: reads nothing again.
    """

    data: Any
    name: str | None = None
    kind = "from_dataset"

    @property
    def infinite(self) -> bool:
        """Never."""
        return False

    def _length(self) -> int | None:
        return len(self.data)

    def spec_fields(self) -> dict[str, State]:
        """Columns and number of rows."""
        return {
            "data": "datasets.Dataset",
            "columns": list(self.data.column_names),
            "length": self.length(),
        }

    def summary(self) -> str:
        """Columns and number of rows."""
        return (
            f"{self.kind}(datasets.Dataset[{', '.join(self.data.column_names)}], {self.length():,}"
            " rows)"
        )

    def _open(self) -> Any:
        data = self.data
        if _formats_itself(data):
            return None, None
        # The indices mapping has no public accessor; this is the one place that knows of it.
        mapping = getattr(data, "_indices", None)
        indices = (
            None if mapping is None else mapping.column(0).to_numpy().astype(np.int64, copy=False)
        )
        return TableReader(data.data.table.select(data.column_names)), indices

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        origins = row_origins(bound, passes, positions)
        reader, indices = self._handle()
        if reader is not None:
            rows = positions if indices is None else indices[positions]
            try:
                return Rows(None, origins, None, reader.columns(rows))
            except (
                Exception
            ):  # one row at a time tells which one it was (text that is not UTF-8, say)
                samples: list[Any] = []
                for row in rows:
                    try:
                        samples.extend(reader.rows(np.array([row])))
                    except Exception as error:
                        samples.append(row_failure(bound, self.data, origins[len(samples)], error))
                return Rows(samples, origins)
        index = positions.tolist()
        try:
            samples = self.data.__getitems__(index)
            require_rows(bound, self.data, len(samples), len(index))
        except ReturnedOthers:
            raise
        except Exception:  # one row at a time tells which one it was
            samples = []
            for row in index:
                try:
                    samples.append(self.data[row])
                except Exception as error:
                    samples.append(row_failure(bound, self.data, origins[len(samples)], error))
        return Rows(samples, origins)


def _formats_itself(data: Any) -> bool:
    """Whether rows are more than what Arrow stores."""
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
