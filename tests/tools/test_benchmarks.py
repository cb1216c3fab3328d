"""The benchmarks: every question still runs, with midstream and torch alone and on little data;
their tables are made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NEEDS_MORE = {"W7"}  # an S3 endpoint, which is in the extra "bench"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The modules, and a cache with the data of all questions."""
    sys.path.insert(0, str(BENCHMARKS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    import measure
    import questions
    import run

    class Modules:
        pass

    modules = Modules()
    modules.measure, modules.questions, modules.run = measure, questions, run
    modules.cache = tmp_path_factory.mktemp("benchmarks")
    yield modules
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCHMARKS))


def failures(value):
    if isinstance(value, dict):
        found = [value["failed"]] if "failed" in value else []
        return found + [bad for inner in value.values() for bad in failures(inner)]
    return []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.parametrize("name", ["W1", "W2", "W3", "W4", "W5", "W6", "W8", "M"])
def test_every_question_is_answered_by_midstream_and_torch(bench, name):
    question = bench.questions.load(name)
    everybody = bench.run.chosen(question, ["midstream", "torch-map"])
    assert "midstream" in [one.name for one in everybody]
    assert not bench.run.get_ready(question, everybody, bench.cache, "tiny", [])
    options = bench.measure.Options(bench.cache, "tiny", seconds=0.05, patience=2.0)
    rows = []
    for one in everybody:
        result = json.loads(json.dumps(bench.measure.run(name, one.name, options)))
        assert not failures(result)
        rows.append({"contestant": one.name, "round": 0, "result": result})
    text = question.report(rows)
    assert "**midstream**" in text
    if name == "W4":
        assert "NOT exact" not in text and text.count("| exact") >= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.parametrize(("kind", "data"), [("shuffled", "tokens"), ("mix", "mix")])
def test_every_stage_can_be_measured(bench, kind, data):
    import stages
    from interface import Work

    folders = stages.folders_of(bench.cache / "stages", "tiny", data)
    found = stages.stages(Work(kind, folders, "flat"), 1024)
    assert set(found) >= {"source", "shuffle", "batch", "reader", "loader", "limit"}
    assert all(measure() > 0 for measure in found.values())


@pytest.mark.processes
def test_the_one_command_records_what_fails_and_goes_on(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench.run, "measure", lambda question, one, *rest: {"failed": "told to fail", "took": 0.0}
    )
    monkeypatch.setattr(bench.run, "get_ready", lambda *rest: {})
    bench.run.main(
        [
            "--only",
            "W1,W4",
            "--tiny",
            "--no-plots",
            "--cache",
            str(tmp_path),
            "--contestants",
            "midstream,torch-map",
        ]
    )
    results = tmp_path / "results-tiny"
    for name in ("W1", "W4"):
        recorded = json.loads((results / f"{name}.json").read_text())
        assert [row["failed"] for row in recorded["rows"]] == ["told to fail"] * 2
    text = (results / "report.md").read_text()
    assert text.count("told to fail") >= 2 and "midstream" in text


@pytest.mark.processes
def test_all_contestants_say_what_was_set(bench):
    from contestants import everyone

    for name, one in everyone().items():
        assert one.name == name and one.settings and one.kinds
    assert set(bench.questions.MODULES) > NEEDS_MORE
