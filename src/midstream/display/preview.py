"""The first samples of a pipeline as a table, in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from midstream.common.tables import NOTE, cell_html, column_widths, rows_html, table_lines
from midstream.common.validation import require_int
from midstream.pipeline.failures import SampleFailure
from midstream.pipeline.iterator import Lane
from midstream.pipeline.ledger import Ledger
from midstream.pipeline.node import BoundNode, Node, bind
from midstream.pipeline.passes import epoch_key
from midstream.pipeline.rows import Item, Origins, as_origin_array
from midstream.pipeline.single_lane import LaneOutput

_ERROR = "color:#b3261e"
_TEXT_WIDTH, _HTML_WIDTH = 32, 80


def peek(node: Node, epoch: int = 0) -> Iterator[Item]:
    """Yields the samples of a pipeline, read as one lane, without touching any running iteration.

    Dropped samples are counted nowhere, and nothing is written to quarantine files.

    Args:
        node: The pipeline.
        epoch: The epoch whose order is read.

    Yields:
        Samples with their origins; a `SampleFailure` in place of a sample on which user code
        failed.
    """
    output = LaneOutput(
        bind(node), Lane(0, 1, 1, Ledger(writes=False)), int(epoch_key(epoch)[0]), epoch
    )
    while True:
        try:
            item = output.next()
        except StopIteration:
            return
        yield item


@dataclass(frozen=True)
class Preview:
    """The first samples of a dataset as a table.

    Attributes:
        origins: Text of the origin of each sample.
        samples: The samples; an exception where user code failed.
    """

    origins: list[str]
    samples: list[Any]

    def table(self, width: int) -> list[list[str]]:
        """Returns a header and rows: the origin, then a column for each key of dict samples.

        Samples that are not dicts, and errors, stand in a column named ``sample``.

        Args:
            width: Largest number of characters in a cell; an error may take three times as many.
        """
        keys: dict[Any, None] = {}
        for sample in self.samples:
            keys.update(dict.fromkeys(sample if isinstance(sample, dict) else ()))
        other = (
            any(not isinstance(sample, (dict, Exception)) for sample in self.samples) or not keys
        )
        header = ["origin", *(["sample"] if other else []), *map(str, keys)]
        rows = []
        for origin, sample in zip(self.origins, self.samples):
            row = [origin]
            if isinstance(sample, dict):
                row += [""] * other + [
                    _short(sample[key], width) if key in sample else "" for key in keys
                ]
            elif isinstance(sample, Exception):
                row.append(_cut(str(sample).partition("\n")[0], 3 * width))
            else:
                row.append(_short(sample, width))
            rows.append(row + [""] * (len(header) - len(row)))
        return [header, *rows]

    def __str__(self) -> str:
        header, *rows = self.table(_TEXT_WIDTH)
        # An error runs over the columns to its right, so it does not widen its own.
        measured = [header] + [
            [row[0]] + [""] * (len(row) - 1) if isinstance(sample, Exception) else row
            for row, sample in zip(rows, self.samples)
        ]
        lines = table_lines([header, *rows], left=len(header), widths=column_widths(measured))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        header, *rows = self.table(_HTML_WIDTH)
        body = []
        for row, sample in zip(rows, self.samples):
            cells = [cell_html(row[0], style=NOTE)]
            if isinstance(sample, Exception):
                cells.append(cell_html(row[1], style=_ERROR, columns=len(header) - 1))
            else:
                cells += map(cell_html, row[1:])
            body.append("".join(cells))
        return rows_html("".join(cell_html(name, tag="th") for name in header), body)


def preview(node: Node, n: int) -> Preview:
    """Reads the first ``n`` samples; see `Dataset.preview`."""
    require_int(n, "n", 0, "preview")
    bound = bind(node)
    origins, samples = [], []
    for sample, origin in islice(peek(node), n):
        if isinstance(sample, SampleFailure):
            origins.append(str(sample.origin or "–"))
            samples.append(sample.error())
        else:
            origins.append(_origin_text(bound, origin))
            samples.append(sample)
    return Preview(origins, samples)


def _origin_text(bound: BoundNode, origins: Origins) -> str:
    rows = as_origin_array(origins)
    if not len(rows):
        return "–"
    more = f" + {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"{bound.origin(rows[0])}{more}"


def _short(value: Any, width: int) -> str:
    """Returns a value in at most ``width`` characters."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        kind = str(value.dtype).removeprefix("torch.")
        if value.ndim == 0:
            return _cut(str(value.item()), width)
        head = [str(item) for item in value.reshape(-1)[:8].tolist()]
        dots = " …" if value.reshape(-1).shape[0] > len(head) else ""
        return _cut(f"{kind}[{', '.join(map(str, value.shape))}] {' '.join(head)}{dots}", width)
    if isinstance(value, (list, tuple)) and len(value) > 8:
        inner = ", ".join(_short(item, width) for item in value[:4])
        return _cut(f"{type(value).__name__}[{len(value)}] {inner}, …", width)
    return _cut(repr(value), width)


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
