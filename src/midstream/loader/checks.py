"""Refuses topologies and states with which some rank or worker could never get data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from midstream.checkpoint.read import RunState
from midstream.distributed.topology import Topology, lanes_of_worker
from midstream.errors import CheckpointError
from midstream.loader.arguments import Settings
from midstream.pipeline.node import Node

log = logging.getLogger("midstream")


def check_topology(
    topology: Topology,
    num_lanes: int,
    settings: Settings,
    pipeline: Node,
    sources: Callable[[], str],
    warn_once: Callable[[str, str], Any],
) -> None:
    """Refuse ranks and workers that could never get data, before they wait for it.

    Args:
        topology: Ranks and workers.
        num_lanes: Of the run.
        settings: The loader's arguments.
        pipeline: What the loader reads.
        sources: Names the sources, for errors.
        warn_once: Warns by key.

    Raises:
        ValueError: If the topology cannot be served; the text says what would work.
    """
    ranks = topology.world_size
    if num_lanes < ranks:
        raise ValueError(
            f"{topology} cannot be served: the run has {num_lanes} lanes, and rank"
            f" {topology.rank} of {ranks}"
            f" {'gets none of them' if topology.rank >= num_lanes else 'is one of more'}. A"
            f" rank without data could never take a step: use at most {num_lanes} ranks, or"
            " start the run with more lanes."
        )
    if pipeline.random_access:
        _check_batches(topology, pipeline.length(), settings.remainder, sources)
        return
    if num_lanes % ranks:
        _check_dealing(topology, num_lanes, settings.strict_order, warn_once)
    if ranks > 1 and not pipeline.infinite and settings.sync_end in (False, None):
        log.info(
            "only reading tells how many batches each of the %d ranks has: they may end their"
            " epochs at different steps. sync_end=True ends them at the same one and keeps what"
            " is left for the next epoch.",
            ranks,
        )
    _check_workers(topology, num_lanes, pipeline, sources)


def _check_batches(
    topology: Topology, total: int | None, remainder: str, sources: Callable[[], str]
) -> None:
    """Random access: refuse ranks that would never get one of ``total`` batches."""
    ranks = topology.world_size
    if total is None or total == 0:
        return
    if total < ranks and (
        remainder == "drop" or (remainder == "uneven" and topology.rank >= total)
    ):
        who = (
            "no rank would get one"
            if remainder == "drop"
            else f"rank {topology.rank} would never get one"
        )
        raise ValueError(
            f"{topology} cannot be served: the pipeline has {total} batches in all, and"
            f" with remainder={remainder!r} {who} ({sources()}). Use"
            " fewer ranks, a smaller batch_size, or remainder='pad'."
        )
    if total < ranks * topology.readers:
        log.info("%s for %d batches: some workers have nothing to do", topology, total)


def _check_dealing(
    topology: Topology, num_lanes: int, strict_order: bool, warn_once: Callable[[str, str], Any]
) -> None:
    """Streams: warn of, or refuse, a number of ranks that does not divide the lanes."""
    ranks = topology.world_size
    kept = (
        f"{num_lanes} lanes are dealt to {ranks} ranks, {num_lanes // ranks} or"
        f" {num_lanes // ranks + 1} each"
    )
    fitting = [divisor for divisor in range(1, num_lanes + 1) if num_lanes % divisor == 0]
    divisors = ", ".join(map(str, fitting[:20]))
    if strict_order:
        raise ValueError(
            f"{topology} cannot keep the order: {kept}, and strict_order=True asks for the"
            f" order of every other topology. Numbers of ranks that keep it: {divisors}."
        )
    warn_once(
        "dealing",
        f"{kept}: every sample comes exactly once, but batches come in another order than"
        f" on a number of ranks that divides the lanes ({divisors}), and a rank with more lanes"
        " has more batches. strict_order=True makes this an error.",
    )


def _check_workers(
    topology: Topology, num_lanes: int, pipeline: Node, sources: Callable[[], str]
) -> None:
    """Streams: refuse workers that would have no lane, or only lanes without data."""
    ranks, readers = topology.world_size, topology.readers
    full, reason = pipeline.full_lanes(num_lanes, 1)
    limit = pipeline.max_lanes()
    fewest = num_lanes // ranks
    if readers > fewest:
        why = (
            limit[1]
            if limit is not None
            else (
                f"lanes={num_lanes} was asked for, or is the checkpoint's. Use fewer workers,"
                " or start with more lanes"
            )
        )
        raise ValueError(
            f"{topology} cannot be served: there are {num_lanes} lanes, {fewest} for some rank,"
            f" and a worker without a lane would never get data; {why}."
        )
    # The same on every rank, so that no rank waits for one that was refused.
    for rank in range(ranks) if 0 < full < num_lanes else ():
        for worker in range(readers):
            own = lanes_of_worker(topology._replace(rank=rank), num_lanes, worker)
            if all(lane < 0 or lane >= full for lane in own):
                raise ValueError(
                    f"{topology} cannot be served: only {full} of {num_lanes} lanes have any"
                    f" data ({reason}), and rank {rank} worker {worker} runs none of those"
                    f" ({sources()}). Use fewer ranks or workers, a smaller"
                    f" batch_size, or lanes={max(1, full - full % ranks)}."
                )


def check_lanes(
    run_state: RunState, topology: Topology, settings: Settings, pipeline: Node
) -> None:
    """Refuse a state that lacks lanes of this rank, or has another number of lanes than asked for.

    Raises:
        CheckpointError: With what to do instead.
    """
    lanes = settings.lanes
    if lanes is not None and lanes != run_state.num_lanes and not pipeline.random_access:
        raise CheckpointError(
            f"this state has {run_state.num_lanes} lanes, and the loader was made with"
            f" lanes={lanes}. The number is fixed by the first run; leave lanes out or"
            f" give lanes={run_state.num_lanes}."
        )
    own = range(topology.rank, run_state.num_lanes, topology.world_size)
    missing = [index for index in own if index not in run_state.lanes]
    if missing:
        raise CheckpointError(
            f"this state has {len(run_state.lanes)} of {run_state.num_lanes} lanes, and rank"
            f" {topology.rank} of {topology.world_size} needs {len(missing)} others (for example"
            f" lane {missing[0]}). It is the state of one rank of several: give a list of the"
            " states of all ranks. (From torch.distributed.checkpoint: give the loader"
            f" lanes={run_state.num_lanes}, so that it asks for all.)"
        )
