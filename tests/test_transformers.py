"""Hugging Face's Trainer: resumed after any step, with accumulated gradients, after SIGTERM and SIGKILL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
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
    "sized": {"num_train_epochs": 2},
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
    for step, path in found.items():
        net = train(tmp_path / "rest", pipeline(), resume=path, save_strategy="no", **options)
        assert net.seen == whole.seen[shown.after[step] :], f"from step {step}"
        assert net.losses == whole.losses[shown.after[step] :]
        assert net.steps == whole.steps
