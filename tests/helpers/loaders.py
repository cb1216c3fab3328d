"""Loaders as tests want them, and ways to read a run: whole, in pieces, with its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import midstream as ms
from midstream.dataset import Dataset
from tests.cases import plain

LANES = 12


def through_json(state: Any) -> Any:
    """A state as it is after it was saved as JSON and loaded again."""
    return json.loads(json.dumps(state))


def loader(
    ds: Dataset, workers: int = 0, method: str | None = "fork", **options: Any
) -> ms.DataLoader:
    """A loader of 12 lanes, with batches of 4 as lists where the pipeline makes none itself.

    Args:
        ds: The pipeline.
        workers: Number of workers.
        method: Start method of worker processes.
        **options: Arguments of `midstream.DataLoader`.
    """
    if ds.batch_rows is None:
        options.setdefault("batch_size", 4)
        options.setdefault("collate_fn", list)
    options.setdefault("lanes", LANES)
    if workers and options.get("worker_type") != "thread":
        options["multiprocessing_context"] = method
    return ms.DataLoader(ds, num_workers=workers, **options)


def whole(ds: Dataset, workers: int = 0, **options: Any) -> list[Any]:
    """All batches of one epoch, as plain Python values."""
    made = loader(ds, workers, **options)
    batches = [plain(batch) for batch in made]
    made.close()
    return batches


def chain(ds: Dataset, pieces: list[tuple[int, int | None]], **options: Any) -> list[Any]:
    """Batches of a run in pieces of (workers, batches), each resumed from the state of the one before."""
    found: list[Any] = []
    state = None
    for workers, count in pieces:
        made = loader(ds, workers, **options)
        if state is not None:
            made.load_state_dict(state)
            assert made.state_dict() == state
        iterator = iter(made)
        while count is None or count > 0:
            try:
                found.append(plain(next(iterator)))
            except StopIteration:
                break
            count = None if count is None else count - 1
        state = through_json(made.state_dict())
        made.close()
    return found


def drain(iterator: Iterator[Any], limit: int = 1000) -> list[Any]:
    """Samples, and sample errors in their places."""
    out: list[Any] = []
    for _ in range(limit):
        try:
            out.append(next(iterator))
        except StopIteration:
            return out
        except ms.SampleError as error:
            out.append(error)
    raise AssertionError(f"no end after {limit}")
