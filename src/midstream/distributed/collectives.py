"""Collectives over ``torch.distributed``. No other package calls it directly."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

__all__ = [
    "ProcessGroup",
    "broadcast",
    "destroy_group",
    "gather_objects",
    "gather_values",
    "is_initialized",
    "largest",
    "new_cpu_group",
    "size_of_group",
    "smallest",
]


def is_initialized() -> bool:
    """Whether ``torch.distributed`` is available and has a default process group."""
    return dist.is_available() and dist.is_initialized()


def size_of_group(group: ProcessGroup | None = None) -> int:
    """Ranks of a group, of all ranks when left out; 1 without ``torch.distributed``."""
    return dist.get_world_size(group) if is_initialized() else 1


def new_cpu_group() -> ProcessGroup:
    """A new gloo group of all ranks. A collective."""
    group: ProcessGroup = dist.new_group(backend="gloo")
    return group


def destroy_group(group: ProcessGroup) -> None:
    """Destroy a group; does nothing where ``torch.distributed`` was shut down before."""
    with contextlib.suppress(Exception):
        dist.destroy_process_group(group)


def smallest(value: int, group: ProcessGroup | None) -> int:
    """The smallest value of all ranks; the group's backend handles CPU tensors. A collective."""
    return _reduced(value, dist.ReduceOp.MIN, group)


def largest(value: int, group: ProcessGroup | None) -> int:
    """The largest value of all ranks; the group's backend handles CPU tensors. A collective."""
    return _reduced(value, dist.ReduceOp.MAX, group)


def _reduced(value: int, operation: Any, group: ProcessGroup | None) -> int:
    found = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(found, operation, group=group)
    return int(found)


def gather_values(value: int, group: ProcessGroup | None) -> list[int]:
    """The values of all ranks, by rank; the group's backend handles CPU tensors. A collective."""
    mine = torch.tensor([value], dtype=torch.int64)
    found = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return [int(each) for each in found]


def gather_objects(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """The picklable values of all ranks, by rank. A collective."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def broadcast(value: Any, group: ProcessGroup | None = None) -> Any:
    """Rank 0's picklable value, on every rank. A collective."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]
