"""Checkpoints of format 1 from before the package was laid out anew still load, and go on exactly.

The files under golden/checkpoints were written by the commit 3ad0383. Each has states of a run, the
batches that followed in that run, and the state after them. They are never written again; a new
case is written with that commit's code: ``PYTHONPATH=OLD/src python
tests/checkpoint/test_old_checkpoints.py --write``, which skips what is there. So this file uses
nothing but public names.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import midstream as ms

FOLDER = Path(__file__).parents[1] / "golden" / "checkpoints"
SOURCES = {"web": 0, "code": 1000}


def source(name: str, rows: int = 90) -> ms.Dataset:
    return ms.from_dataset(range(SOURCES[name], SOURCES[name] + rows), name=name)


def not_seventh(row: int) -> bool:
    return row % 7 != 0


def fails_at_11(row: int) -> int:
    if row % 1000 == 11:
        raise ValueError("a bad row")
    return row


def document(row: int) -> dict[str, Any]:
    return {"input_ids": np.full(row % 6 + 1, row, dtype=np.int32)}


def log_lines(shard: int = 0) -> list[int]:
    return list(range(100 * shard, 100 * shard + 30))


def mix(batch_size: int = 4, *, stream: bool = False) -> ms.Dataset:
    parts = {name: source(name).shuffle(seed) for seed, name in enumerate(SOURCES)}
    if stream:
        parts = {name: part.filter(not_seventh) for name, part in parts.items()}
    mixed = ms.interleave(
        parts,
        {"web": 2, "code": 1},
        stopping_strategy="all_exhausted_without_replacement",
        name="mix",
    )
    return mixed.batch(batch_size, collate_fn=list)


def packed() -> ms.Dataset:
    documents = source("web").filter(not_seventh).map(document).shuffle(3, buffer_size=20)
    return documents.pack(8).batch(2)


def counted() -> ms.Dataset:
    rows = source("web").shuffle(5).map(fails_at_11, on_error="skip").filter(not_seventh)
    return rows.track(row=int).batch(4, collate_fn=list)


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: np.asarray(value).tolist() for key, value in batch.items()}
    return batch


def take(loader: ms.DataLoader, count: int) -> list[Any]:
    """The next batches, over the ends of epochs."""
    found: list[Any] = []
    while len(found) < count:
        for batch in loader:
            found.append(plain(batch))
            if len(found) == count:
                break
    return found


def make(pipeline: ms.Dataset, workers: int = 0, **options: Any) -> ms.DataLoader:
    context = {"multiprocessing_context": "fork"} if workers else {}
    return ms.DataLoader(pipeline, num_workers=workers, **context, **options)


def begun(pipeline: ms.Dataset, steps: int, workers: int = 0, **options: Any) -> ms.DataLoader:
    loader = make(pipeline, workers, **options)
    take(loader, steps)
    return loader


@dataclass(frozen=True)
class Case:
    """A run that was saved.

    Attributes:
        pipeline: What is resumed.
        save: Makes the loader, runs it some steps, and returns it; a list of loaders: of all ranks.
        workers: Numbers of workers it is resumed with.
        follow: Batches to compare.
        strict: As `DataLoader.load_state_dict` has it.
    """

    pipeline: Callable[[], ms.Dataset]
    save: Callable[[], ms.DataLoader | list[ms.DataLoader]]
    workers: tuple[int, ...] = (0, 2)
    follow: int = 60
    strict: bool = True


def weights_set(stream: bool) -> ms.DataLoader:
    loader = begun(mix(stream=stream), 4, lanes=3)
    loader.set_weights("mix", {"web": 1, "code": 3})
    take(loader, 3)
    return loader


def rows_excluded() -> ms.DataLoader:
    loader = begun(mix(), 5)
    loader.exclude(loader.trace()[:2])
    loader.exclude([("web", 0, row) for row in range(20, 30)])
    take(loader, 3)
    return loader


def size_adopted(stream: bool) -> ms.DataLoader:
    state = begun(mix(4, stream=stream), 5, lanes=3).state_dict()
    loader = make(mix(6, stream=stream))
    loader.load_state_dict(state, strict=False)
    take(loader, 2)
    return loader


def two_ranks(stream: bool) -> list[ms.DataLoader]:
    return [begun(mix(stream=stream), 4, rank=rank, world_size=2, lanes=4) for rank in range(2)]


def from_shards() -> ms.Dataset:
    rows = ms.from_iterable(log_lines, name="log", num_shards=4)
    return rows.flat_map(lambda row: [row] * (row % 3)).repeat(2).batch(5, collate_fn=list)


CASES: dict[str, Case] = {
    "mix": Case(mix, lambda: begun(mix(), 7)),
    "mix-read-by-two-workers": Case(mix, lambda: begun(mix(), 7, workers=2)),
    "mix-in-its-second-epoch": Case(mix, lambda: begun(mix(), 50)),
    "mix-of-streams": Case(lambda: mix(stream=True), lambda: begun(mix(stream=True), 7, 2)),
    "packed-stream": Case(packed, lambda: begun(packed(), 6, lanes=3)),
    "shards": Case(from_shards, lambda: begun(from_shards(), 9, lanes=2)),
    "tracked-with-errors": Case(counted, lambda: begun(counted(), 5, lanes=3)),
    "weights-set": Case(mix, lambda: weights_set(stream=False)),
    "weights-set-on-streams": Case(lambda: mix(stream=True), lambda: weights_set(stream=True)),
    "rows-excluded": Case(mix, rows_excluded),
    "batch-size-adopted": Case(lambda: mix(6), lambda: size_adopted(stream=False)),
    "batch-size-adopted-on-streams": Case(
        lambda: mix(6, stream=True), lambda: size_adopted(stream=True)
    ),
    "other-batch-size": Case(lambda: mix(6), lambda: begun(mix(4), 5), strict=False),
    "other-batch-size-on-streams": Case(
        lambda: mix(6, stream=True), lambda: begun(mix(4, stream=True), 5, lanes=3), strict=False
    ),
    "two-ranks": Case(mix, lambda: two_ranks(stream=False)),
    "two-ranks-of-streams": Case(lambda: mix(stream=True), lambda: two_ranks(stream=True)),
}
BARE = {
    "bare-rows": lambda: source("web").shuffle(4),
    "bare-stream": lambda: packed(),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:the loader was left after batch:UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # lanes, and other batch sizes
]


def states_of(case: Case) -> Any:
    saved = case.save()
    return [each.state_dict() for each in saved] if isinstance(saved, list) else saved.state_dict()


def follow(case: Case, states: Any, workers: int) -> dict[str, Any]:
    """What comes after a load, and the state then."""
    loader = make(case.pipeline(), workers)
    loader.load_state_dict(states, strict=case.strict)
    batches = take(loader, case.follow)
    state = loader.state_dict()
    loader.close()
    return {"batches": batches, "state": state}


def written(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def from_bare(name: str, state: Any = None, count: int | None = None) -> tuple[list[Any], Any]:
    """Samples of a dataset without a loader, and the state after them."""
    ds = BARE[name]()
    if state is not None:
        ds.load_state_dict(state)
    found = [plain(sample) for sample, _ in zip(ds, range(count or 1000))]
    return found, ds.state_dict()


@pytest.mark.processes
@pytest.mark.parametrize("name", CASES)
def test_an_old_checkpoint_goes_on_exactly(name: str) -> None:
    old, case = written(name), CASES[name]
    for workers in case.workers:
        assert follow(case, old["states"], workers) == old["following"], f"{workers} workers"


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("two-ranks")])
def test_old_states_of_ranks_merge_to_the_same(name: str) -> None:
    old = written(name)
    merged = ms.merge_states(old["states"])
    assert follow(CASES[name], merged, 0) == old["following"]
    assert follow(CASES[name], old["states"][::-1], 0) == old["following"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.processes
def test_the_same_run_is_saved_as_the_same_state(name: str) -> None:
    assert json.loads(json.dumps(states_of(CASES[name]))) == written(name)["states"]


@pytest.mark.parametrize("name", BARE)
def test_an_old_state_of_a_dataset_goes_on_exactly(name: str) -> None:
    old = written(name)
    assert from_bare(name, count=13) == (old["before"], old["states"])
    assert from_bare(name, old["states"])[0] == old["following"]


def write() -> None:
    warnings.simplefilter("ignore")
    FOLDER.mkdir(exist_ok=True)
    for name in [*CASES, *BARE]:
        path = FOLDER / f"{name}.json"
        if path.exists():
            continue
        if name in CASES:
            states = json.loads(json.dumps(states_of(CASES[name])))
            found = {"states": states, "following": follow(CASES[name], states, 0)}
        else:
            before, states = from_bare(name, count=13)
            found = {"before": before, "states": states, "following": from_bare(name, states)[0]}
        path.write_text(json.dumps(found, separators=(",", ":")) + "\n")
        print(path.name, path.stat().st_size)


if __name__ == "__main__" and "--write" in sys.argv:
    write()
