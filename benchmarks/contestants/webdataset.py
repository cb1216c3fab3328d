"""WebDataset over tar files on the local disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from interface import (
    BUFFER,
    IMAGES,
    MIX,
    PACK,
    SHUFFLED,
    WEIGHTS,
    Collate,
    Contestant,
    PackedReader,
    Reader,
    SkippingReader,
    Work,
    decode,
    stack_images,
)


def _tokens(sample: Any) -> Any:
    return {"id": int(sample["__key__"]), "input_ids": np.frombuffer(sample["bin"], dtype=np.int32)}


def _image(sample: Any) -> Any:
    return {"id": int(sample["__key__"]), "image": decode(sample["jpeg"])}


class WebDataset(Contestant):
    """WebDataset and WebLoader."""

    name, title, environment, format, resumes = (
        "webdataset",
        "WebDataset",
        "webdataset",
        "tar",
        False,
    )
    kinds = frozenset({SHUFFLED, MIX, PACK, IMAGES})
    settings = (
        f"WebDataset(16 shards a part, detshuffle with a seed for the shards).compose(detshuffle({BUFFER}, initial={BUFFER // 2})), "
        ".map(numpy.frombuffer), .batched, WebLoader; the mix by RandomMix(probs=), which draws from the global random; packing "
        "in the main process. No state: a resume reads what was read and drops it."
    )

    def _part(self, work: Work, folder: str) -> Any:
        import webdataset

        shards = sorted(str(path) for path in Path(folder, "tar").glob("*.tar"))
        stream = webdataset.WebDataset(
            shards, shardshuffle=len(shards), detshuffle=True, seed=work.seed
        )
        buffer = 256 if work.kind == IMAGES else BUFFER
        stream = stream.compose(
            webdataset.detshuffle(bufsize=buffer, initial=buffer // 2, seed=work.seed)
        )
        return stream.map(_image if work.kind == IMAGES else _tokens)

    def open(self, work: Work) -> Reader:
        """The loader."""
        import webdataset

        parts = [self._part(work, folder) for folder in work.folders.values()]
        if len(parts) > 1:
            shares = [WEIGHTS[part] / sum(WEIGHTS.values()) for part in work.folders]
            stream = webdataset.DataPipeline(webdataset.RandomMix(parts, shares))
        else:
            stream = webdataset.DataPipeline(parts[0])
        collate = stack_images if work.kind == IMAGES else Collate(work.shape)
        stream.append(webdataset.batched(work.batch_size, collation_fn=collate, partial=False))
        how: dict[str, Any] = {}
        if work.workers:
            how = {
                "multiprocessing_context": work.start,
                "persistent_workers": work.persistent,
                "prefetch_factor": 2,
            }
        loader = webdataset.WebLoader(stream, batch_size=None, num_workers=work.workers, **how)
        return PackedReader(Reader(loader)) if work.kind == PACK else SkippingReader(loader)

    def versions(self) -> dict[str, str]:
        """Of the library."""
        import importlib.metadata

        return {"webdataset": importlib.metadata.version("webdataset")}


ALL = [WebDataset]
