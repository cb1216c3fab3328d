"""Bugs planted one by one in a copy of the package: each must turn a named test red, or that test
proves nothing.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from midstream.pipeline.cursor import iterate
from tests.helpers.nursery import nursery

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bug:
    """A change to one file, and the test that must notice.

    Attributes:
        file: Below src/midstream.
        old: Text that is there exactly once.
        new: What the bug puts in its place.
        test: File and -k expression.
    """

    file: str
    old: str
    new: str
    test: tuple[str, str]


BUGS = {
    "a live list in a state": Bug(
        "core.py",
        "        return copy_plain(self.snapshot())\n",
        "        return self.snapshot()\n",
        ("test_planted_bugs.py", "iterator_hands_out_fresh_values"),
    ),
    "the buffer of a shuffle is not replayed": Bug(
        "nodes/shuffle.py",
        'while self.seen < state["seen"]:',
        'self.seen = state["seen"]\n        while self.seen < state["seen"]:',
        ("test_contract.py", "restore_at_every_step and buffered"),
    ),
    "living workers are not told the epoch": Bug(
        "loader.py",
        "            runner.shared[0] = epoch.epoch\n",
        "            pass\n",
        ("test_loader.py", "three_epochs and True"),
    ),
    "read-ahead counts as delivered": Bug(
        "core.py",
        "        return [self.number, self.told, self.block]\n",
        "        return [self.first + len(self.items), self.told, self.block]\n",
        ("test_contract.py", "restore_at_every_step and shuffle"),
    ),
    "the end of an epoch is one batch late": Bug(
        "position.py",
        "self.turns is not None and passed >= self.turns",
        "self.turns is not None and self.passed >= self.turns",
        ("test_loader.py", "nobody_pulls_stop_iteration"),
    ),
    "two shuffles of one seed share their order": Bug(
        "core.py",
        "self.salt = salt(path)",
        "self.salt = 0",
        ("test_orders.py", "unrelated_orders or released"),
    ),
    "a replay counts twice": Bug(
        "failures.py",
        "        if self.marks.get(mark, _NEVER) >= [pass_, number]:\n",
        "        if False:\n",
        ("test_loader.py", "however_often_they_are_replayed"),
    ),
    "what is tracked counts again when it is read again": Bug(
        "nodes/track.py",
        "if values is not None and self.ledger.first_time(self.path, self.pass_, self.number):",
        "if values is not None:",
        ("test_track.py", "a_resume_reads_again"),
    ),
    "what a repeat tracks counts": Bug(
        "position.py",
        "(random_access and (padded or skipped))",
        "(random_access and skipped)",
        ("test_track.py", "only_fill_up"),
    ),
    "metrics are not taken back with what they are of": Bug(
        "metrics.py",
        "for at, each in added if start < at <= number]",
        "for at, each in added if start < at]",
        ("test_track.py", "any_of_the_last_steps"),
    ),
    "buckets of another width are taken for the same": Bug(
        "metrics.py",
        "            shift = self.level - part.level\n",
        "            shift = 0\n",
        ("test_track.py", "order_or_parts"),
    ),
    "each rank that loads has the metrics of all": Bug(
        "position.py",
        "if lane is not None and index in self.own]\n",
        "if lane is not None]\n",
        ("test_track.py", "counts_nothing_twice"),
    ),
    "a mark forgets its pass": Bug(
        "_paths.py",
        "return value[1] if value[0] == epoch else value",
        "return value[1]",
        ("test_checkpoint.py", "by_number"),
    ),
    "batches that a rank did ahead of the others are made again": Bug(
        "readers.py",
        "if number in self.ahead:",
        "if False:",
        ("test_topology.py", "any_chain_of_topologies and lossy"),
    ),
    "what was left over is not first in the next epoch": Bug(
        "position.py",
        '"" if lane["done"] else encode',
        '"" if True else encode',
        ("test_dcp.py", "sync_end_stops and 0"),
    ),
    "ranks at different steps go unnoticed": Bug(
        "checkpoint.py",
        "if not fits or not (later or",
        "if False and not (later or",
        ("test_topology.py", "saved_at_different_steps"),
    ),
    "another batch size deals the rest of a stream anew": Bug(
        "rest.py",
        'run.setdefault("dealt", size)',
        "pass",
        ("test_topology.py", "streams_stay_exactly_once"),
    ),
    "an error that was raised is met again": Bug(
        "position.py",
        "            told = {**told, number: told.get(number, 0) + 1}\n",
        "            pass\n",
        ("test_planted_bugs.py", "after_an_error_in_a_batch"),
    ),
    "parts of a row are forgotten": Bug(
        "nodes/flat_map.py",
        'return {"part": self.part, "source": self.before}',
        'return {"part": 0, "source": self.source.snapshot()}',
        ("test_contract.py", "restore_at_every_step and flat_map"),
    ),
    "the rest of a cut document is forgotten": Bug(
        "nodes/pack.py",
        "            self.start, self.offset, self.taken = self.source.before(), rest[1], 1\n",
        "            self.start, self.offset, self.taken = self.source.snapshot(), 0, 0\n",
        ("test_pack.py", "token_by_token or saved_at_every_pack and 0"),
    ),
    "documents that wait are forgotten": Bug(
        "nodes/pack.py",
        '"source": self.back if self.bits else self.start,\n            "waiting": f"{self.bits:x}",\n',
        '"source": self.start,\n            "waiting": "0",\n',
        ("test_contract.py", "restore_at_every_step and pack"),
    ),
    "what is read ahead has no bound": Bug(
        "sources/ahead.py",
        "        return self.num_bytes + self.waiting_bytes <= limit or not self.waiting\n",
        "        return True\n",
        ("test_parquet.py", "two_groups_more_than_the_cache"),
    ),
    "a row group that is being read is not waited for": Bug(
        "sources/ahead.py",
        "                while number in self.reading:\n                    self.changed.wait()\n",
        "",
        ("test_parquet.py", "waited_for_not_read_again"),
    ),
    "a restored input of a mix starts in its first pass": Bug(
        "nodes/interleave.py",
        "            child.source = self._open(self.names[index], child.number)\n            child.source.load(source)\n",
        "            child.source = self._open(self.names[index], 0)\n            child.source.load(source)\n",
        ("test_contract.py", "restore_at_every_step and interleave"),
    ),
    "the global generator is drawn from": Bug(
        "loader.py",
        "            generator=torch.Generator().manual_seed(runner.epoch),\n",
        "            generator=None,\n",
        ("test_loader.py", "draws_nothing_from_the_generator"),
    ),
    "a loaded state is followed in the next epoch too": Bug(
        "readers.py",
        "            if generation != self.generation:\n",
        "            if False:\n",
        ("test_planted_bugs.py", "second_epoch_after_a_load"),
    ),
    "an exhausted run starts over": Bug(
        "readers.py",
        '            self.rounds, self.done = state["rounds"], state["done"]\n',
        '            self.rounds, self.done = state["rounds"], False\n',
        ("test_planted_bugs.py", "drained_lane_stays_drained"),
    ),
    "a generator hides state in the reader": Bug(
        "readers.py",
        '            self.delivery.iterator.load(state["state"])\n',
        "            pass\n",
        ("test_loader.py", "cut_anywhere and other_workers and everything"),
    ),
}


# -- small laws of their own, for bugs that the large ones meet only by the way ------------------------------------------


def test_an_iterator_hands_out_fresh_values() -> None:
    import midstream as ms
    from midstream.pipeline.iterator import Lane
    from midstream.pipeline.ledger import Ledger
    from midstream.pipeline.node import bind

    ds = ms.from_dataset(range(40)).filter(bool).shuffle(1, buffer_size=8)
    iterator = iterate(bind(ds.node), Lane(0, 1, 1, Ledger()), 0, 0)
    next(iterator)
    state = iterator.state_dict()
    state["safe"][1].clear()
    assert iterator.state_dict()["safe"][1] != []


def test_a_checkpoint_after_an_error_in_a_batch_goes_on_with_the_rest_of_it() -> None:
    import midstream as ms

    def fails(row: int) -> int:
        if row in (5, 6):
            raise ValueError(row)
        return row

    def make(workers: int) -> ms.DataLoader:
        return ms.DataLoader(
            ms.from_dataset(range(12)).map(fails),
            batch_size=4,
            collate_fn=list,
            num_workers=workers,
        )

    made = make(0)
    iterator = iter(made)
    assert next(iterator) == [0, 1, 2, 3]
    with pytest.raises(ms.SampleError, match=r"data\[5\]"):
        next(iterator)
    state = made.state_dict()
    resumed = make(2)
    resumed.load_state_dict(state)
    rest = iter(resumed)
    with pytest.raises(ms.SampleError, match=r"data\[6\]"):
        next(rest)
    assert list(rest) == [[4, 7], [8, 9, 10, 11]]
    resumed.close()


def test_the_second_epoch_after_a_load_is_whole() -> None:
    import midstream as ms

    made = ms.DataLoader(
        ms.from_dataset(range(40)).shuffle(1), batch_size=4, num_workers=2, persistent_workers=True
    )
    iterator = iter(made)
    for _ in range(5):
        next(iterator)
    state = made.state_dict()
    made.load_state_dict(state)
    assert len(list(made)) == 5
    assert len(list(made)) == 10
    made.close()


def test_a_drained_lane_stays_drained() -> None:
    import midstream as ms

    ds = ms.from_dataset(range(30)).filter(
        lambda row: row < 6 or row // 2 % 3 != 0
    )  # lane 0 has one batch
    made = ms.DataLoader(ds, batch_size=2, lanes=3, collate_fn=list)
    whole = list(made)
    for cut in range(len(whole)):
        made = ms.DataLoader(ds, batch_size=2, lanes=3, collate_fn=list)
        iterator = iter(made)
        for _ in range(cut):
            next(iterator)
        resumed = ms.DataLoader(ds, batch_size=2, lanes=3, collate_fn=list)
        resumed.load_state_dict(made.state_dict())
        assert list(resumed) == whole[cut:]


# -- planting ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    for name in ("src", "tests"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, file: str, expression: str) -> tuple[int, str]:
    """Exit status and output of those tests, on the copy."""
    out = folder / "out"
    out.write_text("")
    modules = (
        "torch",
        "torchdata.stateful_dataloader",
        "datasets",
        "pyarrow.parquet",
        "hypothesis",
        "pytest",
    )
    options = shlex.split(
        "-m pytest -xq -p no:cacheprovider -o addopts= -W ignore::pytest.PytestAssertRewriteWarning"
    )
    command = [*options, f"tests/{file}", "-k", expression]
    imported = nursery(*modules, path=str(folder / "src"))
    (status,) = imported.run(command, [{}], out, timeout=400, out=str(out), cwd=str(folder))
    return status, out.read_text()


def test_the_copy_is_what_is_tested(copy: Path) -> None:
    (copy / "tests" / "test_where.py").write_text(
        "def test(): import midstream; assert not midstream.__file__"
    )
    status, printed = run(copy, "test_where.py", "test")
    assert status == 1 and str(copy / "src" / "midstream" / "__init__.py") in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_turns_its_test_red(name: str, copy: Path) -> None:
    bug = BUGS[name]
    path = copy / "src" / "midstream" / bug.file
    text = path.read_text()
    assert text.count(bug.old) == 1, f"{bug.file} has changed: plant the bug anew"
    path.write_text(text.replace(bug.old, bug.new))
    try:
        status, printed = run(copy, *bug.test)
    finally:
        path.write_text(text)
    assert status == 1, f"no test failed:\n{printed[-4000:]}"
    assert " failed" in printed
    assert "rror during collection" not in printed


@pytest.mark.slow
def test_without_a_bug_the_named_tests_are_green_there(copy: Path) -> None:
    """Some of them, to see that the copy alone turns nothing red: the suite itself runs all."""
    for file, expression in [
        BUGS[name].test
        for name in (
            "a live list in a state",
            "a replay counts twice",
            "documents that wait are forgotten",
        )
    ]:
        status, printed = run(copy, file, expression)
        assert status == 0, printed[-3000:]
