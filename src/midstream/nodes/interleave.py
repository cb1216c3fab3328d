"""Interleave: several datasets mixed by weight, with every prefix close to the asked shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from midstream._check import require_choice, require_int, require_name
from midstream._random import draw, fold, fold_array, pass_key, salt
from midstream._state import State
from midstream.core import (
    I64,
    U64,
    Dataset,
    Item,
    Iterator,
    Lane,
    Place,
    Rows,
    bind,
    pick,
    require_dataset,
    require_passes,
)

StoppingStrategy = Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]
_STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")
_PATTERNS = 16
_EXACT_BLOCK = 4096
_LARGE_BLOCK = 1 << 16
_PASSES = 1 << 20  # passes over one dataset inside an endless epoch, for numbering


def interleave(
    datasets: Mapping[str, Dataset],
    weights: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    stopping_strategy: StoppingStrategy = "first_exhausted",
    name: str | None = None,
) -> Dataset:
    """Mix datasets by weight.

    After any number of samples each of k sources is strictly within 1 + share * (k - 2) samples of its share, as long
    as the shares are ratios of small numbers (on streams: in every lane).

    Args:
        datasets: By name. A source that has no name of its own takes it from here.
        weights: Relative, by the same names; equal when left out. A weight of 0 leaves a dataset out but in the tree.
        seed: Chooses the order of picks. The order is the same every epoch, so that ``len`` is too.
        stopping_strategy: As Hugging Face ``datasets`` has them. ``"first_exhausted"``: the end is the last sample of
            the first dataset to run out. ``"all_exhausted"``: the last sample of the last one; the others start over,
            in a new order where they are shuffled. ``"all_exhausted_without_replacement"``: every sample once. On
            streams each lane stops by itself, when it would pick from a dataset that has run out.
        name: Name of this node in paths and checkpoints.

    Raises:
        ValueError: On names that do not match, weights that are negative, not finite, all 0 or too small to be kept
            (under 2**-17 of the whole), or two sources of one name.
        TypeError: If something is not a midstream dataset.

    >>> import midstream as ms
    >>> mix = ms.interleave({"a": ms.from_dataset([0] * 70), "b": ms.from_dataset([1] * 30)}, {"a": 7, "b": 3})
    >>> len(mix), sum(list(mix)[:50])
    (98, 15)
    """
    if not isinstance(datasets, Mapping):
        raise TypeError(
            f"interleave takes datasets by name, like interleave({{'web': web, 'code': code}}); "
            f"found {type(datasets).__name__}"
        )
    if weights is None:
        weights = dict.fromkeys(datasets, 1)
    if set(weights) != set(datasets):
        raise ValueError(
            f"interleave: weights are by the names of the datasets; expected {sorted(datasets)}, found {sorted(weights)}"
        )
    for key, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float, np.number)):
            raise TypeError(f"interleave: the weight of {key!r} is a number; found {weight!r}")
    require_name(name, "interleave")
    if name is not None and "/" in name:
        raise ValueError(f"interleave: a name is part of paths, so it has no '/'; found {name!r}")
    pairs = tuple((key, float(weights[key]) if not _is_whole(weights[key]) else int(weights[key])) for key in datasets)
    return Interleave(tuple(datasets.items()), pairs, seed, stopping_strategy, name)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) or (isinstance(value, float) and value.is_integer())


@dataclass(frozen=True, eq=False, repr=False)
class Interleave(Dataset):
    """Datasets mixed by integer quotas q_c over blocks of B picks.

    In a block, pick j of dataset c has the key (j + u) / q_c with u uniform in [0, 1); the picks in key order are the
    block's pattern. Sixteen patterns are made once and a hash of the block's number chooses one, so the dataset and the
    position at any place of the mix are one lookup: dataset c's j-th pick of block b is its position b * q_c + j.

    State: random access: none but the position. Stream: ``{"picks", "ended", "inputs": {name: [pass, flags, state]}}``.
    Resume: reads nothing again.
    """

    datasets: tuple[tuple[str, Dataset], ...]
    weights: tuple[tuple[str, float], ...]
    seed: int = 0
    stopping_strategy: StoppingStrategy = "first_exhausted"
    name: str | None = None
    kind = "interleave"

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("interleave takes at least one dataset; found none")
        require_int(self.seed, "seed", -(1 << 63), "interleave")
        require_choice(self.stopping_strategy, "stopping_strategy", _STRATEGIES, "interleave")
        for key, dataset in self.datasets:
            if not isinstance(key, str) or not key or "/" in key or "|" in key:
                raise ValueError(f"interleave: a name is a string without '/' and '|'; found {key!r}")
            require_dataset(dataset, f"interleave {key!r}")
        for key, weight in self.weights:
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"interleave: the weight of {key!r} is a finite number of at least 0; found {weight}")
        quotas(dict(self.weights))
        bind(self)

    def inputs(self) -> dict[str, Dataset]:
        """By name."""
        return dict(self.datasets)

    @property
    def label(self) -> str:
        """The name it was given, or the verb."""
        return self.name or self.kind

    @property
    def infinite(self) -> bool:
        """Whether every dataset that can end the mix is endless."""
        endless = [dataset.infinite for (_, dataset), (_, weight) in zip(self.datasets, self.weights) if weight]
        return all(endless) if self.stopping_strategy == "first_exhausted" else any(endless)

    def spec_fields(self) -> dict[str, State]:
        """Weights by name, seed and strategy."""
        fields: dict[str, State] = {"weights": dict(self.weights), "seed": int(self.seed)}
        if self.name is not None:
            fields["label"] = self.name
        if self.stopping_strategy != "first_exhausted":
            fields["stopping_strategy"] = self.stopping_strategy
        return fields

    def picks(self) -> Picks:
        """The choice sequence, made once. Its salt is the names, not the place: else ``len`` would vary with the tree."""
        cached: Picks | None = self.__dict__.get("_picks")
        if cached is None:
            names = "/".join([self.label, *sorted(key for key, _ in self.datasets)])
            cached = Picks(dict(self.weights), fold(self.seed, salt(names)))
            self._set("_picks", cached)
        return cached

    def _length(self) -> int | None:
        return self._layout().length

    def _layout(self) -> _Layout:
        cached: _Layout | None = self.__dict__.get("_layout_made")
        if cached is None:
            lengths = [dataset.length() for _, dataset in self.datasets]
            cached = _Layout(self.picks(), [key for key, _ in self.datasets], lengths, self.stopping_strategy)
            self._set("_layout_made", cached)
        return cached

    def _rows(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows:
        layout = self._layout()
        source, inside = layout.locate(positions)
        parts: list[tuple[I64, Rows]] = []
        order = np.argsort(source, kind="stable")
        ends = np.flatnonzero(np.diff(source[order], append=-1)) + 1
        start = 0
        for end in ends.tolist():
            here = order[start:end]
            start = end
            index = int(source[here[0]])
            child = at.inputs[self.datasets[index][0]]
            local, child_keys, child_passes = inside[here], pick(keys, here), pick(passes, here)
            if layout.repeats[index] > 1:
                require_passes(passes, layout.repeats[index])
                number, local = np.divmod(local, layout.lengths[index])
                child_keys = pass_key(child_keys, number)
                child_passes = child_passes * layout.repeats[index] + number
            parts.append((here, child.rows(local, child_keys, child_passes)))
        return Rows.scatter(len(positions), parts)

    def _iterate(self, at: Place, lane: Lane, key: int, pass_: int) -> Iterator:
        return _InterleaveIterator(self, at, lane, key, pass_)


def quotas(weights: Mapping[str, float]) -> tuple[list[int], int]:
    """Integer quotas per block and the block's size.

    Exact when the weights are ratios of small numbers (a block of at most 4,096 picks), else within 2**-17 of the share
    over blocks of 2**16.

    Raises:
        ValueError: If all weights are 0, or one that is not would round to 0.

    >>> quotas({"web": 0.7, "code": 0.3})
    ([7, 3], 10)
    """
    names, values = list(weights), list(weights.values())
    largest = max(values)
    if not largest:
        raise ValueError(f"interleave: at least one weight is above 0; found {dict(weights)}")
    # Floats are taken relative to the largest, so that neither tiny nor huge ones lose what they mean.
    fractions = [
        Fraction(value) if isinstance(value, int) else Fraction(value / largest).limit_denominator(1_000_000)
        for value in (values if all(isinstance(value, int) for value in values) else map(float, values))
    ]
    total = sum(fractions)
    shares = [fraction / total for fraction in fractions]
    exact_total = math.fsum(values)
    close = all(abs(float(share) - value / exact_total) <= 1e-12 for share, value in zip(shares, values))
    block = math.lcm(*(share.denominator for share in shares))
    if close and block <= _EXACT_BLOCK:
        result, size = [int(share * block) for share in shares], block
    else:
        size = _LARGE_BLOCK
        ideal = [value / exact_total * size for value in values]
        result = [int(value) for value in ideal]
        # What rounded down to nothing comes first: a source of the mix is never left out for want of a remainder.
        by_remainder = sorted(
            range(len(ideal)),
            key=lambda index: (result[index] > 0 or ideal[index] < 0.5, result[index] - ideal[index], names[index]),
        )
        for index in by_remainder[: size - sum(result)]:
            result[index] += 1
    for name, value, quota in zip(names, values, result):
        if value and not quota:
            raise ValueError(
                f"interleave: the weight of {name!r} is {value / exact_total:.2g} of the whole, too small to be kept "
                f"(under 1 in {2 * _LARGE_BLOCK:,}). Give it 0 to leave it out, or more."
            )
    return result, size


class Picks:
    """The choice sequence: which dataset is picked when, as a pool of block patterns.

    Attributes:
        quotas: int64, shape [k]: picks of each dataset per block.
        block: Picks per block.
        pattern: int32, shape [16, block]: the dataset picked.
        number: int32, shape [16, block]: how many times it was picked before in the block.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        shares, self.block = quotas(weights)
        self.quotas = np.array(shares, dtype=np.int64)
        self.seed = seed
        self.pattern = np.empty((_PATTERNS, self.block), dtype=np.int32)
        self.number = np.empty((_PATTERNS, self.block), dtype=np.int32)
        # Everything is laid out by name, not by place in the dict: the same mix written in another order is the same.
        names = list(weights)
        by_name = sorted(range(len(names)), key=names.__getitem__)
        source = np.concatenate([np.full(shares[index], index, dtype=np.int32) for index in by_name])
        number = np.concatenate([np.arange(shares[index], dtype=np.int32) for index in by_name])
        for pool in range(_PATTERNS):
            unit = np.concatenate([_unit(fold(seed, pool, salt(names[index])), shares[index]) for index in by_name])
            order = np.argsort((number + unit) / self.quotas[source], kind="stable")
            self.pattern[pool], self.number[pool] = source[order], number[order]

    def choose(self, blocks: I64 | int, lane: int = 0) -> npt.NDArray[np.int64]:
        """Which of the patterns each block has, int64."""
        return (fold_array(fold(self.seed, -1 - lane), blocks) & np.uint64(_PATTERNS - 1)).astype(np.int64)


def _unit(seed: int, count: int) -> npt.NDArray[np.float64]:
    return (draw(seed, 0, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _Layout:
    """The closed forms of a mix of random-access datasets: its length, and what stands at a position.

    Attributes:
        length: Samples in all, None when endless.
        lengths: Of the datasets; 0 where there is no end.
        repeats: Passes over each dataset within one epoch of the mix.
    """

    def __init__(self, picks: Picks, names: list[str], lengths: list[int | None], strategy: str) -> None:
        self.picks = picks
        self.lengths = [length or 0 for length in lengths]
        self.repeats = [1] * len(lengths)
        self.segments: _Segments | None = None
        used = [index for index, quota in enumerate(picks.quotas.tolist()) if quota]
        finite = [index for index in used if lengths[index] is not None]
        if strategy == "first_exhausted":
            ends = [self._end(index) for index in finite]
            self.length: int | None = min(ends) if ends else None
        elif len(finite) < len(used):
            self.length = None
            if strategy == "all_exhausted":
                for index in finite:
                    self._nonempty(names[index], index)
                    self.repeats[index] = _PASSES
        elif strategy == "all_exhausted":
            for index in finite:
                self._nonempty(names[index], index)
            self.length = max(self._end(index) for index in finite)
            for index in finite:
                most = -(-self.length // picks.block) * int(picks.quotas[index])
                self.repeats[index] = -(-most // self.lengths[index])
        else:
            self.length = sum(self.lengths[index] for index in finite)
            self.segments = _Segments(picks, self.lengths)
        if self.length is None and strategy == "all_exhausted_without_replacement":
            self.segments = _Segments(
                picks,
                [_far(quota) if length is None else length for length, quota in zip(lengths, picks.quotas.tolist())],
            )

    def _nonempty(self, name: str, index: int) -> None:
        if not self.lengths[index]:
            raise ValueError(
                f"interleave: {name!r} has no rows, so with all_exhausted it can neither be read nor start over; leave it "
                f"out or give it the weight 0"
            )

    def _end(self, index: int) -> int:
        """The position after the last row of a dataset."""
        if not self.lengths[index]:
            return 0
        block, number = divmod(self.lengths[index] - 1, int(self.picks.quotas[index]))
        pattern = self.picks.pattern[int(self.picks.choose(block)[0])]
        return block * self.picks.block + int(np.flatnonzero(pattern == index)[number]) + 1

    def locate(self, positions: I64) -> tuple[npt.NDArray[Any], I64]:
        """Dataset index and position in it, for positions of the mix; all of shape [k]."""
        picks = self.picks
        if self.segments is not None:
            return self.segments.locate(positions)
        block, inside = np.divmod(positions, picks.block)
        chosen = picks.choose(block)
        source = picks.pattern[chosen, inside]
        return source, block * picks.quotas[source] + picks.number[chosen, inside]


def _far(quota: int) -> int:
    """A length for what never ends: 2**40 blocks, which no run reaches and no product of which overflows."""
    return max(1, quota) << 40


class _Segments:
    """Every sample once: picks of a dataset that has run out are left out.

    Between two blocks in which some dataset runs out, every block has the same limits: how many of each dataset's picks
    are still served. So the block of a position is a division inside the right segment.
    """

    def __init__(self, picks: Picks, lengths: list[int]) -> None:
        self.picks = picks
        length = np.array(lengths, dtype=np.int64)
        quota = picks.quotas
        last = length // np.maximum(quota, 1)
        starts = np.unique(np.concatenate([[0], last, last + 1]))
        self.starts = starts
        self.limits = np.clip(length[None, :] - starts[:, None] * quota[None, :], 0, quota[None, :])
        self.rates = self.limits.sum(axis=1)
        blocks = np.diff(starts, append=starts[-1] + 1)
        self.before = np.concatenate([[0], np.cumsum(self.rates * blocks)[:-1]])
        self.offsets: dict[tuple[int, int], I64] = {}

    def locate(self, positions: I64) -> tuple[npt.NDArray[Any], I64]:
        """As `_Layout.locate`."""
        picks = self.picks
        segment = np.searchsorted(self.before, positions, side="right") - 1
        blocks, inside = np.divmod(positions - self.before[segment], np.maximum(self.rates[segment], 1))
        blocks = blocks + self.starts[segment]
        chosen = picks.choose(blocks)
        offsets = np.empty_like(positions)
        joint = segment * _PATTERNS + chosen
        for value in np.unique(joint).tolist():
            here = np.flatnonzero(joint == value)
            offsets[here] = self._served(*divmod(value, _PATTERNS))[inside[here]]
        source = picks.pattern[chosen, offsets]
        return source, blocks * picks.quotas[source] + picks.number[chosen, offsets]

    def _served(self, segment: int, pattern: int) -> I64:
        """Places in a pattern whose picks are served in a segment."""
        known = self.offsets.get((segment, pattern))
        if known is None:
            picks = self.picks
            if len(self.offsets) >= 256:
                self.offsets.clear()
            known = np.flatnonzero(picks.number[pattern] < self.limits[segment][picks.pattern[pattern]])
            self.offsets[segment, pattern] = known
        return known


_YIELDED, _EXHAUSTED, _EMPTY = 1, 2, 4


class _Input:
    """One dataset of a mix, in a lane."""

    __slots__ = ("flags", "number", "source")

    def __init__(self, source: Iterator) -> None:
        self.source, self.number, self.flags = source, 0, 0


class _InterleaveIterator(Iterator):
    def __init__(self, node: Interleave, at: Place, lane: Lane, key: int, pass_: int) -> None:
        self.node, self.at, self.lane, self.key, self.pass_ = node, at, lane, key, pass_
        self.choices = node.picks()
        self.names = [name for name, _ in node.datasets]
        self.children = [_Input(self._open(name, 0)) for name in self.names]
        self.picks, self.ended = 0, False
        self.pattern: list[int] = []
        self.pattern_of = -1

    def _open(self, name: str, number: int) -> Iterator:
        key = int(pass_key(np.array([self.key], dtype=np.uint64), np.array([number]))[0])
        pass_ = self.pass_
        if self.node.stopping_strategy == "all_exhausted":  # how many passes there will be is not known
            require_passes(np.array([pass_]), _PASSES)
            pass_ = pass_ * _PASSES + number
        return self.at.inputs[name].iterate(self.lane, key, pass_)

    def _next(self) -> Item:
        while not self.ended:
            block, inside = divmod(self.picks, self.choices.block)
            if block != self.pattern_of:
                chosen = int(self.choices.choose(block, 1 + self.lane.index)[0])
                self.pattern, self.pattern_of = self.choices.pattern[chosen].tolist(), block
            index = self.pattern[inside]
            child = self.children[index]
            if not child.flags & _EMPTY and (
                not child.flags & _EXHAUSTED or self.node.stopping_strategy == "all_exhausted"
            ):
                try:
                    item = next(child.source)
                    child.flags |= _YIELDED
                    self.picks += 1
                    return item
                except StopIteration:
                    if self._ran_out(index, child):
                        continue  # it starts over: the same pick, from its beginning
            self.picks += 1
        raise StopIteration

    def _ran_out(self, index: int, child: _Input) -> bool:
        """A dataset has no more; returns whether it starts over."""
        strategy = self.node.stopping_strategy
        if not child.flags & _YIELDED:
            child.flags |= _EMPTY
        else:
            child.flags |= _EXHAUSTED
        live = [other.flags for other, quota in zip(self.children, self.choices.quotas.tolist()) if quota]
        some = [flags for flags in live if not flags & _EMPTY]
        if strategy == "first_exhausted":
            self.ended = not some or bool(child.flags & _EXHAUSTED)
        else:
            self.ended = all(flags & _EXHAUSTED for flags in some)
        if self.ended or child.flags & _EMPTY or strategy != "all_exhausted":
            return False
        child.number += 1
        child.flags &= ~_YIELDED
        child.source = self._open(self.names[index], child.number)
        return True

    def _state(self) -> State:
        inputs = {
            name: [child.number, child.flags, child.source.snapshot()] for name, child in zip(self.names, self.children)
        }
        return {"picks": self.picks, "ended": self.ended, "inputs": inputs}

    def _load(self, state: State) -> None:
        self.picks, self.ended = state["picks"], state["ended"]
        for name, child in zip(self.names, self.children):
            if name not in state["inputs"]:
                continue  # new since the state was saved: it begins at its beginning
            child.number, child.flags, source = state["inputs"][name]
            child.source = self._open(name, child.number)
            child.source.load(source)
