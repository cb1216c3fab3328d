"""One state for the whole job: the states of all ranks, gathered and merged on every one of them.

Lightning, Fabric, Accelerate and transformers keep what one rank saved and give it to all on load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from midstream.checkpoint.merge import merge_states
from midstream.distributed.collectives import ProcessGroup, gather_objects, size_of_group
from midstream.errors import CheckpointError

__all__ = ["WholeRun", "gather_states"]


def gather_states(
    states: Callable[[], list[Any]], group: ProcessGroup | None = None
) -> list[dict[str, Any]]:
    """The merged states of all ranks, for each of several loaders: the same on every rank. A collective.

    Args:
        states: Gives this rank's states, one per loader. When it raises, all ranks raise.
        group: The ranks; all of them when left out.

    Raises:
        CheckpointError: If a rank has none to give, or they do not fit together.
    """
    if size_of_group(group) == 1:
        return states()
    mine: list[Any] | str
    try:
        mine = states()
    except Exception as error:
        mine = f"{type(error).__name__}: {error}"
    found = gather_objects(mine, group)
    failed = {rank: answer for rank, answer in enumerate(found) if isinstance(answer, str)}
    if failed:
        rank, answer = min(failed.items())
        raise CheckpointError(f"rank {rank} has no state to save: {answer}")
    return [merge_states(_different(parts)) for parts in zip(*found)]


def _different(states: Any) -> list[dict[str, Any]]:
    """One of each: ranks that read the same data (tensor or pipeline parallel) have the same lanes."""
    different: list[dict[str, Any]] = []
    for state in states:
        if not any(state["lanes"] == other["lanes"] for other in different):
            different.append(state)
    return different


class WholeRun:
    """A loader whose state is that of the whole run, for programs that keep one state for all ranks.

        accelerator.register_for_checkpointing(midstream.WholeRun(loader))
        fabric.save(path, {"model": model, "loader": midstream.WholeRun(loader)})

    `state_dict` asks all ranks, so all have to call it, after the same step; any number of ranks
    can load what it gives.

    Args:
        loader: This rank's loader, or what Fabric made of it.
        group: Process group of the ranks that the data is divided among; all ranks when left out.

    >>> import midstream as ms
    >>> loader = ms.DataLoader(ms.from_dataset(range(8)), batch_size=2)
    >>> first = next(iter(loader))
    >>> state = ms.WholeRun(loader).state_dict()
    >>> other = ms.DataLoader(ms.from_dataset(range(8)), batch_size=2)
    >>> ms.WholeRun(other).load_state_dict(state)
    >>> next(iter(other))
    tensor([2, 3])
    """

    def __init__(self, loader: Any, *, group: ProcessGroup | None = None) -> None:
        self.loader, self.group = getattr(loader, "_dataloader", loader), group

    def state_dict(self) -> dict[str, Any]:
        """The merged state of all ranks; a collective.

        Raises:
            CheckpointError: If the ranks are at different steps.
        """
        return gather_states(lambda: [self.loader.state_dict()], self.group)[0]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state with the loader's next ``iter()``, on any number of ranks."""
        self.loader.load_state_dict(state)
