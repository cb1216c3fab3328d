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
    ran = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, printed = ran.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        ran.terminate()  # and it ends its ranks; killed, it would leave them behind
        _, printed = ran.communicate()
        raise AssertionError(f"not done in {timeout} s:\n{printed[-5000:]}") from None
    assert (ran.returncode != 0) == dies, printed[-5000:]
    return printed


def ledgers(folder: Path, attempt: str, ranks: int) -> list[list[Any]]:
    """The lines that each rank wrote to its file ``attempt-rank``."""
    return [
        [json.loads(line) for line in (folder / f"{attempt}-{rank}").read_text().splitlines()] for rank in range(ranks)
    ]
