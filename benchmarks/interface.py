"""The interface of contestants, and the code they share.

Needs numpy alone (torch and pyarrow where used).

A contestant is a library, set up as its own documentation says, that reads the same rows as all the
others:

    class Mine(Contestant):
        name, title = "mine", "My loader"
        environment = "mine"           # where it runs: environments.py
        format = "arrow"               # which written form of the data it reads: prepare.py
        settings = "What was set, in words."
        kinds = frozenset({SHUFFLED})

        def open(self, work):          # a Reader: iterable of batches, with state() and load() where it has them
            return Reader(MyLoader(f"{work.part()}/arrow", batch_size=work.batch_size, ...))

A batch is a dict with ``id`` (the rows' numbers, which prove what was read) and ``input_ids``, in
one of three shapes:

    list      a list of the rows' token arrays
    flat      all tokens joined [tokens], and ``lengths`` [rows]
    padded    [rows, most], filled up with zeros; some add lengths

For PACK a batch is a tensor [8, 2048], or a dict with one as ``input_ids``; for IMAGES ``id`` and
``image`` [rows, 3, 224, 224].
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

SHUFFLED, MIX, PACK, SOURCES, REMOTE, IMAGES = (
    "shuffled",
    "mix",
    "pack",
    "sources",
    "remote",
    "images",
)
WEIGHTS = {"a": 7, "b": 2, "c": 1}
SEQ_LEN, ROWS_PACKED = 2048, 8
BUFFER = 10_000
PRELOAD = "MIDSTREAM_BENCHMARKS_PRELOAD"
"""In the environment: a module whose ``preload()`` runs first in spawned workers."""


@dataclass(frozen=True)
class Work:
    """One piece of work, the same for every contestant."""

    kind: str
    folders: dict[str, str] = field(default_factory=dict)
    """Part of the data -> its folder, which has ``raw/``, ``arrow/``, ``mds/``, ... inside."""
    shape: str = "flat"
    workers: int = 0
    batch_size: int = 32
    seed: int = 1
    start: str = "fork"
    persistent: bool = False
    stateful: bool = True
    """Whether the loader has to be ready to give a state after every batch."""
    sources: int = 1
    url: str = ""

    def part(self) -> str:
        """The folder of data that has one part."""
        (folder,) = self.folders.values()
        return folder


class Reader:
    """A loader that a contestant opened. A peer whose loader has ``state_dict`` and
    ``load_state_dict`` needs nothing else.
    """

    def __init__(self, loader: Any, *, also_close: Callable[[], Any] | None = None) -> None:
        self.loader, self.also_close = loader, also_close

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def state(self, iterator: Any, batches: int) -> Any:
        """The state after so many batches taken from ``iterator``."""
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        """Continue from a state, on a fresh reader."""
        self.loader.load_state_dict(state)

    def close(self) -> None:
        """Let go of processes and threads."""
        for close in (getattr(self.loader, "close", None), self.also_close):
            if close is not None:
                close()
        self.loader = None


class SkippingReader(Reader):
    """For loaders without a state: the state is the number of batches, and a resume reads them
    again and drops them.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self.loader)
        for _ in range(self.skip):
            next(iterator)
        return iterator

    def state(self, iterator: Any, batches: int) -> Any:
        """The number of batches."""
        return {"batches": batches}

    def load(self, state: Any) -> None:
        """Remember how many to drop."""
        self.skip = state["batches"]


class Contestant:
    """A library and its settings for every kind of work it can do."""

    name: ClassVar[str]
    title: ClassVar[str]
    environment: ClassVar[str] = "main"
    format: ClassVar[str] = "arrow"
    kinds: ClassVar[frozenset[str]] = frozenset()
    settings: ClassVar[str]
    limit: ClassVar[bool] = False
    """Not a library but a bound: what the bytes allow, or hand-written code behind a library."""
    ours: ClassVar[bool] = False
    resumes: ClassVar[bool] = True
    threads: ClassVar[bool] = False
    """Whether its workers are threads."""
    workers: ClassVar[tuple[int, ...]] = (0, 2)
    starts: ClassVar[tuple[str, ...]] = ("fork", "spawn")

    def open(self, work: Work) -> Reader:
        """A fresh loader for this work."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Of the libraries that matter."""
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class Raw:
    """The bytes that every format was written from: ids, offsets and tokens, memory-mapped."""

    def __init__(self, folder: str) -> None:
        self.ids = np.load(f"{folder}/raw/ids.npy", mmap_mode="r")
        self.offsets = np.load(f"{folder}/raw/offsets.npy", mmap_mode="r")
        self.values = np.load(f"{folder}/raw/values.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Any:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class Views:
    """Rows of memory-mapped Arrow files as zero-copy numpy views: the least that reading a row can
    cost.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._open()

    def _open(self) -> None:
        import pyarrow as pa

        self.values: list[Any] = []
        self.offsets: list[list[int]] = []
        ids, starts = [], [0]
        for path in sorted(Path(self.folder, "arrow").glob("*.arrow")):
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            for batch in table.to_batches():
                tokens = batch.column("input_ids")
                self.values.append(tokens.values.to_numpy())
                self.offsets.append(tokens.offsets.to_numpy().tolist())
                ids.append(batch.column("id").to_numpy())
                starts.append(starts[-1] + len(batch))
        self.ids = np.concatenate(ids)
        self.starts = np.array(starts, dtype=np.int64)

    def __getstate__(self) -> dict[str, str]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        chunk = int(np.searchsorted(self.starts, row, side="right")) - 1
        at = row - int(self.starts[chunk])
        bounds = self.offsets[chunk]
        return {
            "id": int(self.ids[row]),
            "input_ids": self.values[chunk][bounds[at] : bounds[at + 1]],
        }

    def tokens(self, rows: Any) -> list[Any]:
        """The token views of many rows."""
        chunks = np.searchsorted(self.starts, rows, side="right") - 1
        at = (rows - self.starts[chunks]).tolist()
        values, offsets = self.values, self.offsets
        return [values[c][offsets[c][i] : offsets[c][i + 1]] for c, i in zip(chunks.tolist(), at)]


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def as_tensor(array: Any) -> Any:
    """A tensor on the array's memory."""
    import torch

    return torch.from_numpy(array)


def numpy_batch(ids: Any, arrays: list[Any], shape: str) -> dict[str, Any]:
    """A batch of numpy arrays in one of the three shapes."""
    if shape == "list":
        return {"id": ids, "input_ids": arrays}
    lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
    if shape == "flat":
        return {"id": np.asarray(ids), "input_ids": np.concatenate(arrays), "lengths": lengths}
    out = np.zeros((len(arrays), int(lengths.max())), dtype=arrays[0].dtype)
    for row, array in zip(out, arrays):
        row[: len(array)] = array
    return {"id": np.asarray(ids), "input_ids": out, "lengths": lengths}


def tensor_batch(ids: Any, arrays: list[Any], shape: str) -> dict[str, Any]:
    """The same, of tensors."""
    if shape == "list":
        import torch

        # A view of a memory map is read-only, of which torch would warn; measure.py has switched
        # warnings off.
        return {"id": ids, "input_ids": [torch.from_numpy(array) for array in arrays]}
    return {key: as_tensor(value) for key, value in numpy_batch(ids, arrays, shape).items()}


class Collate:
    """A collate function for samples that are dicts of an id and a token array (numpy, or tensors
    on numpy's memory).
    """

    def __init__(self, shape: str, tensors: bool = True) -> None:
        self.shape, self.tensors = shape, tensors

    def __call__(self, samples: Any) -> dict[str, Any]:
        ids = [int(sample["id"]) for sample in samples]
        arrays = [np.asarray(sample["input_ids"]) for sample in samples]
        return (tensor_batch if self.tensors else numpy_batch)(ids, arrays, self.shape)


class Packed:
    """Concat-and-split in the main process: flat batches of documents in, [8, 2048] int64 tensors
    of tokens out.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        import torch

        size = SEQ_LEN * ROWS_PACKED
        held: list[Any] = []
        filled = 0
        for batch in self.batches:
            tokens = batch["input_ids"] if isinstance(batch, dict) else batch
            held.append(torch.as_tensor(tokens))
            filled += len(held[-1])
            while filled >= size:
                joined = torch.cat(held) if len(held) > 1 else held[0]
                yield joined[:size].to(torch.int64).view(ROWS_PACKED, SEQ_LEN)
                held, filled = [joined[size:]], filled - size


class PackedReader(Reader):
    """A reader of flat batches, packed in the main process."""

    def __init__(self, inner: Reader) -> None:
        super().__init__(Packed(inner), also_close=inner.close)


def rows_of(batch: Any) -> int:
    """Rows in a batch."""
    return len(
        (batch["id"] if "id" in batch else batch["input_ids"]) if isinstance(batch, dict) else batch
    )


def ids_of(batch: Any) -> list[int]:
    """The numbers of the rows in a batch."""
    return [int(one) for one in batch["id"]]


def arrays_of(batch: Any) -> list[Any]:
    """The rows' tokens, whatever the shape."""
    tokens = batch["input_ids"]
    if isinstance(tokens, list):
        return [np.asarray(one) for one in tokens]
    tokens = np.asarray(tokens)
    lengths = batch.get("lengths", batch.get("input_ids_lengths"))
    if tokens.ndim == 2:
        return [row[: int(n)] for row, n in zip(tokens, lengths)]
    ends = np.cumsum(np.asarray(lengths))
    return np.split(tokens, ends[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# User code
# ---------------------------------------------------------------------------------------------------------------------


def decode(jpeg: Any) -> Any:
    """A user's function: decode, cut out the middle, scale to 224 x 224, as uint8 [3, 224, 224]."""
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as image:
        image = image.convert("RGB")
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize(
            (224, 224), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
        )
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decode_row(row: Any) -> dict[str, Any]:
    """`decode` on a row."""
    return {"id": int(row["id"]), "image": decode(row["jpeg"])}


def stack_images(samples: Any) -> dict[str, Any]:
    """A batch of decoded rows, as tensors."""
    import torch

    return {
        "id": torch.as_tensor([int(sample["id"]) for sample in samples]),
        "image": torch.from_numpy(np.stack([np.asarray(sample["image"]) for sample in samples])),
    }
