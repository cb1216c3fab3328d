"""A model sharded by FSDP, saved with its optimizer and the loader through
torch.distributed.checkpoint: nothing to adapt.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import midstream as ms
from tests.trainers.test_dcp import run_ranks

pytestmark = pytest.mark.slow


def _pipeline() -> ms.Dataset:
    return ms.from_dataset(range(500)).filter(lambda x: x % 7).shuffle(4, buffer_size=90)


class App:
    """What torch's own recipe saves of model and optimizer."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def _train(rank: int, folder: str, steps: int, save_at: int, resume: bool) -> list[Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Linear(8, 1))
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    loader = ms.DataLoader(_pipeline(), batch_size=4, lanes=12, num_workers=1)
    parts = {"app": App(model, optimizer), "loader": loader}
    if resume:
        dcp.load(parts, checkpoint_id=folder)
    seen = []
    for batch in loader:
        loss = (model(batch[:, None] / 500.0) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((batch.tolist(), loss.item()))
        if len(seen) == save_at:
            dcp.save(parts, checkpoint_id=folder)
        if len(seen) == steps:
            break
    loader.close()
    return seen


def test_fsdp_goes_on_with_the_same_batches_and_losses(tmp_path: Path) -> None:
    whole = run_ranks(2, _train, str(tmp_path), 12, 5, False)
    assert run_ranks(2, _train, str(tmp_path), 7, -1, True) == [rank[5:] for rank in whole]
