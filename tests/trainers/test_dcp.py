"""The loader in torch.distributed.checkpoint: real processes over gloo, saved by two ranks, loaded
by one and by three.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

import midstream as ms
from midstream.dataset import Dataset

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def _random() -> Dataset:
    sources = {
        name: ms.from_dataset(range(at, at + 200), name=name)
        for name, at in (("web", 0), ("code", 1000))
    }
    mix = ms.interleave(
        sources,
        weights={"web": 2, "code": 1},
        stopping_strategy="all_exhausted_without_replacement",
    )
    return mix.shuffle(3).batch(4, collate_fn=tuple)


def _stream() -> Dataset:
    return (
        ms.from_dataset(range(500))
        .filter(lambda x: x % 7)
        .shuffle(4, buffer_size=90)
        .batch(3, collate_fn=tuple)
    )


PIPELINES = {"random": _random, "stream": _stream}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``work(rank, *args)`` returned on each rank, each a process of a gloo group of its own."""
    context = mp.get_context("forkserver")
    answers = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, answers, work, args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    for value in found.values():
        if isinstance(value, BaseException):
            raise value
    return [found[rank] for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, port: int, answers: Any, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        result = work(rank, *args)
    except BaseException as error:
        result = RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
    answers.put((rank, result))
    answers.close()
    answers.join_thread()
    dist.barrier()
    dist.destroy_process_group()


def _take(loader: ms.DataLoader, steps: int | None) -> list[Any]:
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == steps:
            break
    return batches


def _save(
    rank: int, name: str, steps: int, folder: str, *, asynchronous: bool = False
) -> list[Any]:
    loader = ms.DataLoader(PIPELINES[name](), lanes=12, num_workers=1 if name == "stream" else 0)
    batches = _take(loader, steps)
    if asynchronous:
        group = dist.new_group(backend="gloo")
        future = dcp.async_save({"loader": loader}, checkpoint_id=folder, process_group=group)
        next(iter(loader))  # goes on while the checkpoint is written
        future.result()
    else:
        dcp.save({"loader": loader}, checkpoint_id=folder)
    loader.close()
    return batches


def _load(rank: int, name: str, folder: str) -> list[Any]:
    loader = ms.DataLoader(PIPELINES[name](), lanes=12, remainder="uneven")
    dcp.load({"loader": loader}, checkpoint_id=folder)
    assert (loader.epoch, loader.state_dict()["steps_done"]) == (0, 3)
    return _take(loader, None)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", PIPELINES)
def test_saved_by_two_ranks_loaded_by_one_and_by_three(
    name: str, asynchronous: bool, tmp_path: Path
) -> None:
    reference = list(ms.DataLoader(PIPELINES[name](), lanes=12))
    first = run_ranks(2, _save_async if asynchronous else _save, name, 3, str(tmp_path))
    before = [batch for step in zip(*first) for batch in step]
    assert before == reference[:6]
    for ranks in (1, 3):
        rest = run_ranks(ranks, _load, name, str(tmp_path))
        seen = Counter(
            x for batch in [*before, *(batch for rank in rest for batch in rank)] for x in batch
        )
        assert seen == Counter(x for batch in reference for x in batch)
        whole = min(map(len, rest))
        assert [batch for step in zip(*rest) for batch in step] == reference[6 : 6 + ranks * whole]


def _save_async(rank: int, name: str, steps: int, folder: str) -> list[Any]:
    return _save(rank, name, steps, folder, asynchronous=True)


def _save_apart(rank: int, name: str, folder: str) -> None:
    loader = ms.DataLoader(PIPELINES[name](), lanes=12)
    _take(loader, 3 + rank)
    dcp.save({"loader": loader}, checkpoint_id=folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_ranks_at_different_steps_do_not_load(name: str, tmp_path: Path) -> None:
    run_ranks(2, _save_apart, name, str(tmp_path))
    loader = ms.DataLoader(PIPELINES[name](), lanes=12)
    with pytest.raises(Exception, match="different steps"):
        dcp.load({"loader": loader}, checkpoint_id=str(tmp_path), no_dist=True)


def test_the_template_starts_no_worker_and_names_every_key_that_may_be_needed() -> None:
    for ranks, lanes, keys in ((1, 12, 12), (3, 12, 4), (5, 12, 12)):
        loader = ms.DataLoader(
            _random(), lanes=lanes, rank=1 % ranks, world_size=ranks, num_workers=2
        )
        template = loader.state_dict()
        assert len(template["lanes"]) == keys
        assert loader._iterator is None


def test_another_number_of_lanes_says_lanes(tmp_path: Path) -> None:
    loader = ms.DataLoader(_random(), lanes=12)
    dcp.save({"loader": loader}, checkpoint_id=str(tmp_path), no_dist=True)
    with pytest.raises(Exception, match="lanes"):
        dcp.load(
            {"loader": ms.DataLoader(_random(), lanes=6)}, checkpoint_id=str(tmp_path), no_dist=True
        )
    with pytest.raises(
        BaseException, match=r"Missing key.*lanes\.0012"
    ):  # torch's, and no Exception
        dcp.load(
            {"loader": ms.DataLoader(_random(), lanes=24)},
            checkpoint_id=str(tmp_path),
            no_dist=True,
        )


_SYNCED = {"sync_end": True, "lanes": 12}


def _synced(rank: int, workers: int) -> tuple[list[Any], Any]:
    loader = ms.DataLoader(_stream(), num_workers=workers, **_SYNCED)  # type: ignore[arg-type]
    epochs = []
    for _ in range(loader.epoch, 2):
        epochs.append(list(loader))
    loader.close()
    return epochs, loader.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_sync_end_stops_all_ranks_at_the_same_step_and_keeps_the_rest(workers: int) -> None:
    found = run_ranks(3, _synced, workers)
    lengths = [[len(epoch) for epoch in epochs] for epochs, _ in found]
    assert lengths[0] == lengths[1] == lengths[2]
    merged = ms.merge_states([state for _, state in found])
    assert (merged["epoch"], merged["steps_done"]) == (2, 0)
    one = ms.DataLoader(_stream(), lanes=12)
    one.load_state_dict(merged)
    last = list(one)
    seen = Counter(x for epochs, _ in found for epoch in epochs for batch in epoch for x in batch)
    seen += Counter(x for batch in last for x in batch)
    assert seen == Counter({x: 3 for x in range(500) if x % 7})
    assert one.epoch == 3


def _starved(rank: int) -> str:
    pipeline = ms.from_dataset(range(64), name="few").filter(lambda x: x < 4).batch(4)
    loader = ms.DataLoader(pipeline, lanes=2, sync_end=True)
    try:
        next(iter(loader))
    except ms.SourceError as error:
        return str(error)
    return "none"


@pytest.mark.slow
def test_a_rank_without_data_is_named_on_every_rank_before_the_first_step() -> None:
    first, second = run_ranks(2, _starved)
    assert first == second
    assert "rank 1 of 2 has no data in epoch 0" in first and "few" in first


def _broken(rank: int) -> str:
    def fail() -> Any:
        yield from range(20)
        if rank == 1:
            raise OSError("the disk is gone")
        yield from range(20, 60)

    batches = iter(
        ms.DataLoader(
            ms.from_iterable(fail, name="disk", split="stride").batch(2), lanes=4, sync_end=True
        )
    )
    while True:
        try:
            next(batches)
        except ms.SampleError:
            continue  # one row, as a training loop may choose to bear it; the generator is dead all the same
        except (ms.MidstreamError, StopIteration) as error:
            return f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_a_rank_that_cannot_go_on_leaves_no_other_waiting() -> None:
    first, second = run_ranks(2, _broken)
    assert "another rank cannot continue" in first
    assert "raised at row 20 and cannot continue" in second
