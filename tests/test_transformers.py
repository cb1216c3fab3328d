"""Hugging Face's Trainer: resumed after any step, with accumulated gradients, after SIGTERM. (SIGKILL: the README.)"""

from __future__ import annotations

import json
import signal
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
        ms.from_dataset(range(80), name="web").filter(lambda x: x % 4).shuffle(4, buffer_size=96).take(48).map(_sample)
    )


PIPELINES = {"sized": sized, "unsized": unsized}


def train(
    folder: Path, data: Any, *, resume: Any = None, net: Net | None = None, callbacks: Any = (), **options: Any
) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        **{"save_strategy": "steps", "save_steps": 1, "logging_steps": 1000, "learning_rate": 0.1, **options},
    )
    net = net or Net()
    trainer = ResumeTrainer(model=net, args=arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    net.steps = trainer.state.global_step  # type: ignore[assignment]
    return net


def checkpoints(folder: Path) -> dict[int, Path]:
    return dict(sorted((int(path.name.split("-")[1]), path) for path in folder.glob("checkpoint-*")))


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
def test_resumed_after_any_step_it_is_shown_what_an_uninterrupted_run_is(case: str, tmp_path: Path) -> None:
    pipeline, options = PIPELINES[case.split(",")[0]], CASES[case]
    shown = Shown()
    whole = train(tmp_path / "whole", pipeline(), callbacks=[shown], **options)
    found = checkpoints(tmp_path / "whole")
    assert list(found) == list(range(1, whole.steps + 1))
    if options == CASES["sized, gradients of two"]:
        assert whole.steps == 16 and len(whole.seen) == 30  # the last step of an epoch has one batch
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
        state = json.loads((path / "midstream.json").read_text())
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
        train(tmp_path / "jit", sized(), net=Net(_terminated), enable_jit_checkpoint=True, **options)
    finally:
        signal.signal(signal.SIGTERM, before)
    ((step, path),) = checkpoints(tmp_path / "jit").items()
    net = train(tmp_path / "rest", sized(), resume=path, **options)
    assert net.seen == whole.seen[2 * step :] and net.losses == whole.losses[2 * step :] and net.steps == 16


def test_a_checkpoint_without_a_position_is_refused(tmp_path: Path) -> None:
    train(tmp_path, sized(), max_steps=1)
    (path,) = checkpoints(tmp_path).values()
    (path / "midstream.json").unlink()
    with pytest.raises(ms.CheckpointError, match="does not say where the training stood"):
        train(tmp_path, sized(), resume=path, max_steps=2)


def test_plain_lists_are_shuffled_and_columns_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    data = [_sample(number) for number in range(58)]
    whole = train(tmp_path / "whole", data, num_train_epochs=2)
    assert (
        sorted(x for ids in whole.seen[:15] for x in ids)
        == list(range(58))
        != [x for ids in whole.seen[:15] for x in ids]
    )
    assert whole.seen[:15] != whole.seen[15:]
    rest = train(tmp_path / "rest", data, resume=checkpoints(tmp_path / "whole")[18], num_train_epochs=2)
    assert rest.seen == whole.seen[18:]
