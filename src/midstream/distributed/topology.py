"""Topology: which rank and worker makes which batch, as pure arithmetic.

A run's batches are numbered n = 0, 1, 2, ... over all ranks. Batch n is made by lane n mod L.

    rank r of R      makes the batches n = r (mod R), n >= n0, where n0 is the batch at which the
                     run continues
    worker w of W    makes every W-th of its rank's batches, beginning with number w

Random access needs no lanes: a worker computes its batch numbers and reads at their positions.

Streams assign lane l to rank l mod R, which is the rank of batch n when R divides L. For another R
the lanes are assigned the same way, exactly once and as evenly as possible, but the ranks' batches
come in another order. A rank's lanes are its slots 0, 1, 2, ...; worker s mod W reads slot s. Empty
slots pad them to a multiple of W, so that the workers' turns stay in step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from midstream.distributed.ranks import rank_and_world_size

DEFAULT_LANES = 48
"""Divisible by 1, 2, 3, 4, 6, 8, 12, 16, 24 and 48 ranks."""


class Topology(NamedTuple):
    """One rank among ``world_size``, with ``num_workers`` workers (0: the main process reads)."""

    rank: int
    world_size: int
    num_workers: int

    @property
    def readers(self) -> int:
        """Number of readers on this rank: the workers, or the main process."""
        return max(1, self.num_workers)

    def __str__(self) -> str:
        return f"{self.world_size} rank{'s' * (self.world_size > 1)} x {self.num_workers} workers"


def current_topology(rank: int | None, world_size: int | None, num_workers: int) -> Topology:
    """This process's topology.

    Rank and world size are those given, else those of ``torch.distributed``, else the environment
    variables RANK and WORLD_SIZE, else one rank.

    Raises:
        ValueError: If only one of the two is given, or the rank is out of range.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"rank and world_size are given together; found rank={rank}, world_size={world_size}"
        )
    if rank is None or world_size is None:
        rank, world_size = rank_and_world_size()
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank is in [0, world_size); found rank={rank}, world_size={world_size}")
    return Topology(rank, world_size, num_workers)


def choose_lanes(asked: int | None, topology: Topology, limit: tuple[int, str] | None) -> int:
    """The number of lanes of a first run. The checkpoint records it; a stream keeps it for good.

    Args:
        asked: The loader's argument ``lanes``.
        topology: The topology of the first run.
        limit: The most lanes that the sources can feed, with the reason in words; None: no limit.

    Raises:
        ValueError: If the sources cannot feed that many lanes, or cannot feed one for each rank.
    """
    ranks = topology.world_size
    if asked is not None:
        if limit is not None and asked > limit[0]:
            raise ValueError(f"lanes={asked}, but {limit[1]}.")
        return asked
    step = math.lcm(DEFAULT_LANES, ranks)
    lanes = -(-ranks * topology.readers // step) * step
    if limit is not None and lanes > limit[0]:
        lanes = limit[0] - limit[0] % ranks
        if not lanes:
            raise ValueError(
                f"{topology} cannot be served: {limit[1]}. A rank without data could never take a"
                " step."
            )
    return lanes


def first_batch(start: int, rank: int, world_size: int) -> int:
    """The first batch of a rank in a run that continues at batch ``start``.

    >>> [first_batch(10, rank, 4) for rank in range(4)]
    [12, 13, 10, 11]
    """
    return start + (rank - start) % world_size


def batches_of_rank(total: int, start: int, rank: int, world_size: int, remainder: str) -> int:
    """Number of the batches ``start`` ... ``total - 1`` that a rank makes.

    Args:
        total: Batches of the epoch over all ranks.
        start: The first batch that was not delivered yet.
        rank: The rank.
        world_size: Number of ranks.
        remainder: Of a last round without a batch for every rank. ``"drop"``: it is left out.
            ``"pad"``: every rank makes a batch; those from ``total`` on repeat earlier ones.
            ``"uneven"``: some ranks make one batch more than others.

    >>> [batches_of_rank(10, 0, rank, 4, "uneven") for rank in range(4)]
    [3, 3, 2, 2]
    >>> batches_of_rank(10, 0, 0, 4, "drop"), batches_of_rank(10, 0, 0, 4, "pad")
    (2, 3)
    """
    left = max(0, total - start)
    if remainder == "drop":
        return left // world_size
    if remainder == "pad":
        return -(-left // world_size)
    return max(0, -(-(total - first_batch(start, rank, world_size)) // world_size))


def lanes_of_worker(topology: Topology, lanes: int, worker: int) -> list[int]:
    """A worker's lanes in the order of its turns; -1 for an empty slot.

    >>> lanes_of_worker(Topology(0, 2, 2), 6, 0), lanes_of_worker(Topology(0, 2, 2), 6, 1)
    ([0, 4], [2, -1])
    """
    mine = range(topology.rank, lanes, topology.world_size)
    padded = -(-len(mine) // topology.readers) * topology.readers
    return [
        mine[slot] if slot < len(mine) else -1 for slot in range(worker, padded, topology.readers)
    ]
