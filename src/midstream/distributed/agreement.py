"""Agreement of the ranks on small numbers."""

from __future__ import annotations

from typing import Any

import torch.distributed


class Agreement:
    """How the ranks of a group agree on small numbers, on the CPU, once a step.

    Args:
        group: A process group of the data-parallel ranks, or True for a new gloo group of all ranks
            (every rank makes it).
        world_size: How many ranks the data is divided among.

    Raises:
        ValueError: If the group has another number of ranks.
    """

    def __init__(self, group: Any, world_size: int) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError(
                f"{world_size} ranks can only agree through torch.distributed, which is not"
                " initialised: call torch.distributed.init_process_group first"
            )
        found = torch.distributed.get_world_size(None if group is True else group)
        if found != world_size:
            raise ValueError(
                f"the data is divided among {world_size} ranks, the process group has {found}; give"
                " the group of the data-parallel ranks"
            )
        self.group = torch.distributed.new_group(backend="gloo") if group is True else group

    def least(self, value: int) -> int:
        """The smallest value of all ranks."""
        found = torch.tensor([value])
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group=self.group)
        return int(found)

    def all(self, value: int) -> list[int]:
        """The values of all ranks, in their order."""
        mine = torch.tensor([value])
        found = [
            torch.zeros_like(mine) for _ in range(torch.distributed.get_world_size(self.group))
        ]
        torch.distributed.all_gather(found, mine, group=self.group)
        return [int(part) for part in found]


def from_rank_zero(value: Any) -> Any:
    """The value that rank 0 has, on every rank: a collective.

    Raises:
        RuntimeError: If torch.distributed is not initialised.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError("torch.distributed is not initialised")
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
