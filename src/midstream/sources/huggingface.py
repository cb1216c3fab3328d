"""A source over a Hugging Face ``datasets.IterableDataset``: a stream, read shard by shard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator as Iter
from dataclasses import dataclass
from typing import Any

import torch.utils.data._utils.worker as torch_worker

from midstream.common.plain_state import State, copy_plain
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node
from midstream.sources.shards import ShardIterator, Shards


@dataclass(frozen=True, eq=False, repr=False)
class IterableSource(Node):
    """Rows of a Hugging Face ``IterableDataset``, shard by shard.

    The stream's own state is recorded every 256 rows of a shard, and the rows since then are
    counted here: right after ``load_state_dict`` its ``state_dict`` does not return what was
    loaded. Streams with a ``shuffle`` of their own lose and repeat rows when resumed, so they are
    refused.

    State: ``[shard, rows read, last row that raised, rows up to the stream's last recorded state,
        that state]``.
    Resume: reads at most 256 rows again, and the rows that the stream's ``load_state_dict`` reads.
    """

    data: Any
    name: str | None = None
    kind = "from_dataset"
    runs_user_iterable = True
    random_access = False
    infinite = False  # not known, so assumed to end

    def __post_init__(self) -> None:
        shuffling = _find_shuffle(self.data._ex_iterable)
        if shuffling:
            raise ValueError(
                f"this IterableDataset is shuffled ({shuffling}), and datasets loses and repeats"
                " rows when such a stream is resumed. Give it to from_dataset without .shuffle and"
                " shuffle here: from_dataset(data).shuffle(seed, buffer_size=10_000)"
            )

        split = getattr(self.data, "_distributed", None)
        if split is not None and split.world_size > 1:
            raise ValueError(
                f"this IterableDataset was split over {split.world_size} ranks by"
                " split_dataset_by_node, and lanes would split it once more. Give it unsplit: the"
                " DataLoader divides the work over ranks (rank=, world_size=)"
            )

    @property
    def _num_shards(self) -> int:
        return int(self.data.num_shards)

    def spec_fields(self) -> dict[str, State]:
        """The columns, if they are known, and the number of shards."""
        columns = self.data.column_names
        return {
            "data": "datasets.IterableDataset",
            "columns": None if columns is None else list(columns),
            "num_shards": self._num_shards,
        }

    def summary(self) -> str:
        """The number of shards."""
        return f"{self.kind}(datasets.IterableDataset, {self._num_shards} shards)"

    def full_lanes(self, num_lanes: int, block: int) -> tuple[int, str]:
        """One lane for each shard."""
        return (
            min(num_lanes, self._num_shards),
            f"the IterableDataset has {self._num_shards} shards",
        )

    def max_lanes(self) -> tuple[int, str] | None:
        """As many lanes as shards."""
        return (
            self._num_shards,
            (
                f"source {self.name or 'data'!r} is an IterableDataset of {self._num_shards}"
                " shards. Use fewer workers, or give it more shards"
                " (to_iterable_dataset(num_shards=n), or .reshard())"
            ),
        )

    def replay_bound(self) -> str:
        """See `Dataset.replay_bound`."""
        return "at most 256 rows of a lane"

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return ShardIterator(_HubShards(self.data), bound, lane, pass_, self._num_shards, False)


class _HubShards(Shards):
    """The shards of an ``IterableDataset``."""

    rows_per_state = 256
    function = "IterableDataset.__iter__"

    def __init__(self, data: Any) -> None:
        self.data = data
        self.shard: Any = None

    def open(self, shard: int, state: State) -> Iter[Any]:
        self.shard = self.data.shard(num_shards=self.data.num_shards, index=shard, contiguous=False)
        if state is not None:
            self.shard.load_state_dict(copy_plain(state))
        return _OutsideWorker(iter(self.shard))

    def state(self) -> State:
        return copy_plain(self.shard.state_dict())


class _OutsideWorker:
    """Starts a Hugging Face stream as if outside a torch worker, where it would split itself a
    second time.
    """

    def __init__(self, rows: Iter[Any]) -> None:
        self.rows, self.started = rows, False

    def __iter__(self) -> _OutsideWorker:
        return self

    def __next__(self) -> Any:
        if self.started:
            return next(self.rows)
        with _no_worker_info():
            row = next(self.rows)
        self.started = True
        return row


@contextlib.contextmanager
def _no_worker_info() -> Iter[None]:
    info = torch_worker._worker_info
    torch_worker._worker_info = None
    try:
        yield
    finally:
        torch_worker._worker_info = info


def _find_shuffle(stream: Any, depth: int = 0) -> str:
    """The class name of the first shuffling step of a Hugging Face stream, or ""."""
    if stream is None or depth > 64:
        return ""
    name = type(stream).__name__
    if "Shuffle" in name:
        return name
    inner = [getattr(stream, "ex_iterable", None), *(getattr(stream, "ex_iterables", None) or [])]
    for step in inner:
        found = _find_shuffle(step, depth + 1)
        if found:
            return found
    return ""
