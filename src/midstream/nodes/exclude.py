"""Exclude: single samples left out, by origin. No verb makes it: `DataLoader.exclude` puts it below the batches that run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.common.plain_state import State
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import Excluded, Hole
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import Node, Place
from midstream.pipeline.rows import I64, U64, Item, Origins, Rows, as_origin_array


@dataclass(frozen=True, eq=False, repr=False)
class Exclude(Node):
    """The input with a quiet `Hole` in place of each sample that is left out. Positions stay.

    State: the input's: this node is in no checkpoint.
    Resume: reads nothing again.
    """

    source: Node
    origins: tuple[tuple[str, int, int, int], ...]
    kind = "exclude"
    one_to_one = True

    def _rows(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows:
        rows = at.input.rows(positions, keys, passes)
        hit = _Wanted(self, at).among(rows.origins)
        if not hit.any():
            return rows
        items = rows.items()
        if rows.sizes is not None:
            hit = np.array([bool(hit[end - size : end].any()) for size, end in zip(rows.sizes, np.cumsum(rows.sizes))])
        samples = list(rows.samples)
        for index in np.flatnonzero(hit).tolist():
            if type(samples[index]) is not Hole:  # what failed already is told as that
                samples[index] = _hole(at, items[index][1])
        return Rows(samples, rows.origins, rows.sizes)

    def _iterate(self, at: Place, lane: Lane, key: int, pass_: int) -> Iterator:
        return _ExcludeIterator(at, iterate(at.input, lane, key, pass_), _Wanted(self, at))


class _ExcludeIterator(Iterator):
    def __init__(self, at: Place, source: Iterator, wanted: _Wanted) -> None:
        self.at, self.source, self.wanted = at, source, wanted

    def _next(self) -> Item:
        sample, origins = next(self.source)
        if type(sample) is not Hole and self.wanted.among(as_origin_array(origins)).any():
            return _hole(self.at, origins), origins
        return sample, origins

    def _state(self) -> State:
        return self.source.snapshot()

    def _load(self, state: State) -> None:
        self.source.load(state)


class _Wanted:
    """Finds the origins that are left out."""

    def __init__(self, node: Exclude, at: Place) -> None:
        number = {name: index for index, name in enumerate(at.names)}
        self.exact = {(number[name], *rest) for name, *rest in node.origins if name in number}
        self.rows = np.array(sorted({row for _, _, row, _ in self.exact}), dtype=np.int64)

    def among(self, origins: I64) -> Any:
        """bool [m]: which of the origins (int64 [m, 5])."""
        hit = np.isin(origins[:, 2], self.rows)
        for index in np.flatnonzero(hit).tolist():
            hit[index] = tuple(origins[index, :4].tolist()) in self.exact
        return hit


def _hole(at: Place, origins: Origins) -> Hole:
    return Hole((Excluded(at.path, at.origin(as_origin_array(origins)[0])),))
