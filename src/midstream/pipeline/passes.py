"""Epochs and passes, numbered in 64 bits."""

from __future__ import annotations

import numpy as np

from midstream.common.randomness import fold
from midstream.pipeline.node import BoundNode
from midstream.pipeline.rows import I64, U64


def epoch_key(epoch: int) -> U64:
    """The seed key of an outer epoch: where every chain of passes starts. uint64, shape [1]."""
    return np.array([fold(epoch) if epoch else 0], dtype=np.uint64)


_TOO_DEEP = (
    "{}endless passes (repeat(), all_exhausted) are nested too deep to number them in 64 bits. Give"
    " repeat a number of epochs, or an inner mix max_epochs= or 'all_exhausted_without_replacement'"
)

_EPOCHS = 1 << 16  # of a loader at least


def require_passes(passes: I64, times: int) -> None:
    """Refuse passes nested so deep that they cannot be numbered in 64 bits."""
    if int(passes.max()) * times >= 1 << 62:
        raise ValueError(_TOO_DEEP.format(""))


def require_epochs(root: BoundNode) -> None:
    """Refuse the same before anything is read: of every source, the passes of 65,536 epochs can be
    numbered.
    """

    def most(bound: BoundNode, exact: bool) -> tuple[int, list[str]]:
        below: list[tuple[int, list[str]]] = [(1, [])]
        for key, child in bound.inputs.items():
            times, paths = most(child, exact)
            own = bound.node.passes_over(key, exact)
            below.append((times * own, [bound.path, *paths] if own > 1 else paths))
        return max(below, key=lambda found: found[0])

    if (
        most(root, False)[0] * _EPOCHS > 1 << 62
    ):  # lengths may have to be looked up: only where they could matter
        times, paths = most(root, True)
        if times * _EPOCHS > 1 << 62:
            raise ValueError(_TOO_DEEP.format(f"{' > '.join(paths)}: "))
