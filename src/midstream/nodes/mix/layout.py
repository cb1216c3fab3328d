"""Closed forms of mixes with random access: which row of which dataset is at a position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from midstream.nodes.mix.picks import PATTERNS, Picks
from midstream.pipeline.rows import I64

PASSES = 1 << 20
"""Passes over one dataset inside an endless epoch, for numbering."""


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

    In each phase of a schedule the picks are counted anew, and dataset c goes on at its row
    ``taken[c]``.

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
            many: Number passes as if there were many, whatever the length: it may change within an
            epoch.
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
            # What runs out just at a border ends the mix if it has a weight beyond it: the next
            # phase says.
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
            self.repeats[index] = (
                PASSES if many or self.length is None else max(1, -(-most // length))
            )

    def _segments(self, number: int, taken: I64) -> Segments | None:
        if self.strategy != "all_exhausted_without_replacement":
            return None
        picks = self.picks(number)
        left = [
            _far(quota) if endless else max(0, length - used)
            for length, endless, used, quota in zip(
                self.lengths, self.endless, taken.tolist(), picks.quotas.tolist()
            )
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
        return (
            phase.segments.counts(count)
            if phase.segments is not None
            else self.picks(phase.number).counts(count)
        )

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
        return (
            phase.segments.locate(positions)
            if phase.segments
            else self.picks(phase.number).locate(positions)
        )


def _far(quota: int) -> int:
    """A length for what never ends: 2**40 blocks, which no run reaches and no product of which
    overflows.
    """
    return max(1, quota) << 40


class Segments:
    """Every sample once: picks of a dataset that has run out are left out.

    Between two blocks in which some dataset runs out, every block has the same limits: how many of
    each dataset's picks are still served. So the block of a position is a division inside the right
    segment.
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
        blocks, inside = np.divmod(
            positions - self.before[segment], np.maximum(self.rates[segment], 1)
        )
        return segment, blocks + self.starts[segment], inside

    def locate(self, positions: I64) -> tuple[npt.NDArray[Any], I64]:
        """As `Layout.locate`."""
        picks = self.picks
        segment, blocks, inside = self._blocks(positions)
        chosen = picks.choose(blocks)
        source, number = np.empty_like(positions), np.empty_like(positions)
        joint = segment * PATTERNS + chosen
        for value in np.unique(joint).tolist():
            here = np.flatnonzero(joint == value)
            offsets = self._served(*divmod(value, PATTERNS))[inside[here]]
            pool = value % PATTERNS
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
