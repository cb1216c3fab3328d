"""midstream. When it learns something, change it here and nowhere else."""

from __future__ import annotations

import inspect
from typing import Any

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
    Reader,
    Work,
    decode_row,
    stack_images,
)


def _source(folder: str) -> Any:
    import datasets

    import midstream as ms

    return ms.from_dataset(datasets.load_from_disk(f"{folder}/arrow"))


def _yes(sample: Any) -> bool:
    return True


def _shape(shape: str) -> Any:
    """The collate function: midstream's own where it has one."""
    import midstream as ms

    if shape == "padded":
        return ms.pad
    if shape == "list" and hasattr(ms, "ragged"):
        return ms.ragged
    if shape == "flat" and hasattr(ms, "flat"):
        return ms.flat
    return Collate(shape, tensors=shape != "list")


class Midstream(Contestant):
    """Worker processes."""

    name, title, ours = "midstream", "midstream", True
    kinds = frozenset({SHUFFLED, MIX, PACK, SOURCES, REMOTE, IMAGES})
    settings = (
        "from_dataset(load_from_disk(...)).shuffle(seed); interleave with weights 7:2:1; .pack(2048), which also makes labels, "
        "positions and piece lengths; read_parquet(s3://...).shuffle(seed); .map(decode). ms.DataLoader with defaults: 48 "
        "lanes, prefetch_factor 2, and a state with every batch. Collate functions: ms.ragged, ms.pad, ms.flat."
    )
    loader: dict[str, Any] = {}  # noqa: RUF012

    def pipeline(self, work: Work) -> Any:
        """The dataset."""
        import midstream as ms

        if work.kind == SOURCES:
            rows = range(4096)
            parts = {
                f"s{number:03d}": ms.from_dataset(rows).shuffle(number)
                for number in range(work.sources)
            }
            return (ms.interleave(parts) if len(parts) > 1 else parts["s000"]).repeat()
        if work.kind == REMOTE:
            return ms.read_parquet(f"{work.url}/*.parquet").shuffle(work.seed)
        parts = {part: _source(folder).shuffle(work.seed) for part, folder in work.folders.items()}
        ds = (
            ms.interleave(parts, weights=WEIGHTS, seed=work.seed)
            if len(parts) > 1
            else next(iter(parts.values()))
        )
        if work.kind == PACK:
            return ds.pack(SEQ_LEN)
        return ds.map(decode_row) if work.kind == IMAGES else ds

    def open(self, work: Work) -> Reader:
        """The loader."""
        import midstream as ms

        how: dict[str, Any] = dict(self.loader)
        if work.workers:
            how |= {"num_workers": work.workers, "multiprocessing_context": work.start}
            how["persistent_workers"] = work.persistent
        if "worker_type" in how:
            how.pop("multiprocessing_context", None)
        if work.kind in (SHUFFLED, MIX, REMOTE):
            how["collate_fn"] = _shape(work.shape)
        elif work.kind == IMAGES:
            how["collate_fn"] = stack_images
        elif work.kind == PACK:
            how["drop_last"] = True
        return Reader(
            ms.DataLoader(
                self.pipeline(work), ROWS_PACKED if work.kind == PACK else work.batch_size, **how
            )
        )

    def versions(self) -> dict[str, str]:
        """Of what it stands on."""
        import datasets
        import torchdata

        import midstream as ms

        return {
            "midstream": ms.__version__,
            "torchdata": torchdata.__version__,
            "datasets": datasets.__version__,
        }


class MidstreamThreads(Midstream):
    """Threads in place of processes, once the loader has them."""

    name, title = "midstream-thread", "midstream, threads"
    kinds = frozenset({SHUFFLED, MIX, PACK, REMOTE, IMAGES})
    settings = 'As midstream, with worker_type="thread".'
    workers = (2,)
    threads = True
    starts = ("fork",)
    loader = {"worker_type": "thread"}  # noqa: RUF012

    def open(self, work: Work) -> Reader:
        """The loader."""
        import midstream as ms

        if "worker_type" not in inspect.signature(ms.DataLoader.__init__).parameters:
            raise NotImplementedError("this midstream has no worker_type yet")
        return super().open(work)


class MidstreamStream(Midstream):
    """A stream: filtered, and shuffled in a buffer."""

    name, title = "midstream-stream", "midstream, filter and buffered shuffle"
    kinds = frozenset({SHUFFLED, SOURCES})
    settings = f"from_dataset(...).filter(yes).shuffle(seed, buffer_size={BUFFER}): a stream, which has to be replayed."

    def pipeline(self, work: Work) -> Any:
        """The dataset."""
        import midstream as ms

        if work.kind == SOURCES:
            rows = range(4096)
            parts = {
                f"s{number:03d}": ms.from_dataset(rows).shuffle(number).filter(_yes)
                for number in range(work.sources)
            }
            return (ms.interleave(parts) if len(parts) > 1 else parts["s000"]).repeat()
        return _source(work.part()).filter(_yes).shuffle(work.seed, buffer_size=BUFFER)


ALL = [Midstream, MidstreamThreads, MidstreamStream]
