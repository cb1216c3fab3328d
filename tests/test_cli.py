"""The command line: what it prints, and its exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import midstream as ms
from midstream import cli
from midstream.demo import Step, Verdict


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
    for word in ("SIGKILL", "0 exact, 1 not exact, 2 it could not run", "--steps", "--workers", "--resume-workers"):
        assert word in text
    for word in ("--seed", "--kill-at", "--every", "--keep", "--json"):
        assert word in text


@pytest.mark.parametrize("arguments", [("nonsense",), ("demo", "--steps", "0"), ("demo", "--wrong")])
def test_wrong_arguments_exit_with_2(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_importing_the_command_line_imports_neither_the_extra_nor_torch() -> None:
    code = (
        "import sys, types; sys.modules['midstream'] = types.ModuleType('midstream'); "
        "sys.modules['midstream'].__path__ = [sys.argv[1]]; import midstream.cli; "
        "assert not {'typer', 'rich', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, ms.__path__[0]], check=True, timeout=60)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the demonstration tells, in place of a real one; an exception is raised."""
    script: list[Any] = []

    def run(**options: Any) -> Iterator[Any]:
        for item in script:
            if isinstance(item, Exception):
                raise item
            yield item

    monkeypatch.setattr("midstream.demo.run", run)
    return script


WRONG = Verdict(False, 60, 960, 3, ["step 22 of the resumed run: sample 4 differs: expected code[7], found code[9]"])


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
    assert cli._show_demo(False, steps=100) is False
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
    assert capsys.readouterr().err == "The demonstration could not run: the killed run ended with status 1\n"


def test_numbers_that_make_no_demonstration_exit_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("demo", "--steps", "60", "--kill-at", "10", monkeypatch=monkeypatch) == 2
    assert "after the first checkpoint (step 20)" in capsys.readouterr().err
