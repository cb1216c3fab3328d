"""The arguments of `DataLoader`: which contradict each other, and the pipeline they stand for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from midstream.common.plain_state import State
from midstream.dataset import Dataset
from midstream.nodes.collate import collate
from midstream.pipeline.node import BoundNode, Node

log = logging.getLogger("midstream")

PASSED_THROUGH = (
    "{} is for midstream pipelines; this loader passes its arguments to torchdata's"
    " StatefulDataLoader unchanged. Give it a midstream dataset, or map-style data without sampler"
    " and generator."
)


COMMON = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
    "snapshot_every_n_steps",
)
"""Arguments of `DataLoader` that torch's and torchdata's loaders have too."""

ORDER = ("sampler", "batch_sampler", "generator")
"""Arguments of torch's loader that choose an order."""

OWN = (
    "lanes",
    "rank",
    "world_size",
    "remainder",
    "strict_order",
    "sync_end",
    "shuffle",
    "worker_type",
)
"""Arguments of `DataLoader` that become its attributes: torch's loader does not keep them."""


class Settings(NamedTuple):
    """The arguments of `DataLoader` that say which batches are this rank's; see there."""

    rank: int | None
    world_size: int | None
    num_workers: int
    lanes: int | None
    remainder: str
    strict_order: bool
    sync_end: Any


def check_arguments(
    own: Mapping[str, Any],
    common: Mapping[str, Any],
    order: Mapping[str, Any],
) -> None:
    """Refuse arguments of `DataLoader` that contradict each other or a midstream pipeline.

    Args:
        own: The arguments that torch does not have, by name.
        common: The arguments that torch has, by name.
        order: The arguments of torch that choose an order: sampler, batch_sampler, generator.

    Raises:
        ValueError: With what to give instead.
    """
    for name, value in order.items():
        if value is not None:
            raise ValueError(
                f"a midstream pipeline has its own order, so {name} does not apply: shuffle"
                " with .shuffle(seed), weigh with midstream.interleave"
            )
    if not common["in_order"]:
        raise ValueError(
            "in_order=False hands out batches by chance, so no position could be saved; leave"
            " it True"
        )
    if own["remainder"] not in ("drop", "pad", "uneven"):
        raise ValueError(f"remainder is 'drop', 'pad' or 'uneven'; found {own['remainder']!r}")
    if own["lanes"] is not None and not _is_positive(own["lanes"]):
        raise ValueError(f"lanes is an integer of at least 1; found {own['lanes']!r}")
    if own["worker_type"] == "thread" and common["multiprocessing_context"] is not None:
        raise ValueError(
            "worker_type='thread' starts no process, so multiprocessing_context does not apply"
        )
    prefetch = common["prefetch_factor"]
    if common["num_workers"] == 0 and prefetch is not None and not _is_positive(prefetch):
        raise ValueError(f"prefetch_factor is an integer of at least 1; found {prefetch!r}")


def check_threads(bound: BoundNode) -> None:
    """Refuse nodes that set the global random generators where threads read.

    Raises:
        ValueError: With the path of such a node.
    """
    for each in bound.walk():
        if getattr(each.node, "isolate_rng", False):
            raise ValueError(
                f"{each.path} has isolate_rng=True, which sets the global random"
                " generators while its function runs. In a thread the training loop and"
                " other readers would draw from them meanwhile: use with_rng=True there,"
                " or read with worker_type='process' or without prefetch_factor."
            )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def runs_here(dataset: Any, sampler: Any, batch_sampler: Any, generator: Any) -> bool:
    """Whether midstream reads this data. If not, the arguments are passed to torchdata."""
    if isinstance(dataset, Dataset):
        return True
    if isinstance(dataset, Node):
        raise TypeError(
            f"DataLoader takes a dataset; found the node {dataset!r}. Wrap it:"
            " midstream.Dataset(node)"
        )
    mapped = (
        hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
        and not isinstance(dataset, dict)
    )
    if (
        mapped
        and not isinstance(dataset, IterableDataset)
        and sampler is None
        and batch_sampler is None
        and generator is None
    ):
        return True
    what = type(dataset).__name__ if not mapped else "a sampler, batch_sampler or generator"
    log.warning(
        "DataLoader passes %s to torchdata's StatefulDataLoader unchanged: resume holds for the"
        " same number of workers, as far as the dataset itself can. Wrap data with"
        " midstream.from_dataset or from_iterable for exact resume anywhere.",
        what,
    )
    return False


def build_pipeline(
    source: Dataset,
    batch_size: int | None,
    shuffle: bool | None,
    drop_last: bool,
    collate_fn: Callable[[list[Any]], Any] | None,
    seed: int,
) -> tuple[Dataset, int | None, bool, Callable[[list[Any]], Any] | None, bool]:
    """The pipeline that a loader runs: the source, shuffled and batched as the arguments say.

    Returns:
        The pipeline; batch_size, drop_last and collate_fn as the loader shows them; and whether
        ``seed`` is used.
    """
    rows = source.batch_rows
    if rows is not None:
        _check_batched(rows, batch_size, shuffle, drop_last, collate_fn)
        return source, rows, False, None, False
    if batch_size is not None and not _is_positive(batch_size):
        raise ValueError(f"batch_size is an integer of at least 1, or None; found {batch_size!r}")
    pipeline = source.shuffle(seed) if shuffle else source
    if batch_size is None:
        if drop_last:
            raise ValueError("drop_last goes with a batch_size")
        return (
            pipeline if collate_fn is None else pipeline.map(collate_fn),
            None,
            False,
            collate_fn,
            bool(shuffle),
        )
    collate_fn = collate_fn or collate
    return (
        pipeline.batch(batch_size, drop_last=drop_last, collate_fn=collate_fn),
        batch_size,
        drop_last,
        collate_fn,
        bool(shuffle),
    )


def _check_batched(
    rows: int, batch_size: int | None, shuffle: bool | None, drop_last: bool, collate_fn: Any
) -> None:
    """Refuse arguments that a pipeline which already ends in ``.batch(rows)`` has itself."""
    if shuffle:
        raise ValueError(
            "shuffle=True on top of a pipeline that already ends in .batch would mix whole"
            f" batches; shuffle before it: ....shuffle(seed).batch({rows})"
        )
    if batch_size not in (None, 1, rows):
        raise ValueError(
            f"batch_size={batch_size} on top of a pipeline that already ends in .batch({rows});"
            " leave batch_size out, or take the .batch out of the pipeline"
        )
    if drop_last:
        raise ValueError(
            f"the pipeline already ends in .batch({rows}); give drop_last there: .batch({rows},"
            " drop_last=True)"
        )
    if collate_fn is not None:
        raise ValueError(
            f"the pipeline already ends in .batch({rows}); give collate_fn there:"
            f" .batch({rows}, collate_fn=...)"
        )


def shuffle_seed(pipeline: Node) -> int:
    """The seed of the shuffle that ``shuffle=True`` added."""
    node = pipeline
    while node.kind != "shuffle":
        node = node.inputs()[""]
    return int(node.seed)  # type: ignore[attr-defined]


def spec_seed(spec: State) -> Any:
    """The seed of that shuffle in a checkpoint's spec; None where there is no such shuffle."""
    while isinstance(spec, dict) and spec.get("node") != "shuffle":
        inputs = spec.get("inputs")
        spec = inputs.get("") if isinstance(inputs, dict) else None
    return spec.get("seed") if isinstance(spec, dict) else None


def with_seed(pipeline: Node, seed: Any) -> Node:
    """The pipeline with another seed in the shuffle that ``shuffle=True`` added."""
    if type(seed) is not int:
        return pipeline
    if pipeline.kind == "shuffle":
        return dataclasses.replace(pipeline, seed=seed)  # type: ignore[type-var]
    return pipeline.with_inputs({"": with_seed(pipeline.inputs()[""], seed)})
