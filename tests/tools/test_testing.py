"""check_resume and check_dataset: what is wrong is found and named, what is right passes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator as Iter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

import midstream as ms
from midstream.dataset import Dataset
from midstream.pipeline.cursor import iterate
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node
from midstream.pipeline.rows import Rows
from midstream.testing import (
    Check,
    LawError,
    ResumeError,
    ResumeReport,
    check_dataset,
    check_resume,
    content,
    laws,
    report,
)
from midstream.testing.drivers import Item, Topology

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(ms.__file__).parent.parent)}
HERE: dict[str, Any] = {"workers": (0,), "ranks": (1,), "kill": False, "seconds": None}


# -- a node that is wrong in a way of choice -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Faulty(Node):
    """Passes samples on, and has one fault."""

    source: Node
    fault: str
    kind = "faulty"

    @property
    def random_access(self) -> bool:
        return False

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return FaultyIterator(self.fault, iterate(bound.input, lane, key, pass_))


class FaultyIterator(Iterator):
    def __init__(self, fault: str, source: Iterator) -> None:
        self.fault, self.source = fault, source
        self.before = source.snapshot()
        self.seen: list[int] = []
        self.held: list[Any] = []

    def _next(self) -> Any:
        if self.fault == "swaps in workers" and get_worker_info() is not None:
            if not self.held:
                self.held = [next(self.source)]
                try:
                    self.held.insert(0, next(self.source))
                except StopIteration:
                    pass
            return self.held.pop(0)
        self.before = self.source.snapshot()
        sample, origins = next(self.source)
        self.seen.append(len(self.seen))
        if self.fault == "another origin":
            origins = (origins[0], origins[1], 0, *origins[3:])
        return sample, origins

    def _state(self) -> Any:
        state: dict[str, Any] = {
            "source": self.before if self.fault == "repeats" else self.source.snapshot()
        }
        if self.fault == "no plain state":
            state["count"] = np.int64(len(self.seen))
        if self.fault == "grows":
            state["seen"] = self.seen
        if self.fault == "data in the state":
            state["data"] = "x" * 5000
        return state

    def _load(self, state: Any) -> None:
        self.source.load(state["source"])
        self.seen = list(state.get("seen", []))
        if self.fault == "loses":
            next(self.source, None)


def faulty(fault: str, rows: int = 40) -> Dataset:
    return Dataset(Faulty(ms.from_dataset(range(rows)).node, fault))


def right() -> Dataset:
    return (
        ms.from_dataset(range(120))
        .shuffle(seed=1)
        .filter(not_third)
        .shuffle(seed=2, buffer_size=24)
    )


def not_third(row: int) -> bool:
    return row % 3 != 0


def wrong(found: ResumeReport, name: str) -> Check:
    return next(check for check in found.checks if check.name == name and not check.passed)


# -- pipelines of ours ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_right_pipeline_passes_everywhere() -> None:
    found = check_resume(right, seconds=12, steps=60, raises=False)
    assert found.exact, str(found)
    assert found.epochs == 2
    assert {check.outcome for check in found.checks} <= {"exact", "once"}
    killed = [check for check in found.checks if check.name.startswith("killed")]
    assert [check.saved for check in killed] == ["2×2", "1×2"]
    assert found.samples == 160
    assert found.replayed_rows is not None
    assert 0 < found.state_bytes < 48 * 400
    pairs = {
        (check.saved, check.resumed)
        for check in found.checks
        if check.resumed and "→" not in check.resumed
    }
    assert len(pairs) == 16


@pytest.mark.slow
def test_random_access_keeps_its_order_on_any_number_of_ranks() -> None:
    pipeline = ms.from_dataset(range(83)).shuffle(seed=1).batch(4)
    found = check_resume(pipeline, workers=(0,), ranks=(1, 2, 3, 4), kill=False, seconds=None)
    assert {check.outcome for check in found.checks} == {"exact"}
    assert found.batches == 42
    assert all(check.cuts == check.of for check in found.checks)


@pytest.mark.slow
def test_streams_on_uneven_ranks_are_exactly_once() -> None:
    found = check_resume(right, workers=(0,), ranks=(1, 5), kill=False, seconds=None)
    assert wrong_or_none(found) is None
    assert "once" in {check.outcome for check in found.checks}


def wrong_or_none(found: ResumeReport) -> Check | None:
    return found.first


def test_batches_that_are_dropped_for_the_ranks_are_no_difference() -> None:
    def make(rank: int, world_size: int) -> ms.DataLoader:
        data = ms.from_dataset(range(27)).shuffle(seed=1)
        return ms.DataLoader(
            data, batch_size=2, rank=rank, world_size=world_size
        )  # 14 batches on 3 ranks

    assert check_resume(make, workers=(0,), ranks=(1, 3), kill=False, seconds=None).exact


def test_a_pipeline_that_goes_on_after_what_is_read_passes_on_ranks_whose_stops_do_not_meet_its_end() -> (
    None
):
    few = ms.from_dataset(range(60), name="few").filter(lambda x: x % 3 == 0)
    found = check_resume(
        ms.concatenate([few, ms.from_dataset(range(200), name="many")]), **{**HERE, "ranks": (2,)}
    )
    assert found.exact and not found.epochs, str(found)


def test_errors_are_met_once() -> None:
    def fails(row: int) -> int:
        if row in (7, 8, 31):
            raise ValueError(row)
        return row

    pipeline = ms.from_dataset(range(40)).map(fails)
    found = check_resume(pipeline, workers=(0,), ranks=(1, 2), kill=False, seconds=None)
    assert found.exact, str(found)
    assert found.samples == 74


@pytest.mark.parametrize(
    ("fault", "lost", "repeated"),
    [("loses", ["data[12]"], []), ("repeats", [], ["data[3]"])],
    ids=["loses", "repeats"],
)
def test_a_sample_that_is_lost_or_repeated_is_named(
    fault: str, lost: list[str], repeated: list[str]
) -> None:
    with pytest.raises(ResumeError) as raised:
        check_resume(faulty(fault), epochs=1, **HERE)
    found = raised.value.report
    check = wrong(found, "stopped at every batch")
    assert check.difference is not None
    assert (check.difference.lost, check.difference.repeated) == (lost, repeated)
    assert check.difference.place.startswith("after step 1, batch ")
    assert (lost + repeated)[0] in str(raised.value)
    assert not found.exact
    assert found.first is check


def test_a_parameter_says_how_many_are_lost_over_a_chain() -> None:
    found = check_resume(faulty("loses"), epochs=1, raises=False, **HERE)
    check = wrong(found, "stopped again and again")
    assert check.most_lost > 1


@pytest.mark.slow
def test_an_order_that_depends_on_workers_is_found() -> None:
    found = check_resume(
        faulty("swaps in workers", 240), epochs=1, ranks=(1,), kill=False, seconds=10, raises=False
    )
    check = wrong(found, "the same order for all")
    assert check.difference is not None
    assert (check.difference.num_lost, check.difference.num_repeated) == (0, 0)
    assert "data[1]" in check.difference.found
    assert not wrong(found, "on other workers").passed
    assert next(
        c for c in found.checks if c.name == "stopped at every batch" and c.saved == "1×0"
    ).passed


def test_a_loader_that_ignores_the_state_is_found() -> None:
    class Ignores(ms.DataLoader):
        def load_state_dict(self, state: Any, strict: bool = True) -> None:
            pass

    found = check_resume(
        lambda: Ignores(ms.from_dataset(range(40)), batch_size=4, rank=0, world_size=1),
        raises=False,
        **HERE,
    )
    check = wrong(found, "stopped at every batch")
    assert check.difference is not None
    assert check.difference.repeated[0].startswith("data[")
    assert check.wrong > 15


def test_a_state_that_comes_back_as_another_is_found() -> None:
    class Forgets(ms.DataLoader):
        def state_dict(self) -> dict[str, Any]:
            state = super().state_dict()
            return {**state, "steps_done": 0} if self.run.loaded is not None else state

    found = check_resume(
        lambda: Forgets(ms.from_dataset(range(40)), batch_size=4, rank=0, world_size=1),
        raises=False,
        **HERE,
    )
    assert "the state is another" in wrong(found, "stopped again and again").text


def test_draws_that_nobody_seeded_are_found() -> None:
    found = check_resume(
        ms.from_dataset(range(40)).map(lambda row: random.random()), raises=False, **HERE
    )
    check = wrong(found, "saving changes nothing")
    assert check.difference is not None
    assert "data[0]" in check.difference.expected
    assert "hash" in check.difference.expected
    assert check.difference.num_lost == 0
    assert "unseeded" in check.text


def test_a_state_that_is_not_json_is_found() -> None:
    class Tuples(ms.DataLoader):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "more": (1, 2)}

    found = check_resume(
        lambda: Tuples(ms.from_dataset(range(40)), batch_size=4, rank=0, world_size=1),
        raises=False,
        **HERE,
    )
    assert "not plain JSON" in wrong(found, "saving changes nothing").text


@pytest.mark.slow
def test_what_cannot_run_in_another_process_says_how_to_go_on() -> None:
    never = (row for row in ())
    found = check_resume(
        lambda: (never, right())[1], workers=(0,), ranks=(1,), seconds=5, steps=8, raises=False
    )
    check = wrong(found, "killed twice by SIGKILL")
    assert "kill=False" in check.text


# -- loaders of others ---------------------------------------------------------------------------------------------------


class Foreign:
    """A loader of someone else: right, or with a fault."""

    def __init__(self, fault: str = "", rows: int = 20) -> None:
        self.fault, self.rows, self.bound = fault, rows, 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.bound}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.fault == "ignores":
            return
        self.bound = state["at"] + {"loses": 1, "repeats": -1}.get(self.fault, 0) * (
            0 < state["at"] < self.rows
        )

    def __iter__(self) -> Iter[dict[str, Any]]:
        if self.bound >= self.rows:
            self.bound = 0
        while self.bound < self.rows:
            self.bound += 1
            yield {"id": torch.tensor([2 * self.bound, 2 * self.bound + 1])}


def test_a_right_foreign_loader_passes_whichever_way_its_epochs_end() -> None:
    found = check_resume(Foreign, epochs=3, steps=100, **HERE)
    assert found.exact
    assert found.kind.endswith("Foreign")
    assert (found.batches, found.samples, found.epochs) == (60, 120, 3)
    assert found.replayed_rows is None


@pytest.mark.parametrize(
    ("fault", "lost", "repeated"),
    [("loses", ["{'id': 4}", "{'id': 5}"], []), ("repeats", [], ["{'id': 2}", "{'id': 3}"])],
    ids=["loses", "repeats"],
)
def test_a_foreign_loader_is_known_by_content(
    fault: str, lost: list[str], repeated: list[str]
) -> None:
    found = check_resume(lambda: Foreign(fault), epochs=1, raises=False, **HERE)
    check = wrong(found, "stopped at every batch")
    assert check.difference is not None
    assert (check.difference.lost, check.difference.repeated) == (lost, repeated)


def test_samples_are_named_by_a_key() -> None:
    found = check_resume(
        lambda: Foreign("loses"),
        epochs=1,
        raises=False,
        key=lambda s: f"row {int(s['id'])}",
        **HERE,
    )
    difference = wrong(found, "stopped at every batch").difference
    assert difference is not None
    assert difference.lost == ["row 4", "row 5"]


def test_what_never_comes_is_noticed_where_one_says_what_should() -> None:
    expected = [{"id": row} for row in range(2, 43)]
    found = check_resume(lambda: Foreign(), epochs=1, expected=expected, raises=False, **HERE)
    difference = wrong(found, "an epoch has every sample once").difference
    assert difference is not None
    assert (difference.lost, difference.repeated) == (["{'id': 42}"], [])
    assert check_resume(lambda: Foreign(), epochs=1, expected=expected[:-1], **HERE).exact


class GetState:
    """An iterator as Grain has them."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.bound = fault, 0

    def get_state(self) -> dict[str, int]:
        return {"at": self.bound}

    def set_state(self, state: dict[str, int]) -> None:
        self.bound = state["at"]

    def __iter__(self) -> GetState:
        return self

    def __next__(self) -> int:
        if self.bound == 20:
            raise StopIteration
        self.bound += 1
        if self.bound == 7 and self.fault == "met again":
            self.bound -= 1
            raise ValueError("a bad row")
        return self.bound


def test_iterators_with_get_state_are_followed() -> None:
    assert check_resume(GetState, **HERE).exact


def test_an_error_that_comes_for_ever_ends_the_reading_and_is_told() -> None:
    found = check_resume(lambda: GetState("met again"), raises=False, **HERE)
    assert any("raised for ever" in note and "a bad row" in note for note in found.notes)
    assert found.samples == 6


def stateful(num_workers: int) -> StatefulDataLoader:
    return StatefulDataLoader(list(range(48)), batch_size=4, num_workers=num_workers)


@pytest.mark.slow
def test_another_number_of_workers_is_shown_and_does_not_count() -> None:
    found = check_resume(stateful, epochs=1, seconds=6, raises=False)
    assert found.exact, str(found)
    others = [check for check in found.checks if check.name == "on other workers"]
    assert [(check.saved, check.resumed) for check in others] == [("1×0", "1×2"), ("1×2", "1×0")]
    assert all(not check.required and check.outcome == "refused" for check in others)
    assert "AssertionError" in others[0].text
    assert "[not promised]" in str(found)
    assert [check.outcome for check in found.checks if check.name.startswith("killed")] == [
        "exact",
        "exact",
    ]


# -- arguments and report ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Foreign(), "Give a function"),
        (7, "found int"),
        (lambda: object(), "neither state_dict and load_state_dict nor get_state"),
    ],
    ids=["a loader", "a number", "makes no loader"],
)
def test_what_cannot_be_checked_says_why(target: Any, message: str) -> None:
    with pytest.raises((TypeError, ResumeError), match=message):
        check_resume(target, **HERE)


@pytest.mark.parametrize(
    "options", [{"workers": (-1,)}, {"ranks": (0,)}, {"ranks": ()}, {"steps": 0}, {"epochs": 0}]
)
def test_wrong_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least"):
        check_resume(right, **{**HERE, **options})


def test_an_empty_pipeline_is_no_proof() -> None:
    with pytest.raises((ValueError, ResumeError), match=r"nothing to check|no batches"):
        check_resume(ms.from_dataset(range(10)).filter(lambda row: False), **HERE)


@pytest.mark.slow
def test_sync_end_is_refused_with_the_way_out() -> None:
    def make(rank: int, world_size: int) -> ms.DataLoader:
        return ms.DataLoader(right(), batch_size=4, rank=rank, world_size=world_size, sync_end=True)

    found = check_resume(make, workers=(0,), ranks=(1, 2), kill=False, raises=False)
    assert "leave it out here" in next(check.text for check in found.checks if not check.passed)


def test_less_time_means_fewer_cuts_and_the_report_says_so() -> None:
    found = check_resume(right, workers=(0,), ranks=(1,), kill=False, seconds=1e-6)
    check = next(check for check in found.checks if check.name == "stopped at every batch")
    assert check.cuts < check.of


def test_a_report_is_plain_values_a_table_and_picklable() -> None:
    import pickle

    found = check_resume(faulty("loses"), epochs=1, raises=False, **HERE)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["exact"] is False
    assert told["checks"][1]["difference"]["lost"] == ["data[12]"]
    text = str(found)
    assert text.startswith("NOT EXACT: ")
    assert "stopped at every batch" in text
    assert str(pickle.loads(pickle.dumps(ResumeError(found)))) == text
    from rich.console import Console

    with (console := Console(width=100, highlight=False)).capture() as captured:
        console.print(found)
    assert "data[12]" in captured.get()


def test_the_end_of_an_epoch_that_was_not_seen_is_told() -> None:
    found = check_resume(ms.from_dataset(range(1000)), steps=5, **HERE)
    assert any("no epoch ended" in note for note in found.notes)
    assert found.epochs == 0


def items(*batches: str, epoch: int = 0) -> list[Item]:
    return [Item(epoch, text, tuple(text)) for text in batches]


@pytest.mark.parametrize(
    ("expected", "found", "ordered", "outcome"),
    [
        (items("ab", "cd"), items("ab", "cd"), None, "exact"),
        (items("ab", "cd"), items("cd", "ab"), None, "differs"),
        (items("ab", "cd"), items("cd", "ab"), {0: 0}, "once"),
        (items("ab", "cd"), items("cd", "ab"), {0: 1}, "differs"),
        (items("ab", "cd"), items("ab"), None, "differs"),
        (items("ab"), items("ab", "cd"), None, "differs"),
        (items("ab", "cd"), items("ab", "ab"), {0: 0}, "differs"),
        (
            items("ab") + items("cd", epoch=1),
            items("cd") + items("ab", epoch=1),
            {0: 0, 1: 0},
            "differs",
        ),
    ],
)
def test_comparing(
    expected: list[Item], found: list[Item], ordered: dict[int, int] | None, outcome: str
) -> None:
    assert report.compare((), expected, found, "here", finished=True, ordered=ordered)[0] == outcome


def test_missing_batches_are_only_excused_where_ranks_drop_them() -> None:
    expected, found = items("ab", "cd", "ef"), items("ab", "cd")
    assert report.compare((), expected, found, "here", finished=True, slack=1)[0] == "exact"
    assert report.compare((), expected, found, "here", finished=True)[0] == "differs"
    assert report.compare((), expected, items("ab"), "here", finished=True, slack=1)[0] == "differs"


def test_ranks_are_compared_each_by_itself() -> None:
    one = [Item(0, "a", ("a",), rank=0), Item(0, "b", ("b",), rank=1)]
    assert report.compare((), one, one[::-1], "here", finished=True, by_rank=True)[0] == "exact"
    swapped = [item._replace(rank=1 - item.rank) for item in one]
    assert report.compare((), one, swapped, "here", finished=True, by_rank=True)[0] == "differs"


def test_topologies_in_words() -> None:
    assert (str(Topology(2, 1)), Topology(2, 1).words()) == ("2×1", "2 ranks with 1 worker each")


# -- content -------------------------------------------------------------------------------------------------------------


def different() -> list[Any]:
    return [
        1,
        1.0,
        True,
        "1",
        None,
        [1],
        [[1]],
        [1, 2],
        {"a": 1},
        {"a": 2},
        torch.tensor([1]),
        torch.tensor([1.0]),
        torch.tensor([[1]]),
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([], dtype=torch.int64),
        np.array([1]),
        np.array([1], dtype=np.int32),
        torch.tensor(float("nan")),
        b"1",
    ]


def test_a_digest_is_of_the_content() -> None:
    digests = [content.digest(value) for value in different()]
    assert len(set(digests)) == len(digests)
    assert [content.digest(value) for value in different()] == digests
    assert content.digest((1, 2)) == content.digest([1, 2])
    assert content.digest(torch.zeros(2, 3).t()) == content.digest(torch.zeros(3, 2))
    assert content.digest(torch.ones(2, dtype=torch.bfloat16)) != content.digest(
        torch.ones(2, dtype=torch.float16)
    )


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        (torch.tensor([3, 4]), ["3", "4"]),
        (
            {"id": torch.tensor([3, 4]), "text": ["a", "b"]},
            ["{'id': 3, 'text': 'a'}", "{'id': 4, 'text': 'b'}"],
        ),
        ([torch.tensor([3, 4]), torch.tensor([5, 6])], ["[3, 5]", "[4, 6]"]),
        (["x", "y"], ["'x'", "'y'"]),
        (7, ["7"]),
        ({"id": torch.tensor([3, 4]), "width": 2}, ["{'id': 3}", "{'id': 4}"]),
    ],
)
def test_samples_of_a_batch_are_named(batch: Any, names: list[str]) -> None:
    assert content.name_samples(batch) == names


def test_large_samples_have_short_names_that_differ() -> None:
    names = content.name_samples(torch.arange(2 * 3000).reshape(2, 3000))
    assert names[0] != names[1]
    assert max(map(len, names)) < 60


# -- laws ----------------------------------------------------------------------------------------------------------------


def test_a_right_dataset_breaks_no_law() -> None:
    assert check_dataset(right()) == []
    assert check_dataset(lambda: ms.from_dataset(range(30)).shuffle(seed=3), replay=0) == []


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("loses", "A run restored at any step continues identically."),
        ("repeats", "A state at and after the end yields nothing."),
        ("no plain state", "plain JSON"),
        ("grows", "Sixty resumes do not make the state grow."),
        ("data in the state", "A state is at most"),
        ("another origin", "No origin comes twice"),
    ],
)
def test_a_broken_law_is_named(fault: str, law: str) -> None:
    with pytest.raises(LawError) as raised:
        check_dataset(faulty(fault, 100))
    assert law in str(raised.value)
    assert "faulty" in str(raised.value)


def test_a_draw_from_a_global_generator_breaks_a_law() -> None:
    broken = check_dataset(
        ms.from_dataset(range(20)).map(lambda row: row + 0 * torch.rand(()).item()), raises=False
    )
    assert any("global generator of torch" in text for text in broken)


def test_rows_that_are_not_those_of_the_stream_break_a_law() -> None:
    @dataclass(frozen=True, eq=False, repr=False)
    class Chunky(Node):
        source: Node
        kind = "chunky"

        def _length(self) -> int | None:
            return self.source.length()

        def _rows(self, bound: Any, positions: Any, keys: Any, passes: Any) -> Any:
            rows = bound.input.rows(positions, keys, passes)
            return Rows(
                [(sample, i) for i, sample in enumerate(rows.samples)], rows.origins, rows.sizes
            )

    with pytest.raises(LawError, match="rows at"):
        laws.rows_are_the_stream(lambda: Dataset(Chunky(ms.from_dataset(range(30)).node)))


def test_more_rows_read_again_than_stated_break_a_law() -> None:
    pipeline = ms.from_dataset(range(200)).shuffle(seed=1, buffer_size=128)
    assert check_dataset(pipeline, replay=144) == []
    with pytest.raises(LawError, match="at most 8 source rows again"):
        check_dataset(pipeline, replay=8)


@pytest.mark.parametrize(
    "make",
    [lambda: ms.from_dataset(range(10)).repeat(), lambda: ms.from_dataset(range(1000))],
    ids=["endless", "large"],
)
def test_what_is_too_large_for_every_law_is_refused(make: Callable[[], Dataset]) -> None:
    with pytest.raises(ValueError, match="take"):
        check_dataset(make)


# -- the plugin ----------------------------------------------------------------------------------------------------------

TESTS = """
import midstream as ms

def not_third(row):
    return row % 3 != 0

def test_right(check_resume):
    assert check_resume(ms.from_dataset(range(200)).filter(not_third), steps=12, seconds=5).exact

def test_wrong(check_resume):
    def make():
        loader = ms.DataLoader(ms.from_dataset(range(40)), batch_size=4, rank=0, world_size=1)
        loader.load_state_dict = lambda state: None
        return loader
    check_resume(make)
"""


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["quick", "full"])
def test_the_plugin_checks_and_tells(full: bool, tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(TESTS)
    options = ["--midstream-resume", "-k", "right"] if full else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "pytest_midstream",
        "-p",
        "no:cacheprovider",
        *options,
        ".",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == (0 if full else 1), done.stdout + done.stderr
    assert "test_mine.py::test_right: EXACT" in done.stdout
    if full:
        assert "workers, ranks and kills" in done.stdout
    else:
        assert "test_mine.py::test_wrong: NOT EXACT" in done.stdout
        assert "quick; --midstream-resume does more" in done.stdout
        assert "repeated" in done.stdout


@pytest.mark.processes
def test_the_plugin_costs_other_peoples_tests_nothing() -> None:
    code = "import sys, pytest_midstream; assert not {'torch', 'midstream'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=60)
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'pytest_midstream = "pytest_midstream"' in declared


@pytest.mark.parametrize("stream", [False, True])
def test_an_epoch_that_ends_right_behind_what_is_read_is_no_fault(stream: bool) -> None:
    """Two steps after the last stop are of the next epoch already, and nothing is known of either."""
    data = (
        ms.from_dataset(range(26)).filter(lambda row: True)
        if stream
        else ms.from_dataset(range(26))
    )
    assert check_resume(data.batch(2), steps=12, workers=(0,), kill=False).exact
