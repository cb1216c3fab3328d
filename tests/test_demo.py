"""The main job, as a user runs it, and its verdict when something is wrong."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from midstream.demo import Verdict, choose_kill, compare


def midstream(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "midstream", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def group_of(folder: Path) -> list[str]:
    """Processes of this machine that belong to a demonstration in ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if str(folder) in command and entry.name != str(os.getpid()):
            found.append(command)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "resume_workers"), [(2, 1), (0, 2)])
def test_a_killed_job_resumes_exactly_with_another_number_of_workers(
    tmp_path: Path, workers: int, resume_workers: int
) -> None:
    done = midstream(
        "demo", "--steps", "60", "--every", "7", "--workers", str(workers), "--resume-workers", str(resume_workers),
        "--keep", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed by SIGKILL at step" in done.stdout
    assert "EXACT" in done.stdout
    assert "NOT EXACT" not in done.stdout
    assert "\r" not in done.stdout
    assert group_of(tmp_path) == []
    ledger = [json.loads(line) for line in (tmp_path / "resumed").read_text().splitlines()]
    assert ledger[0]["step"] % 7 == 0 < ledger[0]["step"]


@pytest.mark.slow
def test_json_is_the_verdict_alone(tmp_path: Path) -> None:
    done = midstream("demo", "--steps", "40", "--every", "9", "--kill-at", "25", "--json")
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["exact"], verdict["steps"]) == (0, True, 40)


@pytest.mark.slow
def test_a_demonstration_that_cannot_run_says_why() -> None:
    done = midstream("demo", "--steps", "30", "--every", "40")
    assert done.returncode == 2
    assert "after the first checkpoint" in done.stderr


def entry(step: int, epoch: int = 0) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": epoch,
        "loss": float(1 / step).hex(),
        "origins": [["code", epoch, step, 0], ["prose", 0, step, 0]],
    }


WHOLE = [entry(step) for step in range(1, 11)]


def verdict(change: Any) -> Verdict:
    resumed = copy.deepcopy(WHOLE[4:])
    change(resumed)
    return compare(WHOLE, WHOLE[:7], resumed, 4)


def test_the_verdict_is_exact_only_when_everything_is_the_same() -> None:
    same = verdict(lambda resumed: None)
    assert (same.exact, same.steps, same.samples, same.rolled_back, same.differences) == (True, 10, 20, 3, [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda resumed: resumed[2].update(loss=(0.5).hex()), "step 7: loss differs"),
        (lambda resumed: resumed[1]["origins"].reverse(), "step 6: origins differs: sample 0"),
        (lambda resumed: resumed[0]["origins"].pop(), "step 5: origins differs: expected 2 samples, found 1"),
        (lambda resumed: resumed.pop(), "steps: expected 1 to 10"),
        (lambda resumed: resumed.insert(0, copy.deepcopy(WHOLE[3])), "steps: expected 1 to 10"),
    ],
)
def test_the_verdict_names_the_first_difference(change: Any, words: str) -> None:
    found = verdict(change)
    assert not found.exact
    assert words in found.differences[0]


def test_the_kill_is_inside_an_epoch_and_after_a_checkpoint() -> None:
    steps = [entry(step, epoch=step // 15) for step in range(1, 45)]
    for seed in range(200):
        kill = choose_kill(steps, 10, seed)
        assert kill > 10
        assert len({steps[index]["epoch"] for index in (kill - 2, kill - 1, kill)}) == 1
    with pytest.raises(ValueError, match="first checkpoint"):
        choose_kill(steps, 50, 0)


def test_the_command_line_explains_itself() -> None:
    assert "SIGKILL" in midstream("demo", "--help").stdout
    assert midstream("--version").stdout.startswith("midstream 0.")
    assert midstream("nonsense").returncode == 2
