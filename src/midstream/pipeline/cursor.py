"""Iterates over a node in one lane: `iterate`, and the `Cursor` that reads random-access nodes."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np

from midstream.common.plain_state import MISSING, State
from midstream.pipeline.columns import Columns
from midstream.pipeline.failures import FailedSample
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode
from midstream.pipeline.rows import I64, Item, LazyBatches, Origins, Rows, Stash, num_bytes

_MAX_CHUNK = 512  # samples
_CHUNK_BYTES = 8 << 20

_FAST_S, _SLOW_S, _LONG_S = 2e-3, 8e-3, 16e-3  # times to read one chunk, in seconds

_CHUNKS_BETWEEN_TRIALS = 64  # after a larger chunk did not pay

_HINT_CHUNKS = 8  # one prefetch hint covers so many chunks,
_HINT_SAMPLES = 1 << 16  # and no sample further ahead than this


def iterate(bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
    """Iterate over a node in one lane, for one pass.

    Returns:
        A `Cursor` for a node with random access, else the node's own iterator.
    """
    if bound.node.random_access:
        return (TrackingCursor if bound.tracking else Cursor)(bound, lane, key, pass_)
    return bound.open(lane, key, pass_)


class Cursor(Iterator):
    """Reads a random-access node forward, in chunks of positions.

    Lane l reads the blocks of ``lane.block`` positions whose number is l modulo ``lane.num_lanes``.
    Chunks grow while reading is fast and shrink when it is slow: a cheap pipeline is vectorised and
    an expensive one returns its first sample early. Between the two a larger chunk is tried from
    time to time, and kept where it makes reading a sample faster (a mix of many sources). The size
    of a chunk changes when samples are read, never which. A sample here is one output of the node:
    a batch, where the node is ``.batch``.

    State: ``[number, raised, block]``: samples of this lane delivered; errors of the next sample
        that were raised already; block size.
    Resume: reads nothing again, except the sample in progress when part of it failed.
    """

    def __init__(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        self.bound, self.lane = bound, lane
        self.keys = np.array([key], dtype=np.uint64)
        self.passes = np.array([pass_], dtype=np.int64)
        self.block = lane.block
        self.length = bound.node.length()
        # The chunk that was read: as items, as columns (no items until one is asked for), or as
        # batches that are collated when they are taken.
        self.items: list[Item] = []
        self.columns_ready: Rows | None = None
        self.lazy_batches: LazyBatches | None = None
        self.first = 0  # number, in this lane, of the chunk's first sample
        self.count = 0  # samples of the chunk
        self.taken = 0  # samples of the chunk that were delivered
        self.raised = 0  # errors of the next sample that were raised already
        self.by_column = False
        # How many samples the next chunk has. A consumer of whole blocks needs one at once.
        self.chunk = min(lane.block, _MAX_CHUNK)
        self.min_chunk = 1
        self.cost_before_shrink = 0.0  # seconds a sample
        self.cost_before_trial = 0.0  # seconds a sample; 0 when the last chunk was no trial
        self.trial_paid = False
        self.chunks_until_trial = 0
        self.prefetching = [each.node for each in bound.walk() if each.node.takes_hints]
        self.hinted = 0  # samples of this lane that prefetch hints have covered

    @property
    def number(self) -> int:
        """Samples of this lane delivered."""
        return self.first + self.taken

    def __next__(self) -> Item:
        taken, items = self.taken, self.items
        if self._loaded is None and taken < len(items):  # the hot path of every pipeline
            item = items[taken]
            if type(item[0]) is not FailedSample:
                self.taken = taken + 1
                return item
        return super().__next__()

    def _next(self) -> Item:
        if self.taken == self.count:
            self._fill()
        taken = self.taken
        if self.lazy_batches is not None:
            item = self.lazy_batches.item(taken, self.bound.trail)
        else:
            if not self.items and self.columns_ready is not None:
                self.items = self.columns_ready.items()
            item = self.items[taken]
        if type(item[0]) is FailedSample:
            return self._next_error(item[0], item[1])
        self.taken = taken + 1
        return item

    def _next_error(self, failed: FailedSample, origins: Origins) -> Item:
        """Deliver the errors of a sample one at a time, then the rest of the sample."""
        if self.raised < len(failed.errors):
            error = failed.errors[self.raised]
            self.raised += 1
            if self.raised == len(failed.errors) and failed.rest is MISSING:
                self.taken, self.raised = self.taken + 1, 0
            return FailedSample((error,)), origins
        self.taken, self.raised = self.taken + 1, 0
        return failed.rest, origins

    def _fill(self) -> None:
        """Read the next chunk."""
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
            # Read one by one: what can be read is delivered before the error is raised.
            self.chunk = 1
            self.cost_before_trial = 0.0
            rows = self._read(positions[:1])
            items = self._items(rows)
        elapsed = time.perf_counter() - start
        self.first, self.items, self.taken = first, items, 0
        self.columns_ready, self.lazy_batches = None, None
        if isinstance(rows, LazyBatches):
            self.lazy_batches, self.count, size = rows, len(rows), rows.num_bytes()
        elif items or rows.columns is None:
            self.count, size = len(items), num_bytes(items[0][0])
        else:
            self.columns_ready, self.count = rows, len(rows.origins)
            size = num_bytes(rows.columns[:1].samples()[0])
        self.lane.ledger.reads += 1
        most = min(_MAX_CHUNK, _CHUNK_BYTES // max(1, size))
        self._adapt(elapsed, elapsed / self.count, most)
        if self.prefetching:
            self._hint()

    def _positions(self, first: int, stop: int) -> I64:
        """Positions of this lane's samples ``first`` to ``stop - 1``, up to the end of the data."""
        numbers = np.arange(first, stop, dtype=np.int64)
        if self.lane.num_lanes > 1 or self.lane.index:
            blocks, inside = np.divmod(numbers, self.block)
            numbers = (blocks * self.lane.num_lanes + self.lane.index) * self.block + inside
        if self.length is not None and numbers[-1] >= self.length:
            numbers = numbers[numbers < self.length]
        return numbers

    def _hint(self) -> None:
        """Give the sources a prefetch hint: they may read on while this chunk is used."""
        after = self.first + self.count
        first = max(after, self.hinted)
        stop = min(first + _HINT_CHUNKS * self.chunk, after + _HINT_SAMPLES)
        if first < stop and any(node.wants_hints() for node in self.prefetching):
            self.hinted = stop
            # An error in samples that were not requested yet is raised when they are read.
            with contextlib.suppress(Exception):
                self.bound.hint(self._positions(first, stop), self.keys, self.passes)

    def _read(self, positions: I64) -> Rows | LazyBatches:
        return self.bound.lazy_rows(positions, self.keys, self.passes)

    def _items(self, rows: Rows | LazyBatches) -> list[Item]:
        """The samples as items; empty where they are taken as columns or as lazy batches."""
        if isinstance(rows, LazyBatches) or (self.by_column and rows.columns is not None):
            return []
        return rows.items()

    def ready_columns(self) -> tuple[Columns, I64, int] | None:
        """The current chunk as columns, for a consumer that takes many samples at once.

        Call `advance` for the samples that were taken.

        Returns:
            The chunk's columns, its origins (int64, shape [k, 5]), and the index in both of the
            first sample not delivered yet. None where samples must be taken one by one: the chunk
            has no columns, errors of a sample are being delivered, or this is the end.
        """
        self.by_column = True
        if self._loaded is not None:
            self._load(self._loaded)
            self._loaded = None
        if self.taken == self.count:
            try:
                self._fill()
            except StopIteration:
                return None
        rows = self.columns_ready
        if rows is None or rows.columns is None or self.raised:
            return None
        return rows.columns, rows.origins, self.taken

    def advance(self, number: int) -> None:
        """Record that ``number`` samples of `ready_columns` were taken."""
        self.taken += number

    def _adapt(self, elapsed: float, cost: float, most: int) -> None:
        """Choose the size of the next chunk.

        Args:
            elapsed: Seconds that the last chunk took.
            cost: Seconds that a sample of it took.
            most: The size that it may grow to, in samples.
        """
        if self.cost_before_trial:
            self.trial_paid = cost < 0.75 * self.cost_before_trial
            self.cost_before_trial = 0.0
            if not self.trial_paid:
                self.chunk, self.chunks_until_trial = self.chunk // 2, _CHUNKS_BETWEEN_TRIALS
                return
            self.min_chunk = self.chunk
        can_grow = self.chunk < most
        if elapsed < _FAST_S:
            if can_grow:
                # A run has many lanes, and the cursor of each starts small: grow fourfold where
                # that is still fast.
                factor = 4 if 4 * elapsed < _FAST_S else 2
                self.chunk = min(factor * self.chunk, most)
        elif (
            can_grow
            and not self.chunks_until_trial
            and elapsed < (_LONG_S if self.trial_paid else _SLOW_S)
        ):
            self.cost_before_trial, self.chunk = cost, min(2 * self.chunk, most)
        elif elapsed > _SLOW_S:
            self._shrink(cost)
        self.chunks_until_trial = max(0, self.chunks_until_trial - 1)

    def _shrink(self, cost: float) -> None:
        """Halve the chunk, or undo that where it made a sample slower.

        That happens where one row costs as much to read as its whole row group.
        """
        if self.cost_before_shrink and cost > 1.5 * self.cost_before_shrink:
            self.chunk = self.min_chunk = min(2 * self.chunk, _MAX_CHUNK)
            self.cost_before_shrink = 0.0
        elif self.chunk > self.min_chunk:
            self.chunk = max(self.min_chunk, self.chunk // 2)
            self.cost_before_shrink = cost

    def snapshot(self) -> State:
        """As `Iterator.snapshot`, without its cache, which the hot path of ``next()`` bypasses."""
        return self._loaded if self._loaded is not None else self._state()

    def _state(self) -> State:
        return [self.number, self.raised, self.block]

    def _load(self, state: State) -> None:
        self.first, self.raised, self.block = state
        self.items, self.columns_ready, self.lazy_batches = [], None, None
        self.taken = self.count = self.hinted = 0


class TrackingCursor(Cursor):
    """A `Cursor` over nodes that track metrics.

    The metrics of a sample are counted when it is delivered, or when it fails.
    """

    def __init__(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        super().__init__(bound, lane, key, pass_)
        self.tracking = [(each, each.node.kinds()) for each in bound.tracking]  # type: ignore[attr-defined]
        self.stashes: list[Stash] = []

    def __next__(self) -> Item:
        item = super().__next__()
        number = self.number + (self.raised > 0)
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

    def ready_columns(self) -> None:
        """None: samples are taken one by one."""
        return

    def _count(self, sample: Any, origins: Origins) -> None:
        """Count the metrics of all rows that make up a sample, also of those that failed later."""
        if self.lazy_batches is not None:
            row = sample
        else:
            row = self.items[self.taken - (self.raised == 0)][0]
        keys: list[tuple[int, ...]] = []  # of all rows that make up the sample
        if type(row) is not FailedSample or row.rest is not MISSING:
            keys = (
                [origins[:4]]
                if type(origins) is tuple
                else list(map(tuple, origins[:, :4].tolist()))
            )
        for error in row.errors if type(row) is FailedSample else ():
            if error.rows is not None:
                keys.extend(map(tuple, error.rows[:, :4].tolist()))
            elif error.origin is not None and error.outcome != "exclude":
                name, epoch, row_number, part, _ = error.origin
                keys.append((self.bound.names.index(name), epoch, row_number, part))
        for (each, kinds), stash in zip(self.tracking, self.stashes):
            found: dict[int, list[tuple[Any, ...]]] = {}
            for key in keys:
                known = stash.pop(key, None)
                if known is not None:
                    found.setdefault(known[0], []).append(known[1])
            for source, values in found.items():
                self.lane.ledger.track(each.path, source, kinds, values)
