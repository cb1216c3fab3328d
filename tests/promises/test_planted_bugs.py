"""Bugs planted one by one in a copy of the package: each must turn a named test red, or that test
proves nothing.
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import midstream as ms
from midstream.pipeline.cursor import iterate
from tests.helpers.nursery import nursery

ROOT = Path(__file__).parents[2]
PACKAGE = Path(ms.__file__).parent


class Bug(NamedTuple):
    """A change inside one definition, and the test that must notice.

    Attributes:
        file: Below src/midstream.
        definition: Its qualified name, as ``Iterator.state_dict``.
        old: Text that is in its source exactly once, white space aside; empty: the whole body.
        new: What the bug puts in its place.
        test: A file below tests, and a -k expression.
    """

    file: str
    definition: str
    old: str
    new: str
    test: tuple[str, str]


LAWS = "laws/test_contract.py"
LOADER = "loader/test_loader.py"
TOPOLOGY = "distributed/test_topology.py"
TRACKED = "metrics/test_tracked.py"
PARQUET = "sources/test_parquet.py"
HERE = "promises/test_planted_bugs.py"

BUGS = {
    "a live list in a state": Bug(
        "pipeline/iterator.py",
        "Iterator.state_dict",
        "copy_plain(self.snapshot())",
        "self.snapshot()",
        (HERE, "iterator_hands_out_fresh_values"),
    ),
    "the buffer of a shuffle is not replayed": Bug(
        "nodes/shuffle.py",
        "_BufferedShuffleIterator._load",
        'while self.seen < state["seen"]:',
        'self.seen = state["seen"]\n        while self.seen < state["seen"]:',
        (LAWS, "restore_at_every_step and buffered"),
    ),
    "living workers do not learn the epoch": Bug(
        "workers/readers.py",
        "Runner.announce",
        "self.shared[0] = self.epoch",
        "pass",
        (LOADER, "three_epochs and True"),
    ),
    "read-ahead counts as delivered": Bug(
        "pipeline/cursor.py",
        "Cursor._state",
        "[self.number, ",
        "[self.first + len(self.items), ",
        (LAWS, "restore_at_every_step and shuffle"),
    ),
    "the end of an epoch is one batch late": Bug(
        "loader/position.py",
        "Position.apply",
        "self.turns is not None and passed >= self.turns",
        "self.turns is not None and self.passed >= self.turns",
        (LOADER, "nobody_pulls_stop_iteration"),
    ),
    "two shuffles of one seed share their order": Bug(
        "pipeline/node.py",
        "BoundNode.__init__",
        "self.salt = salt(path)",
        "self.salt = 0",
        ("promises/test_orders.py", "unrelated_orders or released"),
    ),
    "a replay counts twice": Bug(
        "pipeline/ledger.py",
        "Ledger.first_time",
        "if self.marks.get(mark, _NEVER) >= [pass_, number]:",
        "if False:",
        (LOADER, "however_often_they_are_replayed"),
    ),
    "what is tracked counts again when it is read again": Bug(
        "nodes/track.py",
        "_TrackIterator._next",
        "if values is not None and self.ledger.first_time(self.path, self.pass_, self.number):",
        "if values is not None:",
        (TRACKED, "a_resume_reads_again"),
    ),
    "what a repeat tracks counts": Bug(
        "loader/position.py",
        "Position.apply",
        "(random_access and (padded or skipped))",
        "(random_access and skipped)",
        (TRACKED, "only_fill_up"),
    ),
    "metrics are not taken back with what they are of": Bug(
        "metrics/tracked.py",
        "TotalsHistory.after",
        "if start < at <= number]",
        "if start < at]",
        (TRACKED, "any_of_the_last_steps"),
    ),
    "buckets of another width are taken for the same": Bug(
        "metrics/totals.py",
        "QuantileSketch._merge",
        "shift = self.level - part.level",
        "shift = 0",
        (TRACKED, "order_or_parts"),
    ),
    "each rank that loads has the metrics of all": Bug(
        "loader/position.py",
        "Position._continue_from",
        "if lane is None or index not in self.own:",
        "if lane is None:",
        (TRACKED, "counts_nothing_twice"),
    ),
    "a mark forgets its pass": Bug(
        "checkpoint/spec.py",
        "short_value",
        "return value[1] if value[0] == epoch else value",
        "return value[1]",
        ("checkpoint/test_checkpoint.py", "by_number"),
    ),
    "batches that a rank did ahead of the others are made again": Bug(
        "workers/readers.py",
        "_RandomReader.__next__",
        "if number in self.done_early:",
        "if False:",
        (TOPOLOGY, "any_chain_of_topologies and lossy"),
    ),
    "what was left over is not first in the next epoch": Bug(
        "loader/render.py",
        "_left_over",
        '"" if lane["done"] else encode',
        '"" if True else encode',
        ("trainers/test_dcp.py", "sync_end_stops and 0"),
    ),
    "ranks at different steps go unnoticed": Bug(
        "checkpoint/read.py",
        "RunState._take_position",
        "if not fits or not (later or",
        "if False and not (later or",
        (TOPOLOGY, "saved_at_different_steps"),
    ),
    "another batch size deals the rest of a stream anew": Bug(
        "changes/adopt.py",
        "_adopt_stream",
        'position.setdefault("dealt", size)',
        "pass",
        ("changes/test_adopt.py", "streams_stay_exactly_once"),
    ),
    "an error that was raised is met again": Bug(
        "loader/position.py",
        "Position._raised_after",
        "return {**raised, number: raised.get(number, 0) + 1}",
        "pass",
        (HERE, "after_an_error_in_a_batch"),
    ),
    "parts of a row are forgotten": Bug(
        "nodes/flat_map.py",
        "_FlatMapIterator._state",
        'return {"part": self.part, "source": self.before}',
        'return {"part": 0, "source": self.source.snapshot()}',
        (LAWS, "restore_at_every_step and flat_map"),
    ),
    "the rest of a cut document is forgotten": Bug(
        "nodes/pack/concat.py",
        "Concat._emit",
        "self.start, self.offset, self.taken = self.source.before(), rest[1], 1",
        "self.start, self.offset, self.taken = self.source.snapshot(), 0, 0",
        ("nodes/test_pack.py", "token_by_token or saved_at_every_pack and 0"),
    ),
    "documents that wait are forgotten": Bug(
        "nodes/pack/fit.py",
        "Fit._state",
        '"source": self.before_waiting if self.waiting_bits else self.start, "waiting": f"{self.waiting_bits:x}",',
        '"source": self.start, "waiting": "0",',
        (LAWS, "restore_at_every_step and pack"),
    ),
    "what is read ahead has no bound": Bug(
        "sources/read_ahead.py",
        "ReadAheadCache._make_room",
        "return self.num_bytes + self.prefetched_bytes <= limit or not self.prefetched",
        "return True",
        (PARQUET, "two_groups_more_than_the_cache"),
    ),
    "a row group that is being read is not waited for": Bug(
        "sources/read_ahead.py",
        "ReadAheadCache.get",
        "while number in self.reading: self.changed.wait()",
        "pass",
        (PARQUET, "waited_for_not_read_again"),
    ),
    "a restored input of a mix starts in its first pass": Bug(
        "nodes/mix/interleave.py",
        "_InterleaveIterator._load",
        "child.source = self._open(self.names[index], child.number)",
        "child.source = self._open(self.names[index], 0)",
        (LAWS, "restore_at_every_step and interleave"),
    ),
    "the global generator is drawn from": Bug(
        "workers/processes.py",
        "inner_loader",
        "generator=torch.Generator().manual_seed(runner.epoch),",
        "generator=None,",
        (LOADER, "draws_nothing_from_the_generator"),
    ),
    "a loaded state is followed in the next epoch too": Bug(
        "workers/readers.py",
        "Runner.__iter__",
        "if generation != self.generation:",
        "if False:",
        (HERE, "second_epoch_after_a_load"),
    ),
    "an exhausted run starts over": Bug(
        "workers/readers.py",
        "LaneReader.__init__",
        'self.rounds, self.done = state["rounds"], state["done"]',
        'self.rounds, self.done = state["rounds"], False',
        (HERE, "drained_lane_stays_drained"),
    ),
    "a generator hides state in the reader": Bug(
        "workers/readers.py",
        "LaneReader.__init__",
        'self.output.iterator.load(state["state"])',
        "pass",
        ("laws/test_loader_laws.py", "cut_anywhere and other_workers and everything"),
    ),
}


def span(source: str, definition: str) -> tuple[int, int, int]:
    """Where a definition begins, where its body begins, and where it ends: character offsets."""
    found: list[Any] = []

    def visit(node: ast.AST, path: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                if path + child.name == definition:
                    found.append(child)
                visit(child, f"{path}{child.name}.")
            else:
                visit(child, path)

    visit(ast.parse(source), "")
    assert len(found) == 1, f"there are {len(found)} definitions of {definition}"
    lines = source.encode().splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]

    def offset(line: int, column: int) -> int:
        return len(source.encode()[: starts[line - 1] + column].decode())

    (node,) = found
    body = node.body[1:] if ast.get_docstring(node) is not None and node.body[1:] else node.body
    return (
        offset(node.lineno, node.col_offset),
        offset(body[0].lineno, body[0].col_offset),
        offset(node.end_lineno, node.end_col_offset),
    )


def plant(source: str, bug: Bug) -> str:
    """The source of a file with the bug in it."""
    start, body, end = span(source, bug.definition)
    if not bug.old:
        return source[:body] + bug.new + source[end:]
    pattern = r"\s+".join(re.escape(word) for word in bug.old.split())
    places = [match.span() for match in re.finditer(pattern, source[start:end])]
    assert len(places) == 1, (
        f"{bug.definition} in {bug.file} has this text {len(places)} times, not once: {bug.old}"
    )
    first, last = places[0]
    return source[: start + first] + bug.new + source[start + last :]


@pytest.mark.parametrize("name", BUGS)
def test_every_bug_still_fits_its_definition(name: str) -> None:
    """Fails when the definition moved or changed: then adapt the entry in BUGS."""
    bug = BUGS[name]
    source = (PACKAGE / bug.file).read_text()
    planted = plant(source, bug)
    compile(planted, bug.file, "exec")
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))
    assert (ROOT / "tests" / bug.test[0]).is_file()


# -- small laws of their own, for bugs that the large ones meet only by the way ------------------------------------------


def test_an_iterator_hands_out_fresh_values() -> None:
    from midstream.pipeline.iterator import Lane
    from midstream.pipeline.ledger import Ledger
    from midstream.pipeline.node import bind

    ds = ms.from_dataset(range(40)).filter(bool).shuffle(1, buffer_size=8)
    iterator = iterate(bind(ds.node), Lane(0, 1, 1, Ledger()), 0, 0)
    next(iterator)
    state = iterator.state_dict()
    state["safe"][1].clear()
    assert iterator.state_dict()["safe"][1] != []


@pytest.mark.processes
def test_a_checkpoint_after_an_error_in_a_batch_goes_on_with_the_rest_of_it() -> None:

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


@pytest.mark.processes
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
    source = path.read_text()
    path.write_text(plant(source, bug))
    try:
        status, printed = run(copy, *bug.test)
    finally:
        path.write_text(source)
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
