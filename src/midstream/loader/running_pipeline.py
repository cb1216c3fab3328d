"""The pipeline of one epoch with all changes of the run, and facts about it that a loader needs."""

from __future__ import annotations

import functools

from midstream.changes.running import running
from midstream.checkpoint.changes import NO_CHANGES, Changes
from midstream.checkpoint.spec import Paths
from midstream.common.plain_state import decode, encode
from midstream.nodes.batch import Batch
from midstream.pipeline import describe
from midstream.pipeline.node import Node, bind


class RunningPipeline:
    """A pipeline as it runs in one epoch. It knows no loader: no cycle keeps workers alive.

    Args:
        original: The pipeline as the loader was given it.
        changes: The changes of the run.
        epoch: The epoch; -1 for any epoch in which no weights were changed midway.

    Attributes:
        node: The pipeline that runs.
        bound: The same, bound.
        names: The names of its sources.
    """

    def __init__(self, original: Node, changes: Changes = NO_CHANGES, epoch: int = -1) -> None:
        self.original, self.changes = original, changes
        self.node = running(original, changes, epoch)
        self.bound = bind(self.node)
        self.names = self.bound.names

    @functools.cached_property
    def spec(self) -> str:
        """The original pipeline as data, encoded: made when a state is first asked for."""
        return encode(describe.spec(self.original))

    @functools.cached_property
    def paths(self) -> Paths:
        """The numbers of the nodes."""
        return Paths(decode(self.spec))

    def left_out(self, batch: int) -> int:
        """Rows that a sized epoch leaves out when no rank makes ``batch`` and the batches after it.

        They are the rows of these batches, and those that ``.batch(n, drop_last=True)`` drops.
        """
        if not self.node.random_access or (total := self.node.length()) is None:
            return 0
        node = self._batch
        if node is None:
            return max(0, total - batch)
        rows = node.source.length() or 0
        if batch < total:
            return max(0, rows - batch * node.batch_size)
        return rows - min(rows, total * node.batch_size)

    def samples(self, first: int, end: int) -> tuple[int, int] | None:
        """Samples in the batches ``first`` to ``end``, and as many as there would be in whole ones.

        None if the pipeline does not end in batches.
        """
        node = self._batch
        if node is None:
            return None
        return self.left_out(first) - self.left_out(end), (end - first) * int(node.batch_size)

    @property
    def _batch(self) -> Batch | None:
        node = self.node
        while node.one_to_one:
            (node,) = node.inputs().values()
        return node if isinstance(node, Batch) else None
