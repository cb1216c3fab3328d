"""Counts the source rows that a pipeline reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from midstream.pipeline.node import BoundNode
from midstream.sources.shards import ShardIterator


class Reads:
    """Number of source rows read in this process."""

    rows = 0


@contextlib.contextmanager
def counting_reads() -> Iterator[Reads]:
    """Counts the source rows that midstream pipelines read in this process, inside the block."""
    reads = Reads()
    rows, init = BoundNode.rows, ShardIterator.__init__

    def counted_rows(bound: BoundNode, positions: Any, *args: Any, **options: Any) -> Any:
        if bound.source >= 0:
            reads.rows += len(positions)
        return rows(bound, positions, *args, **options)

    def counted_init(iterator: Any, shards: Any, *args: Any) -> None:
        counted: Any = _CountedShards(shards, reads)
        init(iterator, counted, *args)

    with (
        mock.patch.object(BoundNode, "rows", counted_rows),
        mock.patch.object(ShardIterator, "__init__", counted_init),
    ):
        yield reads


class _CountedShards:
    def __init__(self, shards: Any, reads: Reads) -> None:
        self._shards, self._reads = shards, reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shards, name)

    def open(self, shard: int, state: Any) -> Iterator[Any]:
        return _CountedRows(self._shards.open(shard, state), self._reads)


class _CountedRows:
    def __init__(self, rows: Iterator[Any], reads: Reads) -> None:
        self._rows, self._reads = rows, reads

    def __iter__(self) -> _CountedRows:
        return self

    def __next__(self) -> Any:
        self._reads.rows += 1
        return next(self._rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)
