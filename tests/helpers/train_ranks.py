"""Run by torchrun from test_cluster.py: the example's training, with a ledger and a way to die."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import midstream as ms
from midstream.examples import train_ddp


def _sample(number: Any) -> dict[str, Any]:
    return {"id": int(number), "x": torch.full((8,), int(number) / 5000)}


def mixed() -> ms.Dataset:
    """Random access: tokens of two sources, mixed and shuffled."""
    sources = {
        name: ms.from_dataset(range(low, low + 480), name=name).shuffle(1)
        for name, low in (("web", 0), ("code", 1000))
    }
    mix = ms.interleave(
        sources,
        weights={"web": 2, "code": 1},
        stopping_strategy="all_exhausted_without_replacement",
    )
    return mix.shuffle(3).map(_sample)


def streamed() -> ms.Dataset:
    """A stream: filtered, then shuffled in a buffer."""
    return (
        ms.from_dataset(range(1100), name="web")
        .filter(lambda x: x % 7)
        .shuffle(4, buffer_size=100)
        .map(_sample)
    )


def uneven() -> ms.Dataset:
    """Finite, and its lanes end at very different steps."""
    return (
        ms.from_dataset(range(1000), name="web")
        .filter(lambda x: x % 192 > 60 or x > 500)
        .map(_sample)
    )


PIPELINES = {"mixed": mixed, "streamed": streamed, "uneven": uneven}


def main() -> None:
    """``train_ranks.py PIPELINE LEDGER DEATH --root ...``; DEATH is ``kind:rank:step``, or
    ``none``.
    """
    name, ledger, death = sys.argv[1:4]
    args = train_ddp.arguments(sys.argv[4:])
    rank = int(os.environ["RANK"])
    kind, victim, at = [*death.split(":"), "-1", "-1"][:3]
    mine = rank == int(victim)
    file = open(f"{ledger}-{rank}.jsonl", "a")  # noqa: SIM115
    taken, signalled = 0, Path(ledger).parent / "signalled"

    def after_step(loader: Any, batch: Any, step: int) -> None:
        nonlocal taken
        current = loader.run.position
        number = (
            current.first + (current.steps - current.first_step - 1) * current.topology.world_size
        )
        file.write(
            json.dumps(
                [
                    step,
                    loader.epoch if not current.complete else loader.epoch - 1,
                    number,
                    batch["id"].tolist(),
                ]
            )
            + "\n"
        )
        file.flush()
        os.fsync(file.fileno())
        taken = step
        while kind == "term" and step >= int(at) + 2 and not signalled.exists():
            time.sleep(
                0.01
            )  # on a busy machine the signal could come after the step at which the next attempt dies
        if mine and kind == "worker" and step == int(at):
            os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)

    if mine and kind == "step":
        plain = torch.optim.SGD.step

        def dies(self: Any, *rest: Any) -> Any:
            if taken + 1 >= int(at):  # the batch is taken, and not trained
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, *rest)

        torch.optim.SGD.step = dies  # type: ignore[method-assign]
    if mine and kind == "write":
        replace = os.replace

        def torn(source: Any, target: Any) -> None:
            if taken >= int(at) and "rank-" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = torn  # type: ignore[assignment]
    train_ddp.train(args, PIPELINES[name](), after_step)


if __name__ == "__main__":
    main()
