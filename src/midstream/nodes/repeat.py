"""Repeat: reads its input several times."""

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
"""Passes in a row without a sample, after which an endless repeat gives up."""

_ENDLESS = 1 << 20
"""Passes of an endless repeat in one outer pass, for numbering."""


@dataclass(frozen=True, eq=False, repr=False)
class Repeat(Node):
    """Reads the input ``num_epochs`` times, or without end when None. Random access where it is.

    Every shuffle in the input has a new order in each pass.

    On a stream, one pass may yield nothing in a lane and the next one something (a filter after a
    shuffle). So an endless repeat continues after an empty pass. It ends in a lane whose input has
    no rows. After 1,000 passes in a row that yielded nothing of what was read, it ends with a
    warning if no pass ever yielded a sample; otherwise it raises `SourceError`.

    State: random access: none but the position. Stream: ``[pass, flags, state of the input]``; the
        flags are a sum: 1: the pass read a row; 2: it yielded a sample; 4: some pass did.
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
                "repeat of something endless never gets to a second"
                f" pass:\n{describe.tree(self.source)}"
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
        """The number of passes."""
        return {"num_epochs": None if self.num_epochs is None else int(self.num_epochs)}

    def passes_over(self, name: str, exact: bool) -> int:
        """See `Node.passes_over`."""
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
        self.patience = Patience(node.infinite, _MAX_EMPTY_PASSES)  # counts passes
        self.ever_yielded = False
        self._start(0)

    def _start(self, number: int) -> None:
        self.number, self.yielded, self.read = number, False, False
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
                if self.node.num_epochs is None and not self.yielded:
                    self._check_empty_pass()
                self._start(self.number + 1)
                continue
            self.read = True
            if type(item[0]) is not FailedSample:
                self.yielded, self.ever_yielded, self.patience.count = True, True, 0
            return item

    def _check_empty_pass(self) -> None:
        """Decide whether an endless repeat continues after a pass that yielded nothing.

        Raises:
            StopIteration: If this lane has no rows, or no pass ever yielded a sample.
            SourceError: If passes yielded samples before, and none of the last 1,000 did.
        """
        if not self.read:
            raise StopIteration  # this lane has no data
        if not self.patience.exhausted_by(1):
            return
        found = (
            f"{self.bound.path}: {self.patience.count:,} passes in a row left nothing of what lane"
            f" {self.lane.index} of {self.lane.num_lanes} read"
        )
        if self.ever_yielded:
            raise SourceError(
                f"{found}. Check what the filters and skipped errors below let through"
            )
        self.lane.ledger.notice(
            f"repeat {self.bound.path}",
            f"{found}, nor any before; the lane ends. Fewer lanes (lanes=) give each more rows",
        )
        raise StopIteration

    def _state(self) -> State:
        return [
            self.number,
            self.read + 2 * self.yielded + 4 * self.ever_yielded,
            self.source.snapshot(),
        ]

    def _load(self, state: State) -> None:
        number, flags, source = state
        self._start(number)
        self.read, self.yielded = bool(flags & 1), bool(flags & 2)
        self.ever_yielded = bool(flags & 4)
        self.patience.count = 0
        self.source.load(source)
