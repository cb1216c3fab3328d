"""`from_dataset`: chooses the source for the data that it is given."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from torch.utils.data import IterableDataset

from midstream.common.validation import require_name
from midstream.dataset import Dataset
from midstream.sources.arrow import ArrowSource
from midstream.sources.huggingface import IterableSource
from midstream.sources.sequence import SequenceSource


def from_dataset(data: Any, *, name: str | None = None) -> Dataset:
    """Make a dataset of data that is already loaded or opened.

    Args:
        data: For random access a Hugging Face ``datasets.Dataset`` (memory-mapped or not; numeric
            lists arrive as read-only numpy views of the stored dtype), a map-style torch dataset or
            any sequence. For a stream a Hugging Face ``IterableDataset``.
        name: The source's name in progress, origins and errors. Without one it is the name it has
            in `interleave`, else "data".

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is a shuffled ``IterableDataset``, which cannot resume.

    >>> import midstream as ms
    >>> ms.from_dataset(["a", "b"], name="letters").rows([1])
    ['b']
    """
    require_name(name, "from_dataset")
    if isinstance(data, Dataset):
        raise TypeError(f"this already is a midstream dataset; use it as it is:\n{data!r}")
    # datasets is not imported here (that takes a second): if data is of that package, it is loaded.
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        if isinstance(data, datasets.Dataset):
            return Dataset(ArrowSource(data, name))
        if isinstance(data, datasets.IterableDataset):
            return Dataset(IterableSource(data, name))
        if isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
            raise TypeError(
                f"this is a dict of splits; choose one, like data[{next(iter(data), 'train')!r}]"
            )
    if isinstance(data, (Mapping, set, frozenset)):
        raise TypeError(
            f"a source has rows by number; found {type(data).__name__}, which has keys or no order"
        )
    if isinstance(data, (pa.Table, pa.RecordBatch)):
        raise TypeError(
            "a pyarrow table has columns by number; give its rows:"
            " from_dataset(datasets.Dataset(table))"
        )
    if hasattr(data, "iloc"):
        raise TypeError(
            f"a {type(data).__name__} has columns by name; give its rows:"
            " from_dataset(datasets.Dataset.from_pandas(frame))"
        )
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"{type(data).__name__} is a torch IterableDataset: it can only be iterated, so give it"
            " as midstream.from_iterable(lambda: data, name=...)"
        )
    if isinstance(data, Sequence) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return Dataset(SequenceSource(data, name))
    if hasattr(data, "__iter__"):
        raise TypeError(
            f"{type(data).__name__} can only be iterated, and an iterator cannot be rewound. Give a"
            " callable that returns a fresh one: midstream.from_iterable(lambda: ..., name=...)"
        )
    raise TypeError(
        "from_dataset takes a Hugging Face dataset, a map-style dataset or a sequence; found"
        f" {type(data).__name__}"
    )
