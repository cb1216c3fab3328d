"""Agreement: the ranks agree on small numbers while they read."""

from __future__ import annotations

from typing import Any

from midstream.distributed.collectives import (
    gather_values,
    is_initialized,
    new_cpu_group,
    size_of_group,
    smallest,
)


class Agreement:
    """Exchanges one number a step between the ranks of a group, on the CPU.

    Args:
        group: A process group of the data-parallel ranks, or True for a new gloo group of all ranks
            (every rank makes it).
        world_size: Number of ranks that the data is divided among.

    Raises:
        ValueError: If the group has another number of ranks, or ``torch.distributed`` is not
            initialised.
    """

    def __init__(self, group: Any, world_size: int) -> None:
        if not is_initialized():
            raise ValueError(
                f"{world_size} ranks can only agree through torch.distributed, which is not"
                " initialised: call torch.distributed.init_process_group first"
            )
        found = size_of_group(None if group is True else group)
        if found != world_size:
            raise ValueError(
                f"the data is divided among {world_size} ranks, the process group has {found}; give"
                " the group of the data-parallel ranks"
            )
        self.group = new_cpu_group() if group is True else group

    def least(self, value: int) -> int:
        """The smallest value of all ranks. A collective."""
        return smallest(value, self.group)

    def all(self, value: int) -> list[int]:
        """The values of all ranks, by rank. A collective."""
        return gather_values(value, self.group)
