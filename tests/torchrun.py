"""Starts a program on several ranks, as a cluster's torchrun does, and reads what they wrote down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def torchrun(program: str, ranks: int, *arguments: Any, dies: bool = False, timeout: float = 240) -> str:
    """Run a file on CPU ranks and return its stderr; it must end well, or with ``dies`` must not."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", program, *map(str, arguments)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert (ran.returncode != 0) == dies, ran.stderr[-5000:]
    return ran.stderr


def ledgers(folder: Path, attempt: str, ranks: int) -> list[list[Any]]:
    """The lines that each rank wrote to its file ``attempt-rank``."""
    return [
        [json.loads(line) for line in (folder / f"{attempt}-{rank}").read_text().splitlines()] for rank in range(ranks)
    ]
