"""What a mix picks when: integer quotas, choice sequences, schedules, and the closed forms of mixes
with random access.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from midstream.common.randomness import draw, fold, fold_array, salt
from midstream.nodes.mix.weights import quotas
from midstream.pipeline.rows import I64

PATTERNS = 16


class Picks:
    """The choice sequence: which dataset is picked when, as a pool of block patterns.

    Attributes:
        quotas: int64, shape [k]: picks of each dataset per block.
        block: Picks per block.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        shares, self.block = quotas(weights)
        self.quotas = np.array(shares, dtype=np.int64)
        self.seed = seed
        self._pattern = np.empty((PATTERNS, self.block), dtype=np.int32)
        self._number = np.empty((PATTERNS, self.block), dtype=np.int32)
        self._made = np.zeros(PATTERNS, dtype=bool)
        # Everything is laid out by name, not by place in the dict: the same mix written in another
        # order is the same.
        self._names = list(weights)
        self._by_name = sorted(range(len(self._names)), key=self._names.__getitem__)

    def _make(self, chosen: I64) -> None:
        """Make the patterns that are looked at: of a schedule of many phases few ever are."""
        if self._made.all():
            return
        shares, names = self.quotas.tolist(), self._names
        for pool in np.unique(chosen).tolist():
            if not self._made[pool]:
                source = np.concatenate(
                    [np.full(shares[index], index, dtype=np.int32) for index in self._by_name]
                )
                number = np.concatenate(
                    [np.arange(shares[index], dtype=np.int32) for index in self._by_name]
                )
                unit = np.concatenate(
                    [
                        _unit(fold(self.seed, pool, salt(names[index])), shares[index])
                        for index in self._by_name
                    ]
                )
                order = np.argsort((number + unit) / self.quotas[source], kind="stable")
                self._pattern[pool], self._number[pool] = source[order], number[order]
                self._made[pool] = True

    @property
    def pattern(self) -> npt.NDArray[np.int32]:
        """int32, shape [16, block]: the dataset picked."""
        self._make(np.arange(PATTERNS))
        return self._pattern

    def of(self, pool: int) -> npt.NDArray[np.int32]:
        """int32, shape [block]: the datasets picked in one pattern."""
        self._make(np.array([pool]))
        found: npt.NDArray[np.int32] = self._pattern[pool]
        return found

    def number(self, pool: int) -> npt.NDArray[np.int32]:
        """int32, shape [block]: how many times each of them was picked before in the block."""
        self._make(np.array([pool]))
        found: npt.NDArray[np.int32] = self._number[pool]
        return found

    def locate(self, picks: I64) -> tuple[npt.NDArray[Any], I64]:
        """For picks by number: the dataset, and how many times it was picked before; both of shape
        [k].
        """
        block, inside = np.divmod(picks, self.block)
        chosen = self.choose(block)
        self._make(chosen)
        source = self._pattern[chosen, inside]
        return source, block * self.quotas[source] + self._number[chosen, inside]

    def counts(self, picks: int) -> I64:
        """How many of the first ``picks`` are of each dataset, int64 of shape [k]."""
        block, inside = divmod(picks, self.block)
        found: I64 = block * self.quotas
        if inside:
            pattern = self.of(int(self.choose(block)[0]))
            found = found + np.bincount(pattern[:inside], minlength=len(self.quotas))
        return found

    def end(self, index: int, rows: int) -> int:
        """The number of the pick that takes row number ``rows`` (from 1) of a dataset, + 1."""
        block, number = divmod(rows - 1, int(self.quotas[index]))
        pattern = self.of(int(self.choose(block)[0]))
        return block * self.block + int(np.flatnonzero(pattern == index)[number]) + 1

    def choose(self, blocks: I64 | int, lane: int = 0) -> npt.NDArray[np.int64]:
        """Which of the patterns each block has, int64."""
        return (fold_array(fold(self.seed, -1 - lane), blocks) & np.uint64(PATTERNS - 1)).astype(
            np.int64
        )


def _unit(seed: int, count: int) -> npt.NDArray[np.float64]:
    return (draw(seed, 0, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
