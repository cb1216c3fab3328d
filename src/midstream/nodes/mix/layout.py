"""Closed forms for mixes of random-access datasets: which row of which dataset is at a position.

Picks, blocks, quotas and patterns are defined in `midstream.nodes.mix.picks`. A *phase* is a part
of the mix with one set of weights; a mix without a schedule has one phase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from midstream.nodes.mix.picks import PATTERNS, Picks
from midstream.pipeline.rows import I64

PASSES = 1 << 20
"""Passes over one dataset that are numbered within one epoch, when their number is not known."""


class _Phase:
    """One phase of a layout: a stretch of the mix with one set of weights.

    Attributes:
        start: The position of the mix at which the phase begins.
        taken: int64, shape [datasets]: rows of each dataset before the phase.
        number: Number of the phase, and of its choice sequence.
        segments: With ``all_exhausted_without_replacement``: which picks give a sample. Else None.
    """

    __slots__ = ("number", "segments", "start", "taken")

    def __init__(self, start: int, taken: I64, number: int, segments: Segments | None) -> None:
        self.start, self.taken, self.number, self.segments = start, taken, number, segments


class Layout:
    """Computes the length of a mix, and the dataset and row at any position of it.

    In each phase picks are counted from 0, and dataset c continues at its row ``taken[c]``.

    Attributes:
        length: Samples of the mix; None when it is endless.
        lengths: Rows of each dataset; 0 for endless ones.
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
        """Lays out the phases.

        Args:
            borders: The position at which each phase begins; the first is 0.
            picks: Gives the choice sequence of a phase, by its number.
            names: Names of the datasets.
            lengths: Rows of each dataset; None for endless ones.
            strategy: The stopping strategy.
            many: Number passes as if there were `PASSES` of each dataset, because the length of the
                mix may change within an epoch.
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
                        f"interleave: {names[index]!r} has no rows, so with all_exhausted it can"
                        " neither be read nor start over; leave it out or give it the weight 0"
                    )
        taken, start = np.zeros(len(lengths), dtype=np.int64), 0
        self.length: int | None = None
        for number in range(len(borders)):
            limit = max(0, borders[number + 1] - start) if number + 1 < len(borders) else None
            later = np.any(quotas[number:], axis=0)
            phase = _Phase(start, taken, number, self._segments(number, taken))
            self.phases.append(phase)
            end = self._end(phase, later.tolist())
            # A dataset that runs out exactly at a border ends the mix only if it has a weight after
            # it: the next phase decides.
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
        """Sets ``repeats``: passes over each dataset, when datasets start over."""
        last = self.phases[-1]
        picks = self.picks(last.number)
        blocks = 0 if self.length is None else -(-(self.length - last.start) // picks.block)
        for index, length in enumerate(self.lengths):
            used = any(self.picks(phase.number).quotas[index] for phase in self.phases)
            if self.endless[index] or not used:
                continue
            most = int(last.taken[index]) + blocks * int(picks.quotas[index])
            self.repeats[index] = (
                PASSES if many or self.length is None else max(1, -(-most // length))
            )

    def _segments(self, number: int, taken: I64) -> Segments | None:
        """The segments of phase ``number``, for the strategy that leaves exhausted datasets out."""
        if self.strategy != "all_exhausted_without_replacement":
            return None
        picks = self.picks(number)
        left = [
            _endless_length(quota) if endless else max(0, length - used)
            for length, endless, used, quota in zip(
                self.lengths, self.endless, taken.tolist(), picks.quotas.tolist()
            )
        ]
        return Segments(picks, left)

    def _end(self, phase: _Phase, later: list[bool]) -> int | None:
        """Where the mix would end if this phase were the last, counted from its start; None: never.

        Args:
            phase: The phase.
            later: For each dataset, whether it has a weight in this phase or a later one.
        """
        picks = self.picks(phase.number)
        here = [index for index, quota in enumerate(picks.quotas.tolist()) if quota]
        left = {
            index: max(0, self.lengths[index] - int(phase.taken[index]))
            for index in range(len(self.lengths))
            if not self.endless[index]
        }
        if self.strategy == "first_exhausted":
            ends = [
                picks.end(index, left[index]) if left[index] else 0
                for index in here
                if index in left
            ]
            return min(ends, default=None)
        if self.strategy == "all_exhausted_without_replacement":
            return (
                sum(left[index] for index in here) if all(index in left for index in here) else None
            )
        missing = [index for index, counts in enumerate(later) if counts and left.get(index, 1)]
        if any(index not in left or index not in here for index in missing):
            return None
        return max((picks.end(index, left[index]) for index in missing), default=0)

    def _counts(self, phase: _Phase, count: int) -> I64:
        """Rows of each dataset among the first ``count`` of a phase: int64, shape [datasets]."""
        return (
            phase.segments.counts(count)
            if phase.segments is not None
            else self.picks(phase.number).counts(count)
        )

    def counts(self, position: int) -> I64:
        """Rows of each dataset before a position of the mix: int64, shape [datasets]."""
        phase = next(phase for phase in reversed(self.phases) if phase.start <= position)
        return phase.taken + self._counts(phase, position - phase.start)

    def locate(self, positions: I64) -> tuple[npt.NDArray[Any], I64]:
        """For positions of the mix, int64 of shape [n]: index of the dataset and position in it."""
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
        return (
            phase.segments.locate(positions)
            if phase.segments
            else self.picks(phase.number).locate(positions)
        )


def _endless_length(quota: int) -> int:
    """A length for an endless dataset: 2**40 blocks, which no run reaches, and without overflow."""
    return max(1, quota) << 40


class Segments:
    """Closed forms for ``all_exhausted_without_replacement``: every sample comes once.

    A pick gives a sample (it is *served*) if its dataset still has rows; other picks are left out.
    A *segment* is a run of blocks in which no dataset runs out, or one block in which some do. All
    blocks of a segment serve the same number of picks of each dataset, so the block of a position
    is one division within its segment.

    Attributes:
        starts: int64, shape [segments]: the first block of each segment.
        limits: int64, shape [segments, datasets]: picks of each dataset that a block serves.
        rates: int64, shape [segments]: picks that a block serves.
        before: int64, shape [segments]: samples before each segment.
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
        """The segment and block of each position, and its index among the block's served picks."""
        segment = np.searchsorted(self.before, positions, side="right") - 1
        blocks, inside = np.divmod(
            positions - self.before[segment], np.maximum(self.rates[segment], 1)
        )
        return segment, blocks + self.starts[segment], inside

    def locate(self, positions: I64) -> tuple[npt.NDArray[Any], I64]:
        """See `Layout.locate`."""
        picks = self.picks
        segment, blocks, inside = self._blocks(positions)
        chosen = picks.choose(blocks)
        source, number = np.empty_like(positions), np.empty_like(positions)
        joint = segment * PATTERNS + chosen
        for value in np.unique(joint).tolist():
            here = np.flatnonzero(joint == value)
            offsets = self._served(*divmod(value, PATTERNS))[inside[here]]
            pattern = value % PATTERNS
            source[here] = picks.of(pattern)[offsets]
            number[here] = picks.number(pattern)[offsets]
        return source, blocks * picks.quotas[source] + number

    def counts(self, count: int) -> I64:
        """Rows of each dataset among the first ``count`` samples: int64, shape [datasets]."""
        segment, blocks, inside = self._blocks(np.array([count], dtype=np.int64))
        found = np.minimum(blocks * self.picks.quotas, self.lengths)
        if inside[0]:
            pattern = int(self.picks.choose(blocks)[0])
            served = self._served(int(segment[0]), pattern)[: int(inside[0])]
            sources = self.picks.of(pattern)[served]
            found = found + np.bincount(sources, minlength=len(self.lengths))
        return np.where(self.picks.quotas > 0, found, 0)

    def _served(self, segment: int, pattern: int) -> I64:
        """The picks of a pattern that are served in a segment, ascending indices."""
        known = self.offsets.get((segment, pattern))
        if known is None:
            picks = self.picks
            if len(self.offsets) >= 256:
                self.offsets.clear()
            known = np.flatnonzero(picks.number(pattern) < self.limits[segment][picks.of(pattern)])
            self.offsets[segment, pattern] = known
        return known
