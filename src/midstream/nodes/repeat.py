"""Repeat: several passes over the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from midstream.common.plain_state import State
from midstream.common.randomness import pass_key
from midstream.common.validation import require_int
from midstream.errors import SourceError
from midstream.pipeline import describe
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import FailedSample
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node, Selection
from midstream.pipeline.passes import require_passes
from midstream.pipeline.patience import Patience
from midstream.pipeline.rows import I64, U64, Item

_MAX_EMPTY_PASSES = 1_000
_ENDLESS = 1 << 20  # passes of an endless repeat inside one outer pass, for numbering


@dataclass(frozen=True, eq=False, repr=False)
class Repeat(Node):
    """``num_epochs`` passes over the input, endless when None. Every shuffle below draws a new order each pass.

    On a stream, a pass may yield nothing in a lane and the next one something (a filter above a
    shuffle), so all passes are gone through. An endless repeat ends in a lane that finds nothing to
    read, and, with a warning, after 1,000 passes of which nothing was ever left; where there was
    something before, that is an error.

    State: random access: none but the position. Stream: ``[pass, flags: it read 1, yielded 2, ever
        yielded 4; input state]``.
    Resume: reads nothing again.
    """

    source: Node
    num_epochs: int | None = None
    kind = "repeat"

    def __post_init__(self) -> None:
        if self.num_epochs is not None:
            require_int(self.num_epochs, "num_epochs", 1, "repeat")
        if super().infinite:
            raise ValueError(
                f"repeat of something endless never gets to a second pass:\n{describe.tree(self.source)}"
            )

    @property
    def infinite(self) -> bool:
        """Whether no number of epochs was given."""
        return self.num_epochs is None

    def _length(self) -> int | None:
        length = self.source.length()
        if length == 0:
            return 0
        return None if length is None or self.num_epochs is None else length * self.num_epochs

    def spec_fields(self) -> dict[str, State]:
        """Number of passes."""
        return {"num_epochs": None if self.num_epochs is None else int(self.num_epochs)}

    def passes_over(self, key: str, exact: bool) -> int:
        """Its passes."""
        return int(self.num_epochs or _ENDLESS)

    def _select(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> list[Selection]:
        length = self.source.length()
        assert length
        require_passes(passes, self.passes_over("", True))
        number, inside = np.divmod(positions, length)
        return [
            Selection(
                bound.input,
                inside,
                pass_key(keys, number),
                passes * self.passes_over("", True) + number,
            )
        ]

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _RepeatIterator(self, bound, lane, key, pass_)


class _RepeatIterator(Iterator):
    def __init__(self, node: Repeat, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        self.node, self.bound, self.lane, self.key, self.pass_ = node, bound, lane, key, pass_
        self.patience = Patience(node.infinite, _MAX_EMPTY_PASSES)  # passes without a sample
        self.ever = False  # whether any pass yielded anything
        self._start(0)

    def _start(self, number: int) -> None:
        self.number, self.any, self.read = number, False, False
        times = self.node.passes_over("", True)
        require_passes(np.array([self.pass_]), times)
        key = int(pass_key(np.array([self.key], dtype=np.uint64), np.array([number]))[0])
        self.source = iterate(self.bound.input, self.lane, key, self.pass_ * times + number)

    def _next(self) -> Item:
        ledger = self.lane.ledger
        while True:
            before = ledger.reads
            try:
                item = next(self.source)
            except StopIteration:
                self.read = self.read or ledger.reads != before
                if self.number + 1 == self.node.num_epochs:
                    raise
                if self.node.num_epochs is None and not self.any:
                    self._nothing()
                self._start(self.number + 1)
                continue
            self.read = True
            if type(item[0]) is not FailedSample:
                self.any, self.ever, self.patience.count = True, True, 0
            return item

    def _nothing(self) -> None:
        """An endless repeat whose pass yielded nothing: the end, bad luck, or an endless wait?"""
        if not self.read:
            raise StopIteration  # this lane has no data
        if not self.patience.exhausted_by(1):
            return
        what = (
            f"{self.bound.path}: {self.patience.count:,} passes in a row left nothing of what lane"
            f" {self.lane.index} of {self.lane.num_lanes} read"
        )
        if self.ever:
            raise SourceError(
                f"{what}. Check what the filters and skipped errors below let through"
            )
        self.lane.ledger.notice(
            f"repeat {self.bound.path}",
            f"{what}, nor any before; it is drained. Fewer lanes (lanes=) give each more rows",
        )
        raise StopIteration

    def _state(self) -> State:
        return [self.number, self.read + 2 * self.any + 4 * self.ever, self.source.snapshot()]

    def _load(self, state: State) -> None:
        number, flags, source = state
        self._start(number)
        self.read, self.any, self.ever = bool(flags & 1), bool(flags & 2), bool(flags & 4)
        self.patience.count = 0
        self.source.load(source)
