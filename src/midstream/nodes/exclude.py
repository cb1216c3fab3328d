"""Exclude: single samples left out, by origin. No verb makes it: `DataLoader.exclude` puts it below the batches that run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.common.plain_state import State, decode, encode
from midstream.errors import Origin
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import Excluded, Hole
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import Node, Place
from midstream.pipeline.rows import I64, U64, Item, Origins, Rows, as_origin_array

__all__ = ["Exclude", "excluded_origins", "with_origins"]

MOST_ORIGINS = 4096
"""How many a run may leave out: they are in every checkpoint, about 16 bytes each."""


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


def excluded_origins(text: str) -> list[Origin]:
    """What a state's "excluded" says."""
    known = decode(text) if text else {}
    return [Origin(name, *rest) for name, several in sorted(known.items()) for rest in several]


def with_origins(text: str, origins: Iterable[Any], names: list[str]) -> str:
    """The same with more of them.

    Raises:
        ValueError: If one is of no source, or they become too many.
        TypeError: If one is no origin.
    """
    known = {tuple(origin[:4]) for origin in excluded_origins(text)}
    for origin in origins:
        if (
            not isinstance(origin, (tuple, list))
            or not 3 <= len(origin) <= 5
            or not all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in origin[1:])
        ):
            raise TypeError(
                f"exclude takes origins as loader.trace() gives them, or (source, epoch, row) or (source, epoch, row, part); "
                f"found {origin!r:.80}"
            )
        name, epoch, row, *part = origin
        if name not in names:
            raise ValueError(f"exclude: no source is named {name!r}; there are {', '.join(map(repr, names))}")
        if min(origin[1:]) < 0:
            raise ValueError(f"exclude: epoch, row and part are at least 0; found {origin!r}")
        known.add((name, int(epoch), int(row), int(part[0]) if part else 0))
    if len(known) > MOST_ORIGINS:
        raise ValueError(
            f"exclude: that would be {len(known):,} samples left out, and every checkpoint holds them: at most "
            f"{MOST_ORIGINS:,}. Take many samples out with .filter, or pass over whole batches with loader.skip."
        )
    by_name: dict[str, list[list[int]]] = {}
    for name, *rest in sorted(known):
        by_name.setdefault(name, []).append(rest)  # type: ignore[arg-type]
    return encode(by_name) if by_name else ""
