"""Google's Grain over a source of its own kind: random access to the same memory-mapped Arrow
files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from interface import (
    IMAGES,
    MIX,
    PACK,
    ROWS_PACKED,
    SEQ_LEN,
    SHUFFLED,
    SOURCES,
    WEIGHTS,
    Contestant,
    Raw,
    Reader,
    Views,
    Work,
    as_tensor,
    decode_row,
    numpy_batch,
)


class _Images:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.raw = Raw(folder)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, row: int) -> Any:
        return {"id": int(self.raw.ids[row]), "jpeg": self.raw[row].tobytes()}

    def __reduce__(self) -> Any:
        return _Images, (self.folder,)


class _Collate:
    def __init__(self, shape: str) -> None:
        self.shape = shape

    def __call__(self, samples: Any) -> Any:
        return numpy_batch(
            [one["id"] for one in samples], [one["input_ids"] for one in samples], self.shape
        )


def _stack(samples: Any) -> Any:
    return {
        "id": np.array([one["id"] for one in samples]),
        "image": np.stack([one["image"] for one in samples]),
    }


def _stack_numbers(samples: Any) -> Any:
    return np.stack(samples)


def _tokens(row: Any) -> Any:
    return {"input_ids": row["input_ids"]}


class _GrainReader(Reader):
    """State and load are of Grain's iterators; batches become tensors on the same memory."""

    def __init__(self, dataset: Any, *, tensors: bool) -> None:
        super().__init__(dataset)
        self.tensors, self.pending = tensors, None
        self.iterators: list[Any] = []

    def __iter__(self) -> Any:
        iterator = iter(self.loader)
        if self.pending is not None:
            iterator.set_state(self.pending)
        self.iterators.append(iterator)
        return _Tensors(iterator) if self.tensors else iterator

    def state(self, iterator: Any, batches: int) -> Any:
        """Of the iterator."""
        return getattr(iterator, "inner", iterator).get_state()

    def load(self, state: Any) -> None:
        """Set when iterating."""
        self.pending = state

    def close(self) -> None:
        """Stop the processes."""
        for iterator in self.iterators:
            iterator.close()
        self.iterators.clear()
        self.loader = None


class _Tensors:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        batch = next(self.inner)
        if isinstance(batch, dict):
            return {
                key: as_tensor(value) if isinstance(value, np.ndarray) else value
                for key, value in batch.items()
            }
        return as_tensor(batch)


class Grain(Contestant):
    """Grain's dataset API."""

    name, title, environment = "grain", "Grain, Arrow source", "grain"
    kinds = frozenset({SHUFFLED, MIX, PACK, IMAGES, SOURCES})
    settings = (
        "MapDataset.source(Arrow views).shuffle(seed); MapDataset.mix(weights); .batch(batch_fn=) ; to_iter_dataset with "
        "ReadOptions(num_threads=0, prefetch_buffer_size=0), which is the fastest for data in memory (images: 2 threads where "
        "there are no workers to compare with); mp_prefetch for workers (spawn, its only way); packing by its own "
        "ConcatThenSplitIterDataset, which also makes positions and segment ids."
    )
    starts = ("spawn",)

    def open(self, work: Work) -> Reader:
        """The dataset."""
        import grain
        from grain import experimental

        if work.kind == SOURCES:
            parts = [
                grain.MapDataset.range(4096).shuffle(seed=n).repeat() for n in range(work.sources)
            ]
            weights = [1.0] * len(parts)
        else:
            source = _Images if work.kind == IMAGES else Views
            parts = [
                grain.MapDataset.source(source(f)).shuffle(seed=work.seed)
                for f in work.folders.values()
            ]
            weights = [float(WEIGHTS.get(part, 1)) for part in work.folders]
        rows = grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0]
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        if work.kind == PACK:
            stream = rows.map(_tokens).to_iter_dataset(options)
            stream = experimental.ConcatThenSplitIterDataset(
                stream, length_struct={"input_ids": SEQ_LEN}
            )
            stream = stream.batch(ROWS_PACKED)
        else:
            collate: Any = _stack_numbers if work.kind == SOURCES else _Collate(work.shape)
            if work.kind == IMAGES:
                rows, collate = rows.map(decode_row), _stack
            stream = rows.batch(work.batch_size, batch_fn=collate).to_iter_dataset(options)
        if work.workers:
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=work.workers))
        return _GrainReader(stream, tensors=work.shape != "list" or work.workers > 0)

    def versions(self) -> dict[str, str]:
        """Of Grain."""
        import importlib.metadata

        return {"grain": importlib.metadata.version("grain")}


ALL = [Grain]
