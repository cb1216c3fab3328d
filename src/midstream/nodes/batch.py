"""Batch: groups samples and collates them. The collate functions are in collate.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.common.plain_state import MISSING, State
from midstream.common.validation import require_callable, require_int
from midstream.nodes.collate import collate, column_form
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import (
    FailedSample,
    SampleFailure,
    callable_name,
    describe_callable,
)
from midstream.pipeline.iterator import Iterator, Lane, SafePoint
from midstream.pipeline.node import BoundNode, Node, Selection
from midstream.pipeline.rows import I64, U64, Item, LazyBatches, Rows, join_origins, pick


@dataclass(frozen=True, eq=False, repr=False)
class Batch(Node):
    """Groups ``batch_size`` samples and collates them. Random access where the input is.

    When user code failed on a sample, its batch is one shorter over random access; over a stream
    the next sample takes its place. When the collate function raises, the whole batch is lost. A
    sample that `DataLoader.exclude` left out makes its batch shorter in both cases; a batch of
    which nothing is left is not delivered.

    State: random access: none but the position. Stream: ``[inputs taken, inputs since, state of the
        input]``, the last one as it was between two batches.
    Resume: random access: reads nothing again. Stream: nothing, unless the state was saved between
        an error and the rest of its batch. Then the batch's inputs so far are read again: at most
        ``batch_size - 1`` samples and the failures between them.
    """

    source: Node
    batch_size: int
    drop_last: bool = False
    collate_fn: Callable[[list[Any]], Any] | None = None
    kind = "batch"

    def __post_init__(self) -> None:
        require_int(self.batch_size, "batch_size", 1, "batch")
        if self.collate_fn is not None:
            require_callable(self.collate_fn, "batch: collate_fn")

    @property
    def batch_rows(self) -> int | None:
        """The batch size."""
        return int(self.batch_size)

    def _length(self) -> int | None:
        length = self.source.length()
        if length is None:
            return None
        return length // self.batch_size if self.drop_last else -(-length // self.batch_size)

    def taken_of(self, name: str, count: int) -> int:
        """See `Node.taken_of`."""
        return count * int(self.batch_size)

    def spec_fields(self) -> dict[str, State]:
        """Batch size, and each option that is not the default."""
        fields: dict[str, State] = {"batch_size": int(self.batch_size)}
        if self.drop_last:
            fields["drop_last"] = True
        if self.collate_fn is not None and self.collate_fn is not collate:
            fields["collate_fn"] = callable_name(self.collate_fn)
        return fields

    def full_lanes(self, num_lanes: int, block: int) -> tuple[int, str]:
        """As the input, whose blocks are whole batches."""
        if self.random_access:
            return super().full_lanes(num_lanes, block)
        return self.source.full_lanes(num_lanes, block * self.batch_size)

    def _counts(self, positions: I64) -> I64:
        """Number of samples in the batches at these positions, int64 of shape [k]."""
        size, length = int(self.batch_size), self.source.length()
        counts = np.full(len(positions), size, dtype=np.int64)
        return counts if length is None else np.minimum(counts, length - positions * size)

    def _select(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> list[Selection]:
        counts = self._counts(positions)
        ends = np.cumsum(counts)
        which = np.repeat(np.arange(len(positions), dtype=np.int64), counts)
        starts = positions * int(self.batch_size)
        inside = np.arange(int(ends[-1]), dtype=np.int64) + np.repeat(
            starts - ends + counts, counts
        )
        return [Selection(bound.input, inside, pick(keys, which), pick(passes, which))]

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        lazy = self._lazy_rows(bound, positions, keys, passes)
        if not isinstance(lazy, LazyBatches):
            return lazy
        batches = []
        for first, last in zip(lazy.bounds, lazy.bounds[1:]):
            batch = lazy.make(first, last)
            if type(batch) is FailedSample:
                return self._collate_each(bound, lazy.rows, lazy.bounds)
            batches.append(batch)
        return Rows(batches, lazy.origins, np.diff(lazy.bounds))

    def _lazy_rows(
        self, bound: BoundNode, positions: I64, keys: U64, passes: I64
    ) -> Rows | LazyBatches:
        rows = self._select(bound, positions, keys, passes)[0].rows()
        bounds = [0, *np.cumsum(self._counts(positions)).tolist()]
        columns, collate_columns = rows.columns, column_form(self.collate_fn or collate)
        if columns is None or collate_columns is None:
            samples = rows.samples
            if rows.sizes is not None or any(type(sample) is FailedSample for sample in samples):
                return self._collate_each(bound, rows, bounds)
            return LazyBatches(
                rows, bounds, lambda first, last: self._collate(bound, samples[first:last])
            )

        def make(first: int, last: int) -> Any:
            batch = self._collate(bound, columns[first:last], collate_columns)
            if type(batch) is FailedSample:  # the error then is that of a list of samples
                batch = self._collate(bound, columns[first:last].samples())
            return batch

        return LazyBatches(rows, bounds, make)

    def _collate_each(self, bound: BoundNode, rows: Rows, bounds: list[int]) -> Rows:
        """Collate batch by batch, where samples failed or are made of several rows."""
        items = rows.items()
        samples, origins = [], []
        for first, last in zip(bounds, bounds[1:]):
            errors: list[SampleFailure] = []
            good: list[Item] = []
            for sample, origin in items[first:last]:
                if type(sample) is FailedSample:
                    errors.extend(sample.errors)
                    if sample.rest is MISSING:
                        continue
                    sample = sample.rest
                good.append((sample, origin))
            batch = self._collate(bound, [sample for sample, _ in good]) if good else MISSING
            if type(batch) is FailedSample:
                batch.errors[0].rows = join_origins(good)
                errors.extend(batch.errors)
                batch, good = MISSING, []
            samples.append(FailedSample(tuple(errors), batch) if errors else batch)
            origins.append(join_origins(good))
        sizes = np.array([len(origin) for origin in origins], dtype=np.int64)
        return Rows(samples, np.concatenate(origins), sizes)

    def _collate(
        self, bound: BoundNode, samples: Any, collate_columns: Callable[[Any], Any] | None = None
    ) -> Any:
        """Return the batch, or a `FailedSample` when it cannot be made.

        Args:
            bound: This node.
            samples: A list of samples, or `Columns` with ``collate_columns``.
            collate_columns: Collates `Columns` in place of the collate function.
        """
        fn = self.collate_fn or collate
        try:
            batch = (collate_columns or fn)(samples)
            if batch is None:
                raise TypeError("the collate function returned None; it returns the batch")
        except Exception as raised:
            error: Exception = raised
            if isinstance(raised, StopIteration):
                error = RuntimeError(f"the collate function raised StopIteration({raised})")
            return FailedSample((SampleFailure(bound.path, None, describe_callable(fn), error),))
        return batch

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _BatchIterator(self, bound, lane, key, pass_)


class _BatchIterator(Iterator):
    def __init__(self, node: Batch, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        self.node, self.bound, self.lane, self.pass_ = node, bound, lane, pass_
        upstream = iterate(bound.input, lane.widen(int(node.batch_size)), key, pass_)
        self.source = SafePoint(upstream, bound.path)  # moved between two batches
        self.held: list[Item] = []

    def _next(self) -> Item:
        while (item := self._group()) is None:
            pass
        return item

    def _group(self) -> Item | None:
        """Return the next batch or failure; None where all samples of a batch were excluded."""
        size = self.node.batch_size
        while len(self.held) < size:
            try:
                item = self.source.next()
            except StopIteration:
                return self._last()
            if type(item[0]) is FailedSample and item[0].errors[0].outcome != "exclude":
                if not self.held:
                    self.source.move()
                return item
            self.held.append(item)
        return self._emit()

    def _emit(self) -> Item | None:
        held, self.held = self.held, []
        self.source.move()
        if any(type(sample) is FailedSample for sample, _ in held):
            held = self._without_excluded(held)
            if not held:
                return None
        origins = join_origins(held)
        if self.bound.trail is not None:
            self.bound.trail.rows(origins)
        return self.node._collate(self.bound, [sample for sample, _ in held]), origins

    def _without_excluded(self, held: list[Item]) -> list[Item]:
        """Count the excluded samples and return the others."""
        counts: dict[str, int] = {}
        for sample, _ in held:
            if type(sample) is FailedSample:
                origin = sample.errors[0].origin
                assert origin is not None
                key = f"excluded|{self.bound.path}|{self.bound.names.index(origin.source)}"
                counts[key] = counts.get(key, 0) + 1
        self.lane.ledger.count(self.bound.path, self.pass_, self.source.number, counts)
        return [item for item in held if type(item[0]) is not FailedSample]

    def _last(self) -> Item | None:
        """Return the partial batch at the end of the lane, or count it with ``drop_last``."""
        if not self.held:
            raise StopIteration
        if not self.node.drop_last:
            return self._emit()
        for source in join_origins(self.held)[:, 0].tolist():
            self.source.number += 1  # the ledger counts each number once
            self.lane.ledger.dropped(
                "dropped", self.bound.path, source, self.pass_, self.source.number
            )
        self.held = []
        self.source.move()
        raise StopIteration

    def _state(self) -> State:
        return self.source.snapshot()

    def _load(self, state: State) -> None:
        self.held = [
            item
            for item in self.source.load(state)
            if type(item[0]) is not FailedSample or item[0].errors[0].outcome == "exclude"
        ]
