"""How pipelines, samples, loaders and progress look, as text and in a notebook. Imported only when
something is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from midstream.common.validation import require_int
from midstream.pipeline.failures import SampleFailure
from midstream.pipeline.iterator import Lane
from midstream.pipeline.ledger import Ledger
from midstream.pipeline.node import BoundNode, Node, bind
from midstream.pipeline.passes import epoch_key
from midstream.pipeline.rows import Item, Origins, as_origin_array
from midstream.pipeline.single_lane import LaneOutput

if TYPE_CHECKING:
    from collections.abc import Iterator as Iter
from midstream.common.tables import MONO as _MONO
from midstream.common.tables import NOTE as _NOTE


def look(dataset: Node, epoch: int = 0) -> Iter[Item]:
    """The samples of one lane with their origins, a `SampleFailure` where user code failed; touches nothing of the dataset's own
    iteration, and what is dropped on the way is counted nowhere."""
    delivery = LaneOutput(
        bind(dataset), Lane(0, 1, 1, Ledger(writes=False)), int(epoch_key(epoch)[0]), epoch
    )
    while True:
        try:
            item = delivery.next()
        except StopIteration:
            return
        yield item


@dataclass(frozen=True)
class Preview:
    """The first samples of a dataset as a table.

    Attributes:
        origins: Where each sample came from, in words.
        samples: The samples; an exception where user code failed.
    """

    origins: list[str]
    samples: list[Any]

    def table(self, width: int) -> list[list[str]]:
        """Header and rows: an origin, then a column per key of dict samples, else one named ``sample``.

        Args:
            width: Characters of a cell, at most.
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
            else:
                told = str(sample).partition("\n")[0] if isinstance(sample, Exception) else None
                row += [_cut(told, 3 * width) if told is not None else _short(sample, width)]
                row += [""] * (len(header) - len(row))
            rows.append(row)
        return [header, *rows]

    def __str__(self) -> str:
        table = self.table(32)
        failed = [isinstance(sample, Exception) for sample in [None, *self.samples]]
        widths = [
            max(len(row[column]) for row, bad in zip(table, failed) if not (bad and column))
            for column in range(len(table[0]))
        ]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            for row in table
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        header, *rows = self.table(80)
        head = "".join(f"<th style='text-align:left'>{escape(cell)}</th>" for cell in header)
        body = []
        for row, sample in zip(rows, self.samples):
            cells = [f"<td style='text-align:left;{_NOTE}'>{escape(row[0])}</td>"]
            if isinstance(sample, Exception):
                cells.append(
                    f"<td colspan='{len(header) - 1}'"
                    f" style='text-align:left;color:#b3261e'>{escape(row[1])}</td>"
                )
            else:
                cells += [f"<td style='text-align:left'>{escape(cell)}</td>" for cell in row[1:]]
            body.append(f"<tr>{''.join(cells)}</tr>")
        return (
            "<table"
            f" style='{_MONO}'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        )


def preview(dataset: Node, n: int) -> Preview:
    """See `Dataset.preview`."""
    require_int(n, "n", 0, "preview")
    bound = bind(dataset)
    origins, samples = [], []
    for sample, origin in islice(look(dataset), n):
        failed = isinstance(sample, SampleFailure)
        origins.append(str(sample.origin or "–") if failed else _origin(bound, origin))
        samples.append(sample.error() if failed else sample)
    return Preview(origins, samples)


def _origin(bound: BoundNode, origins: Origins) -> str:
    several = as_origin_array(origins)
    if not len(several):
        return "–"
    return f"{bound.origin(several[0])}{f' + {len(several) - 1} more' if len(several) > 1 else ''}"


def _short(value: Any, width: int) -> str:
    """A value in few characters."""
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
