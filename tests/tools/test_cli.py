"""The command line: what it prints, and its exit status."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import midstream as ms
from midstream.cli import app as cli
from midstream.cli.demo import Step, Verdict
from midstream.cli.output import show_demo


def status(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of ``midstream`` with these arguments, in this process."""
    for name in ("FORCE_COLOR", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["midstream", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == f"midstream {ms.__version__}\n"


def test_help_explains_the_demonstration_and_its_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert status("demo", "--help", monkeypatch=monkeypatch) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # typer forces colours in some CI
    for word in (
        "SIGKILL",
        "0 exact, 1 not exact, 2 it could not run",
        "--steps",
        "--workers",
        "--resume-workers",
    ):
        assert word in text
    for word in ("--seed", "--kill-at", "--every", "--keep", "--json"):
        assert word in text


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("demo", "--steps", "0"), ("demo", "--wrong")]
)
def test_wrong_arguments_exit_with_2(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status(*arguments, monkeypatch=monkeypatch) == 2


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_extra_one_line_names_it(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert status("--version", monkeypatch=monkeypatch) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"the command line needs {module}: pip install 'midstream[cli]'\n"


@pytest.mark.processes
def test_importing_the_command_line_does_not_import_the_extra() -> None:
    code = "import sys, midstream.cli.app; assert not {'typer', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the demonstration tells, in place of a real one; an exception is raised."""
    script: list[Any] = []

    def run(**options: Any) -> Iterator[Any]:
        for item in script:
            if isinstance(item, Exception):
                raise item
            yield item

    monkeypatch.setattr("midstream.cli.demo.run", run)
    return script


WRONG = Verdict(
    False,
    60,
    960,
    3,
    ["step 22 of the resumed run: sample 4 differs: expected code[7], found code[9]"],
)


def test_a_difference_is_named_and_exits_with_1(
    told: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told += ["a line with [brackets]", Step("whole", 1, 5.5), WRONG]
    assert status("demo", monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().out == (
        "a line with [brackets]\n"
        "  step 22 of the resumed run: sample 4 differs: expected code[7], found code[9]\n"
        "NOT EXACT: the resumed run differs from the one that was left alone.\n"
        "Steps after the checkpoint, rolled back with the weights and done again: 3.\n"
    )


def test_forced_colours_without_a_terminal_bring_no_moving_bar(
    told: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told += ["a line", *(Step("whole", step, 5.5) for step in range(1, 100)), WRONG]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert show_demo(False, steps=100) is False
    out = capsys.readouterr().out
    assert "\r" not in out
    assert "loss 5.5" not in out


def test_json_of_a_difference_exits_with_1(
    told: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told += ["a line", WRONG]
    assert status("demo", "--json", monkeypatch=monkeypatch) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["exact"], verdict["differences"]) == (False, WRONG.differences)


def test_a_demonstration_that_cannot_run_says_why_and_exits_with_2(
    told: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told += ["a line", RuntimeError("the killed run ended with status 1")]
    assert status("demo", monkeypatch=monkeypatch) == 2
    assert (
        capsys.readouterr().err
        == "The demonstration could not run: the killed run ended with status 1\n"
    )


def test_numbers_that_make_no_demonstration_exit_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("demo", "--steps", "60", "--kill-at", "10", monkeypatch=monkeypatch) == 2
    assert "after the first checkpoint (step 20)" in capsys.readouterr().err


# -- verify, inspect, diff, trace ----------------------------------------------------------------------------------------

PIPES = """
import midstream as ms

def not_third(row):
    return row % 3 != 0

def make(seed=1):
    web = ms.from_dataset(range(400)).shuffle(seed=seed)
    code = ms.from_dataset(range(300)).shuffle(seed=1).filter(not_third)
    return ms.interleave({"web": web, "code": code}, weights={"web": 7, "code": 3}).batch(8)

def other():
    return make(seed=2)

def fails():
    return ms.from_dataset(range(40)).map(lambda row: 1 // (row - 5)).batch(4)

def broken():
    loader = ms.DataLoader(make(), rank=0, world_size=1)
    loader.load_state_dict = lambda state: None
    return loader

number = 7
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of pipelines, and checkpoints of one after 20 batches and after 35."""
    (tmp_path / "cli_pipes.py").write_text(PIPES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.syspath_prepend(str(tmp_path))
    make = importlib.import_module("cli_pipes").make
    loader = ms.DataLoader(make(), rank=0, world_size=1)
    batches = iter(loader)
    for _ in range(20):
        next(batches)
    ms.checkpoint.save(tmp_path / "run", loader, state={"weights": torch.ones(2)})
    (tmp_path / "a.json").write_text(json.dumps(loader.state_dict()))
    for _ in range(15):
        next(batches)
    ms.checkpoint.save(tmp_path / "run", loader)
    (tmp_path / "b.json").write_text(json.dumps({"trainer": {"loader": loader.state_dict()}}))
    torch.save(
        {"trainer": {"loader": loader.state_dict()}, "weights": torch.ones(2)}, tmp_path / "b.pt"
    )
    yield tmp_path
    sys.modules.pop("cli_pipes", None)


AccelerateIterator = Callable[..., tuple[int, str, str]]


@pytest.fixture
def told_by(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> AccelerateIterator:
    """Exit status, output and errors of a command."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        ended = status(*arguments, monkeypatch=monkeypatch)
        said = capsys.readouterr()
        return ended, said.out, said.err

    return call


@pytest.mark.parametrize("path", ["run", "run/epoch-000000-batch-000000000035", "b.json", "b.pt"])
def test_inspect_reads_every_kind_of_checkpoint(
    path: str, place: Path, told_by: AccelerateIterator
) -> None:
    ended, out, _ = told_by("inspect", path)
    assert ended == 0
    assert f"{path}: epoch 0, 35 batches of it over all ranks, 35 steps; 280 samples in all" in out
    for words in (
        "web         198",
        "48 lanes: 0 to 1 batches each",
        "batch(batch_size=8)",
        '"web": 7',
        "not_third",
    ):
        assert words in out
    found = json.loads(told_by("inspect", path, "--json")[1])
    assert (found["batches"], found["progress"]["samples"], len(found["lanes"])) == (35, 280, 48)
    assert "0034" in told_by("inspect", path, "--lanes")[1]


def test_diff_tells_how_far_a_run_came(place: Path, told_by: AccelerateIterator) -> None:
    ended, out, _ = told_by("diff", "a.json", "run")
    assert ended == 1
    assert re.search(r"batches +20 +35 +\+15", out)
    assert re.search(r"samples +160 +280 +\+120", out)
    assert "pipeline" not in out
    found = json.loads(told_by("diff", "a.json", "b.pt", "--json")[1])
    assert found["position"]["batches"] == [20, 35]
    assert told_by("diff", "b.pt", "b.json") == (0, "SAME: both checkpoints say the same.\n", "")


def test_diff_tells_how_pipelines_differ(place: Path, told_by: AccelerateIterator) -> None:
    loader = ms.DataLoader(importlib.import_module("cli_pipes").other(), rank=0, world_size=1)
    (place / "o.json").write_text(json.dumps(loader.state_dict()))
    ended, out, _ = told_by("diff", "a.json", "o.json")
    assert ended == 1
    assert "pipeline: shuffle 'web': seed 1 → 2" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda loader: loader.exclude([("web", 0, 399), ("code", 0, 2)]),
            "excluded samples: only in the second: code[2], web[399]",
        ),
        (
            lambda loader: loader.set_weights("interleave", {"web": 1, "code": 2}),
            "changed weights of 'interleave': first none; second"
            ' {"code":2,"web":1} after step 20 of epoch 0 (set_weights)',
        ),
    ],
    ids=["excluded", "weights"],
)
def test_diff_names_what_was_changed(
    change: Callable[[ms.DataLoader], None], words: str, place: Path, told_by: AccelerateIterator
) -> None:
    loader = ms.DataLoader(importlib.import_module("cli_pipes").make(), rank=0, world_size=1)
    loader.load_state_dict(json.loads((place / "a.json").read_text()))
    change(loader)
    (place / "changed.json").write_text(json.dumps(loader.state_dict()))
    ended, out, _ = told_by("diff", "a.json", "changed.json")
    assert ended == 1
    assert words in " ".join(out.split())
    found = json.loads(told_by("diff", "changed.json", "a.json", "--json")[1])
    assert not found["same"]
    assert len(found["changes"]) == 1
    assert (found["pipeline"], found["position"], found["lanes"]) == ([], {}, [])
    assert told_by("diff", "changed.json", "changed.json")[0] == 0


def test_diff_names_an_epoch_that_was_begun_with_another_batch_size(
    place: Path, told_by: AccelerateIterator
) -> None:
    states = []
    for steps in (2, 3):
        loader = ms.DataLoader(ms.from_dataset(range(96), name="n"), batch_size=4)
        for _, _ in zip(range(steps), iter(loader)):
            pass
        other = ms.DataLoader(ms.from_dataset(range(96), name="n"), batch_size=8)
        other.load_state_dict(loader.state_dict())
        states.append(other.state_dict())
    states[1] = {**states[0], "rest": states[1]["rest"]}
    for name, state in zip(("one.json", "other.json"), states):
        (place / name).write_text(json.dumps(state))
    ended, out, _ = told_by("diff", "one.json", "other.json")
    assert ended == 1
    assert " ".join(out.split()) == (
        "epoch resumed with another batch size or mix: first 8 rows skipped below the batches;"
        " second 12 rows skipped below the batches"
    )


def test_trace_names_the_rows_that_come(place: Path, told_by: AccelerateIterator) -> None:
    loader = ms.DataLoader(importlib.import_module("cli_pipes").make(), rank=0, world_size=1)
    loader.load_state_dict(json.loads((place / "a.json").read_text()))
    batches, expected = iter(loader), []
    for _ in range(3):
        next(batches)
        expected.append([list(origin) for origin in loader.trace()])
    ended, out, _ = told_by("trace", "cli_pipes:make", "a.json", "--steps", "3", "--json")
    assert ended == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["origins"] for line in lines] == expected
    assert [(line["epoch"], line["batch"]) for line in lines] == [(0, 21), (0, 22), (0, 23)]
    assert (
        "epoch 0  batch     36  " in told_by("trace", "cli_pipes.py:make", "run", "--steps", "1")[1]
    )


def test_trace_goes_on_over_epochs_and_errors(place: Path, told_by: AccelerateIterator) -> None:
    loader = ms.DataLoader(importlib.import_module("cli_pipes").fails(), rank=0, world_size=1)
    (place / "f.json").write_text(json.dumps(loader.state_dict()))
    ended, out, _ = told_by("trace", "cli_pipes:fails", "f.json", "--steps", "14")
    assert ended == 0
    assert "ZeroDivisionError: integer division or modulo by zero at data[5]" in out
    assert "epoch 1  batch      1  " in out


def damaged(place: Path) -> dict[str, str]:
    """Checkpoints that cannot be read: file and what is said of it."""
    state = json.loads((place / "a.json").read_text())
    lane = state["lanes"]["0003"]
    (place / "lane.json").write_text(
        json.dumps({**state, "lanes": {**state["lanes"], "0003": lane.replace("1", "2", 1)}})
    )
    (place / "spec.json").write_text(
        json.dumps({**state, "spec": state["spec"].replace("batch", "patch", 1)})
    )
    (place / "format.json").write_text(json.dumps({**state, "midstream": 99}))
    (place / "key.json").write_text(
        json.dumps({key: value for key, value in state.items() if key != "epoch"})
    )
    (place / "kind.json").write_text(json.dumps({**state, "batches": "many"}))
    (place / "cut.json").write_text(json.dumps(state)[:-20])
    (place / "none.json").write_text("{}")
    (place / "list.json").write_text("[1, 2]")
    (place / "two.json").write_text(json.dumps({"train": state, "test": state}))
    (place / "twice.json").write_text(json.dumps([state, state]))
    (place / "bytes.pt").write_bytes(b"\x00\x01\x02 no file of torch")
    (place / "empty.pt").write_bytes(b"")
    torch.save({"function": damaged}, place / "code.pt")
    (place / "nothing").mkdir()
    return {
        "lane.json": "lane 0003",
        "spec.json": "its spec has the fingerprint",
        "format.json": "format 99",
        "key.json": "'epoch' is missing",
        "kind.json": "'batches' is a int",
        "cut.json": "begins like JSON, but is not valid JSON",
        "none.json": "holds no midstream state",
        "list.json": "holds no midstream state",
        "two.json": "choose one with --key: train, test",
        "twice.json": "in two of the states",
        "bytes.pt": "weights_only",
        "empty.pt": "neither JSON nor a file of torch.save",
        "code.pt": "weights_only",
        "nothing": "no committed checkpoint",
        "missing": "cannot be read",
    }


def test_what_cannot_be_read_is_told_in_words(place: Path, told_by: AccelerateIterator) -> None:
    for file, words in damaged(place).items():
        for command in (
            ("inspect", file),
            ("diff", "a.json", file),
            ("trace", "cli_pipes:make", file),
        ):
            ended, out, err = told_by(*command)
            assert (ended, out) == (2, ""), f"{command}: {out}{err}"
            assert words in err, f"{command}: {err}"
            assert err.startswith("CheckpointError: ")
            assert "Traceback" not in err
    assert told_by("inspect", "two.json", "--key", "test")[0] == 0
    assert "has no 'train.loader'" in told_by("inspect", "two.json", "--key", "train.loader")[2]


def test_trace_of_another_pipeline_shows_the_difference(
    place: Path, told_by: AccelerateIterator
) -> None:
    ended, _, err = told_by("trace", "cli_pipes:other", "a.json")
    assert ended == 2
    assert "shuffle 'web': seed 1 → 2" in err


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cli_pipes", "give module:function"),
        ("cli_pipes:nothing", "it has not_third, make, other"),
        ("no_such_module:make", "No module named"),
        ("no_such_file.py:make", "there is no file"),
        ("cli_pipes:number", "found int"),
    ],
)
def test_verify_of_what_is_not_there(
    target: str, words: str, place: Path, told_by: AccelerateIterator
) -> None:
    ended, _, err = told_by("verify", target)
    assert ended == 2
    assert words in err


def test_verify_finds_what_is_exact_and_what_is_not(
    place: Path, told_by: AccelerateIterator
) -> None:
    quick = ("--no-kill", "--workers", "0", "--steps", "24")
    ended, out, _ = told_by("verify", "cli_pipes:make", *quick)
    assert ended == 0, out
    assert out.startswith("EXACT: make (midstream), 24 batches")
    ended, out, _ = told_by("verify", "cli_pipes.py:broken", *quick)
    assert ended == 1
    assert "DIFFERS" in out
    assert "repeated" in out
    ended, out, _ = told_by("verify", "cli_pipes:broken", *quick, "--json")
    assert ended == 1
    assert json.loads(out)["exact"] is False
    ended, _, err = told_by("verify", "cli_pipes:make", "--workers", "two")
    assert ended == 2
    assert "--workers takes integers" in err


@pytest.mark.parametrize("command", ["verify", "inspect", "diff", "trace"])
def test_every_command_explains_its_exit_status(
    command: str, told_by: AccelerateIterator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ended, out, _ = told_by(command, "--help")
    assert ended == 0
    assert "Exit status: 0" in out
    assert "--json" in re.sub(r"\x1b\[[0-9;]*m", "", out)
