"""Starts a program on several ranks, in the environment of torchrun, and reads what they wrote
down.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers.nursery import nursery

ROOT = Path(__file__).resolve().parents[2]  # of the repository: test files are modules below it


def torchrun(
    program: str, ranks: int, *arguments: Any, dies: bool = False, timeout: float = 240
) -> str:
    """Run a file on CPU ranks and return its stderr; it must end well, or with ``dies`` must not.

    `test_cluster.py` runs torchrun itself. Here the ranks are forked from an interpreter that has
    imported the file.
    """
    for_all = {
        "CUDA_VISIBLE_DEVICES": "",
        "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_RUN_ID": "none",
        "WORLD_SIZE": str(ranks),
    }
    environments = [
        {**for_all, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)
    ]
    module = ".".join(Path(program).resolve().relative_to(ROOT).with_suffix("").parts)
    with tempfile.NamedTemporaryFile("r") as errors:
        command, imported = [program, *map(str, arguments)], nursery(module)
        statuses = imported.run(
            command, environments, Path(errors.name), timeout=timeout, store=True
        )
        printed = errors.read()
    assert any(statuses) == dies, f"{statuses}: {printed[-5000:]}"
    return printed


def ledgers(folder: Path, attempt: str, ranks: int) -> list[list[Any]]:
    """The lines that each rank wrote to its file ``attempt-rank``."""
    return [
        [json.loads(line) for line in (folder / f"{attempt}-{rank}").read_text().splitlines()]
        for rank in range(ranks)
    ]
