"""The README's programs for trainers: each is killed, started again, and shown what an
uninterrupted run is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import midstream as ms

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.split("## In your trainer")[1].split("\n## ")[0]
PROGRAMS = dict(
    zip(
        ("lightning", "accelerate", "transformers"),
        re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL),
    )
)

# Notes what the layer is shown, and dies in the middle of step DIE.
AROUND = """
import json, os, signal, torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
steps, shown = 0, []
forward = torch.nn.Linear.forward
def noted(self, x):
    shown.append(x.flatten().long().tolist())
    return forward(self, x)
def before(optimizer, *rest):
    global steps
    steps += 1
    if steps == int(os.environ["DIE"]):
        os.kill(os.getpid(), signal.SIGKILL)
def after(optimizer, *rest):
    print(json.dumps(shown[-1]), file=ledger, flush=True)
torch.nn.Linear.forward = noted
register_optimizer_step_pre_hook(before)
register_optimizer_step_post_hook(after)
ledger = open(os.environ["LEDGER"], "w")
exec(compile(open("program.py").read(), "program.py", "exec"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_is_killed_and_goes_on(name: str, tmp_path: Path) -> None:
    program = PROGRAMS[name]
    assert name in program and len([line for line in program.splitlines() if line.strip()]) <= 20
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "run").mkdir()
    lines = []
    for death, status in ((13, -signal.SIGKILL), (0, 0)):
        ledger = tmp_path / f"ledger-{death}"
        environment = {
            **os.environ,
            "DIE": str(death),
            "LEDGER": str(ledger),
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-W", "ignore", "-c", AROUND]
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert ran.returncode == status, ran.stderr[-3000:]
        lines.append([json.loads(line) for line in ledger.read_text().splitlines()])
    first, rest = lines
    loader = ms.DataLoader(
        ms.from_dataset(torch.arange(100)[:, None]).shuffle(seed=1), batch_size=4
    )
    reference = [batch.flatten().tolist() for _ in range(2) for batch in loader]
    assert first == reference[:12]
    assert rest == reference[10:]


def test_there_is_a_program_for_each() -> None:
    assert len(PROGRAMS) == SECTION.count("```python") == 3
