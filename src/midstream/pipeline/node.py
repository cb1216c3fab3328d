"""Descriptions, their places in a tree, and what runs them.

    Node    a frozen description: a node with its inputs. Opens nothing until it is read.
    Place      a node at its place in one tree: path, salt, inputs. Made by `bind` when a tree is about to run.
    Rows       what the random-access face returns for an array of positions.
    Later      the same, where each sample is made when it is taken: batches.
    Iterator   the stream face, running in one lane. All state in fields, none in a generator's frame.
    Cursor     the one Iterator of every random-access dataset: reads chunks of positions ahead.
    Run        ``iter(dataset)``: one lane without a loader; what a bare StatefulDataLoader drives too.

A node implements ``inputs``, ``random_access``, ``length`` and then ``_rows`` (random access) or ``_iterate`` (stream).
What flows between nodes is a pair ``(sample, origins)``. A sample that user code failed on travels in band, as a `Hole`
in its place, so no exception ever crosses a node and no buffer is left half filled.

This file is the longest in the package: both faces, and every rule that all nodes share, read here top to bottom.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import dill
import numpy as np
import numpy.typing as npt

from midstream.common.plain_state import FORMAT, MISSING, State, copy_plain, fingerprint
from midstream.common.randomness import fold, salt
from midstream.errors import CheckpointError, MidstreamError, Origin, ReplayDiverged, TooManyErrors
from midstream.pipeline.breadcrumbs import Trail
from midstream.pipeline.columns import Columns
from midstream.pipeline.failures import Excluded, Failure, Hole, Ledger, Windows, add_counts, check_limits

__all__ = [
    "FORMAT",
    "I64",
    "PARTS",
    "U64",
    "Cursor",
    "Delivery",
    "Item",
    "Iterator",
    "Lane",
    "Later",
    "Node",
    "OnError",
    "Origins",
    "Part",
    "Place",
    "Rows",
    "Run",
    "SafePoint",
    "as_origin_array",
    "bind",
    "epoch_key",
    "join_origins",
    "pick",
    "replaying",
    "require_dataset",
    "require_epochs",
    "require_passes",
]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Origins = Any
"""Origins of one sample: a tuple (source, pass, row, part, tokens), or an int64 array [m, 5] for a sample made of several.

``tokens`` is 0 until a node that knows (pack) sets it; the other four alone say which row it is, and key every draw.
"""
PARTS = 1 << 20
"""Parts of a part are numbered in one integer: ``part * PARTS + number``."""
Item = tuple[Any, Origins]
Stash = dict[tuple[int, ...], tuple[int, tuple[Any, ...]]]
"""By the first four numbers of a sample's first origin: its source (-1: several), and a value of each metric."""
OnError = Literal["raise", "skip", "refill"]


# ---------------------------------------------------------------------------------------------------------------------
# The random-access face
# ---------------------------------------------------------------------------------------------------------------------


class Rows:
    """The samples at an array of positions.

    Attributes:
        origins: int64, shape [m, 5]: source index, pass, row, part, tokens.
        sizes: Origins per sample, int64 of shape [k], or None when every sample has exactly one.
        columns: The samples as a table gives them, where they still are so; no sample is a `Hole` then.
    """

    __slots__ = ("_samples", "columns", "origins", "sizes")

    def __init__(
        self, samples: list[Any] | None, origins: I64, sizes: I64 | None = None, columns: Columns | None = None
    ) -> None:
        self._samples, self.origins, self.sizes, self.columns = samples, origins, sizes, columns

    @property
    def samples(self) -> list[Any]:
        """One per position; a `Hole` where user code failed. Dicts are made of columns when first asked for."""
        if self._samples is None:
            assert self.columns is not None
            self._samples = self.columns.samples()
        return self._samples

    def items(self) -> list[Item]:
        """The samples, each with its origins, as streams pass them on."""
        if self.sizes is None:
            return list(zip(self.samples, map(tuple, self.origins.tolist())))
        ends = np.cumsum(self.sizes).tolist()
        starts = [0, *ends[:-1]]
        return [(sample, self.origins[a:b]) for sample, a, b in zip(self.samples, starts, ends)]

    @staticmethod
    def scatter(length: int, parts: Sequence[tuple[I64, Rows]]) -> Rows:
        """Put the rows of several inputs in their places.

        Args:
            length: Number of samples in all.
            parts: For each input the places (int64, shape [j]) and its rows.
        """
        if all(rows.sizes is None for _, rows in parts):
            if len(parts) == 1 and parts[0][0].size == length:
                return parts[0][1]  # the places of an only part are 0, 1, 2, ...
            origins = np.empty((length, 5), dtype=np.int64)
            for places, rows in parts:
                origins[places] = rows.origins
            tables = [rows.columns for _, rows in parts if rows.columns is not None]
            if len(tables) == len(parts) > 0:
                order = np.empty(length, dtype=np.int64)
                order[np.concatenate([places for places, _ in parts])] = np.arange(length)
                if (columns := Columns.join(tables, order)) is not None:
                    return Rows(None, origins, None, columns)
            samples: list[Any] = [None] * length
            for places, rows in parts:
                for place, sample in zip(places.tolist(), rows.samples):
                    samples[place] = sample
            return Rows(samples, origins)
        samples = [None] * length
        pieces: list[I64] = [np.empty((0, 5), dtype=np.int64)] * length
        for places, rows in parts:
            for place, (sample, origin) in zip(places.tolist(), rows.items()):
                samples[place] = sample
                pieces[place] = as_origin_array(origin)
        sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
        return Rows(samples, np.concatenate(pieces) if pieces else np.empty((0, 5), dtype=np.int64), sizes)


class Part(NamedTuple):
    """Positions of an input that make up (a part of) what is asked of a node.

    Attributes:
        place: The input.
        positions: Its positions, int64, shape [j].
        keys: uint64, shape [1] or [j]: see `Node._rows`.
        passes: int64, shape [1] or [j].
        here: Their places in what was asked for, int64, shape [j]; None where they are all of it, in order.
    """

    place: Place
    positions: I64
    keys: U64
    passes: I64
    here: I64 | None = None

    def rows(self) -> Rows:
        """The samples there."""
        return self.place.rows(self.positions, self.keys, self.passes)


class Later:
    """Samples that are made when their turn comes, each of some rows of those that were read together.

    Many batches made ahead would be memory that is touched for the first time, again and again, and cold when it is used.

    Attributes:
        rows: The rows.
        bounds: Sample i is made of the rows from ``bounds[i]`` to ``bounds[i + 1]``.
        make: Makes the sample of the rows from here to there; a `Hole` where user code failed.
    """

    __slots__ = ("bounds", "make", "rows")

    def __init__(self, rows: Rows, bounds: list[int], make: Callable[[int, int], Any]) -> None:
        self.rows, self.bounds, self.make = rows, bounds, make

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def origins(self) -> I64:
        """Of all rows."""
        return self.rows.origins

    def item(self, index: int, trail: Trail | None) -> Item:
        """A sample with its origins; there are none of one that is lost."""
        first, last = self.bounds[index], self.bounds[index + 1]
        origins = self.origins[first:last]
        if trail is not None:
            trail.rows(origins)
        sample = self.make(first, last)
        if type(sample) is not Hole:
            return sample, origins
        sample.errors[0].rows = origins
        return sample, origins[:0]

    def num_bytes(self) -> int:
        """Roughly how much is held for one sample."""
        rows = self.rows
        one = rows.samples[0] if rows.columns is None else rows.columns[:1].samples()[0]
        return num_bytes(one) * self.bounds[1]


def as_origin_array(origins: Origins) -> I64:
    """Origins of one sample as int64 of shape [m, 5]."""
    if type(origins) is tuple:
        return np.array([origins], dtype=np.int64)
    return origins  # type: ignore[no-any-return]


def join_origins(items: Sequence[Item]) -> I64:
    """Origins of several samples as one int64 array of shape [m, 5]."""
    if all(type(origin) is tuple for _, origin in items):
        return np.array([origin for _, origin in items], dtype=np.int64).reshape(-1, 5)
    return np.concatenate([as_origin_array(origin) for _, origin in items])


def pick(values: npt.NDArray[Any], index: I64) -> npt.NDArray[Any]:
    """``values[index]`` of an array that holds one value per position, or one for all (shape [1])."""
    return values if values.size == 1 else values[index]


def epoch_key(epoch: int) -> U64:
    """The seed key of an outer epoch: where every chain of passes starts. uint64, shape [1]."""
    return np.array([fold(epoch) if epoch else 0], dtype=np.uint64)


# ---------------------------------------------------------------------------------------------------------------------
# Places: a tree that is about to run
# ---------------------------------------------------------------------------------------------------------------------


class Place:
    """A node at its place in a tree.

    Attributes:
        node: The description.
        path: Unique in the tree, like ``web/shuffle``; the prefix is the names chosen in interleave and concatenate.
        salt: 64 bits that depend on the path alone: two shuffles of one seed differ.
        inputs: Places of the inputs, by name; the key of a single input is the empty string.
        source: Index in ``names`` of a source, -1 for other nodes.
        names: The names of all sources in the tree, shared by all its places.
        trail: In a worker: where it writes what it has in hand.
        stash: Where a node leaves what it tracked of the rows that are read, by origin; None while nobody takes it.
    """

    __slots__ = ("_tracking", "inputs", "names", "node", "path", "salt", "source", "stash", "trail")

    def __init__(self, node: Node, path: str, names: list[str]) -> None:
        self.node, self.path, self.names = node, path, names
        self.salt = salt(path)
        self.inputs: dict[str, Place] = {}
        self.source = -1
        self.trail: Trail | None = None
        self.stash: Stash | None = None
        self._tracking: list[Place] | None = None

    @property
    def input(self) -> Place:
        """The place of the only input."""
        return self.inputs[""]

    def rows(self, positions: I64, keys: U64, passes: I64) -> Rows:
        """The random-access face. See `Node._rows`."""
        rows = self.node._rows(self, positions, keys, passes)
        if self.trail is not None:
            self.trail.passed_on(rows.origins)
        return rows

    def foretell(self, positions: I64, keys: U64, passes: I64) -> None:
        """Tell the sources below, where they want to know, that these positions are read next. Only a hint."""
        if self.node._reads_ahead:
            self.node._foretell(positions)
        for part in self.node._below(self, positions, keys, passes) or ():
            part.place.foretell(part.positions, part.keys, part.passes)

    def later(self, positions: I64, keys: U64, passes: I64) -> Rows | Later:
        """The same, for a reader that takes samples in their order. See `Node._later`."""
        rows = self.node._later(self, positions, keys, passes)
        if rows is None:
            return self.rows(positions, keys, passes)
        if self.trail is not None:
            self.trail.passed_on(rows.origins)
        return rows

    def iterate(self, lane: Lane, key: int, pass_: int) -> Iterator:
        """The stream face: a `Cursor` where there is random access."""
        if self.node.random_access:
            return (TrackingCursor if self.tracking else Cursor)(self, lane, key, pass_)
        return self.node._iterate(self, lane, key, pass_)

    @property
    def tracking(self) -> list[Place]:
        """The places from here down that track metrics."""
        if self._tracking is None:
            self._tracking = [place for place in self.walk() if place.node.tracks]
        return self._tracking

    def origin(self, origin: Sequence[int]) -> Origin:
        """Five integers with the source's name in place of its index."""
        return Origin(self.names[origin[0]], *map(int, origin[1:]))

    def walk(self) -> Iterable[Place]:
        """This place and all below it, top down."""
        yield self
        for child in self.inputs.values():
            yield from child.walk()


def bind(root: Node) -> Place:
    """Give every node of a tree its place.

    Raises:
        ValueError: If two sources have the same name.
    """
    names: list[str] = []
    where: dict[str, str] = {}

    def build(node: Node, prefix: tuple[str, ...]) -> Place:
        chain = [node]
        while list(chain[-1].inputs()) == [""]:
            chain.append(chain[-1].inputs()[""])
        below: Place | None = None
        seen: dict[str, int] = {}
        for item in reversed(chain):
            label = item.label
            seen[label] = seen.get(label, 0) + 1
            if seen[label] > 1:
                label = f"{label}#{seen[label]}"
            place = Place(item, "/".join((*prefix, label)), names)
            if below is not None:
                place.inputs[""] = below
            elif inputs := item.inputs():
                place.inputs = dict.fromkeys(inputs, place)
                for key in sorted(inputs):  # sources are numbered by name, not by the order of a dict literal
                    place.inputs[key] = build(inputs[key], (*prefix, key))
            else:
                name = getattr(item, "name", None) or "/".join(prefix) or "data"
                if name in where:
                    raise ValueError(
                        f"two sources are named {name!r}: one at {where[name]!r}, one at {place.path!r}. Progress and "
                        f"origins are told by name, so give each source its own name=..."
                    )
                where[name] = place.path
                place.source = len(names)
                names.append(name)
            below = place
        assert below is not None
        return below

    return build(root, ())


# ---------------------------------------------------------------------------------------------------------------------
# The stream face
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lane:
    """One of the logical sub-streams into which a run is divided.

    Attributes:
        index: Number of the lane, from 0.
        num_lanes: How many there are.
        block: How many consecutive positions of a random-access input belong to one lane (the batch size).
        ledger: Where the lane counts what it drops.
        dealt: The batch size by which this epoch's rows were dealt to lanes, where the pipeline has another one by now.
        edits: Weights of mixes that were changed on the way (`midstream.nodes.mix.picks.LaneEdits`), or None.
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
        """How many of ``count`` things are this lane's."""
        return count // self.num_lanes + (self.index < count % self.num_lanes)


class _Loading(threading.local):
    depth = 0


_loading = _Loading()


def replaying() -> bool:
    """Whether what is read now was read before: some iterator of this thread is taking a state."""
    return _loading.depth > 0


class Iterator:
    """The running form of a dataset in one lane.

    A subclass implements ``_next`` (return the next item or raise StopIteration, again and again once it ended),
    ``_state`` (plain values; it may share them, the base class copies) and ``_load`` (take such a state, whatever the
    iterator did before). A loaded state is applied by the first ``next()``, so loading costs nothing and
    ``state_dict()`` after it returns what was loaded.
    """

    _loaded: State = None
    _known: State = None  # the state, since it was last asked for: of hundreds of inputs of a mix, one moves at a time

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
                    f"{type(self).__name__.strip('_')} cannot take this state ({type(error).__name__}: {error}): "
                    f"{self._loaded!r:.200}"
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
        """`state_dict` without the copy: for a caller that encodes it at once or keeps it unchanged."""
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


_MAX_CHUNK = 512
_CHUNK_BYTES = 8 << 20
_FAST, _SLOW, _LONG = 2e-3, 8e-3, 16e-3
_SETTLED = 64  # chunks until a larger one is tried again
_FORETOLD, _FAR = 8, 1 << 16  # sources are told of so many chunks at a time, and of no row further off


class Cursor(Iterator):
    """Reads a random-access dataset forward, in chunks of positions.

    Lane l reads the blocks of ``lane.block`` positions whose number is l modulo ``lane.num_lanes``. Chunks grow while
    reading is fast and shrink when it is slow, so a cheap pipeline is vectorised and an expensive one starts at once; in
    between a larger chunk is tried, and kept where it makes a row cheaper (a mix of many sources). That changes when rows
    are read, never which.

    State: ``[at, told, block]``: rows of this lane delivered; errors of the next row already raised; block size.
    Resume: nothing is read again but the row in progress when part of it failed.
    """

    def __init__(self, place: Place, lane: Lane, key: int, pass_: int) -> None:
        self.place, self.lane = place, lane
        self.keys = np.array([key], dtype=np.uint64)
        self.passes = np.array([pass_], dtype=np.int64)
        self.block = lane.block
        self.length = place.node.length()
        self.first = 0  # number, in this lane, of the first item read ahead
        self.items: list[Item] = []
        self.ahead: Rows | None = None  # the same, where they are taken by column; then no items until one is asked for
        self.later: Later | None = None  # the same, where each is made when it is taken
        self.count = 0  # how many are read ahead
        self.by_block = False
        self.at = 0
        self.told = 0
        self.floor, self.cost = 1, 0.0
        self.tried, self.paid, self.settled = 0.0, False, 0  # cost of a row before the chunk was doubled; did that pay?
        self.chunk = min(lane.block, _MAX_CHUNK)  # what takes rows by blocks needs a whole one at once
        self.sources = [each.node for each in place.walk() if each.node._reads_ahead]
        self.foretold = 0  # up to which row of this lane

    @property
    def number(self) -> int:
        """Rows of this lane delivered."""
        return self.first + self.at

    def __next__(self) -> Item:
        at, items = self.at, self.items
        if self._loaded is None and at < len(items):  # the hot path of every pipeline
            item = items[at]
            if type(item[0]) is not Hole:
                self.at = at + 1
                return item
        return super().__next__()

    def _next(self) -> Item:
        if self.at == self.count:
            self._fill()
        at = self.at
        if self.later is not None:
            item = self.later.item(at, self.place.trail)
        else:
            if not self.items and self.ahead is not None:
                self.items = self.ahead.items()
            item = self.items[at]
        if type(item[0]) is Hole:
            return self._hole(item[0], item[1])
        self.at = at + 1
        return item

    def _hole(self, hole: Hole, origins: Origins) -> Item:
        """One failure at a time, then what is left of the sample."""
        if self.told < len(hole.errors):
            error = hole.errors[self.told]
            self.told += 1
            if self.told == len(hole.errors) and hole.rest is MISSING:
                self.at, self.told = self.at + 1, 0
            return Hole((error,)), origins
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
        if isinstance(rows, Later):
            self.later, self.count, size = rows, len(rows), rows.num_bytes()
        elif items or rows.columns is None:
            self.count, size = len(items), num_bytes(items[0][0])
        else:
            self.ahead, self.count, size = rows, len(rows.origins), num_bytes(rows.columns[:1].samples()[0])
        self.lane.ledger.reads += 1
        most = min(_MAX_CHUNK, _CHUNK_BYTES // max(1, size))
        self._adapt(elapsed, elapsed / self.count, most)
        if self.sources:
            self._foretell()

    def _positions(self, first: int, stop: int) -> I64:
        """Positions of the rows of this lane with these numbers, up to the end of the data."""
        numbers = np.arange(first, stop, dtype=np.int64)
        if self.lane.num_lanes > 1 or self.lane.index:
            blocks, inside = np.divmod(numbers, self.block)
            numbers = (blocks * self.lane.num_lanes + self.lane.index) * self.block + inside
        if self.length is not None and numbers[-1] >= self.length:
            numbers = numbers[numbers < self.length]
        return numbers

    def _foretell(self) -> None:
        """While the consumer has the rows just read, sources that want to may read those that follow."""
        after = self.first + self.count
        first = max(after, self.foretold)
        stop = min(first + _FORETOLD * self.chunk, after + _FAR)
        if first < stop and any(node._wants_more() for node in self.sources):
            self.foretold = stop
            # Whatever is wrong with rows that nobody has asked for is told with them.
            with contextlib.suppress(Exception):
                self.place.foretell(self._positions(first, stop), self.keys, self.passes)

    def _read(self, positions: I64) -> Rows | Later:
        return self.place.later(positions, self.keys, self.passes)

    def _items(self, rows: Rows | Later) -> list[Item]:
        """Samples that were made one by one."""
        return [] if isinstance(rows, Later) or (self.by_block and rows.columns is not None) else rows.items()

    def ahead_by_column(self) -> tuple[Columns, I64, int] | None:
        """What was read together, as columns, with its origins, and the number of the first that is still ahead; call
        `pass_by` for what was taken.

        None where samples must be taken one by one: there are no columns, a failure is being told, or this is the end.
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
        """Choose the size of the next chunk, ``most`` rows if it grows; ``cost`` is of a row, both in seconds."""
        if self.tried:
            self.paid, self.tried = cost < 0.75 * self.tried, 0.0
            if not self.paid:
                self.chunk, self.settled = self.chunk // 2, _SETTLED
                return
            self.floor = self.chunk
        room = self.chunk < most
        if elapsed < _FAST:
            # A run has many lanes, each with a cursor that begins small: four times where that is fast enough too.
            self.chunk = min((4 if 4 * elapsed < _FAST else 2) * self.chunk, most) if room else self.chunk
        elif room and not self.settled and elapsed < (_LONG if self.paid else _SLOW):
            self.tried, self.chunk = cost, min(2 * self.chunk, most)
        elif elapsed > _SLOW:
            self._shrink(cost)
        self.settled = max(0, self.settled - 1)

    def _shrink(self, cost: float) -> None:
        """Read less at a time, unless that made a row dearer (where one row costs a whole row group, say)."""
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
    """A `Cursor` over nodes that track metrics: what they tracked of a row counts when the row is handed out, or fails."""

    def __init__(self, place: Place, lane: Lane, key: int, pass_: int) -> None:
        super().__init__(place, lane, key, pass_)
        self.tracking = [(each, each.node.kinds()) for each in place.tracking]  # type: ignore[attr-defined]
        self.stashes: list[Stash] = []

    def __next__(self) -> Item:
        item = super().__next__()
        number = self.number + (self.told > 0)
        if self.lane.ledger.first_time(self.place.path, int(self.passes[0]), number):
            self._count(*item)
        return item

    def _fill(self) -> None:
        super()._fill()
        self.stashes = [each.stash or {} for each, _ in self.tracking]
        for each, _ in self.tracking:
            each.stash = None

    def _read(self, positions: I64) -> Rows | Later:
        for each, _ in self.tracking:
            each.stash = {}
        return super()._read(positions)

    def ahead_by_column(self) -> None:
        """Samples are taken one by one."""
        return

    def _count(self, sample: Any, origins: Origins) -> None:
        """Count what was tracked of a row: of all that it is made of, whether it failed later on or not."""
        row = sample if self.later is not None else self.items[self.at - (self.told == 0)][0]
        whole: list[tuple[int, ...]] = []
        if type(row) is not Hole or row.rest is not MISSING:
            whole = [origins[:4]] if type(origins) is tuple else list(map(tuple, origins[:, :4].tolist()))
        for error in row.errors if type(row) is Hole else ():
            if error.rows is not None:
                whole.extend(map(tuple, error.rows[:, :4].tolist()))
            elif error.origin is not None and type(error) is not Excluded:
                name, epoch, row_number, part, _ = error.origin
                whole.append((self.place.names.index(name), epoch, row_number, part))
        for (each, kinds), stash in zip(self.tracking, self.stashes):
            found: dict[int, list[tuple[Any, ...]]] = {}
            for key in whole:
                known = stash.pop(key, None)
                if known is not None:
                    found.setdefault(known[0], []).append(known[1])
            for source, values in found.items():
                self.lane.ledger.track(each.path, source, kinds, values)


def num_bytes(sample: Any) -> int:
    """Roughly how large a sample is, in bytes."""
    size = getattr(sample, "nbytes", None)
    if size is not None:
        return int(size)
    if isinstance(sample, dict):
        return sum(num_bytes(value) for value in sample.values())
    if isinstance(sample, (str, bytes)):
        return len(sample)
    if isinstance(sample, (list, tuple)):
        return len(sample) * num_bytes(sample[0]) if sample else 8
    return 64


class SafePoint:
    """The upstream of a buffering node, with a state that can be rebuilt.

    The state of ``upstream`` is taken every ``every`` inputs (a deep state costs more than an input), at input numbers
    that are multiples of ``every``, so that the state at a position does not depend on where the run was resumed.
    """

    __slots__ = ("every", "number", "state", "state_at", "upstream")

    def __init__(self, upstream: Iterator, every: int) -> None:
        self.upstream, self.every = upstream, every
        self.number = 0
        self.state: State = None
        self.state_at = -1

    def next(self) -> Item:
        """The next input."""
        if self.number % self.every == 0 and self.state_at != self.number:
            self.state, self.state_at = self.upstream.snapshot(), self.number
        item = next(self.upstream)
        self.number += 1
        return item

    def snapshot(self) -> list[State]:
        """``[number of inputs taken, how many since the state, upstream state]``."""
        if self.number % self.every == 0 and self.state_at != self.number:
            self.state, self.state_at = self.upstream.snapshot(), self.number
        return [self.number, self.number - self.state_at, self.state]

    def before(self) -> list[State]:
        """The snapshot before the input that was taken last."""
        return [self.number - 1, self.number - 1 - self.state_at, self.state]

    def load(self, state: list[State]) -> None:
        """Go back to the safe point and read forward to where the state was taken."""
        number, since, upstream = state
        self.upstream.load(upstream)
        self.number = number - since
        self.state, self.state_at = upstream, self.number
        for _ in range(since):
            try:
                self.next()
            except StopIteration:
                raise ReplayDiverged(
                    f"the input ended after {self.number} samples while {number} were to be read again; has the data "
                    f"changed since the checkpoint was saved?"
                ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Descriptions
# ---------------------------------------------------------------------------------------------------------------------


class Node:
    """An immutable description of a stream of samples: a node of a tree with sources at its leaves.

    Subclasses are frozen dataclasses (``@dataclass(frozen=True, eq=False, repr=False)``). Every verb returns a new
    dataset. Nothing is opened until it is read.

    A dataset implements torchdata's ``Stateful`` protocol, so a bare ``StatefulDataLoader(ds, num_workers=k)`` resumes
    exactly on the same number of workers.

    >>> ds = ms.from_dataset(list("abcdef"), name="letters").shuffle(seed=1).take(4)
    >>> ds
    take(n=4)                                  # random access, 4
    └─ shuffle(seed=1)                         # random access, 6
       └─ letters: from_dataset(list, 6 rows)  # random access, 6
    >>> list(ds) == list(ds), len(ds)
    (True, 4)
    """

    kind: ClassVar[str] = "dataset"
    """The verb that makes this node: its name in paths, trees and checkpoints."""
    one_to_one: ClassVar[bool] = False
    """Whether it gives one sample for each of its only input, in that order."""
    tracks: ClassVar[bool] = False
    """Whether it leaves something in its place's stash. It has ``kinds()`` then."""
    _reads_ahead: ClassVar[bool] = False
    """Whether this is a source that may read what comes next before it is asked for: see `_foretell`."""
    _may_wait: ClassVar[bool] = False
    """Whether this is a source that runs code of others, which may wait for what the training loop does first."""

    # -- what a node implements ---------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, Node]:
        """The inputs by name. A single input has the empty name; sources have none."""
        source = getattr(self, "source", None)
        return {"": source} if isinstance(source, Node) else {}

    @property
    def random_access(self) -> bool:
        """Whether the sample at any position can be produced. Known without opening anything."""
        return all(child.random_access for child in self.inputs().values())

    @property
    def infinite(self) -> bool:
        """Whether the stream never ends by itself."""
        return any(child.infinite for child in self.inputs().values())

    def _length(self) -> int | None:
        """Number of samples of a random-access dataset; None when it is infinite."""
        if self.one_to_one:
            return self.inputs()[""].length()
        raise NotImplementedError(f"{type(self).__name__} has no length")

    def block_sizes(self) -> I64 | None:
        """Sizes of the natural blocks, in which reading one row costs a whole block; None where a block is a row."""
        return self.inputs()[""].block_sizes() if self.one_to_one else None

    def spec_fields(self) -> dict[str, State]:
        """What a checkpoint remembers of this node: plain values by name."""
        return {}

    def _rows(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows:
        """The samples at ``positions``.

        Args:
            at: This node's place.
            positions: int64, shape [k], each in [0, length).
            keys: uint64, shape [1] or [k]: the seed key of the pass each position belongs to.
            passes: int64, shape [1] or [k]: the number of that pass, for origins.

        What only chooses and orders rows of its inputs says so in `_below`, and needs no `_rows` of its own.
        """
        parts = self._below(at, positions, keys, passes)
        if parts is None:
            raise NotImplementedError(f"{type(self).__name__} has no random access")
        if len(parts) == 1:
            return parts[0].rows()
        return Rows.scatter(len(positions), [(part.here, part.rows()) for part in parts])  # type: ignore[misc]

    def _below(self, at: Place, positions: I64, keys: U64, passes: I64) -> list[Part] | None:
        """The positions of the inputs that the samples at ``positions`` are made of; None where that is not known.

        Arguments as for `_rows`. So that sources can be told what comes next (`Place.foretell`).
        """
        return [Part(at.input, positions, keys, passes)] if self.one_to_one else None

    def _wants_more(self) -> bool:
        """Whether `_foretell` would be of use just now. Asked once a chunk."""
        return False

    def _foretell(self, positions: I64) -> None:
        """Hear which positions (int64, shape [k]) are likely to be read next, in this order. May change no sample."""

    def _later(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows | Later | None:
        """As `_rows`, for a node whose samples are large: each may be made when it is taken. None: as `_rows` has them."""
        return None

    def _iterate(self, at: Place, lane: Lane, key: int, pass_: int) -> Iterator:
        """The running form in one lane, for one pass."""
        raise NotImplementedError(f"{type(self).__name__} cannot be read as a stream")

    def full_lanes(self, num_lanes: int, block: int) -> tuple[int, str]:
        """How many of the lanes 0, 1, 2, ... can have any data, and the reason in words."""
        if self.random_access:
            length = self.length()
            full = num_lanes if length is None else min(num_lanes, -(-length // block))
            return full, f"{self.label} has {length} rows, in blocks of {block}"
        return max((child.full_lanes(num_lanes, block) for child in self.inputs().values()), key=lambda pair: pair[0])

    def max_lanes(self) -> tuple[int, str] | None:
        """The largest useful number of lanes and the source that limits it, or None when nothing does."""
        limits = [limit for child in self.inputs().values() if (limit := child.max_lanes()) is not None]
        return min(limits) if limits else None

    def length(self) -> int | None:
        """`_length`, asked once."""
        known = self.__dict__.get("_known_length")
        if known is None:
            known = (self._length(),)
            self._set("_known_length", known)
        length: int | None = known[0]
        return length

    # -- identity -----------------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """The node's name within its place: the verb, or the name it was given."""
        return self.kind

    @property
    def batch_rows(self) -> int | None:
        """Samples per element when the pipeline ends in ``.batch`` (perhaps with one-to-one nodes after it)."""
        inputs = self.inputs()
        if not inputs:
            return None
        sizes = {child.batch_rows for child in inputs.values()}
        return sizes.pop() if len(sizes) == 1 else None

    def spec(self) -> dict[str, State]:
        """The tree as plain data: nodes, names, seeds, weights, lengths. Its hash is the `fingerprint`.

        A callable is remembered by its name only, so that editing a file does not void a checkpoint.
        """
        return _spec(bind(self))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: the hash of `spec`. Equality of datasets is equality of fingerprints."""
        known = self.__dict__.get("_fingerprint")
        if known is None:
            known = fingerprint(self.spec())
            self._set("_fingerprint", known)
        return str(known)

    def __eq__(self, other: object) -> bool:
        return self.fingerprint == other.fingerprint if isinstance(other, Node) else NotImplemented

    def __hash__(self) -> int:
        return int(self.fingerprint, 16) >> 4

    def __repr__(self) -> str:
        lines = tree_lines(bind(self))
        width = min(72, max(len(line) for line, _ in lines))
        return "\n".join(f"{line.ljust(width)}  # {note}" for line, note in lines)


    def summary(self) -> str:
        """This node in one line of a tree: its arguments."""
        fields = ((key, value) for key, value in self.spec_fields().items() if key != "length")
        return f"{self.kind}({', '.join(f'{key}={_short(value)}' for key, value in fields)})"

    def times(self, key: str, exact: bool) -> int:
        """How many passes over an input one pass over this node may take, for numbering; ``exact``: as its length says."""
        return 1

    def reads_again(self) -> str:
        """What this node itself reads again on a resume, at most, in words; empty where nothing."""
        return ""

    def face(self) -> str:
        """Random access or stream, how long, and what a resume reads again, in words.

        >>> import midstream as ms
        >>> ms.from_dataset(range(1000)).face(), ms.from_dataset(range(9)).filter(bool).shuffle(0, buffer_size=48).face()
        ('random access, 1,000', 'stream, a resume reads again at most 54/lanes + 1 inputs of a lane')
        """
        if self.random_access:
            try:
                length = self.length()
            except Exception:  # who only looks is told of an empty source, or of a file that is not there, by reading
                return "random access"
            return "random access, endless" if length is None else f"random access, {length:,}"
        again = self.reads_again()
        return f"stream{', endless' if self.infinite else ''}{f', a resume reads again {again}' if again else ''}"


    # -- pickling and hidden slots ------------------------------------------------------------------------------------

    _kept_slots: ClassVar[tuple[str, ...]] = ()
    _by_value: ClassVar[tuple[str, ...]] = ()

    def _set(self, name: str, value: Any) -> None:
        """Set one of the few slots that are no fields: caches, handles, a state that waits."""
        object.__setattr__(self, name, value)

    def _handle(self) -> Any:
        """What `_open` returns, opened once per process."""
        pid = os.getpid()
        cached = self.__dict__.get("_opened")
        if cached is None or cached[0] != pid:
            cached = (pid, self._open())
            self._set("_opened", cached)
        return cached[1]

    def _open(self) -> Any:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type,unused-ignore]
        kept = {key: value for key, value in self.__dict__.items() if key in names or key in self._kept_slots}
        for key, value in kept.items():
            if key in self._by_value or (callable(value) and not isinstance(value, (type, Node))):
                kept[key] = _ByValue(value)
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            self._set(key, value.value if isinstance(value, _ByValue) else value)

    # -- running ------------------------------------------------------------------------------------------------------

























class _ByValue:
    """A callable (or data) that pickles by value when a reference would not do: lambdas, closures, notebooks."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_bytes, (_to_bytes(self.value),)


def _to_bytes(value: Any) -> bytes:
    module = getattr(value, "__module__", None) or type(value).__module__
    if module != "__main__":
        try:
            return pickle.dumps(value)
        except Exception:
            pass
    return bytes(dill.dumps(value, recurse=True))


def _from_bytes(data: bytes) -> _ByValue:
    return _ByValue(dill.loads(data))


def require_dataset(value: Any, where: str) -> None:
    """Refuse what is not a dataset, and say how to make it one."""
    if not isinstance(value, Node):
        raise TypeError(
            f"{where} takes midstream datasets; found {type(value).__name__}. Wrap data with midstream.from_dataset(data), "
            f"a stream with midstream.from_iterable(make, name=...)."
        )


_TOO_DEEP = (
    "{}endless passes (repeat(), all_exhausted) are nested too deep to number them in 64 bits. Give repeat a number of epochs, "
    "or an inner mix max_epochs= or 'all_exhausted_without_replacement'"
)
_EPOCHS = 1 << 16  # of a loader at least


def require_passes(passes: I64, times: int) -> None:
    """Refuse passes nested so deep that they cannot be numbered in 64 bits."""
    if int(passes.max()) * times >= 1 << 62:
        raise ValueError(_TOO_DEEP.format(""))


def require_epochs(root: Place) -> None:
    """Refuse the same before anything is read: of every source, the passes of 65,536 epochs can be numbered."""

    def most(place: Place, exact: bool) -> tuple[int, list[str]]:
        below: list[tuple[int, list[str]]] = [(1, [])]
        for key, child in place.inputs.items():
            times, paths = most(child, exact)
            own = place.node.times(key, exact)
            below.append((times * own, [place.path, *paths] if own > 1 else paths))
        return max(below, key=lambda found: found[0])

    if most(root, False)[0] * _EPOCHS > 1 << 62:  # lengths may have to be looked up: only where they could matter
        times, paths = most(root, True)
        if times * _EPOCHS > 1 << 62:
            raise ValueError(_TOO_DEEP.format(f"{' > '.join(paths)}: "))


def _spec(place: Place) -> dict[str, State]:
    spec: dict[str, State] = {"node": place.node.kind, **place.node.spec_fields()}
    if place.source >= 0:
        spec["name"] = place.names[place.source]
    if place.inputs:
        spec["inputs"] = {key: _spec(child) for key, child in place.inputs.items()}
    return spec


def _short(value: State) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    return repr(value) if isinstance(value, (str, float)) else str(value)


def tree_lines(place: Place) -> list[tuple[str, str]]:
    """A tree in words: for each node its line, and its face."""
    label = place.node.summary()
    if place.source >= 0:
        label = f"{place.names[place.source]}: {label}"
    lines = [(label, place.node.face())]
    children = list(place.inputs.values())
    for child in children:
        last = child is children[-1]
        (head, face), *tail = tree_lines(child)
        lines.append((f"{'└─ ' if last else '├─ '}{head}", face))
        lines.extend((f"{'   ' if last else '│  '}{line}", face) for line, face in tail)
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Running without a loader
# ---------------------------------------------------------------------------------------------------------------------


class Delivery:
    """Pulls the deliverable out of a lane: a sample, or a failure to be raised. Quiet failures are counted on the way."""

    __slots__ = ("iterator", "lane", "place", "skipped")

    def __init__(
        self, place: Place, lane: Lane, key: int, pass_: int, skipped: Callable[[], None] | None = None
    ) -> None:
        self.place, self.lane, self.skipped = place, lane, skipped
        self.iterator = place.iterate(lane, key, pass_)

    def next(self) -> Item:
        """The next sample with its origins, or a `Failure` in the sample's place; raises StopIteration at the end."""
        while True:
            sample, origins = next(self.iterator)
            if type(sample) is not Hole:
                return sample, origins
            failure = sample.errors[0]
            if not failure.quiet:
                return failure, origins
            source = self.place.names.index(failure.origin.source) if failure.origin is not None else -1
            self.lane.ledger.failed(failure, source)
            if self.skipped is not None:
                self.skipped()  # may raise, while no sample is in hand that could be lost


class Run:
    """``iter(dataset)``: the samples of one lane, one after the other.

    State: ``{"midstream", "fingerprint", "epoch", "lane": [index, number of lanes], "done", "state", "marks",
    "events"}``: the root's state, and what was dropped or skipped so far.
    """

    def __init__(self, dataset: Node, index: int, num_lanes: int, epoch: int) -> None:
        self.on_end: Callable[[Run], None] | None = None
        self._dataset = dataset
        self._ledger = Ledger()
        self._lane = Lane(index, num_lanes, 1, self._ledger)
        self._place = bind(dataset)
        self._epoch = epoch
        self._events: dict[str, int] = {}
        self._over: list[TooManyErrors] = []
        self._windows, self._seen = Windows(), [0]
        self._noticed: set[str] = set()
        self._done = False
        self._waiting: State = None
        self._delivery: Delivery | None = None

    def __iter__(self) -> Run:
        return self

    def __del__(self) -> None:
        """Leave the position with the dataset, which may be asked for it after a loop was left."""
        with contextlib.suppress(Exception):
            if self.on_end is not None:
                self.on_end(self)

    def __next__(self) -> Any:
        if self._ledger.notices:
            self._tell()  # of what was met on the way to the sample before: no sample is in hand that could be lost
        if self._over:
            raise self._over[0]
        if self._done:
            raise StopIteration
        self._seen[0] += 1
        try:
            sample = (self._delivery or self._start()).next()[0]
        except StopIteration:
            self._done = True
            self._tell()
            raise
        if type(sample) is Failure:
            raise sample.error()
        return sample

    def _start(self) -> Delivery:
        # Not a method of this object: that would be a cycle.
        skipped = functools.partial(_check_skipped, self._events, self._ledger, self._over, self._windows, self._seen)
        delivery = Delivery(self._place, self._lane, int(epoch_key(self._epoch)[0]), self._epoch, skipped)
        if self._waiting is not None:
            delivery.iterator.load(self._waiting["state"])
            self._ledger.marks = copy_plain(self._waiting["marks"])
            self._waiting = None
        self._delivery = delivery
        return delivery

    def _tell(self) -> None:
        notices, self._ledger.notices = self._ledger.notices, []
        for key, text in notices:
            if key not in self._noticed:
                self._noticed.add(key)
                warnings.warn(text, RuntimeWarning, stacklevel=3)

    def state_dict(self) -> State:
        """The state after the last sample returned; plain values, fresh each time."""
        if self._waiting is not None:
            return copy_plain(self._waiting)
        delivery = self._delivery or self._start()
        return copy_plain(
            {
                "midstream": FORMAT,
                "fingerprint": self._dataset.fingerprint,
                "epoch": self._epoch,
                "lane": [self._lane.index, self._lane.num_lanes],
                "done": self._done,
                "state": delivery.iterator.snapshot(),
                "marks": self._ledger.marks,
                "events": add_counts(self._events, self._ledger.events),
            }
        )

    def load_state_dict(self, state: State) -> None:
        """Continue from ``state`` with the next ``next()``.

        Raises:
            CheckpointError: If another pipeline, or another number of lanes, wrote it.
        """
        check_run_state(self._dataset, state)
        if state["lane"] != [self._lane.index, self._lane.num_lanes]:
            raise CheckpointError(
                f"this state is of worker {state['lane'][0]} of {state['lane'][1]}, and was given to worker "
                f"{self._lane.index} of {self._lane.num_lanes}. Under a bare StatefulDataLoader a worker is a lane, so "
                f"resume with num_workers={state['lane'][1]}; midstream.DataLoader takes any number."
            )
        self._waiting = copy_plain(state)
        self._epoch, self._done = state["epoch"], state["done"]
        self._events = dict(self._waiting["events"])
        self._ledger.events, self._over = {}, []
        self._windows.begin(self._events)
        self._seen[0] = 0
        self._delivery = None


def _check_skipped(
    events: Mapping[str, int], ledger: Ledger, over: list[TooManyErrors], windows: Windows, seen: list[int]
) -> None:
    """A sample was skipped: is that one too many?"""
    seen[0] += 1
    try:
        check_limits(add_counts(events, ledger.events), ledger.limits, windows, seen[0])
    except TooManyErrors as error:
        over.append(error)
        raise


_RUN_KEYS = {
    "midstream": int,
    "fingerprint": str,
    "epoch": int,
    "lane": list,
    "done": bool,
    "marks": dict,
    "events": dict,
}


def check_run_state(dataset: Node, state: State) -> None:
    """Refuse what is not a state of this dataset."""
    if (
        not isinstance(state, dict)
        or "state" not in state
        or any(not isinstance(state.get(key), kind) for key, kind in _RUN_KEYS.items())
    ):
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"not a state of a midstream dataset: expected {sorted([*_RUN_KEYS, 'state'])}, found {found}"
        )
    if state["midstream"] != FORMAT:
        raise CheckpointError(f"this state has format {state['midstream']}; this midstream reads format {FORMAT}")
    if state["fingerprint"] != dataset.fingerprint:
        raise CheckpointError(
            f"this state was written by another pipeline (fingerprint {state['fingerprint']}, here "
            f"{dataset.fingerprint}). This pipeline is:\n{dataset!r}"
        )
