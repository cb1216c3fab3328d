"""Streams that are read in shards."""

from __future__ import annotations

from collections.abc import Iterator as Iter
from typing import Any

from midstream.common.plain_state import State
from midstream.errors import ReplayDiverged, SourceError
from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode
from midstream.pipeline.rows import Item


class Shards:
    """What a `ShardIterator` reads: shards by number."""

    function = ""
    survives = False
    """Whether a shard certainly goes on after a row that raised. A generator does not, and what it
    wraps is not known.
    """
    every = 0
    """Rows between two states of a shard; 0 where a shard has none and is read again from its
    start.
    """

    def open(self, shard: int, state: State) -> Iter[Any]:
        """Start a shard, from its beginning (state None) or from one of its states."""
        raise NotImplementedError

    def state(self) -> State:
        """The state of the shard being read, between two rows."""
        return None


class ShardIterator(Iterator):
    """Reads a lane's shards one after the other.

    State: ``[shard, rows read of it, the last row that raised, rows bound the shard's own last
    state, that state]``.
    """

    def __init__(
        self,
        shards: Shards,
        bound: BoundNode,
        lane: Lane,
        pass_: int,
        num_shards: int,
        stride: bool,
    ) -> None:
        self.shards, self.bound, self.lane, self.pass_, self.num_shards = (
            shards,
            bound,
            lane,
            pass_,
            num_shards,
        )
        self.stride = stride
        self.step = 1 if stride else lane.num_lanes
        self._start(0 if stride else lane.index)

    def _start(self, shard: int) -> None:
        self.shard, self.row = shard, 0
        self.safe_row, self.safe = 0, None
        self.rows: Iter[Any] | None = None
        self.raised_at = -1

    def _next(self) -> Item:
        trail = self.bound.trail
        while True:
            if self.shard >= self.num_shards:
                raise StopIteration
            if self.rows is None:
                self._seek()
            assert self.rows is not None
            if self.shards.every and self.row - self.safe_row >= self.shards.every:
                self.safe_row, self.safe = self.row, self.shards.state()
            if trail is not None:
                trail.row(
                    self.bound.source, self.pass_, self.row * self.num_shards + self.shard, 0, 0
                )
            try:
                sample = next(self.rows)
            except StopIteration:
                if self.raised_at == self.row - 1 >= 0 and not self.shards.survives:
                    self._dead()
                self._start(self.shard + self.step)
                continue
            except SourceError:
                raise  # not of one row: what was to be read cannot be
            except Exception as error:
                return self._failed(error)
            row = self.row
            self.row = row + 1
            self.lane.ledger.reads += 1
            if self.stride and row // self.lane.block % self.lane.num_lanes != self.lane.index:
                continue
            return sample, (self.bound.source, self.pass_, row * self.num_shards + self.shard, 0, 0)

    def _seek(self) -> None:
        """Open the shard and read up to the row where we stand."""
        target, last_raised = self.row, self.raised_at
        try:
            rows = self.rows = self.shards.open(self.shard, self.safe)
        except Exception as error:
            self.rows = None
            raise SourceError(
                f"{self.bound.path}: shard {self.shard} cannot be opened: {type(error).__name__}:"
                f" {error}"
            ) from error
        row = self.safe_row
        while row < target:
            try:
                next(rows)
            except StopIteration:
                if last_raised >= 0 and not self.shards.survives:
                    self._dead()
                self.rows = None
                raise ReplayDiverged(
                    f"{self.bound.path}: shard {self.shard} ended at row {row} while rows up to"
                    f" {target} were to be read again; has the data changed since the checkpoint"
                    " was saved?"
                ) from None
            except SourceError:
                raise
            except Exception:
                self.raised_at = row  # it was reported when it was met first
            row += 1

    def _failed(self, error: Exception) -> Item:
        """Report the row; what can go on after an exception does."""
        row = self.row
        self.lane.ledger.reads += 1
        origin = (self.bound.source, self.pass_, row * self.num_shards + self.shard, 0, 0)
        self.row, self.raised_at = row + 1, row
        failure = SampleFailure(
            self.bound.path, self.bound.origin(origin), self.shards.function, error
        )
        return FailedSample((failure,)), origin

    def _dead(self) -> None:
        row = self.raised_at
        self.rows = None
        raise SourceError(
            f"{self.bound.path}: shard {self.shard} raised at row {row} and cannot go on, so every"
            " row after it is lost (a generator is dead once it raised). Catch the exception"
            " inside the iterable, or do the failing work in .map, where an error loses one"
            " sample."
        )

    def _state(self) -> State:
        return [self.shard, self.row, self.raised_at, self.safe_row, self.safe]

    def _load(self, state: State) -> None:
        shard, row, raised_at, safe_row, safe = state
        self._start(shard)
        self.row, self.raised_at, self.safe_row, self.safe = row, raised_at, safe_row, safe
