"""Batches that followed a checkpoint, made again without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from midstream.common.plain_state import State
from midstream.common.validation import require_int
from midstream.dataset import Dataset
from midstream.loader.loader import DataLoader
from midstream.loader.position import Trace

__all__ = ["Replay", "replay"]


class Replay:
    """An iterator over batches. `trace` gives the origins of the batch just returned.

    >>> import midstream as ms
    >>> loader = ms.DataLoader(ms.from_dataset(range(8), name="eight"), batch_size=2)
    >>> state = loader.state_dict()
    >>> again = ms.replay(loader, state, 1)
    >>> next(again), list(map(str, again.trace()))
    (tensor([0, 1]), ['eight[0]', 'eight[1]'])
    """

    def __init__(self, loader: DataLoader, num_batches: int | None) -> None:
        self._loader, self._left = loader, num_batches
        self._iterator: Any = None

    def __iter__(self) -> Replay:
        return self

    def __next__(self) -> Any:
        if self._left == 0:
            raise StopIteration
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._left is None:
                raise
            self._iterator = iter(self._loader)  # the next epoch
            batch = next(self._iterator)
        if self._left is not None:
            self._left -= 1
        return batch

    def trace(self) -> Trace:
        """The origins of the batch just returned."""
        return self._loader.trace()

    def state_dict(self) -> State:
        """The state after the batch just returned."""
        return self._loader.state_dict()


def replay(
    dataset: Dataset | DataLoader,
    state: State | Sequence[State],
    num_batches: int | None = None,
    *,
    batch_size: int | None = 1,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Replay:
    """Make the batches that followed a checkpoint again, exactly, for example at a loss spike.

    Nothing of the run is touched. As in a loader, a sample that fails raises, and the next
    ``next()`` continues.

    Args:
        dataset: The pipeline, with the batch arguments it had in the loader; or the loader itself,
            whose pipeline and batches are used.
        state: A loader's ``state_dict()``, a merged one, or a list of the states of all ranks.
        num_batches: How many, into the next epoch if needed. None: those left of the epoch.
        batch_size: As in the loader (left alone where a loader is given, or the pipeline ends in
            ``.batch``).
        collate_fn: The same.
        drop_last: The same.
        rank: Whose batches. With the default the run's batches in their global order; a rank of a
            run of R ranks saw every R-th of them, which ``rank=r, world_size=R`` gives.
        world_size: Number of ranks.
        num_workers: Worker processes.

    Raises:
        CheckpointError: If the state is damaged, incomplete, or of another pipeline.

    >>> import midstream as ms
    >>> ds = ms.from_dataset(range(100)).shuffle(seed=1)
    >>> loader = ms.DataLoader(ds, batch_size=4)
    >>> batches = iter(loader)
    >>> first, state = next(batches), loader.state_dict()
    >>> second, third = next(batches), next(batches)
    >>> [a.equal(b) for a, b in zip(ms.replay(ds, state, 2, batch_size=4), (second, third))]
    [True, True]
    """
    if num_batches is not None:
        require_int(num_batches, "num_batches", 0, "replay")
    common: dict[str, Any] = {"rank": rank, "world_size": world_size, "num_workers": num_workers}
    if isinstance(dataset, DataLoader):
        loader = DataLoader(Dataset(dataset.run.pipeline), None, **common)
    else:
        loader = DataLoader(
            dataset, batch_size, collate_fn=collate_fn, drop_last=drop_last, **common
        )
    loader.load_state_dict(state)
    return Replay(loader, num_batches)
