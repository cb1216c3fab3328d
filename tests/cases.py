"""One table of small pipelines: every exported node and source, and compositions of them.

Every law in test_contract.py runs on every row. A sample is, or contains, integers ``10_000 * k +
row`` for row ``row`` of the k-th source of the case, so any output can be traced back by its
content alone.
"""

from __future__ import annotations

import atexit
import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import midstream as ms
from midstream.dataset import Dataset

BASE = 10_000


class Boom(Exception):
    """Its constructor takes two arguments, so it does not survive pickling."""

    def __init__(self, value: int, reason: str) -> None:
        super().__init__(f"{value}: {reason}")


@dataclass(frozen=True)
class Bomb:
    """Raises on some samples, passes the others on."""

    ids: frozenset[int]

    def __call__(self, sample: Any) -> Any:
        if self.ids.intersection(identify(sample)):
            raise Boom(identify(sample)[0], "bad row")
        return sample


class Counted(list):  # type: ignore[type-arg]
    """A list that counts the rows read of it, in this process."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        Counted.reads += 1
        return super().__getitem__(index)


def identify(sample: Any) -> list[int]:
    """The integers in a sample, in order: which rows it is made of."""
    if isinstance(sample, (bool, str, bytes, float)):
        return []
    if isinstance(sample, (int, np.integer)):
        return [int(sample)]
    if isinstance(sample, torch.Tensor):
        return [int(value) for value in sample.reshape(-1).tolist()]
    if isinstance(sample, np.ndarray):
        return [int(value) for value in sample.reshape(-1).tolist()]
    if isinstance(sample, dict) and "seq_lens" in sample:
        return [i for row in pieces(sample) for i in row[:, 0].tolist()]
    if isinstance(sample, dict):
        return (
            identify(sample["id"])
            if "id" in sample
            else [i for value in sample.values() for i in identify(value)]
        )
    return [i for value in sample for i in identify(value)]


def pieces(sample: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """The token id and the number of tokens of each piece of packed rows, as arrays of shape
    [pieces, 2], one per row.
    """
    found = []
    for ids, lengths in zip(np.atleast_2d(sample["input_ids"]), np.atleast_2d(sample["seq_lens"])):
        lengths = lengths[lengths > 0]
        found.append(np.stack([ids[np.cumsum(lengths) - lengths], lengths], axis=1))
    return found


def plain(sample: Any) -> Any:
    """A sample as plain Python, to be compared whole."""
    if isinstance(sample, (torch.Tensor, np.ndarray)):
        return sample.tolist()
    if isinstance(sample, dict):
        return {key: plain(value) for key, value in sample.items()}
    if isinstance(sample, (list, tuple)):
        return [plain(value) for value in sample]
    return sample


# -- data on disk, made once per process --------------------------------------------------------------------------------

_folder: Path | None = None


def folder() -> Path:
    """Where this process keeps its files."""
    global _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="midstream-cases-"))
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    return _folder


def ids(k: int, n: int) -> list[int]:
    return list(range(BASE * k, BASE * k + n))


def numbers(k: int, n: int, bomb: frozenset[int] = frozenset()) -> Dataset:
    """A sequence source, with a map that fails on the rows in ``bomb``."""
    return ms.from_dataset(Counted(ids(k, n))).map(Bomb(bomb))


def columns(k: int, n: int) -> dict[str, list[Any]]:
    rows = ids(k, n)
    return {
        "id": rows,
        "text": [f"row {row}" for row in rows],
        "tokens": [list(range(row % 5)) for row in rows],
    }


def arrow(k: int, n: int, *, mapped: bool) -> datasets.Dataset:
    data = datasets.Dataset.from_dict(columns(k, n))
    if not mapped:
        return data
    path = folder() / f"arrow-{k}-{n}"
    if not path.exists():
        data.save_to_disk(str(path), max_shard_size="1GB")
    return datasets.load_from_disk(str(path))


def parquet(k: int, n: int) -> str:
    path = folder() / f"{k}-{n}.parquet"
    if not path.exists():
        pq.write_table(pa.table(columns(k, n)), path, row_group_size=7)
    return str(path)


def jsonl(k: int, n: int) -> str:
    path = folder() / f"{k}-{n}.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps({"id": row}) + "\n" for row in ids(k, n)))
    return str(path)


def jsonl_gz(k: int, n: int, shards: int) -> list[str]:
    paths = [folder() / f"{k}-{n}-{shard}.jsonl.gz" for shard in range(shards)]
    for shard, path in enumerate(paths):
        if not path.exists():
            path.write_bytes(
                gzip.compress(
                    "".join(json.dumps({"id": r}) + "\n" for r in ids(k, n)[shard::shards]).encode()
                )
            )
    return list(map(str, paths))


def hub_stream(k: int, n: int) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"id": ids(k, n)}).to_iterable_dataset(num_shards=12)


@dataclass(frozen=True)
class Shards:
    """What from_iterable calls."""

    k: int
    n: int
    num_shards: int

    def __call__(self, shard: int = 0) -> list[int]:
        return ids(self.k, self.n)[shard :: self.num_shards]


# -- functions of the pipelines ----------------------------------------------------------------------------------------


def is_odd(sample: Any) -> bool:
    return identify(sample)[0] % 2 == 1


def not_third(sample: Any) -> bool:
    return identify(sample)[0] % 3 != 0


def to_dict(sample: Any) -> dict[str, Any]:
    return {"id": identify(sample)[0], "twice": float(identify(sample)[0] * 2)}


def with_noise(sample: Any, rng: np.random.Generator) -> dict[str, Any]:
    return {"id": identify(sample)[0], "noise": rng.random()}


def with_global_noise(sample: Any) -> dict[str, Any]:
    import random

    noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    return {"id": identify(sample)[0], "noise": noise}


def copies(sample: Any) -> list[Any]:
    """0, 1, 2 or 3 parts, all with the row's id."""
    return [sample] * (identify(sample)[0] % 4)


def ragged(sample: Any) -> dict[str, Any]:
    row = identify(sample)[0]
    return {"id": row, "tokens": np.arange(row % 6, dtype=np.int32)}


LENGTHS = [3, 0, 8, 1, 5, 9, 2, 0, 7, 21, 4, 6, 80]


def document(sample: Any) -> dict[str, Any]:
    """A row as a document of up to 80 tokens, all of which are its id."""
    row = identify(sample)[0]
    size = LENGTHS[row % 13] if row % 10 else 4
    return {
        "input_ids": np.full(size, row, dtype=np.int32),
        "kind": np.arange(size) % 3,
        "trained": [token % 2 for token in range(size)],
    }


def two_documents(bomb: frozenset[int]) -> Dataset:
    return ms.interleave(
        {
            "web": numbers(0, 60, bomb).shuffle(1).map(document).filter(not_empty),
            "code": numbers(1, 40, bomb).map(document),
        },
        {"web": 2, "code": 1},
        stopping_strategy="all_exhausted_without_replacement",
    )


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {"id": batch["id"], "four times": [2 * value for value in batch["twice"]]}


def first_of_pairs(batch: dict[str, Any]) -> dict[str, Any]:
    """One sample of two, which has both ids."""
    return {"id": [batch["id"]]}


def parts_of_one(batch: list[Any]) -> list[Any]:
    return copies(batch[0])


def apart(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch as its rows again."""
    ends = batch["tokens_lengths"].cumsum(0).tolist() if "tokens_lengths" in batch else None
    tokens = batch["tokens"] if ends is None else np.split(batch["tokens"].numpy(), ends[:-1])
    rows = zip(batch["id"].tolist(), batch["text"], tokens)
    return [{"id": row, "text": text, "tokens": each} for row, text, each in rows]


def not_empty(sample: dict[str, Any]) -> bool:
    return len(sample["input_ids"]) > 0


# -- the table ---------------------------------------------------------------------------------------------------------

Build = Callable[[frozenset[int]], Dataset]


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes:
        build: Makes the pipeline; the argument is the ids that user code fails on (ignored by some
            sources).
        sources: The k of each source's ids, by name.
        replay: Source rows read again on resume, at most (for one lane).
        epoch: What one epoch yields, sorted, or None where only part of the data is used.
        shifts: Whether a sample lost to an error moves those after it (into another batch that is
            dropped, say).
        cuts: Whether one row may come in several pieces.
    """

    build: Build
    sources: dict[str, int]
    replay: int = 0
    epoch: list[int] | None = None
    shifts: bool = False
    cuts: bool = False


def mix(bomb: frozenset[int], **options: Any) -> Dataset:
    return ms.interleave(
        {"web": numbers(0, 90, bomb).shuffle(1), "code": numbers(1, 60, bomb)},
        {"web": 7, "code": 3},
        **options,
    )


def stream_mix(bomb: frozenset[int], **options: Any) -> Dataset:
    return ms.interleave(
        {
            "web": numbers(0, 90, bomb).shuffle(1).filter(not_third),
            "code": numbers(1, 60, bomb).shuffle(1),
        },
        {"web": 7, "code": 3},
        **options,
    )


def everything(bomb: frozenset[int]) -> Dataset:
    inner = ms.interleave(
        {"b": numbers(1, 50, bomb), "c": numbers(2, 40, bomb).filter(not_third)},
        {"b": 1, "c": 2},
        seed=4,
    )
    return (
        ms.interleave(
            {"a": numbers(0, 80, bomb).shuffle(3).map(to_dict), "rest": inner},
            {"a": 3, "rest": 2},
            seed=5,
        )
        .map(with_noise, with_rng=True)
        .flat_map(copies)
        .shuffle(9, buffer_size=40)
        .repeat(2)
        .skip(5)
        .batch(4)
    )


PLAN = ms.schedule(
    [(0, {"web": 7, "code": 3}), (17, {"web": 1, "code": 1}), (60, {"web": 2, "code": 9})]
)


def planned(bomb: frozenset[int], stream: bool = False, **options: Any) -> Dataset:
    web, code = numbers(0, 90, bomb).shuffle(1), numbers(1, 60, bomb)
    return ms.interleave(
        {"web": web.filter(not_third) if stream else web, "code": code}, PLAN, **options
    )


def size_of(sample: Any) -> int:
    """What a sample counts: up to 40, by its row."""
    return (0, 3, 40, 1, 7, 5)[identify(sample)[0] % 6]


def measured(bomb: frozenset[int], weights: Any = None, **options: Any) -> Dataset:
    return ms.interleave(
        {"web": numbers(0, 90, bomb).shuffle(1).filter(not_third), "code": numbers(1, 60, bomb)},
        weights or {"web": 7, "code": 3},
        weights_by=size_of,
        **options,
    )


def first_of(sample: Any) -> int:
    return identify(sample)[0]


def residue(sample: Any) -> int:
    return identify(sample)[0] % 3


def tracked(dataset: Dataset) -> Dataset:
    """With a metric of each kind."""
    return dataset.track(number=first_of, size=ms.distribution(size_of), residue=ms.count(residue))


DATA = {"data": 0}
TWO = {"web": 0, "code": 1}
ODD = [row for row in ids(0, 90) if row % 2]
COPIES = sorted(row for row in ids(0, 60) for _ in range(row % 4))
PASSES = [row for row in ids(0, 90) if row % 3]

CASES: dict[str, Case] = {
    # sources
    "sequence": Case(lambda bomb: numbers(0, 60, bomb), DATA, epoch=ids(0, 60)),
    "arrow in memory": Case(
        lambda b: ms.from_dataset(arrow(0, 60, mapped=False)).map(Bomb(b)), DATA, epoch=ids(0, 60)
    ),
    "arrow mapped, shuffled": Case(
        lambda b: ms.from_dataset(arrow(0, 60, mapped=True)).shuffle(7).map(Bomb(b)),
        DATA,
        epoch=ids(0, 60),
    ),
    "arrow formatted": Case(
        lambda b: ms.from_dataset(
            arrow(0, 60, mapped=True).select_columns(["id"]).with_format("torch")
        ).map(Bomb(b)),
        DATA,
        epoch=ids(0, 60),
    ),
    "parquet, window shuffle": Case(
        lambda b: ms.read_parquet(parquet(0, 60)).shuffle(2, window_blocks=3).map(Bomb(b)),
        DATA,
        epoch=ids(0, 60),
    ),
    "json lines": Case(lambda b: ms.read_json(jsonl(0, 60)).map(Bomb(b)), DATA, epoch=ids(0, 60)),
    "json lines gz": Case(
        lambda b: ms.read_json(jsonl_gz(0, 72, 12)).map(Bomb(b)), DATA, epoch=ids(0, 72)
    ),
    "iterable": Case(
        lambda b: ms.from_iterable(Shards(0, 72, 12), name="data", num_shards=12).map(Bomb(b)),
        DATA,
        epoch=ids(0, 72),
    ),
    "iterable stride": Case(
        lambda b: ms.from_iterable(Shards(0, 72, 1), name="data", split="stride").map(Bomb(b)),
        DATA,
        epoch=ids(0, 72),
    ),
    "hub stream": Case(
        lambda b: ms.from_dataset(hub_stream(0, 72)).map(Bomb(b)), DATA, epoch=ids(0, 72)
    ),
    # nodes
    "shuffle": Case(lambda b: numbers(0, 60, b).shuffle(5), DATA, epoch=ids(0, 60)),
    "buffered shuffle": Case(
        lambda b: numbers(0, 90, b).shuffle(5, buffer_size=30), DATA, 34, ids(0, 90)
    ),
    "interleave": Case(mix, TWO),
    "interleave all": Case(lambda b: mix(b, stopping_strategy="all_exhausted"), TWO),
    "interleave once": Case(
        lambda b: mix(b, stopping_strategy="all_exhausted_without_replacement"),
        TWO,
        epoch=ids(0, 90) + ids(1, 60),
    ),
    "interleave streams": Case(stream_mix, TWO, shifts=True),
    "interleave streams all": Case(
        lambda b: stream_mix(b, stopping_strategy="all_exhausted"), TWO, shifts=True
    ),
    "interleave streams once": Case(
        lambda b: stream_mix(b, stopping_strategy="all_exhausted_without_replacement"),
        TWO,
        epoch=PASSES + ids(1, 60),
        shifts=True,
    ),
    "interleave zero weight": Case(
        lambda b: ms.interleave(
            {"web": numbers(0, 60, b), "code": numbers(1, 60, b)}, {"web": 1, "code": 0}
        ),
        TWO,
        epoch=ids(0, 60),
    ),
    "interleave schedule": Case(planned, TWO),
    "interleave schedule all": Case(lambda b: planned(b, stopping_strategy="all_exhausted"), TWO),
    "interleave schedule once": Case(
        lambda b: planned(b, stopping_strategy="all_exhausted_without_replacement"),
        TWO,
        epoch=ids(0, 90) + ids(1, 60),
    ),
    "interleave schedule streams": Case(lambda b: planned(b, True), TWO, shifts=True),
    "interleave schedule streams all": Case(
        lambda b: planned(b, True, stopping_strategy="all_exhausted").batch(3), TWO, shifts=True
    ),
    "interleave schedule streams once": Case(
        lambda b: planned(b, True, stopping_strategy="all_exhausted_without_replacement"),
        TWO,
        epoch=PASSES + ids(1, 60),
        shifts=True,
    ),
    "interleave by tokens": Case(measured, TWO, shifts=True),
    "interleave by tokens all": Case(
        lambda b: measured(b, stopping_strategy="all_exhausted"), TWO, shifts=True
    ),
    "interleave by tokens once": Case(
        lambda b: measured(b, stopping_strategy="all_exhausted_without_replacement"),
        TWO,
        epoch=PASSES + ids(1, 60),
        shifts=True,
    ),
    "interleave by tokens, schedule, buffered": Case(
        lambda b: measured(b, PLAN).shuffle(2, buffer_size=20).batch(3), TWO, 90, shifts=True
    ),
    "interleave max_epochs": Case(
        lambda b: ms.interleave(
            {"web": numbers(0, 30, b).shuffle(1), "code": numbers(1, 20, b)},
            {"web": 7, "code": 3},
            max_epochs={"web": 2, "code": 1},
            then="share",
        ),
        TWO,
        epoch=ids(0, 30) * 2 + ids(1, 20),
    ),
    "interleave max_epochs streams all": Case(
        lambda b: ms.interleave(
            {"web": numbers(0, 30, b).shuffle(1).filter(is_odd), "code": numbers(1, 20, b)},
            {"web": 1, "code": 3},
            max_epochs={"web": 2},
            weights_by=size_of,
        ),
        TWO,
        shifts=True,
    ),
    "concatenate": Case(
        lambda b: ms.concatenate([numbers(0, 40, b).shuffle(1), numbers(1, 30, b)]),
        {"0": 0, "1": 1},
        epoch=ids(0, 40) + ids(1, 30),
    ),
    "concatenate streams": Case(
        lambda b: ms.concatenate([numbers(0, 60, b).filter(is_odd), numbers(1, 50, b)]),
        {"0": 0, "1": 1},
        epoch=[r for r in ids(0, 60) if r % 2] + ids(1, 50),
    ),
    "map": Case(lambda b: numbers(0, 60, b).map(to_dict), DATA, epoch=ids(0, 60)),
    "map rng": Case(
        lambda b: numbers(0, 50, b).shuffle(1).map(with_noise, with_rng=True),
        DATA,
        epoch=ids(0, 50),
    ),
    "map isolated rng": Case(
        lambda b: numbers(0, 50, b).filter(bool).map(with_global_noise, isolate_rng=True),
        DATA,
        epoch=ids(0, 50)[1:],
    ),
    "map refill": Case(
        lambda b: numbers(0, 60, b).map(Bomb(frozenset({7, 31})), on_error="refill").batch(4),
        DATA,
        epoch=[r for r in ids(0, 60) if r not in (7, 31)],
    ),
    "map skip": Case(
        lambda b: numbers(0, 60, b).map(Bomb(frozenset({7, 31})), on_error="skip").batch(4),
        DATA,
        epoch=[r for r in ids(0, 60) if r not in (7, 31)],
    ),
    "filter": Case(lambda b: numbers(0, 90, b).shuffle(1).filter(is_odd), DATA, epoch=ODD),
    "flat_map": Case(lambda b: numbers(0, 60, b).flat_map(copies), DATA, 17, COPIES),
    "flat_map twice": Case(
        lambda b: numbers(0, 60, b).flat_map(copies).flat_map(lambda s: [s, s]),
        DATA,
        34,
        sorted(COPIES * 2),
    ),
    "map batched": Case(
        lambda b: (
            numbers(0, 60, b).shuffle(1).map(to_dict).map(doubled, batched=True, batch_size=7)
        ),
        DATA,
        14,
        ids(0, 60),
        shifts=True,
    ),
    "map batched, fewer": Case(
        lambda b: (
            numbers(0, 60, b)
            .map(to_dict)
            .map(first_of_pairs, batched=True, batch_size=2)
            .batch(3, collate_fn=list)
        ),
        DATA,
        10,
        shifts=True,
    ),
    "map batched, more": Case(
        lambda b: numbers(0, 60, b).filter(not_third).map(parts_of_one, batched=True, batch_size=1),
        DATA,
        6,
        sorted(row for row in ids(0, 60) if row % 3 for _ in range(row % 4)),
    ),
    "flat over columns": Case(
        lambda b: (
            ms.interleave(
                {
                    "web": ms.from_dataset(arrow(0, 60, mapped=True)).shuffle(1),
                    "code": ms.from_dataset(arrow(1, 40, mapped=False)),
                },
                {"web": 3, "code": 2},
                stopping_strategy="all_exhausted_without_replacement",
            )
            .batch(4, collate_fn=ms.flat(cu_seqlens=True))
            .flat_map(apart)
            .map(Bomb(b))
        ),
        TWO,
        0,
        ids(0, 60) + ids(1, 40),
    ),
    "ragged over columns": Case(
        lambda b: (
            ms.from_dataset(arrow(0, 60, mapped=True))
            .shuffle(3)
            .batch(4, collate_fn=ms.ragged)
            .flat_map(apart)
            .map(Bomb(b))
        ),
        DATA,
        0,
        ids(0, 60),
    ),
    "repeat": Case(
        lambda b: numbers(0, 30, b).shuffle(2).repeat(3), DATA, epoch=sorted(ids(0, 30) * 3)
    ),
    "repeat stream": Case(
        lambda b: numbers(0, 60, b).shuffle(2).filter(is_odd).repeat(3),
        DATA,
        epoch=sorted([r for r in ids(0, 60) if r % 2] * 3),
    ),
    "track": Case(lambda b: tracked(numbers(0, 60, b).shuffle(1)), DATA, epoch=ids(0, 60)),
    "track below a batch": Case(lambda b: tracked(mix(b)).shuffle(2).map(to_dict).batch(4), TWO),
    "track above a batch": Case(
        lambda b: tracked(numbers(0, 62, b).map(to_dict).batch(4)), DATA, epoch=ids(0, 62)
    ),
    "track stream": Case(lambda b: tracked(numbers(0, 90, b).filter(is_odd)), DATA, epoch=ODD),
    "track under a buffer": Case(
        lambda b: tracked(stream_mix(b)).shuffle(3, buffer_size=25).batch(4), TWO, 90, shifts=True
    ),
    "track packed": Case(
        lambda b: tracked(numbers(0, 60, b).shuffle(1)).map(document).pack(8),
        DATA,
        25,
        shifts=True,
        cuts=True,
    ),
    "take": Case(lambda b: numbers(0, 90, b).shuffle(2).take(55), DATA),
    "take stream": Case(lambda b: numbers(0, 90, b).filter(not_third).take(41), DATA, shifts=True),
    "skip": Case(lambda b: numbers(0, 60, b).skip(11), DATA, epoch=ids(0, 60)[11:]),
    "skip stream": Case(lambda b: numbers(0, 90, b).filter(not_third).skip(17), DATA, shifts=True),
    "batch": Case(
        lambda b: numbers(0, 62, b).shuffle(1).map(to_dict).batch(4), DATA, epoch=ids(0, 62)
    ),
    "batch stream": Case(lambda b: numbers(0, 90, b).filter(is_odd).batch(4), DATA, epoch=ODD),
    "batch stream drop_last": Case(
        lambda b: numbers(0, 90, b).filter(is_odd).batch(4, drop_last=True), DATA, shifts=True
    ),
    "batch pad": Case(
        lambda b: numbers(0, 60, b).map(ragged).batch(4, collate_fn=ms.pad(multiple=4)),
        DATA,
        epoch=ids(0, 60),
    ),
    "batch of batches": Case(
        lambda b: (
            numbers(0, 60, b).batch(3, collate_fn=list).filter(bool_of).batch(2, collate_fn=list)
        ),
        DATA,
        epoch=ids(0, 60),
    ),
    "pack concat": Case(
        lambda b: numbers(0, 60, b).shuffle(1).map(document).pack(8),
        DATA,
        25,
        shifts=True,
        cuts=True,
    ),
    "pack concat, columns": Case(
        lambda b: (
            numbers(0, 60, b)
            .map(document)
            .pack(8, columns=["kind"], mask="trained", overflow="truncate", last="drop")
        ),
        DATA,
        40,
        shifts=True,
        cuts=True,
    ),
    "pack concat, dropped": Case(
        lambda b: numbers(0, 60, b).map(document).pack(8, overflow="drop").batch(2),
        DATA,
        60,
        shifts=True,
        cuts=True,
    ),
    "pack concat two, filtered": Case(
        lambda b: two_documents(b).pack(8).filter(not_third), TWO, 40, shifts=True, cuts=True
    ),
    "pack concat under a buffer": Case(
        lambda b: two_documents(b).pack(8).shuffle(3, buffer_size=8),
        TWO,
        90,
        shifts=True,
        cuts=True,
    ),
    "pack fit": Case(
        lambda b: numbers(0, 90, b).shuffle(3).map(document).pack(8, mode="fit", window=7),
        DATA,
        36,
        shifts=True,
        cuts=True,
    ),
    "pack fit, at once": Case(
        lambda b: (
            numbers(0, 60, b)
            .map(document)
            .pack(8, mode="fit", window=5, min_fill=0.0, overflow="drop")
        ),
        DATA,
        10,
        shifts=True,
    ),
    "pack fit, truncated": Case(
        lambda b: two_documents(b).pack(
            8,
            mode="fit",
            window=7,
            overflow="truncate",
            last="drop",
            columns=["kind"],
            separator=[5, 6],
        ),
        TWO,
        36,
        shifts=True,
    ),
    "pack fit under a buffer": Case(
        lambda b: two_documents(b).pack(8, mode="fit", window=4).shuffle(3, buffer_size=8),
        TWO,
        90,
        shifts=True,
        cuts=True,
    ),
    "mix of packs": Case(
        lambda b: (
            ms.interleave(
                {
                    "web": numbers(0, 20, b).map(document).pack(8),
                    "code": numbers(1, 60, b).map(document).pack(8, mode="fit", window=6),
                },
                {"web": 2, "code": 1},
            )
            .repeat(2)
            .batch(2)
        ),
        TWO,
        60,
        shifts=True,
        cuts=True,
    ),
    # compositions
    "mix of shuffled and filtered, buffered": Case(
        lambda b: stream_mix(b).shuffle(3, buffer_size=25).batch(4), TWO, 90, shifts=True
    ),
    "two buffered shuffles": Case(
        lambda b: (
            numbers(0, 90, b).shuffle(1, buffer_size=20).flat_map(copies).shuffle(2, buffer_size=16)
        ),
        DATA,
        80,
        shifts=True,
    ),
    "everything": Case(everything, {"a": 0, "rest/b": 1, "rest/c": 2}, 200, shifts=True),
}


def bool_of(sample: Any) -> bool:
    return bool(identify(sample))


def build(row: str, bomb: frozenset[int] = frozenset()) -> Dataset:
    """The pipeline of a row; its user code fails on the ids in ``bomb``."""
    return CASES[row].build(bomb)


FIVE = [
    "interleave",
    "interleave streams",
    "mix of shuffled and filtered, buffered",
    "hub stream",
    "everything",
    "pack concat two, filtered",
    "pack fit",
]
"""The rows on which every loader law runs with every number of workers and start method."""

CORE = {
    "arrow mapped, shuffled",
    "parquet, window shuffle",
    "json lines",
    "iterable",
    "hub stream",
    "concatenate streams",
    "map batched",
    "track below a batch",
    "take",
    "pack concat",
    "pack fit",
    "everything",
}
"""The rows of the inner loop, ``pytest -m core``: every source and every node once."""

READERS = [
    row
    for row in CASES
    if row in CORE
    or row in FIVE
    or row
    in {
        # sources as other processes and threads open them
        "sequence",
        "arrow in memory",
        "arrow formatted",
        "json lines gz",
        "iterable stride",
        # lanes that end early, begin again, or hold samples back
        "repeat stream",
        "take stream",
        "skip stream",
        "buffered shuffle",
        "batch stream drop_last",
        "batch of batches",
        "flat over columns",
        "ragged over columns",
        # what travels with a batch: dropped samples, counts, metrics, parts
        "map refill",
        "map skip",
        "map isolated rng",
        "interleave by tokens, schedule, buffered",
        "interleave schedule streams once",
        "interleave max_epochs",
        "interleave max_epochs streams all",
        "track stream",
        "track packed",
        "mix of packs",
    }
]
"""The rows that differ for a loader. Their iterators alone are tested on all rows, in one lane and
as one of three (test_contract.py); a loader does nothing of its own for a node, so laws that only
add workers or threads run on these.
"""
