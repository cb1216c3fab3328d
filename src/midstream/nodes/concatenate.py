"""Concatenate: reads one dataset after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from midstream.common.plain_state import State
from midstream.pipeline import describe
from midstream.pipeline.cursor import iterate
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node, Selection, bind
from midstream.pipeline.rows import I64, U64, Item, pick


@dataclass(frozen=True, eq=False, repr=False)
class Concatenate(Node):
    """Reads one dataset after the other; random access where all of them are.

    On a stream, every lane reads one dataset after the other.

    State: random access: none but the position. Stream: ``[index of the dataset being read, its
        state]``.
    Resume: reads nothing again.
    """

    datasets: tuple[Node, ...]
    kind = "concatenate"

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("concatenate takes at least one dataset; found none")
        for index, dataset in enumerate(self.datasets[:-1]):
            if dataset.infinite:
                raise ValueError(
                    f"dataset {index} of concatenate never ends, so what follows is never"
                    f" read:\n{describe.tree(dataset)}"
                )
        bind(self)

    def inputs(self) -> dict[str, Node]:
        """The datasets, named by their numbers."""
        return {str(index): dataset for index, dataset in enumerate(self.datasets)}

    def with_inputs(self, inputs: Mapping[str, Node]) -> Concatenate:
        """See `Node.with_inputs`."""
        return dataclasses.replace(
            self, datasets=tuple(inputs[str(index)] for index in range(len(self.datasets)))
        )

    def taken_of(self, name: str, count: int) -> int:
        """See `Node.taken_of`."""
        return max(0, count - sum(dataset.length() or 0 for dataset in self.datasets[: int(name)]))

    def _length(self) -> int | None:
        lengths = [dataset.length() for dataset in self.datasets]
        return (
            None if lengths[-1] is None else sum(length for length in lengths if length is not None)
        )

    def block_sizes(self) -> I64 | None:
        """Sizes of all blocks, where every input has blocks."""
        sizes = [dataset.block_sizes() for dataset in self.datasets]
        return None if any(size is None for size in sizes) else np.concatenate(sizes)  # type: ignore[arg-type]

    def _select(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> list[Selection]:
        ends = np.cumsum(
            [length for dataset in self.datasets if (length := dataset.length()) is not None]
        )
        number = np.searchsorted(ends, positions, side="right")
        parts: list[Selection] = []
        for index in np.unique(number).tolist():
            here = np.flatnonzero(number == index)
            start = int(ends[index - 1]) if index else 0
            child = bound.inputs[str(index)]
            parts.append(
                Selection(
                    child, positions[here] - start, pick(keys, here), pick(passes, here), here
                )
            )
        return parts

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _ConcatenateIterator(bound, lane, key, pass_)


class _ConcatenateIterator(Iterator):
    def __init__(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        self.bound, self.lane, self.key, self.pass_ = bound, lane, key, pass_
        self._start(0)

    def _start(self, index: int) -> None:
        self.index = index
        self.source = iterate(self.bound.inputs[str(index)], self.lane, self.key, self.pass_)

    def _next(self) -> Item:
        while True:
            try:
                return next(self.source)
            except StopIteration:
                if self.index + 1 == len(self.bound.inputs):
                    raise
                self._start(self.index + 1)

    def _state(self) -> State:
        return [self.index, self.source.snapshot()]

    def _load(self, state: State) -> None:
        index, source = state
        self._start(index)
        self.source.load(source)
