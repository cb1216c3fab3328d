"""Data-parallel training that can be killed at any time and resumes exactly, also on another number
of ranks and workers.

torchrun --nproc-per-node 2 -m midstream.examples.train_ddp --root checkpoints --workers 2
(kill it in any way, then for example)
torchrun --nproc-per-node 1 -m midstream.examples.train_ddp --root checkpoints --workers 0
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import midstream as ms

__all__ = ["pipeline", "train"]


def pipeline() -> ms.Dataset:
    """Two shuffled sources of feature vectors, mixed 1 : 2. Replace them by your data."""
    sources = {
        "small": ms.from_dataset(range(4000), name="small").shuffle(seed=1),
        "large": ms.from_dataset(range(4000, 8000), name="large").shuffle(seed=2),
    }
    mix = ms.interleave(sources, weights={"small": 1, "large": 2})
    return mix.map(lambda number: {"id": number, "x": torch.full((8,), number / 8000)})


def train(
    args: argparse.Namespace, data: ms.Dataset, after_step: Callable[..., Any] = lambda *_: None
) -> None:
    """Train a model; ``after_step(loader, batch, step)`` is called after each optimizer step."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = (
        torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        if cuda
        else torch.device("cpu")
    )
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(8, 1).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = ms.DataLoader(
        data,
        args.batch_size,
        num_workers=args.workers,
        lanes=args.lanes,
        sync_end=True,
        pin_memory=cuda,
    )
    step = 0
    if ms.checkpoint.latest(args.root) is not None:
        extra = ms.checkpoint.load(args.root, loader, map_location=device)
        model.load_state_dict(extra["model"])
        optimizer.load_state_dict(extra["optimizer"])
        step = extra["step"]

    def save() -> None:
        extra = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        ms.checkpoint.save(args.root, loader, global_step=step, state=extra, keep=3)

    with ms.PreemptionGuard() as guard:
        stop = False
        for epoch in range(loader.epoch, args.epochs):
            for batch in loader:
                x = batch["x"].to(device)
                loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                after_step(loader, batch, step)
                stop = guard.should_stop  # a collective: read it once a step
                if stop or step % args.save_every == 0:
                    save()
                if stop:
                    break
            if stop:
                break
            if dist.get_rank() == 0:
                print(f"epoch {epoch}: step {step}, loss {loss.item():.4f}", flush=True)
        else:
            save()
            if dist.get_rank() == 0:
                print(f"done: {loader.progress()}", flush=True)
    loader.close()
    dist.destroy_process_group()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="checkpoints", help="folder or URL of the checkpoints")
    parser.add_argument("--workers", type=int, default=2, help="loader workers per rank")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="samples per rank and step")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument(
        "--lanes", type=int, default=None, help="set at the run's first start; kept from then on"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(arguments(), pipeline())
