"""Iterator, Lane and SafePoint: reading one lane of a stream."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

from midstream.common.plain_state import State, copy_plain
from midstream.errors import CheckpointError, MidstreamError, ReplayDiverged
from midstream.pipeline.ledger import Ledger
from midstream.pipeline.rows import Item


@dataclasses.dataclass(frozen=True)
class Lane:
    """One of the logical sub-streams into which a run is divided.

    Attributes:
        index: Number of the lane, from 0.
        num_lanes: How many there are.
        block: How many consecutive positions of a random-access input belong to one lane (the batch
            size).
        ledger: Counts what the lane drops.
        dealt: The batch size by which this epoch's rows were divided among the lanes, where the
            pipeline has another one by now; else 0.
        edits: Changed weights of mixes (`midstream.nodes.mix.weight_changes.LaneEdits`), or None.
    """

    index: int
    num_lanes: int
    block: int
    ledger: Ledger
    dealt: int = 0
    edits: Any = None

    def widen(self, factor: int) -> Lane:
        """The lane as seen below a node that takes ``factor`` inputs for one output."""
        return dataclasses.replace(self, block=self.block * (self.dealt or factor), dealt=0)

    def share(self, count: int) -> int:
        """This lane's share of ``count`` samples."""
        return count // self.num_lanes + (self.index < count % self.num_lanes)


class _Loading(threading.local):
    depth = 0


_loading = _Loading()


def replaying() -> bool:
    """Whether an iterator of this thread is loading a state, so that samples are read again."""
    return _loading.depth > 0


class Iterator:
    """Iterates over a node in one lane; its state is plain values.

    A subclass implements three methods. ``_next`` returns the next item or raises StopIteration;
    after the end it raises it again. ``_state`` returns plain values, which need not be copies.
    ``_load`` takes such a state, whatever was read before.

    A loaded state is applied by the first ``next()``. So loading costs nothing, and
    ``state_dict()`` after it returns the state that was loaded.
    """

    _loaded: State = None  # a state that the next ``next()`` applies
    # The state, cached until ``next()``: between two states of a mix, most inputs are not read.
    _known: State = None

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Item:
        self._known = None
        if self._loaded is not None:
            _loading.depth += 1
            try:
                self._load(self._loaded)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                if isinstance(error, MidstreamError):
                    raise
                raise CheckpointError(
                    f"{type(self).__name__.strip('_')} cannot take this state"
                    f" ({type(error).__name__}: {error}): {self._loaded!r:.200}"
                ) from error
            finally:
                _loading.depth -= 1
            self._loaded = None
        return self._next()

    def state_dict(self) -> State:
        """The state, as fresh plain values. Legal at any time."""
        return copy_plain(self.snapshot())

    def load_state_dict(self, state: State) -> None:
        """Continue from ``state`` with the next ``next()``."""
        self.load(copy_plain(state))

    def snapshot(self) -> State:
        """`state_dict` without the copy, for a caller that encodes it at once or never changes
        it.
        """
        if self._loaded is not None:
            return self._loaded
        if self._known is None:
            self._known = self._state()
        return self._known

    def load(self, state: State) -> None:
        """`load_state_dict` without the copy."""
        self._loaded, self._known = state, None

    def _next(self) -> Item:
        raise NotImplementedError

    def _state(self) -> State:
        raise NotImplementedError

    def _load(self, state: State) -> None:
        raise NotImplementedError


class OneToOneIterator(Iterator):
    """Base of iterators that give one sample for each of their input's and hold none back.

    A subclass implements ``_next``. The state is the input's state.
    """

    def __init__(self, source: Iterator) -> None:
        self.source = source

    def _state(self) -> State:
        return self.source.snapshot()

    def _load(self, state: State) -> None:
        self.source.load(state)


_NO_GRID = 1 << 62
"""Stands for ``every=None``: no run reads so many inputs."""


class SafePoint:
    """An input with a state to go back to, taken before the oldest sample that the node holds.

    That state is the safe point. A resume loads it and reads the held samples again. There are two
    ways to choose it:

    - ``every=k``: at input numbers that are multiples of k, because the state of a long pipeline
      costs more to take than a sample. The state at a position then does not depend on where the
      run was resumed.
    - ``every=None``: where the node calls `move`, because it holds nothing there.

    Attributes:
        number: Inputs taken so far.
        state: State of the input at the safe point.
        state_at: Number of inputs taken before the safe point; -1 while none was chosen.
    """

    __slots__ = ("every", "number", "path", "state", "state_at", "upstream")

    def __init__(self, upstream: Iterator, path: str, every: int | None = None) -> None:
        self.upstream, self.path = upstream, path
        self.every = _NO_GRID if every is None else every
        self.number = 0
        self.state: State = None
        self.state_at = -1

    def next(self) -> Item:
        """Return the next input."""
        if self.state_at < 0 or self.number % self.every == 0:
            self._choose()
        item = next(self.upstream)
        self.number += 1
        return item

    @property
    def since(self) -> int:
        """Inputs taken since the safe point: as many are read again on resume."""
        return 0 if self.state_at < 0 else self.number - self.state_at

    def move(self) -> None:
        """Make the point before the next input the safe point. Its state is taken when needed."""
        self.state, self.state_at = None, -1

    def snapshot(self) -> list[State]:
        """``[number of inputs taken, inputs since the safe point, its state]``."""
        if self.state_at < 0 or self.number % self.every == 0:
            self._choose()
        return [self.number, self.number - self.state_at, self.state]

    def _choose(self) -> None:
        """Make the point before the next input the safe point, and take its state."""
        if self.state_at != self.number:
            self.state, self.state_at = self.upstream.snapshot(), self.number

    def before(self) -> list[State]:
        """The snapshot as it was before the last input."""
        return [self.number - 1, self.number - 1 - self.state_at, self.state]

    def load(self, state: list[State]) -> list[Item]:
        """Go back to the safe point of a snapshot and read forward to where it was taken.

        Returns:
            The inputs since the safe point.

        Raises:
            ReplayDiverged: If there are fewer inputs than there were.
        """
        self.number, since, self.state = state
        self.state_at = self.number - since
        self.upstream.load(self.state)
        return read_again(self.upstream, since, self.path)


def read_again(source: Iterator, count: int, path: str) -> list[Item]:
    """Read ``count`` items that were read before the checkpoint was saved.

    Args:
        source: Where to read, from the state before those items.
        count: How many.
        path: Path of the node that held them, for the error.

    Raises:
        ReplayDiverged: If ``source`` ends before that.
    """
    items: list[Item] = []
    for _ in range(count):
        try:
            items.append(next(source))
        except StopIteration:
            raise ReplayDiverged(
                f"{path}: {count:,} samples of its input were to be read again, and there are only"
                f" {len(items):,}; has the data changed since the checkpoint was saved?"
            ) from None
    return items
