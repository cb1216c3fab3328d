"""Streams from a callable that returns a fresh iterable: the one source that must be read again to resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Iterator as Iter
from dataclasses import dataclass
from typing import Any, Literal

from midstream.common.plain_state import State
from midstream.common.validation import require_callable, require_choice, require_int, require_name
from midstream.dataset import Dataset
from midstream.errors import ReplayDiverged, SourceError
from midstream.pipeline.failures import Failure, Hole, callable_name, describe_callable
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import Node, Place
from midstream.pipeline.rows import Item


def from_iterable(
    make_iterable: Callable[..., Iterable[Any]],
    *,
    name: str | None = None,
    num_shards: int = 1,
    split: Literal["shards", "stride"] = "shards",
) -> Dataset:
    """Make a stream of anything that can be iterated.

    Args:
        make_iterable: Returns a fresh iterable each time: called with no argument, or with the shard's number when
            ``num_shards`` is above 1.
        name: What progress, origins and errors call it.
        num_shards: Into how many independent parts the data falls. Lanes, and so workers and ranks, are at most as many.
        split: ``"shards"``: shard i feeds lane i modulo the number of lanes. ``"stride"``: every lane reads everything
            and keeps its share, which allows any number of workers and costs each of them all the reading.

    The iterable cannot be asked to seek, so resuming reads each lane's shard in progress again from its start.

    >>> import midstream as ms
    >>> list(ms.from_iterable(lambda: iter("abc"), name="letters"))
    ['a', 'b', 'c']
    """
    require_callable(make_iterable, "from_iterable")
    require_name(name, "from_iterable")
    require_int(num_shards, "num_shards", 1, "from_iterable")
    require_choice(split, "split", ("shards", "stride"), "from_iterable")
    return Dataset(FromIterable(make_iterable, name, int(num_shards), split))


@dataclass(frozen=True, eq=False, repr=False)
class FromIterable(Node):
    """Samples of a fresh iterable per shard. Row r of shard s is row ``r * num_shards + s`` of the source.

    State: ``[shard, rows read of it]``.
    Resume: the rows read of the shard in progress are read again, however many they are.
    """

    make_iterable: Callable[..., Iterable[Any]]
    name: str | None = None
    num_shards: int = 1
    split: str = "shards"
    kind = "from_iterable"
    _may_wait = True

    @property
    def random_access(self) -> bool:
        """Never."""
        return False

    @property
    def infinite(self) -> bool:
        """Not known, so taken to end."""
        return False

    def spec_fields(self) -> dict[str, State]:
        """The callable's name and how it is split."""
        return {"fn": callable_name(self.make_iterable), "num_shards": self.num_shards, "split": self.split}

    def full_lanes(self, num_lanes: int, block: int) -> tuple[int, str]:
        """One for each shard."""
        if self.split == "stride":
            return num_lanes, "every lane reads all"
        return min(num_lanes, self.num_shards), f"from_iterable has {self.num_shards} shards"

    def max_lanes(self) -> tuple[int, str] | None:
        """As many as there are shards."""
        if self.split == "stride":
            return None
        return self.num_shards, (
            f"source {self.name or self.kind!r} has {self.num_shards} shard{'s' if self.num_shards > 1 else ''}. Use fewer "
            f"workers, give from_iterable more shards (num_shards=n calls make_iterable(shard)), or split='stride', where "
            f"every lane reads all and keeps its part"
        )

    def reads_again(self) -> str:
        """See `Dataset.reads_again`."""
        return "the shard in progress, from its start"

    def _iterate(self, at: Place, lane: Lane, key: int, pass_: int) -> Iterator:
        return ShardIterator(_IterableShards(self), at, lane, pass_, self.num_shards, self.split == "stride")


class Shards:
    """What a `ShardIterator` reads: shards by number."""

    function = ""
    survives = False
    """Whether a shard certainly goes on after a row that raised. A generator does not, and what it wraps is not known."""
    every = 0
    """Rows between two states of a shard; 0 where a shard has none and is read again from its start."""

    def open(self, shard: int, state: State) -> Iter[Any]:
        """Start a shard, from its beginning (state None) or from one of its states."""
        raise NotImplementedError

    def state(self) -> State:
        """The state of the shard being read, between two rows."""
        return None


class _IterableShards(Shards):
    def __init__(self, node: FromIterable) -> None:
        self.node = node
        self.function = describe_callable(node.make_iterable)

    def open(self, shard: int, state: State) -> Iter[Any]:
        make = self.node.make_iterable
        return iter(make(shard) if self.node.num_shards > 1 else make())


class ShardIterator(Iterator):
    """Reads a lane's shards one after the other.

    State: ``[shard, rows read of it, the last row that raised, rows at the shard's own last state, that state]``.
    """

    def __init__(self, shards: Shards, at: Place, lane: Lane, pass_: int, num_shards: int, stride: bool) -> None:
        self.shards, self.at, self.lane, self.pass_, self.num_shards = shards, at, lane, pass_, num_shards
        self.stride = stride
        self.step = 1 if stride else lane.num_lanes
        self._start(0 if stride else lane.index)

    def _start(self, shard: int) -> None:
        self.shard, self.row = shard, 0
        self.safe_row, self.safe = 0, None
        self.rows: Iter[Any] | None = None
        self.raised_at = -1

    def _next(self) -> Item:
        trail = self.at.trail
        while True:
            if self.shard >= self.num_shards:
                raise StopIteration
            if self.rows is None:
                self._seek()
            assert self.rows is not None
            if self.shards.every and self.row - self.safe_row >= self.shards.every:
                self.safe_row, self.safe = self.row, self.shards.state()
            if trail is not None:
                trail.row(self.at.source, self.pass_, self.row * self.num_shards + self.shard, 0, 0)
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
            return sample, (self.at.source, self.pass_, row * self.num_shards + self.shard, 0, 0)

    def _seek(self) -> None:
        """Open the shard and read up to the row where we stand."""
        target, last_raised = self.row, self.raised_at
        try:
            rows = self.rows = self.shards.open(self.shard, self.safe)
        except Exception as error:
            self.rows = None
            raise SourceError(
                f"{self.at.path}: shard {self.shard} cannot be opened: {type(error).__name__}: {error}"
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
                    f"{self.at.path}: shard {self.shard} ended at row {row} while rows up to {target} were to be read again; "
                    f"has the data changed since the checkpoint was saved?"
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
        origin = (self.at.source, self.pass_, row * self.num_shards + self.shard, 0, 0)
        self.row, self.raised_at = row + 1, row
        failure = Failure(self.at.path, self.at.origin(origin), self.shards.function, error)
        return Hole((failure,)), origin

    def _dead(self) -> None:
        row = self.raised_at
        self.rows = None
        raise SourceError(
            f"{self.at.path}: shard {self.shard} raised at row {row} and cannot go on, so every row after it is lost (a "
            f"generator is dead once it raised). Catch the exception inside the iterable, or do the failing work in .map, "
            f"where an error loses one sample."
        )

    def _state(self) -> State:
        return [self.shard, self.row, self.raised_at, self.safe_row, self.safe]

    def _load(self, state: State) -> None:
        shard, row, raised_at, safe_row, safe = state
        self._start(shard)
        self.row, self.raised_at, self.safe_row, self.safe = row, raised_at, safe_row, safe
