"""The main job, as a user runs it, and its verdict when something is wrong."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import midstream as ms
from midstream.cli import demo
from midstream.cli.demo import (
    BATCH,
    Job,
    Ledger,
    Verdict,
    choose_kill,
    compare,
    inside_epoch,
    load,
    pieces,
    save,
)


def midstream(*arguments: str) -> subprocess.CompletedProcess[str]:
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in ("FORCE_COLOR", "PY_COLORS")
    }
    return subprocess.run(
        [sys.executable, "-m", "midstream", *arguments],
        capture_output=True, text=True, timeout=300, check=False, env=plain,
    )  # fmt: skip


def processes_of(folder: Path) -> list[str]:
    """Processes of this machine whose command line names ``folder``: trainers, and the workers
    forked from them.
    """
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if str(folder) in command and entry.name != str(os.getpid()):
            found.append(command)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The whole demonstration
# ---------------------------------------------------------------------------------------------------------------------


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
    assert "SIGKILL after step" in done.stdout
    assert "\nEXACT: " in done.stdout
    assert not set("\r\x1b") & set(done.stdout)
    ledgers = {name: Ledger(tmp_path / f"{name}.jsonl") for name in ("whole", "killed", "resumed")}
    for ledger in ledgers.values():
        ledger.read()
    start = ledgers["resumed"].event("resume")["step"]
    assert start % 7 == 0 < start <= len(ledgers["killed"].steps) < 60
    assert [entry["step"] for entry in ledgers["resumed"].steps] == list(range(start + 1, 61))
    assert [e["event"] for e in ledgers["resumed"].entries if "event" in e] == [
        "resume",
        "first batch",
        "end",
    ]
    assert load(tmp_path)["step"] == 56
    assert [(tmp_path / f"{name}.log").read_text() for name in ledgers] == [
        "",
        "",
        "",
    ]  # not one warning
    if sys.platform == "linux":
        deadline = (
            time.monotonic() + 30
        )  # torch's workers look every 5 seconds whether their parent lives
        while processes_of(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_json_is_the_verdict_alone() -> None:
    done = midstream(
        "demo", "--steps", "40", "--every", "9", "--kill-at", "25", "--workers", "0", "--json"
    )
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert (verdict["exact"], verdict["steps"], verdict["differences"]) == (True, 40, [])
    details = verdict["details"]
    assert 25 <= details["killed_after"] < 40
    assert details["killed_after"] - details["resumed_after"] == verdict["rolled_back"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (
            lambda checkpoint, fresh: checkpoint.update(loader=fresh),
            "the epoch differs|sample 0 differs: expected ",
        ),
        (
            lambda checkpoint, fresh: checkpoint["model"]["head.bias"][ord(" ")].add_(1e-3),
            "the loss differs: expected ",
        ),
    ],
    ids=["data", "weights"],
)
def test_a_resume_from_a_spoilt_checkpoint_is_found_out(
    tmp_path: Path, spoil: Callable[[dict[str, Any], dict[str, Any]], None], word: str
) -> None:
    job = Job(str(tmp_path), "whole", steps=13, workers=0, rows=1500, every=6)
    whole, killed = in_a_process(job), in_a_process(replace(job, name="killed"))
    checkpoint = load(tmp_path)
    loader = ms.DataLoader(demo.pipeline(job.rows), batch_size=BATCH, collate_fn=ms.pad)
    spoil(checkpoint, loader.state_dict())
    save(checkpoint, tmp_path)
    resumed = in_a_process(replace(job, name="resumed", resume=True))
    verdict = compare(whole.steps, killed.steps, resumed.steps, 12)
    assert not verdict.exact
    assert verdict.differences[0].startswith("step 13 of the resumed run: ")
    assert any(part in verdict.differences[0] for part in word.split("|"))


def in_a_process(job: Job) -> Ledger:
    process = demo.watch(job)
    while True:
        try:
            next(process)
        except StopIteration as end:
            ledger: Ledger = end.value
            return ledger


@pytest.mark.slow
def test_a_training_that_fails_by_itself_is_told_with_its_traceback(tmp_path: Path) -> None:
    job = Job(
        str(tmp_path), "resumed", steps=5, workers=0, rows=100, every=2, resume=True
    )  # from no checkpoint
    with pytest.raises(
        RuntimeError, match=r"(?s)the resumed run ended with status 1:.*FileNotFoundError"
    ):
        in_a_process(job)


# ---------------------------------------------------------------------------------------------------------------------
# Its parts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 30, "every": 40}, "no room for a kill"),
        ({"steps": 60, "kill_at": 20}, r"after the first checkpoint \(step 20\)"),
        ({"steps": 60, "kill_at": 60}, r"before the last step \(60\)"),
    ],
)
def test_numbers_that_leave_nothing_to_resume_are_refused_before_anything_runs(
    options: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        next(iter(demo.run(**options)))  # type: ignore[arg-type]


def test_the_kill_is_inside_an_epoch_and_after_a_checkpoint() -> None:
    epochs = [step // 15 for step in range(44)]
    kills = {choose_kill(epochs, 10, random.Random(seed)) for seed in range(200)}
    # Steps 1 to 15 are epoch 0, 16 to 30 epoch 1. Not the first of an epoch, nor so late that a
    # slow signal is in the next.
    assert kills == {*range(17, 26), *range(32, 40)}
    with pytest.raises(ValueError, match="more steps"):
        choose_kill(epochs, 40, random.Random(0))
    assert [step for step in range(1, 20) if inside_epoch(epochs, step, 1)] == [
        *range(2, 14),
        17,
        18,
        19,
    ]


def test_every_piece_has_a_byte_to_predict() -> None:
    for length in range(12, 200):
        made = pieces("x" * length)
        assert all(2 <= len(piece["ids"]) <= demo.PIECE for piece in made)
        assert sum(len(piece["ids"]) for piece in made) in (length, length - 1)


@pytest.mark.slow
def test_the_last_batch_of_an_epoch_trains_too() -> None:
    loader = ms.DataLoader(demo.pipeline(200), batch_size=BATCH, collate_fn=ms.pad)
    model = demo.Model()
    losses = [model.loss(batch).detach() for batch in loader]
    assert len(losses) > 10
    assert torch.isfinite(torch.stack(losses)).all()


def test_a_ledger_is_read_by_whole_lines(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.read() == []
    Ledger(ledger.path).write(step=1)
    with ledger.path.open("a") as file:
        file.write('{"step": 2')
    assert ledger.read() == [{"step": 1}]
    with ledger.path.open("a") as file:
        file.write('}\n{"event": "end"}\n')
    assert ledger.read() == [{"step": 2}, {"event": "end"}]
    assert ledger.steps == [{"step": 1}, {"step": 2}]


# ---------------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------------


def entry(step: int, epoch: int = 0) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": epoch,
        "loss": float(1 / step).hex(),
        "origins": [["code", epoch, step, 0], ["prose", 0, step, 0]],
    }


WHOLE = [entry(step) for step in range(1, 11)]


def verdict(change: Callable[[list[dict[str, Any]], list[dict[str, Any]]], Any]) -> Verdict:
    """Of a run killed after step 7 and resumed from the checkpoint of step 4, with something
    changed.
    """
    killed, resumed = copy.deepcopy(WHOLE[:7]), copy.deepcopy(WHOLE[4:])
    change(killed, resumed)
    return compare(WHOLE, killed, resumed, 4)


def test_the_verdict_is_exact_only_when_everything_is_the_same() -> None:
    same = verdict(lambda killed, resumed: None)
    assert (same.exact, same.steps, same.samples, same.rolled_back, same.differences) == (
        True,
        10,
        20,
        3,
        [],
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda killed, resumed: resumed[2].update(loss=(0.5).hex()),
            "step 7 of the resumed run: the loss differs: expected 0.14285714285714285, found 0.5",
        ),
        (
            lambda killed, resumed: resumed[1]["origins"].reverse(),
            "step 6 of the resumed run: sample 0 differs: expected code[6], found prose[6]",
        ),
        (
            lambda killed, resumed: resumed[1]["origins"][1].__setitem__(3, 2),
            "step 6 of the resumed run: sample 1 differs: expected prose[6], found prose[6] part 2",
        ),
        (
            lambda killed, resumed: resumed[0]["origins"].pop(),
            "step 5 of the resumed run: expected 2 samples, found 1",
        ),
        (
            lambda killed, resumed: resumed[0].update(epoch=1),
            "step 5 of the resumed run: the epoch differs: expected 0, found 1",
        ),
        (
            lambda killed, resumed: killed[1].update(loss=(0.25).hex()),
            "step 2 of the killed run: the loss differs: expected 0.5, found 0.25",
        ),
        (
            lambda killed, resumed: killed[6].update(loss=(0.25).hex()),
            "step 7 of the killed run: the loss differs: expected 0.14285714285714285, found 0.25",
        ),
        (lambda killed, resumed: resumed.pop(), "after 9 steps: expected step 10, found the end"),
        (
            lambda killed, resumed: resumed.append(entry(11)),
            "after 10 steps: expected the end, found step 11",
        ),
        (lambda killed, resumed: resumed.pop(0), "after 4 steps: expected step 5, found step 6"),
        (
            lambda killed, resumed: resumed.insert(0, copy.deepcopy(WHOLE[3])),
            "after 4 steps: expected step 5, found step 4",
        ),
    ],
)
def test_the_verdict_names_the_first_difference(change: Any, words: str) -> None:
    found = verdict(change)
    assert not found.exact
    assert found.differences[0] == words
