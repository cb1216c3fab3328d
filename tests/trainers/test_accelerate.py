"""Accelerate: prepared as it is, told from batch to batch, saved by all ranks and loaded by another
number of them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState, PartialState
from torchdata.stateful_dataloader import StatefulDataLoader

import midstream as ms
from tests.helpers.torchrun import ledgers, torchrun

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of accelerate and what it imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    """Accelerate keeps its state in the process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def sized() -> ms.Dataset:
    return ms.from_dataset(range(58), name="web").shuffle(3).batch(4)  # 15 batches


def unsized() -> ms.Dataset:
    return (
        ms.from_dataset(range(77), name="web")
        .filter(lambda x: x % 4)
        .shuffle(4, buffer_size=96)
        .batch(4)
        .take(15)
    )


PIPELINES = {"sized": sized, "unsized": unsized}


def test_prepare_takes_the_loader_as_it_is() -> None:
    accelerator = Accelerator(cpu=True)
    loader = ms.DataLoader(sized(), num_workers=2, prefetch_factor=3, persistent_workers=True)
    assert accelerator.prepare(loader) is loader
    assert accelerator.prepare_data_loader(loader) is loader
    assert loader._iterator is None  # no worker was started
    assert [batch.tolist() for batch in loader] == [
        batch.tolist() for batch in ms.DataLoader(sized())
    ]
    assert (loader.num_workers, loader.prefetch_factor) == (2, 3)
    loader.close()


def test_what_is_no_pipeline_of_ours_is_prepared_as_any_loader() -> None:
    loader = ms.DataLoader(
        range(8), batch_size=2, sampler=torch.utils.data.SequentialSampler(range(8))
    )
    prepared = Accelerator(cpu=True).prepare(loader)
    assert prepared is not loader and [batch.tolist() for batch in prepared] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


@pytest.mark.parametrize("wanted", [True, False])
def test_batches_are_on_the_device_that_was_asked_for(wanted: bool) -> None:
    accelerator = Accelerator(cpu=True, device_placement=wanted)
    loader = accelerator.prepare(ms.DataLoader(sized().map(lambda x: {"x": x.float()})))
    PartialState._shared_state["device"] = torch.device("meta")  # a device that there is everywhere
    assert {batch["x"].device.type for batch in loader} == {"meta" if wanted else "cpu"}
    other = accelerator.prepare(ms.DataLoader(sized()), device_placement=[not wanted])
    assert next(iter(other)).device.type == ("cpu" if wanted else "meta")


@pytest.mark.parametrize("stops", [None, 6])
@pytest.mark.parametrize("name", PIPELINES)
def test_gradients_are_accumulated_as_with_a_loader_of_torch(name: str, stops: int | None) -> None:
    def steps(loader: Any) -> list[list[int]]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        model = torch.nn.Linear(1, 1)
        loader, model = accelerator.prepare(loader, model)
        found: list[list[int]] = [[], []]
        for epoch in range(2):
            for index, _ in enumerate(loader):
                if index == stops:
                    break
                with accelerator.accumulate(model):
                    found[epoch] += [index] if accelerator.sync_gradients else []
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return found

    with_torch = steps(torch.utils.data.DataLoader(range(58), batch_size=4))
    loader = ms.DataLoader(PIPELINES[name]())
    if stops is not None:
        loader.run._noticed.add("restart")
    assert steps(loader) == with_torch
    if stops is None:
        assert with_torch == [[3, 7, 11, 14]] * 2  # the last step has three batches


@pytest.mark.parametrize("name", PIPELINES)
def test_saved_after_any_step_and_loaded(name: str, tmp_path: Path) -> None:
    reference = [batch.tolist() for batch in ms.DataLoader(PIPELINES[name]())]

    def start() -> tuple[Accelerator, Any]:
        accelerator = Accelerator(cpu=True)
        loader = accelerator.prepare(ms.DataLoader(PIPELINES[name]()))
        accelerator.register_for_checkpointing(ms.WholeRun(loader))
        return accelerator, loader

    accelerator, loader = start()
    for number, _ in enumerate(loader):
        accelerator.save_state(str(tmp_path / str(number + 1)))
    for step in range(1, 16):
        accelerator, loader = start()
        accelerator.load_state(str(tmp_path / str(step)))
        assert loader.epoch == step // 15
        if step < 15:
            assert [batch.tolist() for batch in loader] == reference[step:]


def test_a_loader_that_is_not_registered_is_missed_when_it_is_saved(tmp_path: Path) -> None:
    for stateful in (False, True):
        accelerator = Accelerator(
            cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=stateful)
        )
        loader = accelerator.prepare(ms.DataLoader(sized()))
        next(iter(loader))
        with pytest.warns(RuntimeWarning, match="register_for_checkpointing"):
            accelerator.save_state(str(tmp_path / "a"))
        accelerator.save_state(str(tmp_path / "b"))  # said once


@pytest.mark.parametrize("name", PIPELINES)
def test_our_dataset_in_a_loader_of_torchdata(name: str, tmp_path: Path) -> None:
    """One process: exact, per worker. Accelerate makes a loader of its own, and asks for its state
    at each batch.
    """

    def start() -> tuple[Accelerator, Any]:
        accelerator = Accelerator(
            cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True)
        )
        return accelerator, accelerator.prepare(
            StatefulDataLoader(PIPELINES[name](), batch_size=None, num_workers=2)
        )

    accelerator, loader = start()
    seen = []
    for batch in loader:
        seen.append(batch.tolist())
        if len(seen) in (1, 6):
            accelerator.save_state(str(tmp_path / str(len(seen))))
    for step in (1, 6):
        accelerator, loader = start()
        accelerator.load_state(str(tmp_path / str(step)))
        assert [batch.tolist() for batch in loader] == seen[step:]


def left(rows: int = 54, drop_last: bool = False) -> ms.Dataset:
    """14 batches, the last one of two samples: two of the last round on three ranks, and one of
    them short.
    """
    return ms.from_dataset(range(rows), name="web").shuffle(3).batch(4, drop_last=drop_last)


REMAINDERS = [
    # pipeline, remainder, what gather_for_metrics keeps of the last step on 3 ranks (0: all)
    (left(), "pad", 6),
    (left(drop_last=True), "pad", 4),  # 13 batches
    (left().map(lambda batch: -batch), "pad", 6),
    (left(60), "pad", 0),
    (left(58), "drop", 10),
    (left(), "drop", 0),
    (unsized(), "drop", 0),
]


@pytest.mark.parametrize("case", range(len(REMAINDERS)))
def test_accelerate_is_told_what_is_no_repeat_and_the_loader_keeps_its_remainder(case: int) -> None:
    pipeline, remainder, kept = REMAINDERS[case]
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(
        ms.DataLoader(pipeline, rank=1, world_size=3, remainder=remainder, lanes=3)  # type: ignore[arg-type]
    )
    state = accelerator.gradient_state
    for _ in range(2):
        told = [(state.end_of_dataloader, state.remainder) for _ in loader]
        assert told == [(False, -1)] * (len(told) - 1) + [(True, kept)]
        assert not state.in_dataloader and loader.remainder == remainder


def test_it_says_so_where_repeats_are_not_the_last_that_is_gathered() -> None:
    two = [ms.DataLoader(left(), rank=rank, world_size=2) for rank in range(2)]
    for loader in two:
        for _ in zip(range(2), loader):
            pass
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(ms.DataLoader(left(), rank=2, world_size=3, remainder="pad"))
    loader.load_state_dict([loader.state_dict() for loader in two])
    with pytest.warns(
        RuntimeWarning, match="2 batches twice.*begun on another number of ranks.*trace"
    ):
        found = [accelerator.gradient_state.remainder for _ in loader]
    assert found == [-1] * 4 and loader.trace().padded
    loader.set_epoch(1)
    assert [accelerator.gradient_state.remainder for _ in loader][-1] == 6
    bare = accelerator.prepare(
        ms.DataLoader(left().repeat(1), rank=0, world_size=3, remainder="pad")
    )
    with pytest.warns(RuntimeWarning, match="does not end in .batch"):
        assert [accelerator.gradient_state.remainder for _ in bare][-1] == -1


def _gather(folder: str, attempt: str, remainder: Any) -> None:
    """What torchrun starts."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(ms.DataLoader(left(), num_workers=1, remainder=remainder))
    with open(f"{folder}/{attempt}-{accelerator.process_index}", "w") as ledger:
        for _ in range(2):
            for batch in loader:
                whole = accelerator.pad_across_processes(batch, pad_index=-1)
                assert len(accelerator.gather(whole)) == 12
                gathered = accelerator.gather_for_metrics(whole)
                print(json.dumps([len(batch), gathered.tolist()]), file=ledger)
            assert loader.remainder == remainder
    loader.close()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_three_ranks_gather_every_sample_once_in_every_epoch(
    remainder: str, tmp_path: Path
) -> None:
    torchrun(__file__, 3, "gather", tmp_path, "run", remainder)
    found = ledgers(tmp_path, "run", 3)
    steps = 5 if remainder == "pad" else 4
    assert [len(rank) for rank in found] == [2 * steps] * 3  # in the second epoch too
    one = ms.DataLoader(left())
    reference = [[x for batch in one for x in batch.tolist()] for _ in range(2)]
    for rank in found:
        for epoch in range(2):
            gathered = [x for _, ids in rank[epoch * steps : (epoch + 1) * steps] for x in ids]
            assert gathered == reference[epoch][: 54 if remainder == "pad" else 48]


BARE: dict[str, tuple[dict[str, Any], Any]] = {
    # how Accelerate is set, and what is prepared
    "dispatched, saved": ({"use_stateful_dataloader": True}, StatefulDataLoader),
    "dispatched": ({}, torch.utils.data.DataLoader),
    "each its own": (
        {"use_stateful_dataloader": True, "dispatch_batches": False},
        StatefulDataLoader,
    ),
    "not prepared": ({}, StatefulDataLoader),
}


def _bare(folder: str, case: str, workers: str) -> None:
    """What torchrun starts: two epochs of our dataset in a loader that is not ours."""
    options, kind = BARE[case]
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    error: str = ""
    batches: list[Any] = []
    told: list[str] = []

    def show(message: Any, *rest: Any) -> None:
        told.append(str(message))
        print(message, file=sys.stderr)  # in a worker all that comes through

    warnings.simplefilter("always")
    warnings.showwarning = show
    data = ms.from_dataset(range(32), name="web").shuffle(3)
    loader = kind(data, batch_size=4, num_workers=int(workers))
    if case != "not prepared":
        loader = accelerator.prepare(loader)
    try:
        batches = [[batch.tolist() for batch in loader] for _ in range(2)]
    except ms.CheckpointError as raised:
        error = str(raised)
    told = [text for text in told if "midstream" in text]
    Path(folder, f"bare-{accelerator.process_index}").write_text(json.dumps([error, told, batches]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("case", BARE)
def test_our_dataset_in_another_loader_on_two_ranks_is_refused_or_told(
    case: str, workers: int, tmp_path: Path
) -> None:
    printed = torchrun(__file__, 2, "bare", tmp_path, case, workers)
    one = [
        x
        for batch in ms.DataLoader(ms.from_dataset(range(32), name="web").shuffle(3))
        for x in batch.tolist()
    ]
    for rank, (line,) in enumerate(ledgers(tmp_path, "bare", 2)):
        error, told, batches = line
        first = [x for batch in batches[0] for x in batch] if batches else []
        if case == "dispatched, saved":
            assert re.search(
                r"shuffle.* of web.*ahead for 2 ranks.*midstream.DataLoader.*WholeRun", error
            )
            assert not told and not batches
            continue
        assert not error and len(told) == (0 if case == "not prepared" and workers else 1)
        if case == "not prepared":
            text = told[0] if told else printed
            assert re.search(r"each of 2 ranks reads this dataset \(shuffle.* of web\) whole", text)
            assert first == one
        else:
            what = (
                "rank 0 for 2 ranks, and saves no position"
                if case == "dispatched"
                else "whole on each of 2 ranks"
            )
            assert what in told[0] and "midstream.WholeRun(loader)" in told[0]
            assert first == [
                x for n in range(rank, 8, 2) for x in one[4 * n : 4 * n + 4]
            ]  # divided by Accelerate


def test_who_only_looks_into_a_dataset_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert list(ms.from_dataset(range(3))) == [0, 1, 2]
    with pytest.warns(RuntimeWarning, match="each of 2 ranks") as found:
        loader = torch.utils.data.DataLoader(ms.from_dataset(range(3)), batch_size=3)
        assert [[batch.tolist() for batch in loader] for _ in range(2)] == [[[0, 1, 2]]] * 2
    assert len(found) == 1


def _train(folder: str, name: str, attempt: str, death: str, resume: str) -> None:
    """What torchrun starts."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = RANKS[name]()
    loader, model, optimizer = accelerator.prepare(
        ms.DataLoader(data, num_workers=1, lanes=48), model, optimizer
    )
    accelerator.register_for_checkpointing(ms.WholeRun(loader))
    if resume:
        accelerator.load_state(resume)
    step = loader.state_dict()["steps_done"]
    with open(f"{folder}/{attempt}-{accelerator.process_index}", "w") as ledger:
        for batch in loader:
            loss = (model(batch[:, None] / 100.0) - 1).square().mean()
            accelerator.backward(loss)
            if accelerator.is_main_process and step + 1 == int(death):
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            print(json.dumps([step, batch.tolist(), loss.item()]), file=ledger, flush=True)
            if step % 5 == 0:
                accelerator.save_state(f"{folder}/{attempt}-state-{step}")
            if step == 16:
                break
    loader.close()
    model, optimizer = accelerator.free_memory(
        model, optimizer
    )  # before what they talk through: after it torch may hang
    torch.distributed.destroy_process_group()


def ranks_sized() -> ms.Dataset:
    return ms.from_dataset(range(400), name="web").shuffle(3).batch(4)


def ranks_unsized() -> ms.Dataset:
    return ms.from_dataset(range(540), name="web").filter(lambda x: x % 9).batch(4)


RANKS = {"sized": ranks_sized, "unsized": ranks_unsized}


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_killed_on_two_ranks_it_goes_on_on_two_and_on_three(name: str, tmp_path: Path) -> None:
    def train(attempt: str, ranks: int, death: int = -1, resume: str = "") -> list[list[Any]]:
        torchrun(__file__, ranks, "train", tmp_path, name, attempt, death, resume, dies=death > 0)
        return ledgers(tmp_path, attempt, ranks)

    reference = [batch.tolist() for batch in ms.DataLoader(RANKS[name](), lanes=48)]
    killed = train("killed", 2, death=14)
    newest = str(tmp_path / "killed-state-10")
    if name == "sized":
        whole = train("whole", 2)
        rest = train("rest", 2, resume=newest)
        # The same batches and the same losses, bit for bit.
        assert [killed[rank][:10] + rest[rank] for rank in range(2)] == whole
    else:
        rest = train("rest", 3, resume=newest)
    ranks = len(rest)
    first = 20 % ranks  # the rank that makes the next batch
    after = [line[1] for step in zip(*rest[first:], *rest[:first]) for line in step]
    before = [line[1] for step in zip(*killed) for line in step][:20]
    assert before + after == reference[: 20 + len(after)] and len(after) == 6 * ranks


if __name__ == "__main__":
    {"train": _train, "gather": _gather, "bare": _bare}[sys.argv[1]](*sys.argv[2:])
