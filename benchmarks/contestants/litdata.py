"""LitData over its own optimized chunks on the local disk."""

from __future__ import annotations

from typing import Any

from interface import (
    IMAGES,
    MIX,
    PACK,
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


class _Decode:
    def __call__(self, samples: Any) -> Any:
        return stack_images([decode_row(sample) for sample in samples])


class LitData(Contestant):
    """StreamingDataset and StreamingDataLoader."""

    name, title, environment, format = "litdata", "LitData", "litdata", "litdata"
    kinds = frozenset({SHUFFLED, MIX, PACK, IMAGES})
    settings = (
        "optimize(chunk_bytes='64MB'), StreamingDataset(shuffle=True, seed, drop_last=False), StreamingDataLoader; the mix by "
        "CombinedStreamingDataset(weights=, iterate_over_all=False); packing in the main process (its own TokensLoader "
        "joins documents when the data is written, which is not the same work); images decoded in the collate function."
    )

    def open(self, work: Work) -> Reader:
        """The loader."""
        import litdata

        parts = [
            litdata.StreamingDataset(
                f"{folder}/litdata", shuffle=True, seed=work.seed, drop_last=False
            )
            for folder in work.folders.values()
        ]
        if len(parts) > 1:
            shares = [WEIGHTS[part] / sum(WEIGHTS.values()) for part in work.folders]
            data = litdata.CombinedStreamingDataset(
                parts, weights=shares, iterate_over_all=False, seed=work.seed
            )
        else:
            data = parts[0]
        how: dict[str, Any] = {
            "collate_fn": _Decode() if work.kind == IMAGES else Collate(work.shape)
        }
        if work.workers:
            how |= {
                "multiprocessing_context": work.start,
                "persistent_workers": work.persistent,
                "prefetch_factor": 2,
            }
        loader = litdata.StreamingDataLoader(
            data, batch_size=work.batch_size, num_workers=work.workers, **how
        )
        reader = Reader(loader)
        return PackedReader(reader) if work.kind == PACK else reader

    def versions(self) -> dict[str, str]:
        """Of the library."""
        import litdata

        return {"litdata": litdata.__version__}


ALL = [LitData]
