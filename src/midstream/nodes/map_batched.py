"""MapBatched: calls a function on groups of samples, columns in and columns out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from midstream.common.plain_state import State
from midstream.common.validation import require_callable, require_int
from midstream.errors import ReplayDiverged, SourceError
from midstream.nodes.parts import part_origin, require_depth
from midstream.nodes.user_function import RAISE, Call, ErrorPolicy
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import FailedSample, callable_name, describe_callable
from midstream.pipeline.iterator import Iterator, Lane, SafePoint
from midstream.pipeline.node import BoundNode, Node
from midstream.pipeline.patience import Patience
from midstream.pipeline.rows import PARTS, Item, join_origins

_NO_ORIGINS = np.empty((0, 5), dtype=np.int64)
"""Origins of a whole group that failed: none, for no single row is to blame."""


@dataclass(frozen=True, eq=False, repr=False)
class MapBatched(Node):
    """Replaces every group of ``batch_size`` samples by the samples that ``fn`` returns. A stream.

    ``fn`` gets the columns of a group and returns columns or samples, of any length, as in Hugging
    Face ``datasets``. A group is of consecutive samples of a lane; the last one may be smaller.
    Where ``fn`` returns as many samples as it got, sample i has the origin of input i. Otherwise
    each is a part of all rows of its group, as in `FlatMap`. Samples of groups that became nothing
    are counted by source. When ``fn`` raises, its whole group is lost.

        batch_size 3    a b c | d e f | g      fn makes A B of a b c, C D E of d e f, F of g
        output          A B     C D E   F      state after C: before d, taken 3, part 1

    State: ``{"source", "taken", "part", "number"}``: state of the input before the group in
        progress, inputs taken of that group, samples of it delivered, groups before it.
    Resume: reads the group in progress again, at most ``batch_size`` inputs and the failures
        between them, and calls the function once for it.
    """

    source: Node
    fn: Callable[[Any], Any]
    batch_size: int = 1000
    errors: ErrorPolicy = RAISE
    kind = "map_batched"
    makes_parts = True
    random_access = False
    batch_rows = None

    def __post_init__(self) -> None:
        require_callable(self.fn, "map")
        require_int(self.batch_size, "batch_size", 1, "map")
        if self.batch_size >= PARTS:
            raise ValueError(f"map: batch_size is below {PARTS:,}; found {self.batch_size:,}")
        self.errors.check(("raise", "skip", "refill"), "map")
        require_depth(self)

    def spec_fields(self) -> dict[str, State]:
        """The function's name, the size of a group, and ``on_error`` if not the default."""
        return {
            "fn": callable_name(self.fn),
            "batch_size": int(self.batch_size),
            **self.errors.spec_fields(),
        }

    def replay_bound(self) -> str:
        """See `Node.replay_bound`."""
        return f"at most {self.batch_size:,} inputs of a lane"

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _MapBatchedIterator(self, bound, lane, key, pass_)


class _MapBatchedIterator(Iterator):
    def __init__(
        self, node: MapBatched, bound: BoundNode, lane: Lane, key: int, pass_: int
    ) -> None:
        self.node, self.bound, self.lane, self.pass_ = node, bound, lane, pass_
        # Moved between two groups.
        self.source = SafePoint(iterate(bound.input, lane, key, pass_), bound.path)
        fn = node.fn
        self.call = Call(bound, fn, node.errors, lambda samples, _: fn(samples))
        self.number = 0
        self.patience = Patience(node.source.infinite)
        self._clear()

    def _clear(self) -> None:
        """Forget the group; the next one begins at the next input."""
        self.source.move()
        self.held: list[Item] = []
        self.made: list[Any] = []
        self.origins: Any = None
        self.part = 0

    def _next(self) -> Item:
        while True:
            if self.part < len(self.made):
                return self._emit()
            ended = False
            for _ in range(self.node.batch_size - self.source.since):
                try:
                    item = self.source.next()
                except StopIteration:
                    ended = True
                    break
                if type(item[0]) is FailedSample:
                    return item
                self.held.append(item)
            if self.held:
                failed = self._make()
                if failed is not None:
                    origins = self.origins
                    self._clear()
                    self.number += 1
                    return failed, origins
                if self.made:
                    self.patience.count = 0
                    continue
                self._count_emptied()
            elif ended:
                self._clear()  # the state is the input's at its end, even if one was taken before
                raise StopIteration
            self._clear()
            self.number += 1

    def _emit(self) -> Item:
        part = self.part
        sample = self.made[part]
        parts = len(self.made)
        origins = (
            self.held[part][1]
            if parts == len(self.held)
            else part_origin(self.origins, part, parts)
        )
        self.part = part + 1
        if self.part == parts:
            self._clear()
            self.number += 1
        return sample, origins

    def _make(self) -> FailedSample | None:
        """Call the function on the group; return a `FailedSample` when it raises."""
        self.origins = join_origins(self.held)
        if self.bound.trail is not None:
            self.bound.trail.rows(self.origins)
        samples = [sample for sample, _ in self.held]
        try:
            self.made = rows_of(self.call.call(columns_of(samples), self.origins))
        except Exception as error:
            return self.call.failed(error, _NO_ORIGINS, samples)
        return None

    def _count_emptied(self) -> None:
        """Count the samples of a group that became nothing.

        Raises:
            SourceError: If there were too many in a row, and the input never ends.
        """
        counts: dict[str, int] = {}
        for _, origins in self.held:
            source = origins[0] if type(origins) is tuple else int(origins[0, 0])
            key = f"emptied|{self.bound.path}|{source}"
            counts[key] = counts.get(key, 0) + 1
        self.lane.ledger.count(self.bound.path, self.pass_, self.number, counts)
        if self.patience.exhausted_by(len(self.held)):
            raise SourceError(
                f"{self.bound.path}: {describe_callable(self.node.fn)} made nothing of"
                f" {self.patience.count:,} samples in a row, and the input never ends. Try it on a"
                " few samples"
            )

    def _state(self) -> State:
        _, taken, source = self.source.snapshot()
        return {"source": source, "taken": taken, "part": self.part, "number": self.number}

    def _load(self, state: State) -> None:
        self._clear()
        self.number, self.patience.count = state["number"], 0
        taken, part = state["taken"], state["part"]
        items = self.source.load([taken, taken, state["source"]])
        self.held = [item for item in items if type(item[0]) is not FailedSample]
        if part:
            self._load_part(part)

    def _load_part(self, part: int) -> None:
        """Call the function again for the group of which ``part`` samples were delivered."""
        failed = self._make() if self.held else None
        taken = self.source.since
        if taken < self.node.batch_size and next(self.source.upstream, None) is not None:
            raise ReplayDiverged(
                f"{self.bound.path}: the group in progress was the last, of {taken} samples, when"
                " the state was saved, and there are more now; has the data changed?"
            )
        if failed is not None or len(self.made) <= part:
            raise ReplayDiverged(
                f"{self.bound.path}: the group in progress had more than {part} samples when the"
                f" state was saved and has {len(self.made)} now; has the data or the function"
                " changed?"
            )
        self.part = part


def columns_of(samples: list[Any]) -> Any:
    """Return the function's argument: dicts as one dict of lists, other samples as a list.

    Raises:
        ValueError: If the dicts have different keys.
    """
    first = samples[0]
    if not isinstance(first, Mapping):
        return samples
    for number, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or sample.keys() != first.keys():
            found = (
                sorted(map(str, sample)) if isinstance(sample, Mapping) else type(sample).__name__
            )
            raise ValueError(
                f"samples of a group have different keys: expected {sorted(map(str, first))}, found"
                f" {found} in sample {number}; give them the same keys with .map before"
            )
    return {key: [sample[key] for sample in samples] for key in first}


def rows_of(result: Any) -> list[Any]:
    """Return the samples in a function's result: a dict of columns, or a list of samples.

    Raises:
        TypeError: If it is neither, or a sample is None.
        ValueError: If columns differ in length, or there are too many samples.
    """
    if isinstance(result, Mapping):
        columns = {key: _as_list(key, column) for key, column in result.items()}
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns that the function returned differ in length: {lengths}")
        rows: list[Any] = [dict(zip(columns, values)) for values in zip(*columns.values())]
    elif isinstance(result, (list, tuple)):
        rows = list(result)
        if any(row is None for row in rows):
            raise TypeError("the function returned None for a sample; leave samples out instead")
    else:
        raise TypeError(
            "with batched=True the function returns a dict of columns (lists or arrays, one entry"
            f" for each sample), or a list of samples; found {type(result).__name__}"
        )
    if len(rows) >= PARTS:
        raise ValueError(f"one group became {len(rows):,} samples; the most is {PARTS - 1:,}")
    return rows


def _as_list(key: Any, column: Any) -> list[Any]:
    """Return the values of a column, one for each sample."""
    if isinstance(column, (np.ndarray, torch.Tensor)):
        if column.ndim:
            return column.tolist() if column.ndim == 1 else list(column)
    elif isinstance(column, Sequence) and not isinstance(column, (str, bytes)):
        return list(column)
    raise TypeError(
        "with batched=True a column has one entry for each sample: a list or an array; found"
        f" {type(column).__name__} for {key!r}"
    )
