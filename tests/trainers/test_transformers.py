"""Hugging Face's Trainer: resumed after any step, with accumulated gradients, after SIGTERM, killed
on two ranks.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import transformers.trainer_jit_checkpoint
from transformers import TrainerCallback, TrainingArguments

import midstream as ms
from midstream.transformers import ResumeTrainer
from tests.helpers.torchrun import ledgers, torchrun

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of transformers and what it imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
]
transformers.logging.set_verbosity_error()


class Net(torch.nn.Module):
    """Learns nothing much, and notes what it was shown and its losses."""

    def __init__(self, in_step: Callable[[int], Any] = lambda step: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[Any] = []
        self.losses: list[float] = []
        self.in_step = in_step

    def forward(self, x: Any) -> dict[str, Any]:
        self.seen.append(x.flatten().long().tolist())
        self.in_step(len(self.seen))
        loss = (self.layer(x / 100.0) - 1).square().mean()
        self.losses.append(loss.item())
        return {"loss": loss}


def _sample(number: Any) -> dict[str, Any]:
    return {"x": np.float32([number]), "unused": int(number)}


def sized() -> ms.Dataset:
    return ms.from_dataset(range(58), name="web").shuffle(3).map(_sample)  # 15 batches


def unsized() -> ms.Dataset:
    return (
        ms.from_dataset(range(80), name="web")
        .filter(lambda x: x % 4)
        .shuffle(4, buffer_size=96)
        .take(48)
        .map(_sample)
    )


PIPELINES = {"sized": sized, "unsized": unsized}


def train(
    folder: Path,
    data: Any,
    *,
    resume: Any = None,
    net: Net | None = None,
    callbacks: Any = (),
    **options: Any,
) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        **{
            "save_strategy": "steps",
            "save_steps": 1,
            "logging_steps": 1000,
            "learning_rate": 0.1,
            **options,
        },
    )
    net = net or Net()
    trainer = ResumeTrainer(
        model=net, args=arguments, train_dataset=data, callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    net.steps = trainer.state.global_step  # type: ignore[assignment]
    return net


def checkpoints(folder: Path) -> dict[int, Path]:
    return dict(
        sorted((int(path.name.split("-")[1]), path) for path in folder.glob("checkpoint-*"))
    )


class Shown(TrainerCallback):  # type: ignore[misc]
    """How many batches each step had seen."""

    def __init__(self) -> None:
        self.after: dict[int, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = len(kwargs["model"].seen)


CASES: dict[str, dict[str, Any]] = {
    "sized, gradients of two": {"num_train_epochs": 2, "gradient_accumulation_steps": 2},
    "sized, steps": {"max_steps": 20},
    "unsized": {"max_steps": 22},
    "unsized, gradients of two": {"max_steps": 10, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_after_any_step_it_is_shown_what_an_uninterrupted_run_is(
    case: str, tmp_path: Path
) -> None:
    pipeline, options = PIPELINES[case.split(",")[0]], CASES[case]
    shown = Shown()
    whole = train(tmp_path / "whole", pipeline(), callbacks=[shown], **options)
    found = checkpoints(tmp_path / "whole")
    assert list(found) == list(range(1, whole.steps + 1))
    if options == CASES["sized, gradients of two"]:
        assert (
            whole.steps == 16 and len(whole.seen) == 30
        )  # the last step of an epoch has one batch
    for step in [1, 2, 7, 8, 9, 11, 14, 15]:
        if step >= whole.steps:  # the Trainer itself takes one step too many there, with any data
            continue
        path = found[step]
        net = train(tmp_path / "rest", pipeline(), resume=path, save_strategy="no", **options)
        assert net.seen == whole.seen[shown.after[step] :], f"from step {step}"
        assert net.losses == whole.losses[shown.after[step] :]
        assert net.steps == whole.steps


def test_nothing_is_read_again_and_the_next_checkpoint_is_right_too(tmp_path: Path) -> None:
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    whole = train(tmp_path / "whole", sized(), save_strategy="no", **options)
    done: list[Any] = []
    path = None
    for number, steps in enumerate([3, 5, 1, 4]):
        folder = tmp_path / str(number)
        net = train(
            folder,
            sized(),
            resume=path,
            callbacks=[Stop(steps)],
            dataloader_num_workers=number % 2,
            **options,
        )
        done += net.seen
        assert done == whole.seen[: len(done)]
        path = list(checkpoints(folder).values())[-1]
        state = json.loads((path / "midstream.json").read_text())["state"]
        assert (state["epoch"], state["steps_done"]) == divmod(len(done), 15)
        assert ms.progress(state).samples == sum(map(len, done))
    assert len(done) == 2 * 13 - 1


class Stop(TrainerCallback):  # type: ignore[misc]
    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        control.should_training_stop = control.should_training_stop or self.left == 0


def _terminated(seen: int) -> None:
    if seen == 8:  # the second of the fourth step's
        signal.raise_signal(signal.SIGTERM)


class AtOnce:
    """Stands for the timer with which the trainer waits three seconds after the signal."""

    def __init__(self, wait: float, then: Callable[[], None]) -> None:
        self.start = then


def test_a_checkpoint_on_sigterm_has_the_step_that_was_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.trainer_jit_checkpoint.threading, "Timer", AtOnce)
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    whole = train(tmp_path / "whole", sized(), **options)
    try:
        before = signal.getsignal(signal.SIGTERM)
        train(
            tmp_path / "jit", sized(), net=Net(_terminated), enable_jit_checkpoint=True, **options
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    ((step, path),) = checkpoints(tmp_path / "jit").items()
    net = train(tmp_path / "rest", sized(), resume=path, **options)
    assert (
        net.seen == whole.seen[2 * step :]
        and net.losses == whole.losses[2 * step :]
        and net.steps == 16
    )


def test_a_checkpoint_without_a_position_is_refused(tmp_path: Path) -> None:
    train(tmp_path, sized(), max_steps=1)
    (path,) = checkpoints(tmp_path).values()
    (path / "midstream.json").unlink()
    with pytest.raises(ms.CheckpointError, match="has no position in the data"):
        train(tmp_path, sized(), resume=path, max_steps=2)


def test_plain_lists_are_shuffled_and_columns_the_model_does_not_take_are_left_out(
    tmp_path: Path,
) -> None:
    data = [_sample(number) for number in range(58)]
    whole = train(tmp_path / "whole", data, num_train_epochs=2)
    assert (
        sorted(x for ids in whole.seen[:15] for x in ids)
        == list(range(58))
        != [x for ids in whole.seen[:15] for x in ids]
    )
    assert whole.seen[:15] != whole.seen[15:]
    rest = train(
        tmp_path / "rest", data, resume=checkpoints(tmp_path / "whole")[18], num_train_epochs=2
    )
    assert rest.seen == whole.seen[18:]


def ranks_sized() -> ms.Dataset:
    return (
        ms.from_dataset(range(120), name="web").shuffle(3).map(_sample)
    )  # 15 batches on each of two ranks


def ranks_unsized() -> ms.Dataset:
    return ms.from_dataset(range(540), name="web").filter(lambda x: x % 9).map(_sample)


RANKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sized": (ranks_sized, {"num_train_epochs": 2, "gradient_accumulation_steps": 2}),
    "unsized": (ranks_unsized, {"max_steps": 12}),
}


def _ranks(folder: str, name: str, attempt: str, death: str, resume: str) -> None:
    """What torchrun starts; rank 0 dies at its ``death``-th batch, which is taken and not trained."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    net = Net(
        lambda seen: (
            os.kill(os.getpid(), signal.SIGKILL) if rank == 0 and seen == int(death) else None
        )
    )
    pipeline, options = RANKS[name]
    with open(f"{folder}/{attempt}-{rank}", "w") as ledger:

        class Note(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                print(json.dumps([net.seen, net.losses]), file=ledger, flush=True)

        train(
            Path(folder, attempt),
            pipeline(),
            resume=resume,
            net=net,
            callbacks=[Note()],
            save_steps=3,
            dataloader_num_workers=1,
            ddp_backend="gloo",
            **options,
        )
    gc.collect()  # the trainer and its model before what they talk through: after it torch may hang
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_killed_on_two_ranks_it_goes_on(name: str, tmp_path: Path) -> None:
    def run(attempt: str, ranks: int, death: int = 0, resume: str = "") -> list[list[Any]]:
        torchrun(__file__, ranks, tmp_path, name, attempt, death, resume, dies=death > 0)
        return ledgers(tmp_path, attempt, ranks)

    one = ms.DataLoader(
        RANKS[name][0](), batch_size=4, collate_fn=lambda rows: [row["unused"] for row in rows]
    )
    reference = list(one) + list(one)
    whole = run("whole", 2)
    assert [ids for step in zip(*(rank[-1][0] for rank in whole)) for ids in step] == reference[
        : 2 * len(whole[0][-1][0])
    ]
    killed = run("killed", 2, death=21 if name == "sized" else 11)
    newest = tmp_path / "killed" / "checkpoint-9"
    taken = (
        17 if name == "sized" else 9
    )  # micro-batches of nine steps: an epoch of 15 and one step of two
    assert newest.is_dir() and [len(rank) for rank in killed] == [10, 10]
    rest = run("rest", 2, resume=str(newest))
    for rank in range(2):
        for shown in (0, 1):  # sample ids and losses, bit for bit
            assert killed[rank][8][shown] + rest[rank][-1][shown] == whole[rank][-1][shown]
        assert len(killed[rank][8][0]) == taken
    resume = str(newest)
    if name == "sized":
        printed = torchrun(__file__, 3, tmp_path, name, "three", 0, resume, dies=True)
        assert "was saved on 2 ranks, and there are 3" in printed and "Start 2 ranks; or" in printed
        return
    three = run(
        "three", 3, resume=resume
    )  # a step is a step: nothing is counted by the number of ranks
    assert [len(rank) for rank in three] == [3] * 3
    batches = [ids for step in zip(*(rank[-1][0] for rank in three)) for ids in step]
    assert batches == reference[18:27]


if __name__ == "__main__":
    _ranks(*sys.argv[1:])
