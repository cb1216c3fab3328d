"""Counts of one lane over the whole run: samples, rows, tokens and events by source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from midstream.common.plain_state import Fragment, encode
from midstream.pipeline.ledger import add_counts
from midstream.pipeline.rows import I64, PARTS

END = "/end of epoch|"
"""Part of the key of an event that a rank counted at its end of the epoch.

It is provisional on several ranks: other ranks may not have come to their end.
"""


class LaneCounts:
    """Counts of one lane (random access: of one rank), over the whole run."""

    __slots__ = ("_texts", "events", "rows", "samples", "tokens")

    def __init__(self, num_sources: int, lane: Mapping[str, Any] | None = None) -> None:
        self.samples = np.zeros(num_sources, dtype=np.int64)
        self.rows = np.zeros(num_sources, dtype=np.int64)
        self.tokens = np.zeros(num_sources, dtype=np.int64)
        self.events: dict[str, int] = {}
        self._texts: dict[str, Fragment] | None = None
        if lane is not None:
            for counts, found in (
                (self.samples, lane["samples"]),
                (self.rows, lane["rows"]),
                (self.tokens, lane.get("tokens", [])),
            ):
                known = min(num_sources, len(found))
                counts[:known] = found[:known]
            self.events = dict(lane["events"])

    def plus(self, origins: I64 | None, events: Mapping[str, int] | None) -> LaneCounts:
        """The counts after a batch, as another object.

        Args:
            origins: Of its samples, int64 of shape [m, 5]; None for no batch.
            events: What was dropped before it.
        """
        # Once per batch in the main process: copy.copy would be the slowest part of it.
        other = LaneCounts.__new__(LaneCounts)
        other.samples, other.rows, other.tokens, other.events = (
            self.samples,
            self.rows,
            self.tokens,
            self.events,
        )
        other._texts = None
        if origins is not None and len(origins):
            size = len(self.samples)
            source = origins[:, 0]
            if not origins[:, 3:].any():  # whole rows, and no node that counts tokens
                counts = np.bincount(source, minlength=size)
                other.rows, other.samples = self.rows + counts, self.samples + counts
                return other._with(events)
            part, tokens = origins[:, 3], origins[:, 4]
            other.rows = self.rows + np.bincount(source[part == 0], minlength=size)
            if tokens.any():
                # As floats the counts of a batch are exact; `np.add.at` takes five times as long.
                other.tokens = self.tokens + np.bincount(source, tokens, minlength=size).astype(
                    np.int64
                )
                source = source[
                    (tokens == 0) | (part % PARTS == 0)
                ]  # further pieces of a document are no samples
            other.samples = self.samples + np.bincount(source, minlength=size)
        return other._with(events)

    def texts(self) -> dict[str, Fragment]:
        """The counts by source as in a checkpoint.

        Encoded once: from one state to the next most lanes do not change.
        """
        if self._texts is None:
            samples = Fragment(encode(self.samples.tolist()))
            same = np.array_equal(self.rows, self.samples)
            self._texts = {
                "samples": samples,
                "rows": samples if same else Fragment(encode(self.rows.tolist())),
            }
            if self.tokens.any():
                self._texts["tokens"] = Fragment(encode(self.tokens.tolist()))
        return self._texts

    def passed_over(
        self, origins: I64 | None, events: Mapping[str, int] | None, path: str
    ) -> LaneCounts:
        """The counts after a batch that `DataLoader.skip` passed over.

        Its rows were read, and nothing was delivered.
        """
        other = self.plus(origins, events)
        skipped: dict[str, int] = {}
        for kind, after, before in (
            ("skipped", other.samples, self.samples),
            ("tokens skipped", other.tokens, self.tokens),
        ):
            for source, count in enumerate((after - before).tolist()):
                if count:
                    skipped[f"{kind}|{path}|{source}"] = count
        other.samples, other.tokens = self.samples, self.tokens
        return other._with(skipped)

    def with_ends_resolved(self, keep: bool) -> LaneCounts:
        """Resolves provisional end-of-epoch counts.

        Args:
            keep: True makes them permanent. False removes them, when the epoch turns out not to be
                over.
        """
        ends = {key: count for key, count in self.events.items() if END in key}
        if not ends:
            return self
        kept = {key.replace(END, "|"): count for key, count in ends.items()} if keep else {}
        return self.plus(None, add_counts(kept, {key: -count for key, count in ends.items()}))

    def _with(self, events: Mapping[str, int] | None) -> LaneCounts:
        """Add events in place: for an object that nobody else holds yet."""
        if events:
            self.events = dict(self.events)
            for key, count in events.items():
                self.events[key] = self.events.get(key, 0) + count
                if not self.events[key]:
                    del self.events[key]
        return self
