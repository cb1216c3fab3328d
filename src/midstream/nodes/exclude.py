"""Exclude: leaves out single samples, by origin.

No verb makes this node. `DataLoader.exclude` puts it below the batches of the running pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.iterator import Iterator, Lane, OneToOneIterator
from midstream.pipeline.node import BoundNode, Node
from midstream.pipeline.rows import I64, U64, Item, Origins, Rows, as_origin_array


@dataclass(frozen=True, eq=False, repr=False)
class Exclude(Node):
    """Replaces excluded samples by a `FailedSample` that is counted, not raised. Keeps positions.

    Random access where the input is.

    State: the state of its input; this node is in no checkpoint.
    Resume: reads nothing again.
    """

    source: Node
    origins: tuple[tuple[str, int, int, int], ...]
    kind = "exclude"
    one_to_one = True

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        rows = bound.input.rows(positions, keys, passes)
        hit = _OriginFinder(self, bound).among(rows.origins)
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
            if type(samples[index]) is not FailedSample:  # an earlier failure is reported as such
                samples[index] = _excluded_sample(bound, items[index][1])
        return Rows(samples, rows.origins, rows.sizes)

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _ExcludeIterator(
            bound, iterate(bound.input, lane, key, pass_), _OriginFinder(self, bound)
        )


class _ExcludeIterator(OneToOneIterator):
    def __init__(self, bound: BoundNode, source: Iterator, finder: _OriginFinder) -> None:
        super().__init__(source)
        self.bound, self.finder = bound, finder

    def _next(self) -> Item:
        sample, origins = next(self.source)
        if type(sample) is not FailedSample and self.finder.among(as_origin_array(origins)).any():
            return _excluded_sample(self.bound, origins), origins
        return sample, origins


class _OriginFinder:
    """Finds the excluded samples among others, by their origins."""

    def __init__(self, node: Exclude, bound: BoundNode) -> None:
        number = {name: index for index, name in enumerate(bound.names)}
        self.exact = {(number[name], *rest) for name, *rest in node.origins if name in number}
        self.rows = np.array(sorted({row for _, _, row, _ in self.exact}), dtype=np.int64)

    def among(self, origins: I64) -> Any:
        """Return which origins (int64, shape [m, 5]) are excluded: bool of shape [m]."""
        hit = np.isin(origins[:, 2], self.rows)
        for index in np.flatnonzero(hit).tolist():
            hit[index] = tuple(origins[index, :4].tolist()) in self.exact
        return hit


def _excluded_sample(bound: BoundNode, origins: Origins) -> FailedSample:
    origin = bound.origin(as_origin_array(origins)[0])
    return FailedSample((SampleFailure(bound.path, origin, outcome="exclude"),))
