"""torch's DataLoader and torchdata's StatefulDataLoader, over Hugging Face ``datasets`` of both
kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from interface import (
    BUFFER,
    IMAGES,
    MIX,
    PACK,
    REMOTE,
    ROWS_PACKED,
    SEQ_LEN,
    SHUFFLED,
    SOURCES,
    WEIGHTS,
    Collate,
    Contestant,
    PackedReader,
    Reader,
    SkippingReader,
    Work,
    decode,
    decode_row,
    stack_images,
    tensor_batch,
)


def processes(work: Work) -> dict[str, Any]:
    """Arguments of torch's loaders for workers."""
    if not work.workers:
        return {}
    return {
        "num_workers": work.workers,
        "multiprocessing_context": work.start,
        "persistent_workers": work.persistent,
        "prefetch_factor": 2,
    }


class Decoded:
    """A map-style dataset with a transform, as torchvision's are."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        return decode_row(self.data[row])


def map_style(work: Work) -> Any:
    """Hugging Face's map-style dataset in numpy format; several are concatenated."""
    import datasets

    if work.kind == SOURCES:
        return range(10**6)
    parts = [datasets.load_from_disk(f"{folder}/arrow") for folder in work.folders.values()]
    data = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    return Decoded(data) if work.kind == IMAGES else data.with_format("numpy", dtype=np.int32)


def sampling(work: Work, data: Any) -> dict[str, Any]:
    """Arguments that shuffle, or mix by torch's own sampler."""
    import torch

    generator = torch.Generator().manual_seed(work.seed)
    if work.kind not in (MIX, PACK):
        return {"shuffle": True, "generator": generator}
    import datasets

    sizes = [len(datasets.load_from_disk(f"{folder}/arrow")) for folder in work.folders.values()]
    per_row = np.repeat([WEIGHTS[part] / size for part, size in zip(work.folders, sizes)], sizes)
    sampler = torch.utils.data.WeightedRandomSampler(
        torch.from_numpy(per_row), len(per_row), generator=generator
    )
    return {"sampler": sampler}


def collate_of(work: Work) -> Any:
    """The collate function."""
    if work.kind == SOURCES:
        return None
    return stack_images if work.kind == IMAGES else Collate(work.shape)


class TorchMap(Contestant):
    """torch's DataLoader over map-style data."""

    name, title, resumes = "torch-map", "torch DataLoader + datasets (map)", False
    kinds = frozenset({SHUFFLED, MIX, PACK, IMAGES})
    settings = (
        'load_from_disk(...).with_format("numpy", dtype=int32), read by __getitems__; shuffle=True with a seeded generator; the '
        "mix by WeightedRandomSampler over concatenate_datasets; prefetch_factor 2; packing in the main process. No state: a "
        "resume reads what was read and drops it."
    )

    def open(self, work: Work) -> Reader:
        """The loader."""
        import torch

        data = map_style(work)
        loader = torch.utils.data.DataLoader(
            data,
            work.batch_size,
            collate_fn=collate_of(work),
            **sampling(work, data),
            **processes(work),
        )
        return PackedReader(Reader(loader)) if work.kind == PACK else SkippingReader(loader)

    def versions(self) -> dict[str, str]:
        """Of datasets."""
        import datasets

        return {"datasets": datasets.__version__}


class StatefulMap(TorchMap):
    """torchdata's loader over map-style data."""

    name, title, resumes = "sdl-map", "StatefulDataLoader + datasets (map)", True
    kinds = frozenset({SHUFFLED, MIX, PACK, IMAGES, SOURCES})
    settings = "As torch-map, in StatefulDataLoader with snapshot_every_n_steps=1. W5: one list, shuffled, whatever the sources."

    def open(self, work: Work) -> Reader:
        """The loader."""
        from torchdata.stateful_dataloader import StatefulDataLoader

        data = map_style(work)
        every = 1 if work.stateful else 10**9
        how = sampling(work, data) | processes(work) | {"snapshot_every_n_steps": every}
        reader = Reader(
            StatefulDataLoader(data, work.batch_size, collate_fn=collate_of(work), **how)
        )
        return PackedReader(reader) if work.kind == PACK else reader

    def versions(self) -> dict[str, str]:
        """Of both."""
        import torchdata

        return super().versions() | {"torchdata": torchdata.__version__}


class ArrowCollate:
    """Rows as pyarrow tables of one row, which is what Hugging Face's arrow format gives: no
    formatting of values.
    """

    def __init__(self, shape: str) -> None:
        self.shape = shape

    def __call__(self, rows: Any) -> Any:
        ids = [row.column("id")[0].as_py() for row in rows]
        arrays = [row.column("input_ids").chunk(0).flatten().to_numpy() for row in rows]
        return tensor_batch(ids, arrays, self.shape)


def group_texts(table: Any) -> Any:
    """Hugging Face's recipe: join the documents of a thousand and cut; what is over is dropped."""
    import pyarrow as pa

    tokens = np.concatenate(
        [chunk.flatten().to_numpy() for chunk in table.column("input_ids").chunks]
    )
    rows = len(tokens) // SEQ_LEN
    offsets = np.arange(rows + 1, dtype=np.int32) * SEQ_LEN
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(
                pa.array(offsets), pa.array(tokens[: rows * SEQ_LEN])
            )
        }
    )


def stack_packed(rows: Any) -> Any:
    """Rows of `group_texts` as one int64 tensor."""
    import torch

    arrays = [row.column("input_ids").chunk(0).flatten().to_numpy() for row in rows]
    return torch.from_numpy(np.stack(arrays).astype(np.int64))


class _DecodeArrow:
    def __call__(self, row: Any) -> Any:
        return {"id": row["id"], "image": decode(row["jpeg"])}


class StatefulIterable(Contestant):
    """torchdata's loader over Hugging Face's streams."""

    name, title = "sdl-iterable", "StatefulDataLoader + datasets (iterable)"
    kinds = frozenset({SHUFFLED, MIX, PACK, SOURCES, REMOTE, IMAGES})
    settings = (
        f'to_iterable_dataset(num_shards=16).shuffle(seed, buffer_size={BUFFER}).with_format("arrow"), the fastest format here, '
        "collated by hand; interleave_datasets(probabilities=, seed=); packing by .map(batched=True); images: .map(decode). "
        'Remote: load_dataset("parquet", streaming=True) over s3fs. snapshot_every_n_steps=1.'
    )

    def data(self, work: Work) -> Any:
        """The stream."""
        import datasets

        if work.kind == SOURCES:
            parts = [
                datasets.IterableDataset.from_generator(
                    _Numbers(), gen_kwargs={"shards": [0, 1, 2, 3]}
                ).repeat(None)
                for _ in range(work.sources)
            ]
            return datasets.interleave_datasets(
                parts, probabilities=[1 / len(parts)] * len(parts), seed=work.seed
            )
        if work.kind == REMOTE:
            stream = datasets.load_dataset(
                "parquet", data_files=f"{work.url}/*.parquet", split="train", streaming=True
            )
            return stream.shuffle(work.seed, buffer_size=BUFFER).with_format("arrow")
        parts = []
        for folder in work.folders.values():
            stream = datasets.load_from_disk(f"{folder}/arrow").to_iterable_dataset(num_shards=16)
            parts.append(
                stream.shuffle(
                    work.seed, buffer_size=min(BUFFER, 256) if work.kind == IMAGES else BUFFER
                )
            )
        if len(parts) > 1:
            shares = [WEIGHTS[part] / sum(WEIGHTS.values()) for part in work.folders]
            stream = datasets.interleave_datasets(parts, probabilities=shares, seed=work.seed)
        else:
            stream = parts[0]
        if work.kind == IMAGES:
            return stream.map(_DecodeArrow(), remove_columns=["jpeg"]).with_format("numpy")
        stream = stream.with_format("arrow")
        if work.kind == PACK:
            return stream.map(group_texts, batched=True, batch_size=1000, remove_columns=["id"])
        return stream

    def open(self, work: Work) -> Reader:
        """The loader."""
        from torchdata.stateful_dataloader import StatefulDataLoader

        every = 1 if work.stateful else 10**9
        collate: Any = ArrowCollate(work.shape)
        if work.kind in (PACK, SOURCES, IMAGES):
            collate = {PACK: stack_packed, SOURCES: None, IMAGES: stack_images}[work.kind]
        size = ROWS_PACKED if work.kind == PACK else work.batch_size
        return Reader(
            StatefulDataLoader(
                self.data(work),
                size,
                collate_fn=collate,
                snapshot_every_n_steps=every,
                **processes(work),
            )
        )

    def versions(self) -> dict[str, str]:
        """Of both."""
        import datasets
        import torchdata

        return {"datasets": datasets.__version__, "torchdata": torchdata.__version__}


class _Numbers:
    def __call__(self, shards: list[int]) -> Iterator[dict[str, int]]:
        for shard in shards:
            for row in range(1024):
                yield {"x": shard * 1024 + row}


ALL = [TorchMap, StatefulMap, StatefulIterable]
