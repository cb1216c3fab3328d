"""The honest test: torchrun, gloo and DDP, killed in every way there is, on other ranks and workers
each time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import midstream as ms
from tests.helpers.train_ranks import PIPELINES

PROGRAM = Path(__file__).parents[1] / "helpers" / "train_ranks.py"


def _start(
    name: str, folder: Path, attempt: int, ranks: int, workers: int, death: str
) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    command += [str(PROGRAM), name, str(folder / f"ledger-{attempt}"), death]
    command += [
        f"--root={folder / 'checkpoints'}",
        f"--workers={workers}",
        "--batch-size=4",
        "--save-every=5",
        "--epochs=2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(folder / f"log-{attempt}", "w") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )


def _lines(folder: Path, attempt: int) -> list[Any]:
    """``[step, epoch, n, ids]`` of all ranks, in the run's order."""
    lines = []
    for file in folder.glob(f"ledger-{attempt}-*.jsonl"):
        lines += [
            json.loads(line)
            for line in file.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
    return sorted(lines)


def _wait_for_step(folder: Path, attempt: int, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(line[0] >= step for line in _lines(folder, attempt)):
        assert process.poll() is None and time.monotonic() < deadline, (
            folder / f"log-{attempt}"
        ).read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_killed_in_every_way_on_changing_topologies_every_sample_is_trained_exactly_once(
    name: str, tmp_path: Path
) -> None:
    pipeline = PIPELINES[name]()
    attempts = [
        (2, 2, "term:0:8"),
        (2, 2, "step:1:17"),
        (3, 1, "write:0:25"),
        (1, 2, "worker:0:33"),
        (2, 0, "none"),
    ]
    resumed = []
    for attempt, (ranks, workers, death) in enumerate(attempts):
        newest = ms.checkpoint.latest(tmp_path / "checkpoints")
        resumed.append(ms.checkpoint.load(newest)["step"] if newest else 0)
        process = _start(name, tmp_path, attempt, ranks, workers, death)
        if death.startswith("term"):
            _wait_for_step(tmp_path, attempt, int(death.rpartition(":")[2]), process)
            os.killpg(process.pid, signal.SIGTERM)  # torchrun, ranks and loader workers alike
            (tmp_path / "signalled").touch()
        try:
            status = process.wait(150)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        log = (tmp_path / f"log-{attempt}").read_text()
        assert (status == 0) == (death == "none") or death.startswith("term"), log[-3000:]
        if death.startswith("worker"):
            assert "worker 0" in log and "was killed by SIGKILL" in log
    # What was trained and not rolled back: of each attempt, up to the step from which the next one
    # went on.
    committed = []
    for attempt, end in enumerate([*resumed[1:], 10**9]):
        lines = _lines(tmp_path, attempt)
        assert lines and lines[0][0] == resumed[attempt] + 1
        committed += [line for line in lines if line[0] <= end]
    assert resumed[1] >= 8 and resumed == sorted(resumed) and resumed[2] == 15
    trained = Counter(number for *_, ids in committed for number in ids)
    loader = ms.DataLoader(pipeline, 4, lanes=48)
    epochs = [[batch["id"].tolist() for batch in loader] for _ in range(2)]
    # The same order as an uninterrupted run's, until the first lane drains.
    first = [ids for step, epoch, n, ids in committed if epoch == 0]
    promised = len(first) if name == "mixed" else {"streamed": 192, "uneven": 96}[name]
    assert promised >= 90 and first[:promised] == epochs[0][:promised]
    # What the ranks had left when the other ended is the beginning of the next epoch.
    last = ms.DataLoader(pipeline, 4)
    ms.checkpoint.load(tmp_path / "checkpoints", last)
    assert last.epoch == 2
    told = last.progress()
    if name == "mixed":
        dropped = sum(told.unattributed.values())
        assert (
            dropped in (0, 4, 8)
            and sum(trained.values()) == 2 * 960 - dropped
            and max(trained.values()) <= 2
        )
    else:
        trained += Counter(number for batch in last for number in batch["id"].tolist())
        assert trained == Counter({number: 3 for batch in epochs[0] for number in batch})
