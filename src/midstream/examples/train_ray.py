"""Training with Ray Train on any number of workers: each saves its part, and all parts are loaded.

python -m midstream.examples.train_ray --storage /tmp/ray-run --workers 2
(kill it or one of its workers, then for example)
python -m midstream.examples.train_ray --storage /tmp/ray-run --workers 1

Needs ``pip install 'ray[train]'``. Ray merges the files that the workers report into one folder,
the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch

import midstream as ms
from midstream.examples.train_ddp import pipeline

__all__ = ["train"]


def train(config: dict[str, Any]) -> None:
    """Train in one worker: Ray calls this function in each of them."""
    import ray.train
    import ray.train.torch

    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    plain = torch.nn.Linear(8, 1)
    model = ray.train.torch.prepare_model(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = ms.DataLoader(pipeline(), 8, num_workers=1, lanes=48)
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            loader.load_state_dict(
                [json.loads(part.read_text()) for part in Path(folder).glob("data-*.json")]
            )
            saved = torch.load(Path(folder, "model.pt"), weights_only=True)
        plain.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    for batch in loader:
        loss = (model(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if (step + 1, rank) == (config["die"], 1):  # to try out a resume
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        step += 1
        if config["ledger"]:
            with open(f"{config['ledger']}-{rank}", "a") as ledger:
                print(json.dumps([step, batch["id"].tolist()]), file=ledger)
        if step % 5 == 0:
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, f"data-{rank}.json").write_text(json.dumps(loader.state_dict()))
                if rank == 0:
                    weights = {
                        "model": plain.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step,
                    }
                    torch.save(weights, Path(folder, "model.pt"))
                ray.train.report(
                    {"loss": loss.item()}, checkpoint=ray.train.Checkpoint.from_directory(folder)
                )
        if step == config["steps"]:
            break
    loader.close()


def main() -> None:
    """Parse the command line and run the training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", required=True, help="folder of the run's checkpoints")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--die", type=int, default=-1, help="worker 1 kills itself in the middle of this step"
    )
    parser.add_argument(
        "--ledger", default="", help="where each worker records the samples it trained on"
    )
    args = parser.parse_args()
    import ray
    import ray.train.torch

    ray.init(num_cpus=args.workers + 1, include_dashboard=False)
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config=vars(args),
        scaling_config=ray.train.ScalingConfig(num_workers=args.workers),
        run_config=ray.train.RunConfig(name="run", storage_path=args.storage),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
