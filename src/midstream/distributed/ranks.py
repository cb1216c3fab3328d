"""Rank and world size of this process."""

from __future__ import annotations

import os

import torch.distributed

from midstream.distributed.collectives import is_initialized


def rank_and_world_size() -> tuple[int, int]:
    """Rank and world size: of ``torch.distributed``, else of RANK and WORLD_SIZE, else one rank."""
    if is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
