"""Epochs and passes in 64 bits: the seed key of an epoch, and limits on nested passes."""

from __future__ import annotations

import numpy as np

from midstream.common.randomness import fold
from midstream.pipeline.node import BoundNode
from midstream.pipeline.rows import I64, U64


def epoch_key(epoch: int) -> U64:
    """The seed key of an epoch, uint64, shape [1]. The keys of passes are derived from it."""
    return np.array([fold(epoch) if epoch else 0], dtype=np.uint64)


_TOO_DEEP = (
    "{}endless passes (repeat(), all_exhausted) are nested too deep to number them in 64 bits. Give"
    " repeat a number of epochs, or an inner mix max_epochs= or 'all_exhausted_without_replacement'"
)

_EPOCHS = 1 << 16  # a loader can run at least so many


def require_passes(passes: I64, times: int) -> None:
    """Check that ``times`` passes in each of these passes can be numbered in 64 bits.

    Raises:
        ValueError: If they cannot.
    """
    if int(passes.max()) * times >= 1 << 62:
        raise ValueError(_TOO_DEEP.format(""))


def require_epochs(root: BoundNode) -> None:
    """Check, before anything is read, that every source's passes in 65,536 epochs can be numbered.

    Raises:
        ValueError: If they cannot; names the nodes that are nested.
    """

    def most(bound: BoundNode, exact: bool) -> tuple[int, list[str]]:
        """The most passes over any source in one pass over ``bound``, and the nodes that repeat."""
        below: list[tuple[int, list[str]]] = [(1, [])]
        for name, child in bound.inputs.items():
            times, paths = most(child, exact)
            own = bound.node.passes_over(name, exact)
            below.append((times * own, [bound.path, *paths] if own > 1 else paths))
        return max(below, key=lambda found: found[0])

    # Lengths may have to be looked up in files: only where the bound without them is too large.
    if most(root, False)[0] * _EPOCHS > 1 << 62:
        times, paths = most(root, True)
        if times * _EPOCHS > 1 << 62:
            raise ValueError(_TOO_DEEP.format(f"{' > '.join(paths)}: "))
