"""What the arguments of `DataLoader` mean."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from torch.utils.data import IterableDataset

from midstream.common.plain_state import State
from midstream.dataset import Dataset
from midstream.nodes.collate import collate
from midstream.pipeline.node import Node

log = logging.getLogger("midstream")

PASSED_THROUGH = (
    "{} is for midstream pipelines; this loader passes its arguments to torchdata's"
    " StatefulDataLoader unchanged. Give it a midstream dataset, or map-style data without sampler"
    " and generator."
)


def runs_here(dataset: Any, sampler: Any, batch_sampler: Any, generator: Any) -> bool:
    """Whether midstream runs this, or torchdata alone."""
    if isinstance(dataset, Dataset):
        return True
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
    """The pipeline a loader runs: the source, shuffled and batched as the arguments say."""
    rows = source.batch_rows
    if rows is not None:
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
        return source, rows, False, None, False
    if batch_size is not None and (
        isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
    ):
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


def shuffle_seed(pipeline: Node) -> int:
    """The seed of the shuffle that ``shuffle=True`` put on top (or below the batch)."""
    node = pipeline
    while node.kind != "shuffle":
        node = node.inputs()[""]
    return int(node.seed)  # type: ignore[attr-defined]


def spec_seed(spec: State) -> Any:
    """The same, of a checkpoint's spec; None where there is no such shuffle."""
    while isinstance(spec, dict) and spec.get("node") != "shuffle":
        inputs = spec.get("inputs")
        spec = inputs.get("") if isinstance(inputs, dict) else None
    return spec.get("seed") if isinstance(spec, dict) else None


def with_seed(pipeline: Node, seed: Any) -> Node:
    """The pipeline with another seed in that shuffle."""
    if type(seed) is not int:
        return pipeline
    if pipeline.kind == "shuffle":
        return dataclasses.replace(pipeline, seed=seed)  # type: ignore[type-var]
    return pipeline.with_inputs({"": with_seed(pipeline.inputs()[""], seed)})
