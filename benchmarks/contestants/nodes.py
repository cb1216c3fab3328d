"""torchdata.nodes: over the map-style ``datasets``, and over hand-written views."""

from __future__ import annotations

import threading
from typing import Any

from interface import (
    IMAGES,
    MIX,
    PACK,
    SHUFFLED,
    SOURCES,
    WEIGHTS,
    Collate,
    Contestant,
    PackedReader,
    Reader,
    Views,
    Work,
    stack_images,
    tensor_batch,
)

from contestants.torch_loaders import map_style


class _Fetch:
    """From a list of (part, row) to a batch."""

    def __init__(self, work: Work) -> None:
        self.work, self.collate = work, Collate(work.shape)
        only = [
            Work(kind=SHUFFLED if work.kind != IMAGES else IMAGES, folders={"x": f})
            for f in work.folders.values()
        ]
        self.parts = dict(zip(work.folders, map(map_style, only)))

    def __call__(self, keys: Any) -> Any:
        if self.work.kind == IMAGES:
            return stack_images([self.parts[part][row] for part, row in keys])
        if len(self.parts) == 1:
            (part,) = self.parts
            return self.collate(self.parts[part].__getitems__([row for _, row in keys]))
        samples: list[Any] = [None] * len(keys)
        for part, data in self.parts.items():
            places = [place for place, key in enumerate(keys) if key[0] == part]
            for place, sample in zip(
                places, data.__getitems__([keys[place][1] for place in places])
            ):
                samples[place] = sample
        return self.collate(samples)


class _FetchViews(_Fetch):
    """The same over `Views`."""

    def __init__(self, work: Work) -> None:
        self.work, self.collate = work, None
        self.parts = {part: Views(folder) for part, folder in work.folders.items()}

    def __call__(self, keys: Any) -> Any:
        rows = [self.parts[part][row] for part, row in keys]
        arrays = [row["input_ids"] for row in rows]
        if self.work.shape == "list":
            return {"id": [row["id"] for row in rows], "input_ids": arrays}
        return tensor_batch([row["id"] for row in rows], arrays, self.work.shape)


class _Tag:
    def __init__(self, part: str) -> None:
        self.part = part

    def __call__(self, row: int) -> tuple[str, int]:
        return self.part, row


class _Number:
    """W5's rows are their numbers."""

    def __call__(self, keys: Any) -> Any:
        import torch

        return torch.tensor([row for _, row in keys])


class NodesThread(Contestant):
    """Threads."""

    name, title = "nodes-thread", "torchdata.nodes + datasets (map), threads"
    kinds = frozenset({SHUFFLED, MIX, PACK, IMAGES, SOURCES})
    settings = (
        "SamplerWrapper(RandomSampler with a seeded generator) → MultiNodeWeightedSampler for mixes → Batcher → "
        "ParallelMapper(fetch and collate, method=thread; a Mapper with 0 workers) → Loader. The mix draws row numbers, so rows "
        "are read a batch at a time."
    )
    method = "thread"
    threads = True
    starts = ("fork",)
    fetch: Any = _Fetch

    def open(self, work: Work) -> Reader:
        """The graph."""
        import torch
        from torch.utils.data import RandomSampler
        from torchdata import nodes

        if work.kind == SOURCES:
            # One source alone has nothing that repeats it.
            sizes = {
                f"s{number:03d}": 4096 if work.sources > 1 else 10**6
                for number in range(work.sources)
            }
            fetch: Any = _Number()
        else:
            fetch = type(self).fetch(work)
            sizes = {part: len(data) for part, data in fetch.parts.items()}
        children = {}
        for part, size in sizes.items():
            generator = torch.Generator().manual_seed(work.seed)
            rows = nodes.SamplerWrapper(RandomSampler(range(size), generator=generator))
            children[part] = nodes.Mapper(rows, _Tag(part))
        if len(children) > 1:
            total = sum(WEIGHTS.values())
            shares = {part: WEIGHTS[part] / total if part in WEIGHTS else 1.0 for part in children}
            stop = "CYCLE_FOREVER" if work.kind == SOURCES else "FIRST_DATASET_EXHAUSTED"
            keys: Any = nodes.MultiNodeWeightedSampler(
                children, shares, stop_criteria=stop, seed=work.seed
            )
        else:
            keys = next(iter(children.values()))
        batches = nodes.Batcher(keys, work.batch_size)
        if work.workers:
            how = {"multiprocessing_context": work.start} if self.method == "process" else {}
            root: Any = nodes.ParallelMapper(
                batches, fetch, num_workers=work.workers, method=self.method, **how
            )
        else:
            root = nodes.Mapper(batches, fetch)
        reader = Reader(nodes.Loader(root), also_close=_Shutdown(root))
        return PackedReader(reader) if work.kind == PACK else reader

    def versions(self) -> dict[str, str]:
        """Of both."""
        import datasets
        import torchdata

        return {"datasets": datasets.__version__, "torchdata": torchdata.__version__}


_KEPT: list[Any] = []


class _Shutdown:
    """Its threads and processes may hang when they end, so that happens in a thread, is not waited for, and is not repeated
    when the graph is collected."""

    def __init__(self, root: Any) -> None:
        self.root = root
        _KEPT.append(root)

    def __call__(self) -> None:
        it = getattr(self.root, "_it", None)
        if it is not None and hasattr(it, "_shutdown"):
            ending = threading.Thread(target=it._shutdown, daemon=True)
            ending.start()
            ending.join(3)
            _KEPT.append(it)


class NodesProcess(NodesThread):
    """Processes."""

    name, title = "nodes-process", "torchdata.nodes + datasets (map), processes"
    kinds = frozenset({SHUFFLED, MIX, PACK, IMAGES})
    settings = "As nodes-thread, with method=process."
    method = "process"
    threads = False
    workers = (2,)
    starts = ("fork", "spawn")


class NodesViews(NodesThread):
    """Hand-written reading."""

    name, title, limit = "nodes-views", "limit: views in torchdata.nodes threads", True
    kinds = frozenset({SHUFFLED, MIX, PACK})
    settings = "As nodes-thread, over the hand-written views of the limit."
    fetch = _FetchViews


ALL = [NodesThread, NodesProcess, NodesViews]
