"""The data: made once from a seed as plain numpy files, then written in each contestant's own format from those.

    raw/       ids.npy, offsets.npy, values.npy: tokens as int32 (or the bytes of JPEG files, as uint8)
    arrow/     what ``datasets`` saves: columns id and input_ids (or jpeg), record batches of 1,000 rows
    parquet/   4 files, row groups of 2,000 rows
    mds/ litdata/ tar/     written by the peer's own writer, in its own environment; webdataset's TarWriter, 16 shards

Run by run.py, one process for each format: ``python prepare.py FORMAT FOLDER``.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from interface import Raw

SETS: dict[str, dict[str, int]] = {
    "tokens": {"all": 200_000},
    "mix": {"a": 140_000, "b": 40_000, "c": 20_000},
    "short": {"all": 1_050_000},
    "epoch": {"all": 20_000},
    "images": {"all": 800},
    "remote": {"all": 40_000},
}
"""Set -> part -> rows. ``tokens``, ``mix``, ``epoch``, ``remote``: lengths lognormal, 16 to 2,048,
mean 296. ``short``: 4 to 12.
"""

SCALES = {"full": 1.0, "quick": 0.1, "tiny": 0.01}
FAR = 100_000_000
"""Ids of part k start at k times this."""


def folder_of(cache: Path, scale: str, name: str, part: str) -> Path:
    """Where a part of a set lies."""
    return cache / "data" / scale / name / part


def parts_of(name: str, scale: str) -> dict[str, int]:
    """Part -> rows, at a scale."""
    if name == "images" and scale == "quick":
        return {
            part: rows // 2 + 64 for part, rows in SETS[name].items()
        }  # fewer would all be decoded before the clock starts
    return {part: max(64, int(rows * SCALES[scale])) for part, rows in SETS[name].items()}


def make_raw(folder: Path, name: str, number: int, rows: int) -> None:
    """Make the bytes."""
    rng = np.random.default_rng([number, sum(map(ord, name))])
    if name == "images":
        blobs = [_jpeg(rng) for _ in range(rows)]
        lengths = np.array([len(blob) for blob in blobs])
        values: Any = np.frombuffer(b"".join(blobs), dtype=np.uint8)
    else:
        if name == "short":
            lengths = rng.integers(4, 13, rows)
        else:
            lengths = np.clip(rng.lognormal(5.4, 0.8, rows), 16, 2048).astype(np.int64)
        values = rng.integers(0, 50_000, int(lengths.sum()), dtype=np.int32)
    (folder / "raw").mkdir(parents=True)
    np.save(folder / "raw" / "ids.npy", np.arange(rows, dtype=np.int64) + number * FAR)
    np.save(
        folder / "raw" / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    )
    np.save(folder / "raw" / "values.npy", values)


def _jpeg(rng: Any) -> bytes:
    """A picture with edges and some noise, 512 x 384."""
    from PIL import Image

    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    picture = np.asarray(small.resize((512, 384), Image.Resampling.BICUBIC)).astype(np.int16)
    picture = picture + rng.integers(-12, 13, picture.shape)
    out = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=88)
    return out.getvalue()


def write(kind: str, folder: Path) -> None:
    """Write one format of what lies raw in a folder."""
    target, unfinished = folder / kind, folder / f"{kind}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    raw = Raw(str(folder))
    {"arrow": _arrow, "parquet": _parquet, "mds": _mds, "litdata": _litdata, "tar": _tar}[kind](
        raw, unfinished
    )
    unfinished.rename(target)


def _table(raw: Raw) -> Any:
    import pyarrow as pa

    ids = pa.array(np.asarray(raw.ids))
    offsets = pa.array(np.asarray(raw.offsets).astype(np.int32))
    if raw.values.dtype == np.uint8:
        blobs = pa.BinaryArray.from_buffers(
            pa.binary(),
            len(raw),
            [None, offsets.buffers()[1], pa.py_buffer(np.asarray(raw.values))],
        )
        return pa.table({"id": ids, "jpeg": blobs})
    return pa.table(
        {
            "id": ids,
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(np.asarray(raw.values))),
        }
    )


def _arrow(raw: Raw, target: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(datasets.table.InMemoryTable(_table(raw))).save_to_disk(str(target))


def _parquet(raw: Raw, target: Path) -> None:
    import pyarrow.parquet as pq

    table = _table(raw)
    rows = -(-len(raw) // 4)
    for number in range(4):
        pq.write_table(
            table.slice(number * rows, rows), target / f"part-{number}.parquet", row_group_size=2000
        )


def _is_image(raw: Raw) -> bool:
    return bool(raw.values.dtype == np.uint8)


def _mds(raw: Raw, target: Path) -> None:
    from contestants.mosaic import streaming_library

    columns = (
        {"id": "int", "jpeg": "bytes"}
        if _is_image(raw)
        else {"id": "int", "input_ids": "ndarray:int32"}
    )
    with streaming_library().MDSWriter(
        out=str(target), columns=columns, size_limit="64mb"
    ) as writer:
        for row in range(len(raw)):
            value = raw[row].tobytes() if _is_image(raw) else np.array(raw[row])
            writer.write(
                {"id": int(raw.ids[row]), ("jpeg" if _is_image(raw) else "input_ids"): value}
            )


class _Row:
    """LitData's ``optimize`` calls this in worker processes: rows of a range."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, bounds: tuple[int, int]) -> Iterator[dict[str, Any]]:
        raw = Raw(self.folder)
        for row in range(*bounds):
            if _is_image(raw):
                yield {"id": int(raw.ids[row]), "jpeg": raw[row].tobytes()}
            else:
                yield {"id": int(raw.ids[row]), "input_ids": np.array(raw[row])}


def _litdata(raw: Raw, target: Path) -> None:
    import litdata

    step = 20_000
    inputs = [(first, min(first + step, len(raw))) for first in range(0, len(raw), step)]
    litdata.optimize(
        fn=_Row(str(target.parent)),
        inputs=inputs,
        output_dir=str(target),
        chunk_bytes="64MB",
        num_workers=1,
    )


def _tar(raw: Raw, target: Path) -> None:
    import webdataset

    shards = 16
    rows = -(-len(raw) // shards)
    for shard in range(shards):
        with webdataset.TarWriter(str(target / f"{shard:03d}.tar")) as out:
            for row in range(shard * rows, min((shard + 1) * rows, len(raw))):
                suffix = "jpeg" if _is_image(raw) else "bin"
                out.write({"__key__": f"{int(raw.ids[row]):09d}", suffix: raw[row].tobytes()})


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
