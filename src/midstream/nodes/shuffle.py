"""Shuffle: a permutation by formula. BufferedShuffle: a shuffle of a stream in bounded memory."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.common.plain_state import State
from midstream.common.randomness import fold, fold_array, permute, uniform32
from midstream.common.validation import require_int
from midstream.errors import ReplayDiverged
from midstream.pipeline import describe
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import FailedSample
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node, Selection
from midstream.pipeline.rows import I64, U64, Item, Origins, as_origin_array


@dataclass(frozen=True, eq=False, repr=False)
class Shuffle(Node):
    """Permutes a random-access input, in another order in every epoch and every pass of a repeat.

    The order is a formula (a keyed Feistel network, see `midstream.common.randomness.permute`), so
    memory is constant for any length. Where the source decodes a block of rows at once (parquet row
    groups), the blocks are permuted first. Then rows are permuted within windows of
    ``window_blocks`` blocks, so that reading in order uses few blocks at a time:

        blocks     A B C D E F     permuted      D A F | C B E      (window_blocks=3)
        rows                       within        daffad..| ecbbce..

    State: none but the position.
    Resume: reads nothing again.
    """

    source: Node
    seed: int = 0
    window_blocks: int | None = 16
    kind = "shuffle"

    def __post_init__(self) -> None:
        require_int(self.seed, "seed", -(1 << 63), "shuffle")
        if self.window_blocks is not None:
            require_int(self.window_blocks, "window_blocks", 1, "shuffle")
        if not self.random_access:
            raise TypeError(
                "a global shuffle needs random access, and this is a stream. Shuffle before the"
                " node that makes it one, or hold samples back with .shuffle(seed,"
                f" buffer_size=10_000):\n{describe.tree(self.source)}"
            )
        if self.infinite:
            raise ValueError(
                "a global shuffle needs a length, and this has none. Shuffle before .repeat():"
                f" every pass then has its own order:\n{describe.tree(self.source)}"
            )

    def _length(self) -> int | None:
        return self.source.length()

    def spec_fields(self) -> dict[str, State]:
        """The seed, and ``window_blocks`` where it is not the default."""
        fields: dict[str, State] = {"seed": int(self.seed)}
        if self.window_blocks != 16:
            fields["window_blocks"] = self.window_blocks
        return fields

    def _select(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> list[Selection]:
        return [Selection(bound.input, self._permute(bound, positions, keys), keys, passes)]

    def _permute(self, bound: BoundNode, positions: I64, keys: U64) -> I64:
        sizes = self.source.block_sizes() if self.window_blocks is not None else None
        seed = fold(self.seed, bound.salt)
        if sizes is None:
            length = self.source.length()
            assert length is not None
            return permute(positions, length, seed, keys)
        if keys.size == 1:
            return self._windows(int(keys[0]), seed, sizes).permute(positions)
        rows = np.empty_like(positions)
        for key in np.unique(keys):
            here = np.flatnonzero(keys == key)
            rows[here] = self._windows(int(key), seed, sizes).permute(positions[here])
        return rows

    def _windows(self, key: int, seed: int, sizes: I64) -> _Windows:
        """Return the block order of one pass. The last few are cached."""
        cache: OrderedDict[tuple[int, int], _Windows] = self.__dict__.get("_plans") or OrderedDict()
        self._set("_plans", cache)
        plan = cache.get((key, seed))
        if plan is None:
            assert self.window_blocks is not None
            plan = cache[key, seed] = _Windows(key, seed, sizes, self.window_blocks)
            if len(cache) > 4:
                cache.popitem(last=False)
        return plan


class _Windows:
    """Permutes blocks, cuts them into windows, and permutes rows within each window."""

    def __init__(self, key: int, seed: int, sizes: I64, window_blocks: int) -> None:
        keys = np.array([key], dtype=np.uint64)
        order = permute(np.arange(len(sizes), dtype=np.int64), len(sizes), fold(seed, 1), keys)
        starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        self.key, self.seed = key, fold(seed, 2)
        self.block_start = starts[order]  # first source row of the i-th block in the new order
        self.block_at = np.concatenate(
            [[0], np.cumsum(sizes[order])]
        )  # first position of the i-th block
        self.window_at = np.append(self.block_at[:-1:window_blocks], self.block_at[-1])

    def permute(self, positions: I64) -> I64:
        """Return the source rows at positions, both int64 of shape [k]."""
        windows = np.searchsorted(self.window_at, positions, side="right") - 1
        mixed = np.empty_like(positions)
        for window in np.unique(windows):
            here = np.flatnonzero(windows == window)
            first, last = self.window_at[window], self.window_at[window + 1]
            keys = fold_array(self.key, np.array([window]))
            mixed[here] = first + permute(
                positions[here] - first, int(last - first), self.seed, keys
            )
        blocks = np.searchsorted(self.block_at, mixed, side="right") - 1
        return np.asarray(self.block_start[blocks] + mixed - self.block_at[blocks], dtype=np.int64)


@dataclass(frozen=True, eq=False, repr=False)
class BufferedShuffle(Node):
    """Shuffles a stream in bounded memory: samples leave in the order of random keys. A stream.

    In a lane, input i gets the key ``i + b * u(i)``, with u uniform in [0, 1) and b =
    ceil(buffer_size / lanes). A sample leaves when no later input can have a smaller key. So at
    most b samples are held, and none moves by more than b places. With b = 4:

        input   0    1    2    3    4    5       state after "1 0" left: safe point at input 2
        key     2.1  1.3  5.9  3.2  4.4  8.0     (the oldest held), seen 4, last 0. Held are the
        output  1 0 3 4 2 5                      inputs from 2 on whose keys are larger

    The output is a pure function of the input order, so the state holds no sample.

    State: ``{"seen", "last", "held", "oldest", "safe"}``: inputs taken; number of the input that
        left last; how many are held; hash of the oldest one's origin; ``[number, state of the
        input]`` at a safe point not newer than it.
    Resume: reads at most b + max(1, b // 8) inputs again. Raises `ReplayDiverged` when they are not
        the ones that were read before.
    """

    source: Node
    seed: int = 0
    buffer_size: int = 1000
    kind = "shuffle"
    random_access = False

    def __post_init__(self) -> None:
        require_int(self.seed, "seed", -(1 << 63), "shuffle")
        require_int(self.buffer_size, "buffer_size", 1, "shuffle")

    def spec_fields(self) -> dict[str, State]:
        """Seed and buffer size."""
        return {"seed": int(self.seed), "buffer_size": int(self.buffer_size)}

    def replay_bound(self) -> str:
        """See `Node.replay_bound`."""
        return f"at most {self.buffer_size * 9 // 8:,}/lanes + 1 inputs of a lane"

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _BufferedShuffleIterator(self, bound, lane, key, pass_)


_DRAWS = 1024
"""Random numbers drawn at once."""


class _BufferedShuffleIterator(Iterator):
    def __init__(
        self, node: BufferedShuffle, bound: BoundNode, lane: Lane, key: int, pass_: int
    ) -> None:
        self.path = bound.path
        self.source = iterate(bound.input, lane, key, pass_)
        self.reach = -(-node.buffer_size // lane.num_lanes)
        self.grid = max(1, self.reach // 8)
        self.seed = fold(node.seed, bound.salt, key, lane.index)
        self.draws: list[int] = []
        self.draws_block = -1
        self._clear(0)

    def _clear(self, seen: int) -> None:
        self.seen = seen
        self.last = -1
        self.heap: list[tuple[int, int, Any, Origins]] = []
        self.live: dict[int, Origins] = {}  # origins of held samples by number, oldest first
        self.safe: deque[tuple[int, State]] = deque()  # safe points, oldest first
        self.ended = False

    def _key(self, number: int) -> int:
        """Return the key of an input, times 2**32."""
        block, inside = divmod(number, _DRAWS)
        if block != self.draws_block:
            self.draws, self.draws_block = (
                uniform32(self.seed, block * _DRAWS, _DRAWS).tolist(),
                block,
            )
        return (number << 32) + self.reach * self.draws[inside]

    def _next(self) -> Item:
        while True:
            if self.heap and (self.ended or self.heap[0][0] <= self.seen << 32):
                _, number, sample, origins = heapq.heappop(self.heap)
                del self.live[number]
                self.last = number
                return sample, origins
            if self.ended:
                raise StopIteration
            try:
                number = self.seen
                item = self._pull()
            except StopIteration:
                self.ended = True
                continue
            if type(item[0]) is FailedSample:
                return item
            self._hold(self._key(number), number, item)

    def _pull(self) -> Item:
        if self.seen % self.grid == 0 and not (self.safe and self.safe[-1][0] == self.seen):
            self._prune()
            self.safe.append((self.seen, self.source.snapshot()))
        item = next(self.source)
        self.seen += 1
        return item

    def _hold(self, key: int, number: int, item: Item) -> None:
        heapq.heappush(self.heap, (key, number, _owned(item[0]), item[1]))
        self.live[number] = item[1]

    def _prune(self) -> None:
        """Drop the safe points that are older than needed for the oldest held sample."""
        oldest = next(iter(self.live), self.seen)
        while len(self.safe) > 1 and self.safe[1][0] <= oldest:
            self.safe.popleft()

    def _state(self) -> State:
        if not self.safe:
            self.safe.append((self.seen, self.source.snapshot()))
        self._prune()
        oldest = next(iter(self.live.values()), None)
        return {
            "seen": self.seen,
            "last": self.last,
            "held": len(self.live),
            "oldest": None if oldest is None else _origin_hash(oldest),
            "safe": list(self.safe[0]),
        }

    def _load(self, state: State) -> None:
        number, upstream = state["safe"]
        self._clear(number)
        self.source.load(upstream)
        self.safe.append((number, upstream))
        last = state["last"]
        last_key = (self._key(last), last) if last >= 0 else (-1, -1)
        while self.seen < state["seen"]:
            number = self.seen
            try:
                item = self._pull()
            except StopIteration:
                break
            key = self._key(number)
            if type(item[0]) is not FailedSample and (key, number) > last_key:
                self._hold(key, number, item)
        self.last = last
        oldest = next(iter(self.live.values()), None)
        found = (self.seen, len(self.live), None if oldest is None else _origin_hash(oldest))
        expected = (state["seen"], state["held"], state["oldest"])
        if found != expected:
            raise ReplayDiverged(
                f"{self.path}: what was read again is not what was read before. Expected"
                f" {expected[1]} samples held after {expected[0]} inputs (oldest {expected[2]}),"
                f" found {found[1]} after {found[0]} (oldest {found[2]}). The data changed, or user"
                " code below failed on a sample then and not now (or the reverse)."
            )


def _origin_hash(origins: Origins) -> int:
    return fold(*as_origin_array(origins)[:, :4].ravel().tolist()) >> 11


def _owned(sample: Any) -> Any:
    """Copy arrays that are views: holding one would keep its whole chunk in memory."""
    if isinstance(sample, np.ndarray):
        return sample if sample.base is None else sample.copy()
    if type(sample) is dict:
        return {key: _owned(value) for key, value in sample.items()}
    return sample
