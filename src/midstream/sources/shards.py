"""Reads streams shard by shard: independent parts of the data, each read by one lane."""

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
    """Base of the shards that a `ShardIterator` reads, by number."""

    function = ""
    """The function that reads a row, for messages."""
    continues_after_errors = False
    """Whether a shard certainly continues after a row that raised. A generator does not, and other
    iterables may wrap one.
    """
    rows_per_state = 0
    """Rows after which the state of a shard is recorded; 0 if shards have no state, so that a
    resume reads them again from their start.
    """

    def open(self, shard: int, state: State) -> Iter[Any]:
        """Start a shard: from its beginning (state None), or from a state that `state` returned."""
        raise NotImplementedError

    def state(self) -> State:
        """The state of the shard that is being read, between two rows."""
        return None


class ShardIterator(Iterator):
    """Reads a lane's shards one after the other.

    Args:
        num_shards: How many shards there are.
        stride: Each lane reads all shards and keeps its share of the rows, instead of reading its
            share of the shards.

    State: ``[shard, rows read of it, the last row that raised (-1: none), rows read up to the
        shard's last recorded state, that state]``.
    Resume: reads the rows since the shard's last recorded state again.
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
        self.shards, self.bound, self.lane, self.pass_ = shards, bound, lane, pass_
        self.num_shards, self.stride = num_shards, stride
        self.step = 1 if stride else lane.num_lanes
        self._start(0 if stride else lane.index)

    def _start(self, shard: int) -> None:
        self.shard, self.row = shard, 0
        self.state_row, self.shard_state = 0, None
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
            if (
                self.shards.rows_per_state
                and self.row - self.state_row >= self.shards.rows_per_state
            ):
                self.state_row, self.shard_state = self.row, self.shards.state()
            if trail is not None:
                trail.row(
                    self.bound.source, self.pass_, self.row * self.num_shards + self.shard, 0, 0
                )
            try:
                sample = next(self.rows)
            except StopIteration:
                if self.raised_at == self.row - 1 >= 0 and not self.shards.continues_after_errors:
                    self._raise_ended()
                self._start(self.shard + self.step)
                continue
            except SourceError:
                raise  # not of one row: the shard itself cannot be read
            except Exception as error:
                return self._failed(error)
            row = self.row
            self.row = row + 1
            self.lane.ledger.reads += 1
            if self.stride and row // self.lane.block % self.lane.num_lanes != self.lane.index:
                continue
            return sample, (self.bound.source, self.pass_, row * self.num_shards + self.shard, 0, 0)

    def _seek(self) -> None:
        """Open the shard and read it up to the current row."""
        target, last_raised = self.row, self.raised_at
        try:
            rows = self.rows = self.shards.open(self.shard, self.shard_state)
        except Exception as error:
            self.rows = None
            raise SourceError(
                f"{self.bound.path}: shard {self.shard} cannot be opened: {type(error).__name__}:"
                f" {error}"
            ) from error
        row = self.state_row
        while row < target:
            try:
                next(rows)
            except StopIteration:
                if last_raised >= 0 and not self.shards.continues_after_errors:
                    self._raise_ended()
                self.rows = None
                raise ReplayDiverged(
                    f"{self.bound.path}: shard {self.shard} ended at row {row} while rows up to"
                    f" {target} were to be read again; has the data changed since the checkpoint"
                    " was saved?"
                ) from None
            except SourceError:
                raise
            except Exception:
                self.raised_at = row  # already reported, when it was first read
            row += 1

    def _failed(self, error: Exception) -> Item:
        """A placeholder for the current row, which raised. The shard may continue after it."""
        row = self.row
        self.lane.ledger.reads += 1
        origin = (self.bound.source, self.pass_, row * self.num_shards + self.shard, 0, 0)
        self.row, self.raised_at = row + 1, row
        failure = SampleFailure(
            self.bound.path, self.bound.origin(origin), self.shards.function, error
        )
        return FailedSample((failure,)), origin

    def _raise_ended(self) -> None:
        """Raise for a shard that ended right after a row that raised: its other rows are lost."""
        row = self.raised_at
        self.rows = None
        raise SourceError(
            f"{self.bound.path}: shard {self.shard} raised at row {row} and cannot continue, so"
            " every row after it is lost (a generator ends when it raises). Catch the exception"
            " inside the iterable, or do the failing work in .map, where an error loses one"
            " sample."
        )

    def _state(self) -> State:
        return [self.shard, self.row, self.raised_at, self.state_row, self.shard_state]

    def _load(self, state: State) -> None:
        shard, row, raised_at, state_row, shard_state = state
        self._start(shard)
        self.row, self.raised_at, self.state_row, self.shard_state = (
            row,
            raised_at,
            state_row,
            shard_state,
        )
