"""Which dataset a mix picks when.

A *pick* chooses the dataset that gives the next sample. Picks are numbered from 0 and come in
*blocks* of one size, in which dataset c is picked exactly ``quotas[c]`` times. The order of the
picks in a block is its *pattern*. There are 16 patterns; a hash of the block's number says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from midstream.common.randomness import draw, fold, fold_array, salt
from midstream.nodes.mix.weights import quotas
from midstream.pipeline.rows import I64

PATTERNS = 16
"""Patterns of a choice sequence; a power of two."""


def draws_seed(seed: int, label: str, names: Iterable[str], phase: int) -> int:
    """The seed of the draws in one phase of a mix.

    It depends on the names, not on the node's path: the length of a mix must not depend on the tree
    around it.

    Args:
        seed: The mix's ``seed``.
        label: The mix's name, or its verb.
        names: Of the datasets, in any order.
        phase: Number of the phase; for changed weights -1 minus the number of the change.
    """
    seed = fold(seed, salt("/".join([label, *sorted(names)])))
    return fold(seed, phase) if phase else seed


class Picks:
    """The choice sequence of a mix: the dataset of each pick.

    In a pattern, pick j of dataset c has the key ``(j + u) / quotas[c]`` with u uniform in [0, 1);
    the picks in the order of their keys are the pattern. So every prefix is close to the shares.

    Args:
        weights: By dataset name, in the order of the datasets.
        seed: Seed of the patterns and of the hash that chooses among them.

    Attributes:
        quotas: int64, shape [datasets]: picks of each dataset in a block.
        block: Picks in a block.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        shares, self.block = quotas(weights)
        self.quotas = np.array(shares, dtype=np.int64)
        self.seed = seed
        # For each pick of each pattern: the dataset, and its earlier picks in the block.
        self._pattern = np.empty((PATTERNS, self.block), dtype=np.int32)
        self._number = np.empty((PATTERNS, self.block), dtype=np.int32)
        self._made = np.zeros(PATTERNS, dtype=bool)
        # Ties are broken by name, so that the order in which a mix is written does not matter.
        self._names = list(weights)
        self._by_name = sorted(range(len(self._names)), key=self._names.__getitem__)

    def _make(self, chosen: I64) -> None:
        """Makes the chosen patterns, on first use: of a schedule with many phases few are used."""
        if self._made.all():
            return
        shares, names = self.quotas.tolist(), self._names
        for number in np.unique(chosen).tolist():
            if not self._made[number]:
                source = np.concatenate(
                    [np.full(shares[index], index, dtype=np.int32) for index in self._by_name]
                )
                earlier = np.concatenate(
                    [np.arange(shares[index], dtype=np.int32) for index in self._by_name]
                )
                unit = np.concatenate(
                    [
                        _unit(fold(self.seed, number, salt(names[index])), shares[index])
                        for index in self._by_name
                    ]
                )
                order = np.argsort((earlier + unit) / self.quotas[source], kind="stable")
                self._pattern[number], self._number[number] = source[order], earlier[order]
                self._made[number] = True

    @property
    def pattern(self) -> npt.NDArray[np.int32]:
        """int32, shape [16, block]: the dataset of each pick, for all patterns."""
        self._make(np.arange(PATTERNS))
        return self._pattern

    def of(self, pattern: int) -> npt.NDArray[np.int32]:
        """int32, shape [block]: the dataset of each pick in one pattern."""
        self._make(np.array([pattern]))
        found: npt.NDArray[np.int32] = self._pattern[pattern]
        return found

    def number(self, pattern: int) -> npt.NDArray[np.int32]:
        """int32, shape [block]: for each pick, earlier picks of its dataset in the block."""
        self._make(np.array([pattern]))
        found: npt.NDArray[np.int32] = self._number[pattern]
        return found

    def locate(self, picks: I64) -> tuple[npt.NDArray[Any], I64]:
        """The dataset of each pick, and how often it was picked before; both of shape [n]."""
        block, inside = np.divmod(picks, self.block)
        chosen = self.choose(block)
        self._make(chosen)
        source = self._pattern[chosen, inside]
        return source, block * self.quotas[source] + self._number[chosen, inside]

    def counts(self, picks: int) -> I64:
        """Picks of each dataset among the first ``picks``: int64, shape [datasets]."""
        block, inside = divmod(picks, self.block)
        found: I64 = block * self.quotas
        if inside:
            pattern = self.of(int(self.choose(block)[0]))
            found = found + np.bincount(pattern[:inside], minlength=len(self.quotas))
        return found

    def end(self, index: int, rows: int) -> int:
        """How many picks it takes until dataset ``index`` was picked ``rows`` times."""
        block, number = divmod(rows - 1, int(self.quotas[index]))
        pattern = self.of(int(self.choose(block)[0]))
        return block * self.block + int(np.flatnonzero(pattern == index)[number]) + 1

    def choose(self, blocks: I64 | int, lane: int = 0) -> npt.NDArray[np.int64]:
        """The pattern of each block: int64. In streams each lane (from 1) has its own sequence."""
        return (fold_array(fold(self.seed, -1 - lane), blocks) & np.uint64(PATTERNS - 1)).astype(
            np.int64
        )


def _unit(seed: int, count: int) -> npt.NDArray[np.float64]:
    """Draws from [0, 1): float64, shape [count]."""
    return (draw(seed, 0, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
