"""What a mix picks when: integer quotas, choice sequences, schedules, and the closed forms of mixes with random access."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from midstream.common.plain_state import State
from midstream.common.randomness import draw, fold, fold_array, salt
from midstream.common.validation import require_int
from midstream.pipeline.rows import I64

_PATTERNS = 16
_EXACT_BLOCK = 4096
_LARGE_BLOCK = 1 << 16
PASSES = 1 << 20
"""Passes over one dataset inside an endless epoch, for numbering."""

Weights = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Schedule:
    """Weights that change on the way; made by `schedule`.

    Attributes:
        phases: (where it begins, weights by name), the first at 0.
    """

    phases: tuple[tuple[int, Weights], ...]


def schedule(phases: Sequence[tuple[int, Mapping[str, float]]]) -> Schedule:
    """Weights of a mix that change at given counts: ``interleave(..., weights=ms.schedule([...]))``.

    Args:
        phases: ``(border, weights)``, the first border 0, each larger than the one before. A border counts the samples that
            the mix has given since the epoch began (with ``weights_by``: their tokens, and the sample in which it lies
            belongs to the phase before). On streams every lane has its share of it, ``border // lanes`` or one more.

    Raises:
        ValueError: If the borders do not rise from 0.
        TypeError: If something is not a pair of a whole number and weights by name.

    >>> import midstream as ms
    >>> sources = {"easy": ms.from_dataset([0] * 90), "hard": ms.from_dataset([1] * 90)}
    >>> mix = ms.interleave(sources, ms.schedule([(0, {"easy": 1, "hard": 0}), (5, {"easy": 1, "hard": 1})]))
    >>> list(mix)[:5], sum(list(mix)[5:15])
    ([0, 0, 0, 0, 0], 5)
    """
    if isinstance(phases, (str, Mapping)) or not isinstance(phases, Sequence) or not phases:
        raise TypeError(
            f"schedule takes a list of (border, weights), like [(0, {{'web': 1}}), ...]; found {phases!r:.80}"
        )
    made: list[tuple[int, Weights]] = []
    for phase in phases:
        if not isinstance(phase, Sequence) or len(phase) != 2 or not isinstance(phase[1], Mapping):
            raise TypeError(f"schedule: a phase is (border, weights by name); found {phase!r:.80}")
        require_int(phase[0], "a border", 0, "schedule")
        if (phase[0] == 0) != (not made) or (made and phase[0] <= made[-1][0]):
            raise ValueError(f"schedule: borders begin with 0 and rise; found {[phase[0] for phase in phases][:12]}")
        made.append((int(phase[0]), tuple(phase[1].items())))
    return Schedule(tuple(made))


def check_weights(weights: Mapping[str, Any], names: Sequence[str], where: str) -> Weights:
    """Weights as they are kept: in the order of the datasets, whole ones as integers.

    Raises:
        ValueError: If the names are not those of the datasets, or a weight is negative or not finite.
        TypeError: If a weight is no number.
    """
    if set(weights) != set(names):
        raise ValueError(
            f"{where}: weights are by the names of the datasets; expected {sorted(names, key=str)}, found "
            f"{sorted(weights, key=str)}"
        )
    for key, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float, np.number)):
            raise TypeError(f"{where}: the weight of {key!r} is a number; found {weight!r}")
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{where}: the weight of {key!r} is a finite number of at least 0; found {weight}")
    return tuple((key, int(weights[key]) if _is_whole(weights[key]) else float(weights[key])) for key in names)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) or (isinstance(value, float) and value.is_integer())


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
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        shares, self.block = quotas(weights)
        self.quotas = np.array(shares, dtype=np.int64)
        self.seed = seed
        self._pattern = np.empty((_PATTERNS, self.block), dtype=np.int32)
        self._number = np.empty((_PATTERNS, self.block), dtype=np.int32)
        self._made = np.zeros(_PATTERNS, dtype=bool)
        # Everything is laid out by name, not by place in the dict: the same mix written in another order is the same.
        self._names = list(weights)
        self._by_name = sorted(range(len(self._names)), key=self._names.__getitem__)

    def _make(self, chosen: I64) -> None:
        """Make the patterns that are looked at: of a schedule of many phases few ever are."""
        if self._made.all():
            return
        shares, names = self.quotas.tolist(), self._names
        for pool in np.unique(chosen).tolist():
            if not self._made[pool]:
                source = np.concatenate([np.full(shares[index], index, dtype=np.int32) for index in self._by_name])
                number = np.concatenate([np.arange(shares[index], dtype=np.int32) for index in self._by_name])
                unit = np.concatenate(
                    [_unit(fold(self.seed, pool, salt(names[index])), shares[index]) for index in self._by_name]
                )
                order = np.argsort((number + unit) / self.quotas[source], kind="stable")
                self._pattern[pool], self._number[pool] = source[order], number[order]
                self._made[pool] = True

    @property
    def pattern(self) -> npt.NDArray[np.int32]:
        """int32, shape [16, block]: the dataset picked."""
        self._make(np.arange(_PATTERNS))
        return self._pattern

    def of(self, pool: int) -> npt.NDArray[np.int32]:
        """int32, shape [block]: the datasets picked in one pattern."""
        self._make(np.array([pool]))
        found: npt.NDArray[np.int32] = self._pattern[pool]
        return found

    def number(self, pool: int) -> npt.NDArray[np.int32]:
        """int32, shape [block]: how many times each of them was picked before in the block."""
        self._make(np.array([pool]))
        found: npt.NDArray[np.int32] = self._number[pool]
        return found

    def locate(self, picks: I64) -> tuple[npt.NDArray[Any], I64]:
        """For picks by number: the dataset, and how many times it was picked before; both of shape [k]."""
        block, inside = np.divmod(picks, self.block)
        chosen = self.choose(block)
        self._make(chosen)
        source = self._pattern[chosen, inside]
        return source, block * self.quotas[source] + self._number[chosen, inside]

    def counts(self, picks: int) -> I64:
        """How many of the first ``picks`` are of each dataset, int64 of shape [k]."""
        block, inside = divmod(picks, self.block)
        found: I64 = block * self.quotas
        if inside:
            pattern = self.of(int(self.choose(block)[0]))
            found = found + np.bincount(pattern[:inside], minlength=len(self.quotas))
        return found

    def end(self, index: int, rows: int) -> int:
        """The number of the pick that takes row number ``rows`` (from 1) of a dataset, + 1."""
        block, number = divmod(rows - 1, int(self.quotas[index]))
        pattern = self.of(int(self.choose(block)[0]))
        return block * self.block + int(np.flatnonzero(pattern == index)[number]) + 1

    def choose(self, blocks: I64 | int, lane: int = 0) -> npt.NDArray[np.int64]:
        """Which of the patterns each block has, int64."""
        return (fold_array(fold(self.seed, -1 - lane), blocks) & np.uint64(_PATTERNS - 1)).astype(np.int64)


def _unit(seed: int, count: int) -> npt.NDArray[np.float64]:
    return (draw(seed, 0, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _Phase:
    """One phase of a layout.

    Attributes:
        start: The position of the mix at which it begins.
        taken: int64, shape [k]: rows of each dataset before it.
        number: Of its choice sequence.
        segments: Where every sample comes once: which picks are served.
    """

    __slots__ = ("number", "segments", "start", "taken")

    def __init__(self, start: int, taken: I64, number: int, segments: Segments | None) -> None:
        self.start, self.taken, self.number, self.segments = start, taken, number, segments


class Layout:
    """The closed forms of a mix of random-access datasets: its length, and what stands at a position.

    In each phase of a schedule the picks are counted anew, and dataset c goes on at its row ``taken[c]``.

    Attributes:
        length: Samples in all, None when endless.
        lengths: Of the datasets; 0 where there is no end.
        repeats: Passes over each dataset within one epoch of the mix.
    """

    def __init__(
        self,
        borders: Sequence[int],
        picks: Callable[[int], Picks],
        names: Sequence[str],
        lengths: Sequence[int | None],
        strategy: str,
        *,
        many: bool = False,
    ) -> None:
        """A layout.

        Args:
            borders: Where each phase begins, the first at 0.
            picks: The choice sequence of a phase by number.
            names: Of the datasets.
            lengths: Of the datasets; None where there is no end.
            strategy: When the mix ends.
            many: Number passes as if there were many, whatever the length: it may change within an epoch.
        """
        self.picks, self.names, self.strategy = picks, names, strategy
        self.lengths = [length or 0 for length in lengths]
        self.endless = [length is None for length in lengths]
        self.repeats = [1] * len(lengths)
        self.phases: list[_Phase] = []
        quotas = [picks(number).quotas for number in range(len(borders))]
        if strategy == "all_exhausted":
            for index, length in enumerate(lengths):
                if length == 0 and any(quota[index] for quota in quotas):
                    raise ValueError(
                        f"interleave: {names[index]!r} has no rows, so with all_exhausted it can neither be read nor start "
                        f"over; leave it out or give it the weight 0"
                    )
        taken, start = np.zeros(len(lengths), dtype=np.int64), 0
        self.length: int | None = None
        for number in range(len(borders)):
            limit = max(0, borders[number + 1] - start) if number + 1 < len(borders) else None
            later = np.any(quotas[number:], axis=0)
            phase = _Phase(start, taken, number, self._segments(number, taken))
            self.phases.append(phase)
            end = self._end(phase, later.tolist())
            # What runs out just at a border ends the mix if it has a weight beyond it: the next phase says.
            inclusive = strategy == "all_exhausted"
            if strategy == "all_exhausted_without_replacement" and limit is not None:
                limit = limit if end is None else min(limit, end)
            elif end is not None and (limit is None or end < limit or (inclusive and end == limit)):
                self.length = start + end
                break
            if limit is None:
                self.length = None if end is None else start + end
                break
            taken, start = taken + self._counts(phase, limit), start + limit
        if strategy == "all_exhausted":
            self._count_passes(many)

    def _count_passes(self, many: bool) -> None:
        last = self.phases[-1]
        picks = self.picks(last.number)
        blocks = 0 if self.length is None else -(-(self.length - last.start) // picks.block)
        for index, length in enumerate(self.lengths):
            used = any(self.picks(phase.number).quotas[index] for phase in self.phases)
            if self.endless[index] or not used:
                continue
            most = int(last.taken[index]) + blocks * int(picks.quotas[index])
            self.repeats[index] = PASSES if many or self.length is None else max(1, -(-most // length))

    def _segments(self, number: int, taken: I64) -> Segments | None:
        if self.strategy != "all_exhausted_without_replacement":
            return None
        picks = self.picks(number)
        left = [
            _far(quota) if endless else max(0, length - used)
            for length, endless, used, quota in zip(self.lengths, self.endless, taken.tolist(), picks.quotas.tolist())
        ]
        return Segments(picks, left)

    def _end(self, phase: _Phase, later: list[bool]) -> int | None:
        """Where the mix ends if this phase goes on for ever, counted from its start; None: never."""
        picks = self.picks(phase.number)
        here = [index for index, quota in enumerate(picks.quotas.tolist()) if quota]
        left = {
            index: max(0, self.lengths[index] - int(phase.taken[index]))
            for index in range(len(self.lengths))
            if not self.endless[index]
        }
        if self.strategy == "first_exhausted":
            ends = [picks.end(index, left[index]) if left[index] else 0 for index in here if index in left]
            return min(ends, default=None)
        if self.strategy == "all_exhausted_without_replacement":
            return sum(left[index] for index in here) if all(index in left for index in here) else None
        missing = [index for index, counts in enumerate(later) if counts and left.get(index, 1)]
        if any(index not in left or index not in here for index in missing):
            return None
        return max((picks.end(index, left[index]) for index in missing), default=0)

    def _counts(self, phase: _Phase, count: int) -> I64:
        return phase.segments.counts(count) if phase.segments is not None else self.picks(phase.number).counts(count)

    def counts(self, position: int) -> I64:
        """Rows of each dataset before a position, int64 of shape [k]."""
        phase = next(phase for phase in reversed(self.phases) if phase.start <= position)
        return phase.taken + self._counts(phase, position - phase.start)

    def locate(self, positions: I64) -> tuple[npt.NDArray[Any], I64]:
        """Node index and position in it, for positions of the mix; all of shape [k]."""
        if len(self.phases) == 1:
            return self._locate(self.phases[0], positions)
        which = np.searchsorted([phase.start for phase in self.phases], positions, side="right") - 1
        source, inside = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(which).tolist():
            here, phase = np.flatnonzero(which == number), self.phases[number]
            found, rows = self._locate(phase, positions[here] - phase.start)
            source[here], inside[here] = found, rows + phase.taken[found]
        return source, inside

    def _locate(self, phase: _Phase, positions: I64) -> tuple[npt.NDArray[Any], I64]:
        return phase.segments.locate(positions) if phase.segments else self.picks(phase.number).locate(positions)


def _far(quota: int) -> int:
    """A length for what never ends: 2**40 blocks, which no run reaches and no product of which overflows."""
    return max(1, quota) << 40


class Segments:
    """Every sample once: picks of a dataset that has run out are left out.

    Between two blocks in which some dataset runs out, every block has the same limits: how many of each dataset's picks
    are still served. So the block of a position is a division inside the right segment.
    """

    def __init__(self, picks: Picks, lengths: list[int]) -> None:
        self.picks = picks
        length = self.lengths = np.array(lengths, dtype=np.int64)
        quota = picks.quotas
        last = length // np.maximum(quota, 1)
        starts = np.unique(np.concatenate([[0], last, last + 1]))
        self.starts = starts
        self.limits = np.clip(length[None, :] - starts[:, None] * quota[None, :], 0, quota[None, :])
        self.rates = self.limits.sum(axis=1)
        blocks = np.diff(starts, append=starts[-1] + 1)
        self.before = np.concatenate([[0], np.cumsum(self.rates * blocks)[:-1]])
        self.offsets: dict[tuple[int, int], I64] = {}

    def _blocks(self, positions: I64) -> tuple[I64, I64, I64]:
        """Segment, block, and place among the picks served in it."""
        segment = np.searchsorted(self.before, positions, side="right") - 1
        blocks, inside = np.divmod(positions - self.before[segment], np.maximum(self.rates[segment], 1))
        return segment, blocks + self.starts[segment], inside

    def locate(self, positions: I64) -> tuple[npt.NDArray[Any], I64]:
        """As `Layout.locate`."""
        picks = self.picks
        segment, blocks, inside = self._blocks(positions)
        chosen = picks.choose(blocks)
        source, number = np.empty_like(positions), np.empty_like(positions)
        joint = segment * _PATTERNS + chosen
        for value in np.unique(joint).tolist():
            here = np.flatnonzero(joint == value)
            offsets = self._served(*divmod(value, _PATTERNS))[inside[here]]
            pool = value % _PATTERNS
            source[here], number[here] = picks.of(pool)[offsets], picks.number(pool)[offsets]
        return source, blocks * picks.quotas[source] + number

    def counts(self, count: int) -> I64:
        """Rows of each dataset among the first ``count``, int64 of shape [k]."""
        segment, blocks, inside = self._blocks(np.array([count], dtype=np.int64))
        found = np.minimum(blocks * self.picks.quotas, self.lengths)
        if inside[0]:
            pool = int(self.picks.choose(blocks)[0])
            places = self._served(int(segment[0]), pool)[: int(inside[0])]
            found = found + np.bincount(self.picks.of(pool)[places], minlength=len(self.lengths))
        return np.where(self.picks.quotas > 0, found, 0)

    def _served(self, segment: int, pattern: int) -> I64:
        """Places in a pattern whose picks are served in a segment."""
        known = self.offsets.get((segment, pattern))
        if known is None:
            picks = self.picks
            if len(self.offsets) >= 256:
                self.offsets.clear()
            known = np.flatnonzero(picks.number(pattern) < self.limits[segment][picks.of(pattern)])
            self.offsets[segment, pattern] = known
        return known


class LaneEdits:
    """Weights that were changed on the way (`DataLoader.set_weights`), as one lane sees them.

    The run knows the edits of each mix, in order. A lane places one where it first picks after hearing of it: at a pass and
    a number of picks, which its state keeps, so that whatever is read again is picked by the weights of then.

    State: ``{path of the mix: [[edit, pass, pick], ...]}``.
    """

    def __init__(self, known: Mapping[str, list[dict[str, float]]], placed: State = None) -> None:
        self.known, self.placed = known, {path: list(places) for path, places in (placed or {}).items()}

    def of(self, path: str) -> MixEdits | None:
        """Those of one mix; None where there are none."""
        known = self.known.get(path)
        return MixEdits(known, self.placed.setdefault(path, [])) if known else None

    def state(self) -> State:
        """Where edits were placed."""
        return {path: [list(place) for place in places] for path, places in self.placed.items() if places}

    def forget(self) -> None:
        """Keep only the last of each mix: a new epoch begins."""
        for places in self.placed.values():
            del places[:-1]


class MixEdits:
    """The part of `LaneEdits` that is of one mix."""

    __slots__ = ("known", "placed")

    def __init__(self, known: list[dict[str, float]], placed: list[list[int]]) -> None:
        self.known, self.placed = known, placed

    def at(self, pass_: int, picks: int, *, live: bool) -> int:
        """The edit in force at a pick, -1 for none; where the pick is not read again, what is new is placed here."""
        last = len(self.known) - 1
        if live and (not self.placed or self.placed[-1][0] < last):
            self.placed.append([last, pass_, picks])
        found = -1
        for number, *place in self.placed:
            if place <= [pass_, picks]:
                found = number
        return found

    def weights(self, number: int, pass_: int) -> tuple[dict[str, float], int]:
        """The weights of an edit, and the first pick of this pass that is by them."""
        first = next(picks if place == pass_ else 0 for edit, place, picks in self.placed if edit == number)
        return self.known[number], first
