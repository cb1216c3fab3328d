"""Take: keeps the first samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from midstream.common.plain_state import State
from midstream.common.validation import require_int
from midstream.pipeline.cursor import iterate
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node, Selection
from midstream.pipeline.rows import I64, U64, Item


@dataclass(frozen=True, eq=False, repr=False)
class Take(Node):
    """Keeps the first ``n`` samples. Random access where the input is.

    On a stream, lane l of L takes the first ``n // L + (l < n % L)`` of its own samples.

    State: random access: none but the position. Stream: ``[samples left to take, state of the
        input]``.
    Resume: reads nothing again.
    """

    source: Node
    n: int
    kind = "take"
    infinite = False

    def __post_init__(self) -> None:
        require_int(self.n, "n", 0, "take")

    def _length(self) -> int | None:
        length = self.source.length()
        return int(self.n) if length is None else min(int(self.n), length)

    def block_sizes(self) -> I64 | None:
        """Sizes of the input's blocks up to sample ``n``."""
        sizes = self.source.block_sizes()
        return None if sizes is None else cut_blocks(sizes, 0, int(self.n))

    def taken_of(self, name: str, count: int) -> int:
        """See `Node.taken_of`."""
        return count

    def spec_fields(self) -> dict[str, State]:
        """The number of samples."""
        return {"n": int(self.n)}

    def _select(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> list[Selection]:
        return [Selection(bound.input, positions, keys, passes)]

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _TakeIterator(iterate(bound.input, lane, key, pass_), lane.share(int(self.n)))


class _TakeIterator(Iterator):
    def __init__(self, source: Iterator, left: int) -> None:
        self.source, self.left = source, left

    def _next(self) -> Item:
        if self.left == 0:
            raise StopIteration
        item = next(self.source)
        self.left -= 1
        return item

    def _state(self) -> State:
        return [self.left, self.source.snapshot()]

    def _load(self, state: State) -> None:
        self.left, source = state
        self.source.load(source)


def cut_blocks(sizes: I64, start: int, stop: int) -> I64:
    """Return the sizes of blocks of which only the rows in [start, stop) are kept."""
    ends = np.minimum(np.cumsum(sizes), stop)
    left = np.diff(np.maximum(ends, start), prepend=start)
    return left[left > 0]
