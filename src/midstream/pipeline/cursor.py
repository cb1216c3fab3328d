"""The stream face of random-access nodes: a cursor that reads chunks of positions."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np

from midstream.common.plain_state import MISSING, State
from midstream.pipeline.columns import Columns
from midstream.pipeline.failures import Excluded, FailedSample
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode
from midstream.pipeline.rows import I64, Item, LazyBatches, Origins, Rows, Stash, num_bytes

_MAX_CHUNK = 512

_CHUNK_BYTES = 8 << 20

_FAST, _SLOW, _LONG = 2e-3, 8e-3, 16e-3

_SETTLED = 64  # chunks until a larger one is tried again

_FORETOLD, _FAR = (
    8,
    1 << 16,
)  # sources are told of so many chunks at a time, and of no row further off


class Cursor(Iterator):
    """Reads a random-access dataset forward, in chunks of positions.

    Lane l reads the blocks of ``lane.block`` positions whose number is l modulo ``lane.num_lanes``.
    Chunks grow while reading is fast and shrink when it is slow, so a cheap pipeline is vectorised
    and an expensive one starts at once; in between a larger chunk is tried, and kept where it makes
    a row cheaper (a mix of many sources). That changes when rows are read, never which.

    State: ``[at, told, block]``: rows of this lane delivered; errors of the next row already
        raised; block size.
    Resume: nothing is read again but the row in progress when part of it failed.
    """

    def __init__(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        self.bound, self.lane = bound, lane
        self.keys = np.array([key], dtype=np.uint64)
        self.passes = np.array([pass_], dtype=np.int64)
        self.block = lane.block
        self.length = bound.node.length()
        self.first = 0  # number, in this lane, of the first item read ahead
        self.items: list[Item] = []
        self.ahead: Rows | None = (
            None  # the same, where they are taken by column; then no items until one is asked for
        )
        self.later: LazyBatches | None = None  # the same, where each is made when it is taken
        self.count = 0  # how many are read ahead
        self.by_block = False
        self.at = 0
        self.told = 0
        self.floor, self.cost = 1, 0.0
        self.tried, self.paid, self.settled = (
            0.0,
            False,
            0,
        )  # cost of a row before the chunk was doubled; did that pay?
        self.chunk = min(
            lane.block, _MAX_CHUNK
        )  # what takes rows by blocks needs a whole one at once
        self.sources = [each.node for each in bound.walk() if each.node.reads_ahead]
        self.foretold = 0  # up to which row of this lane

    @property
    def number(self) -> int:
        """Rows of this lane delivered."""
        return self.first + self.at

    def __next__(self) -> Item:
        at, items = self.at, self.items
        if self._loaded is None and at < len(items):  # the hot path of every pipeline
            item = items[at]
            if type(item[0]) is not FailedSample:
                self.at = at + 1
                return item
        return super().__next__()

    def _next(self) -> Item:
        if self.at == self.count:
            self._fill()
        at = self.at
        if self.later is not None:
            item = self.later.item(at, self.bound.trail)
        else:
            if not self.items and self.ahead is not None:
                self.items = self.ahead.items()
            item = self.items[at]
        if type(item[0]) is FailedSample:
            return self._hole(item[0], item[1])
        self.at = at + 1
        return item

    def _hole(self, hole: FailedSample, origins: Origins) -> Item:
        """One failure at a time, then what is left of the sample."""
        if self.told < len(hole.errors):
            error = hole.errors[self.told]
            self.told += 1
            if self.told == len(hole.errors) and hole.rest is MISSING:
                self.at, self.told = self.at + 1, 0
            return FailedSample((error,)), origins
        self.at, self.told = self.at + 1, 0
        return hole.rest, origins

    def _fill(self) -> None:
        first = self.first + self.count
        positions = self._positions(first, first + self.chunk)
        if not positions.size:
            raise StopIteration
        start = time.perf_counter()
        try:
            rows = self._read(positions)
            items = self._items(rows)
        except Exception:
            if len(positions) == 1:
                raise
            self.chunk = 1  # what can still be read comes first; then the error meets whoever asks for its row
            self.tried = 0.0
            rows = self._read(positions[:1])
            items = self._items(rows)
        elapsed = time.perf_counter() - start
        self.first, self.items, self.at = first, items, 0
        self.ahead, self.later = None, None
        if isinstance(rows, LazyBatches):
            self.later, self.count, size = rows, len(rows), rows.num_bytes()
        elif items or rows.columns is None:
            self.count, size = len(items), num_bytes(items[0][0])
        else:
            self.ahead, self.count, size = (
                rows,
                len(rows.origins),
                num_bytes(rows.columns[:1].samples()[0]),
            )
        self.lane.ledger.reads += 1
        most = min(_MAX_CHUNK, _CHUNK_BYTES // max(1, size))
        self._adapt(elapsed, elapsed / self.count, most)
        if self.sources:
            self._hint()

    def _positions(self, first: int, stop: int) -> I64:
        """Positions of the rows of this lane with these numbers, up to the end of the data."""
        numbers = np.arange(first, stop, dtype=np.int64)
        if self.lane.num_lanes > 1 or self.lane.index:
            blocks, inside = np.divmod(numbers, self.block)
            numbers = (blocks * self.lane.num_lanes + self.lane.index) * self.block + inside
        if self.length is not None and numbers[-1] >= self.length:
            numbers = numbers[numbers < self.length]
        return numbers

    def _hint(self) -> None:
        """While the consumer has the rows just read, sources that want to may read those that
        follow.
        """
        after = self.first + self.count
        first = max(after, self.foretold)
        stop = min(first + _FORETOLD * self.chunk, after + _FAR)
        if first < stop and any(node.wants_more() for node in self.sources):
            self.foretold = stop
            # Whatever is wrong with rows that nobody has asked for is told with them.
            with contextlib.suppress(Exception):
                self.bound.hint(self._positions(first, stop), self.keys, self.passes)

    def _read(self, positions: I64) -> Rows | LazyBatches:
        return self.bound.lazy_rows(positions, self.keys, self.passes)

    def _items(self, rows: Rows | LazyBatches) -> list[Item]:
        """Samples that were made one by one."""
        return (
            []
            if isinstance(rows, LazyBatches) or (self.by_block and rows.columns is not None)
            else rows.items()
        )

    def ahead_by_column(self) -> tuple[Columns, I64, int] | None:
        """What was read together, as columns, with its origins, and the number of the first that is still ahead; call
        `pass_by` for what was taken.

        None where samples must be taken one by one: there are no columns, a failure is being told,
        or this is the end.
        """
        self.by_block = True
        if self._loaded is not None:
            self._load(self._loaded)
            self._loaded = None
        if self.at == self.count:
            try:
                self._fill()
            except StopIteration:
                return None
        rows = self.ahead
        if rows is None or rows.columns is None or self.told:
            return None
        return rows.columns, rows.origins, self.at

    def pass_by(self, number: int) -> None:
        """So many samples of `ahead_by_column` were taken."""
        self.at += number

    def _adapt(self, elapsed: float, cost: float, most: int) -> None:
        """Choose the size of the next chunk, ``most`` rows if it grows; ``cost`` is of a row, both
        in seconds.
        """
        if self.tried:
            self.paid, self.tried = cost < 0.75 * self.tried, 0.0
            if not self.paid:
                self.chunk, self.settled = self.chunk // 2, _SETTLED
                return
            self.floor = self.chunk
        room = self.chunk < most
        if elapsed < _FAST:
            # A run has many lanes, each with a cursor that begins small: four times where that is
            # fast enough too.
            self.chunk = (
                min((4 if 4 * elapsed < _FAST else 2) * self.chunk, most) if room else self.chunk
            )
        elif room and not self.settled and elapsed < (_LONG if self.paid else _SLOW):
            self.tried, self.chunk = cost, min(2 * self.chunk, most)
        elif elapsed > _SLOW:
            self._shrink(cost)
        self.settled = max(0, self.settled - 1)

    def _shrink(self, cost: float) -> None:
        """Read less at a time, unless that made a row dearer (where one row costs a whole row
        group, say).
        """
        if self.cost and cost > 1.5 * self.cost:
            self.chunk = self.floor = min(2 * self.chunk, _MAX_CHUNK)
            self.cost = 0.0
        elif self.chunk > self.floor:
            self.chunk, self.cost = max(self.floor, self.chunk // 2), cost

    def snapshot(self) -> State:
        """As ever, but made anew each time: the way around `Iterator.__next__` does not forget it."""
        return self._loaded if self._loaded is not None else self._state()

    def _state(self) -> State:
        return [self.number, self.told, self.block]

    def _load(self, state: State) -> None:
        self.first, self.told, self.block = state
        self.items, self.at, self.ahead, self.later, self.count = [], 0, None, None, 0
        self.foretold = 0


class TrackingCursor(Cursor):
    """A `Cursor` over nodes that track metrics: what they tracked of a row counts when the row is
    handed out, or fails.
    """

    def __init__(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        super().__init__(bound, lane, key, pass_)
        self.tracking = [(each, each.node.kinds()) for each in bound.tracking]  # type: ignore[attr-defined]
        self.stashes: list[Stash] = []

    def __next__(self) -> Item:
        item = super().__next__()
        number = self.number + (self.told > 0)
        if self.lane.ledger.first_time(self.bound.path, int(self.passes[0]), number):
            self._count(*item)
        return item

    def _fill(self) -> None:
        super()._fill()
        self.stashes = [each.stash or {} for each, _ in self.tracking]
        for each, _ in self.tracking:
            each.stash = None

    def _read(self, positions: I64) -> Rows | LazyBatches:
        for each, _ in self.tracking:
            each.stash = {}
        return super()._read(positions)

    def ahead_by_column(self) -> None:
        """Samples are taken one by one."""
        return

    def _count(self, sample: Any, origins: Origins) -> None:
        """Count what was tracked of a row: of all that it is made of, whether it failed later on or
        not.
        """
        row = sample if self.later is not None else self.items[self.at - (self.told == 0)][0]
        whole: list[tuple[int, ...]] = []
        if type(row) is not FailedSample or row.rest is not MISSING:
            whole = (
                [origins[:4]]
                if type(origins) is tuple
                else list(map(tuple, origins[:, :4].tolist()))
            )
        for error in row.errors if type(row) is FailedSample else ():
            if error.rows is not None:
                whole.extend(map(tuple, error.rows[:, :4].tolist()))
            elif error.origin is not None and type(error) is not Excluded:
                name, epoch, row_number, part, _ = error.origin
                whole.append((self.bound.names.index(name), epoch, row_number, part))
        for (each, kinds), stash in zip(self.tracking, self.stashes):
            found: dict[int, list[tuple[Any, ...]]] = {}
            for key in whole:
                known = stash.pop(key, None)
                if known is not None:
                    found.setdefault(known[0], []).append(known[1])
            for source, values in found.items():
                self.lane.ledger.track(each.path, source, kinds, values)


def iterate(bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
    """The stream face of a node: a `Cursor` where it has random access, its own iterator elsewhere."""
    if bound.node.random_access:
        return (TrackingCursor if bound.tracking else Cursor)(bound, lane, key, pass_)
    return bound.open(lane, key, pass_)
