"""Skip: leaves out the first samples."""

from __future__ import annotations

from dataclasses import dataclass

from midstream.common.plain_state import State
from midstream.common.validation import require_int
from midstream.nodes.take import cut_blocks
from midstream.pipeline.cursor import iterate
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node, Selection
from midstream.pipeline.rows import I64, U64, Item


@dataclass(frozen=True, eq=False, repr=False)
class Skip(Node):
    """Leaves out the first ``n`` samples. Random access where the input is.

    On a stream, lane l of L leaves out the first ``n // L + (l < n % L)`` of its own samples.

    State: random access: none but the position. Stream: ``[samples left to skip, state of the
        input]``.
    Resume: reads nothing again.
    """

    source: Node
    n: int
    kind = "skip"

    def __post_init__(self) -> None:
        require_int(self.n, "n", 0, "skip")

    def _length(self) -> int | None:
        length = self.source.length()
        return None if length is None else max(0, length - int(self.n))

    def block_sizes(self) -> I64 | None:
        """Sizes of the input's blocks from sample ``n`` on."""
        sizes = self.source.block_sizes()
        return None if sizes is None else cut_blocks(sizes, int(self.n), int(sizes.sum()))

    def taken_of(self, name: str, count: int) -> int:
        """See `Node.taken_of`."""
        return count + int(self.n)

    def spec_fields(self) -> dict[str, State]:
        """The number of samples."""
        return {"n": int(self.n)}

    def _select(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> list[Selection]:
        return [Selection(bound.input, positions + int(self.n), keys, passes)]

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _SkipIterator(iterate(bound.input, lane, key, pass_), lane.share(int(self.n)))


class _SkipIterator(Iterator):
    def __init__(self, source: Iterator, left: int) -> None:
        self.source, self.left = source, left

    def _next(self) -> Item:
        while self.left:
            next(self.source)
            self.left -= 1
        return next(self.source)

    def _state(self) -> State:
        return [self.left, self.source.snapshot()]

    def _load(self, state: State) -> None:
        self.left, source = state
        self.source.load(source)
