"""Mosaic Streaming over MDS shards on the local disk."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import tempfile
import types
from typing import Any

import numpy as np
from interface import (
    IMAGES,
    MIX,
    PACK,
    PRELOAD,
    REMOTE,
    SHUFFLED,
    WEIGHTS,
    Collate,
    Contestant,
    PackedReader,
    Reader,
    Work,
    decode_row,
    stack_images,
)


class _Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return _Empty(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def streaming_library() -> Any:
    """The library. It imports torchvision for its picture datasets, which loads only beside the
    torch it was built with.
    """
    try:
        import torchvision  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())
    import streaming

    return streaming


def preload() -> None:
    """In spawned workers, which import the library by unpickling."""
    streaming_library()


class _Decode:
    def __call__(self, samples: Any) -> Any:
        return stack_images([decode_row(sample) for sample in samples])


class Mosaic(Contestant):
    """StreamingDataset and StreamingDataLoader."""

    name, title, environment, format = "mosaic", "Mosaic Streaming (MDS)", "mosaic", "mds"
    kinds = frozenset({SHUFFLED, MIX, PACK, IMAGES, REMOTE})
    settings = (
        "StreamingDataset(local=..., shuffle=True, shuffle_seed, batch_size, num_canonical_nodes=1) of 64 MB shards, "
        "StreamingDataLoader; the mix by Stream(proportion=); packing in the main process; images decoded in the collate "
        "function. Remote: the same rows as MDS shards at the same endpoint. Where torchvision cannot be imported beside "
        "torch's CPU build an empty one stands in for it (Mosaic needs it for its picture datasets only)."
    )

    def open(self, work: Work) -> Reader:
        """The loader."""
        streaming = streaming_library()
        os.environ[PRELOAD] = __name__
        streaming.base.util.clean_stale_shared_memory()
        common = {
            "shuffle": True,
            "shuffle_seed": work.seed,
            "batch_size": work.batch_size,
            "num_canonical_nodes": 1,
        }
        if work.kind == REMOTE:
            local = tempfile.mkdtemp(prefix="mosaic-")
            data = streaming.StreamingDataset(remote=f"{work.url}-mds", local=local, **common)
        elif len(work.folders) > 1:
            shares = {part: WEIGHTS[part] / sum(WEIGHTS.values()) for part in work.folders}
            streams = [
                streaming.Stream(local=f"{folder}/mds", proportion=shares[part])
                for part, folder in work.folders.items()
            ]
            data = streaming.StreamingDataset(streams=streams, **common)
        else:
            data = streaming.StreamingDataset(local=f"{work.part()}/mds", **common)
        how: dict[str, Any] = {
            "collate_fn": _Decode() if work.kind == IMAGES else Collate(work.shape)
        }
        if work.workers:
            how |= {
                "multiprocessing_context": work.start,
                "persistent_workers": work.persistent,
                "prefetch_factor": 2,
            }
        loader = streaming.StreamingDataLoader(
            data, batch_size=work.batch_size, num_workers=work.workers, **how
        )
        reader = Reader(loader)
        return PackedReader(reader) if work.kind == PACK else reader

    def versions(self) -> dict[str, str]:
        """Of the library."""
        return {"mosaicml-streaming": streaming_library().__version__, "numpy": np.__version__}


ALL = [Mosaic]
