"""The pipeline of an epoch, and facts about it that the loader needs."""

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
    """What a position has to know of its loader's pipeline. No way back to the loader: no cycle
    keeps workers alive.
    """

    def __init__(self, pipeline: Node, changes: Changes = NO_CHANGES, epoch: int = -1) -> None:
        self.pipeline, self.changes = pipeline, changes
        self.running = running(pipeline, changes, epoch)
        self.bound = bind(self.running)
        self.names = self.bound.names

    @functools.cached_property
    def spec(self) -> str:
        """The pipeline as data, encoded: made when a state is first asked for."""
        return encode(describe.spec(self.pipeline))

    @functools.cached_property
    def paths(self) -> Paths:
        """Numbers of the nodes."""
        return Paths(decode(self.spec))

    def left_out(self, batch: int) -> int:
        """Rows that an epoch of a sized pipeline leaves out when ``batch`` is the first batch that nobody makes.

        Those of the batches from there on, and what a ``.batch(n, drop_last=True)`` drops.
        """
        if not self.running.random_access or (total := self.running.length()) is None:
            return 0
        node = self._batch
        if node is None:
            return max(0, total - batch)
        rows = node.source.length() or 0
        return (
            max(0, rows - batch * node.batch_size)
            if batch < total
            else rows - min(rows, total * node.batch_size)
        )

    def samples(self, first: int, end: int) -> tuple[int, int] | None:
        """How many there are in batches ``first`` to ``end`` of a sized pipeline, and how many if all were there and whole.

        None if batches are not the last thing that it makes.
        """
        node = self._batch
        if node is None:
            return None
        return self.left_out(first) - self.left_out(end), (end - first) * int(node.batch_size)

    @property
    def _batch(self) -> Batch | None:
        node = self.running
        while node.one_to_one:
            (node,) = node.inputs().values()
        return node if isinstance(node, Batch) else None
