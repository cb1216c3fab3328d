"""Exclude: single samples left out, by origin. No verb makes it: `DataLoader.exclude` puts it below
the batches that run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import Excluded, FailedSample
from midstream.pipeline.iterator import Iterator, Lane, OneToOneIterator
from midstream.pipeline.node import BoundNode, Node
from midstream.pipeline.rows import I64, U64, Item, Origins, Rows, as_origin_array


@dataclass(frozen=True, eq=False, repr=False)
class Exclude(Node):
    """The input with a quiet `FailedSample` in place of each sample that is left out. Positions stay.

    State: the input's: this node is in no checkpoint.
    Resume: reads nothing again.
    """

    source: Node
    origins: tuple[tuple[str, int, int, int], ...]
    kind = "exclude"
    one_to_one = True

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        rows = bound.input.rows(positions, keys, passes)
        hit = _Wanted(self, bound).among(rows.origins)
        if not hit.any():
            return rows
        items = rows.items()
        if rows.sizes is not None:
            hit = np.array(
                [
                    bool(hit[end - size : end].any())
                    for size, end in zip(rows.sizes, np.cumsum(rows.sizes))
                ]
            )
        samples = list(rows.samples)
        for index in np.flatnonzero(hit).tolist():
            if type(samples[index]) is not FailedSample:  # what failed already is told as that
                samples[index] = _hole(bound, items[index][1])
        return Rows(samples, rows.origins, rows.sizes)

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _ExcludeIterator(bound, iterate(bound.input, lane, key, pass_), _Wanted(self, bound))


class _ExcludeIterator(OneToOneIterator):
    def __init__(self, bound: BoundNode, source: Iterator, wanted: _Wanted) -> None:
        super().__init__(source)
        self.bound, self.wanted = bound, wanted

    def _next(self) -> Item:
        sample, origins = next(self.source)
        if type(sample) is not FailedSample and self.wanted.among(as_origin_array(origins)).any():
            return _hole(self.bound, origins), origins
        return sample, origins


class _Wanted:
    """Finds the origins that are left out."""

    def __init__(self, node: Exclude, bound: BoundNode) -> None:
        number = {name: index for index, name in enumerate(bound.names)}
        self.exact = {(number[name], *rest) for name, *rest in node.origins if name in number}
        self.rows = np.array(sorted({row for _, _, row, _ in self.exact}), dtype=np.int64)

    def among(self, origins: I64) -> Any:
        """bool [m]: which of the origins (int64 [m, 5])."""
        hit = np.isin(origins[:, 2], self.rows)
        for index in np.flatnonzero(hit).tolist():
            hit[index] = tuple(origins[index, :4].tolist()) in self.exact
        return hit


def _hole(bound: BoundNode, origins: Origins) -> FailedSample:
    return FailedSample((Excluded(bound.path, bound.origin(as_origin_array(origins)[0])),))
