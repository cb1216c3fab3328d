"""Errors: what the user is told, that one sample is lost and no more, and that no checkpoint meets
an error twice.
"""

from __future__ import annotations

import copy
import functools
import json
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import midstream as ms
import midstream.errors
from midstream.dataset import Dataset
from midstream.pipeline.single_lane import SingleLaneIterator
from tests.helpers import loaders
from tests.helpers.loaders import drain, through_json

CONFIGURATIONS = [
    pytest.param((0, None), id="0 workers"),
    pytest.param((2, "fork"), id="2 forked"),
    pytest.param((2, "spawn"), id="2 spawned", marks=pytest.mark.slow),
]

loader = functools.partial(loaders.loader, lanes=4)


def told(found: list[Any]) -> list[Any]:
    """The same with, in the place of an error, the row it names."""
    return [
        (item.origin.row if item.origin is not None else "batch")
        if isinstance(item, ms.SampleError)
        else item
        for item in found
    ]


def fail_at(*bad: int) -> Callable[[int], int]:
    def check(x: int) -> int:
        if x in bad:
            raise ValueError(f"bad {x}")
        return x

    return check


# -- what is raised -----------------------------------------------------------------------------------------------------


class TwoArguments(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Formats(Exception):
    """Survives pickling, but its constructor would format the message again."""

    def __init__(self, value: object) -> None:
        super().__init__(f"value {value}")


class CannotBePickled(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class RefusesToBePickled(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("never")


class BreaksWhenUnpickled(Exception):
    def __reduce__(self) -> Any:
        return int, ("no number",)


class BadStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no str")


class Carries(Exception):
    """Arguments that survive."""


def local_exception(x: int) -> None:
    class Local(Exception):
        pass

    raise Local(f"local {x}")


def chained(x: int) -> None:
    try:
        1 / 0
    except ZeroDivisionError as error:
        raise ValueError(f"outer {x}") from error


def too_deep(x: int) -> int:
    return too_deep(x) + 1


def raise_(error: Exception) -> None:
    raise error


# What is raised; its type and message as told; whether the original comes along as the cause.
KINDS: dict[int, tuple[Callable[[int], Any], str, str, bool]] = {
    1: (lambda x: raise_(ValueError(f"row {x}")), "ValueError", "row 1", True),
    2: (lambda x: raise_(KeyError("missing")), "KeyError", "'missing'", True),
    3: (lambda x: raise_(Carries("code", {"row": x})), "Carries", "('code', {'row': 3})", True),
    4: (lambda x: raise_(TwoArguments(x, "bad row")), "TwoArguments", "4: bad row", False),
    5: (lambda x: raise_(KeywordOnly(code=x)), "KeywordOnly", "code 5", False),
    6: (lambda x: raise_(Formats(x)), "Formats", "value 6", False),
    7: (local_exception, "local_exception.<locals>.Local", "local 7", False),
    8: (lambda x: raise_(CannotBePickled("has a lock")), "CannotBePickled", "has a lock", False),
    9: (lambda x: raise_(RefusesToBePickled("refuses")), "RefusesToBePickled", "refuses", False),
    10: (lambda x: raise_(BreaksWhenUnpickled("breaks")), "BreaksWhenUnpickled", "breaks", False),
    11: (lambda x: raise_(BadStr()), "BadStr", "", False),
    12: (chained, "ValueError", "outer 12", True),
    13: (too_deep, "RecursionError", "maximum recursion depth exceeded", True),
    14: (
        lambda x: raise_(OSError(2, "No such file", "x.bin")),
        "FileNotFoundError",
        "No such file: 'x.bin'",
        True,
    ),
    15: (lambda x: raise_(AssertionError()), "AssertionError", "", True),
    16: (lambda x: b"\xff".decode("utf-8"), "UnicodeDecodeError", "invalid start byte", True),
}


def misbehave(x: int) -> int:
    if x in KINDS:
        KINDS[x][0](x)
    return x


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def outcome(request: pytest.FixtureRequest) -> dict[int, ms.SampleError]:
    """Every kind of exception, met once, with and without workers; samples between them are checked
    here.
    """
    workers, method = request.param
    ds = ms.interleave(
        {"web": ms.from_dataset(range(20)).map(misbehave), "code": ms.from_dataset([])},
        {"web": 1, "code": 0},
    )
    made = loader(ds, workers, method, batch_size=1)
    found = drain(iter(made))
    state = made.state_dict()
    made.close()
    assert told(found) == [x if x in KINDS else [x] for x in range(20)]
    assert state["epoch"] == 1
    return {error.origin.row: error for error in found if isinstance(error, ms.SampleError)}


@pytest.fixture(scope="module")
def reference() -> dict[int, ms.SampleError]:
    found = drain(iter(ms.interleave({"web": ms.from_dataset(range(20)).map(misbehave)})))
    return {error.origin.row: error for error in found if isinstance(error, ms.SampleError)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.processes
def test_an_error_tells_node_origin_function_type_and_traceback(
    kind: int, outcome: dict[int, ms.SampleError]
) -> None:
    error = outcome[kind]
    _, type_, message, carried = KINDS[kind]
    assert type(error) is ms.SampleError
    assert error.node == "web/map"
    assert error.origin == ms.Origin("web", 0, kind)
    assert error.function.startswith("misbehave @ ")
    assert f"{__file__}:{misbehave.__code__.co_firstlineno}" in error.function
    assert error.error_type == type_
    assert message in error.original_message
    assert "in misbehave" in error.original_traceback
    assert "Traceback (most recent call last)" in error.original_traceback or kind == 11
    for part in ("web/map", f"web[{kind}]", "misbehave @ ", type_, message, "What next"):
        assert part in str(error)
    assert (error.__cause__ is not None) == carried
    if carried:
        assert type(error.__cause__).__qualname__ == type_
    if kind == 12:
        assert "ZeroDivisionError" in error.original_traceback
        assert "direct cause" in error.original_traceback


@pytest.mark.parametrize("kind", KINDS)
def test_the_cause_says_what_the_original_said(
    kind: int, outcome: dict[int, ms.SampleError]
) -> None:
    error = outcome[kind]
    if error.__cause__ is not None:
        assert str(error.__cause__) == error.original_message
    if kind == 3:
        assert error.__cause__.args == ("code", {"row": 3})
    if kind == 14:
        assert (error.__cause__.errno, error.__cause__.filename) == (2, "x.bin")


@pytest.mark.parametrize("kind", KINDS)
def test_workers_tell_what_the_main_process_tells(
    kind: int, outcome: dict[int, ms.SampleError], reference: dict[int, ms.SampleError]
) -> None:
    here, there = reference[kind], outcome[kind]
    for name in ("node", "origin", "function", "error_type", "original_message"):
        assert getattr(there, name) == getattr(here, name), name
    if kind != 13:  # how deep the stack was to begin with differs
        assert there.original_traceback == here.original_traceback
        assert str(there) == str(here)


@pytest.mark.parametrize("kind", [1, 5, 11])
def test_a_sample_error_survives_pickling_with_all_it_knows(
    kind: int, reference: dict[int, ms.SampleError]
) -> None:
    error = reference[kind]
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ms.SampleError
    assert str(again) == str(error)
    for name in (
        "node",
        "origin",
        "function",
        "error_type",
        "original_message",
        "original_traceback",
    ):
        assert getattr(again, name) == getattr(error, name)
    assert isinstance(again.origin, ms.Origin)


class Callable_:
    def __call__(self, x: int) -> int:
        raise ValueError(x)

    def method(self, x: int) -> int:
        raise ValueError(x)


def with_argument(factor: int, x: int) -> int:
    raise ValueError(factor * x)


def test_the_function_is_told_by_name_whatever_it_is() -> None:
    import functools

    def of(fn: Callable[[Any], Any]) -> str:
        (error,) = drain(iter(ms.from_dataset([1]).map(fn)))
        return str(error.function)

    assert of(Callable_()).startswith("Callable_ @ ")
    assert of(Callable_().method).startswith("Callable_.method @ ")
    assert of(functools.partial(with_argument, 2)).startswith("with_argument @ ")
    assert of(functools.partial(Callable_().method)).startswith("Callable_.method @ ")
    assert "<lambda> @ " in of(lambda x: x / 0)
    assert of("".join) == "str.join"
    assert all(f"{__file__}:" in of(fn) for fn in (Callable_(), with_argument, lambda x: x / 0))


def test_other_nodes_name_their_own_path() -> None:
    def bad(x: int) -> Any:
        raise ValueError("bad")

    for make, node in (
        (lambda ds: ds.filter(bad), "filter"),
        (lambda ds: ds.flat_map(bad), "flat_map"),
        (lambda ds: ds.map(lambda x: x).map(bad), "map#2"),
        (lambda ds: ms.interleave({"a": ds.filter(bool).map(bad)}), "a/map"),
        (lambda ds: ms.concatenate([ms.from_dataset([]), ds.map(bad)]), "1/map"),
        (lambda ds: ds.shuffle(1).map(bad).shuffle(2, buffer_size=4).repeat(2), "map"),
    ):
        errors = drain(iter(make(ms.from_dataset([7]))))  # type: ignore[no-untyped-call]
        assert {error.node for error in errors} <= {node}
        if node != "a/map":
            assert errors


# -- what is lost -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_a_random_access_batch_come_first_then_what_is_left_of_it(workers: int) -> None:
    ds = ms.from_dataset(range(16)).map(fail_at(5, 8, 10, 11))
    made = loader(ds, workers)
    found = drain(iter(made))
    assert told(found) == [[0, 1, 2, 3], 5, [4, 6, 7], 8, 10, 11, [9], [12, 13, 14, 15]]
    assert made.progress().sources["data"].failures == {"ValueError": 4}
    assert made.progress().samples == 12
    assert made.epoch == 1
    made.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "bad", [range(4), range(4, 8), range(12, 16), range(16)], ids=["first", "inner", "last", "all"]
)
def test_a_batch_of_which_all_samples_fail_is_all_errors(bad: range, workers: int) -> None:
    ds = ms.from_dataset(range(16)).map(fail_at(*bad))
    made = loader(ds, workers)
    found = drain(iter(made))
    expected: list[Any] = []
    for start in range(0, 16, 4):
        rows = list(range(start, start + 4))
        expected.extend(rows if start in bad else [rows])
    assert told(found) == expected
    assert (made.epoch, made.state_dict()["steps_done"]) == (1, 0)
    made.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_batch_goes_on_with_the_next_sample_after_an_error(workers: int) -> None:
    ds = ms.from_dataset(range(32)).map(fail_at(1, 2, 6)).filter(lambda x: True)
    made = loader(ds, workers, lanes=2)
    found = drain(iter(made))
    batches = [item for item in found if isinstance(item, list)]
    assert sorted(x for batch in batches for x in batch) == [
        x for x in range(32) if x not in (1, 2, 6)
    ]
    assert [error.origin.row for error in found if isinstance(error, ms.SampleError)] == [1, 2, 6]
    assert batches[:2] == [
        [0, 3, 8, 9],
        [4, 5, 7, 12],
    ]  # lane 0 has rows 0-3, 8-11, ...; lane 1 has 4-7, 12-15, ...
    made.close()


def bad_batch(batch: list[int]) -> list[int]:
    if 5 in batch or 14 in batch:
        raise TypeError(f"cannot collate {batch}")
    return batch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_stream", [False, True])
def test_an_error_in_collate_loses_its_batch(is_stream: bool, workers: int) -> None:
    rows = ms.from_dataset(range(20))
    ds = (rows.filter(lambda x: True) if is_stream else rows).batch(4, collate_fn=bad_batch)
    made = loader(ds, workers)
    found = drain(iter(made))
    assert told(found) == [[0, 1, 2, 3], "batch", [8, 9, 10, 11], "batch", [16, 17, 18, 19]]
    error = found[1]
    assert (error.node, error.origin, error.error_type) == ("batch", None, "TypeError")
    assert error.function.startswith("bad_batch @ ")
    assert "cannot collate [4, 5, 6, 7]" in str(error)
    assert "on a whole batch" in str(error)
    assert isinstance(error.__cause__, TypeError)
    made.close()


def test_an_error_above_a_batch_names_the_batchs_first_row() -> None:
    ds = (
        ms.from_dataset(range(8), name="rows")
        .batch(4, collate_fn=list)
        .map(lambda batch: batch if 5 not in batch else 1 / 0)
    )
    found = drain(iter(loader(ds)))
    assert found[0] == [0, 1, 2, 3]
    assert (found[1].node, found[1].origin) == ("map", ms.Origin("rows", 0, 4))
    assert len(found) == 2


PIPELINES: dict[str, Callable[[], Dataset]] = {
    "random access": lambda: (
        ms.from_dataset(range(40)).shuffle(3).map(fail_at(*range(0, 40, 5), 1, 2))
    ),
    "a whole batch": lambda: ms.from_dataset(range(40)).map(fail_at(4, 5, 6, 7, 20, 21)),
    "stream": lambda: (
        ms.from_dataset(range(40)).map(fail_at(*range(0, 40, 5))).filter(lambda x: x % 7)
    ),
    "buffered": lambda: (
        ms.from_dataset(range(40)).map(fail_at(*range(0, 40, 5))).shuffle(1, buffer_size=12)
    ),
    "flat map": lambda: (
        ms.from_dataset(range(20)).map(fail_at(3, 4, 11)).flat_map(lambda x: [x] * (x % 3))
    ),
    "mixed": lambda: ms.interleave(
        {
            "a": ms.from_dataset(range(30)).map(fail_at(2, 3, 17)).filter(bool),
            "b": ms.from_dataset(range(30)).map(fail_at(8)),
        }
    ),
    "collate": lambda: (
        ms.from_dataset(range(20)).filter(lambda x: True).batch(4, collate_fn=bad_batch)
    ),
    "sample and collate": lambda: (
        ms.from_dataset(range(20)).map(fail_at(6, 16)).batch(4, collate_fn=bad_batch)
    ),
}


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.processes
def test_a_checkpoint_taken_right_after_an_error_does_not_meet_it_again(kind: str) -> None:
    """Nor one taken anywhere else; with other numbers of workers, and through a chain of them."""
    ds = PIPELINES[kind]()
    made = loader(ds)
    found: list[Any] = []
    states = [through_json(made.state_dict())]
    iterator = iter(made)
    while True:
        try:
            found.append(next(iterator))
        except StopIteration:
            break
        except ms.SampleError as error:
            found.append(error)
        states.append(through_json(made.state_dict()))
    expected = told(found)
    assert sum(isinstance(item, ms.SampleError) for item in found) >= 2
    for step, state in enumerate(states[:-1]):
        resumed = loader(ds)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert told(drain(iter(resumed))) == expected[step:], f"resumed after {step}"
    assert states[-1]["epoch"] == 1
    after = next(step for step, item in enumerate(found) if isinstance(item, ms.SampleError)) + 1
    for workers in (1, 2):
        resumed = loader(ds, workers)
        resumed.load_state_dict(states[after])
        assert told(drain(iter(resumed))) == expected[after:]
        resumed.close()


@pytest.mark.parametrize("kind", ["random access", "stream", "sample and collate"])
@pytest.mark.processes
def test_a_run_cut_after_every_error_goes_on_with_other_workers(kind: str) -> None:
    ds = PIPELINES[kind]()
    expected = told(drain(iter(loader(ds))))
    found: list[Any] = []
    state, epoch = None, 0
    for workers in [2, 0, 1, 0] * 10:
        made = loader(ds, workers)
        if state is not None:
            made.load_state_dict(state)
        iterator = iter(made)
        while made.epoch == 0:
            try:
                found.append(next(iterator))
            except StopIteration:
                break
            except ms.SampleError as error:
                found.append(error)
                break
        state, epoch = made.state_dict(), made.epoch
        made.close()
        if epoch:
            break
    assert told(found) == expected


@pytest.mark.parametrize("kind", ["random access", "a whole batch", "stream", "collate"])
def test_the_plain_iterator_does_not_meet_an_error_again(kind: str) -> None:
    ds = PIPELINES[kind]()
    run = SingleLaneIterator(ds.node, 0, 1, 0)
    found: list[Any] = []
    states = [run.state_dict()]
    while True:
        try:
            found.append(next(run))
        except StopIteration:
            break
        except ms.SampleError as error:
            found.append(error)
        states.append(through_json(run.state_dict()))
    for step, state in enumerate(states):
        resumed = SingleLaneIterator(ds.node, 0, 1, 0)
        resumed.load_state_dict(state)
        assert told(drain(resumed)) == told(found)[step:]


def test_errors_are_met_again_in_the_next_epoch() -> None:
    made = loader(ms.from_dataset(range(8)).map(fail_at(5)))
    assert told(drain(iter(made))) == [[0, 1, 2, 3], 5, [4, 6, 7]]
    second = drain(iter(made))
    assert told(second) == [[0, 1, 2, 3], 5, [4, 6, 7]]
    assert second[1].origin == ms.Origin("data", 1, 5)
    assert made.progress().sources["data"].failures == {"ValueError": 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_state_at_and_trace_leave_errors_out_of_the_count(workers: int) -> None:
    made = loader(ms.from_dataset(range(16)).map(fail_at(5, 8)), workers)
    found = drain(iter(made))
    made.close()
    assert told(found) == [[0, 1, 2, 3], 5, [4, 6, 7], 8, [9, 10, 11], [12, 13, 14, 15]]
    assert [[origin.row for origin in made.trace(step)] for step in (1, 2, 3)] == [
        [0, 1, 2, 3],
        [4, 6, 7],
        [9, 10, 11],
    ]
    for step, rest in (
        (1, [5, [4, 6, 7], 8, [9, 10, 11], [12, 13, 14, 15]]),
        (2, [8, [9, 10, 11], [12, 13, 14, 15]]),
    ):
        resumed = loader(ms.from_dataset(range(16)).map(fail_at(5, 8)))
        resumed.load_state_dict(made.state_at(step))
        assert told(drain(iter(resumed))) == rest


# -- the classes --------------------------------------------------------------------------------------------------------

CLASSES = [
    value
    for value in vars(midstream.errors).values()
    if isinstance(value, type) and issubclass(value, midstream.errors.MidstreamError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_exception_can_be_rebuilt_from_its_message_alone(
    kind: type[ms.MidstreamError],
) -> None:
    error = kind("what happened\nand what to do")
    for again in (
        pickle.loads(pickle.dumps(error)),
        copy.copy(error),
        copy.deepcopy(error),
        kind(str(error)),
    ):
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.args == error.args
    if kind is not ms.MidstreamError:
        assert getattr(ms, kind.__name__) is kind


def test_the_tree_of_exceptions_is_the_one_that_is_drawn() -> None:
    drawn = midstream.errors.__doc__
    assert drawn is not None
    assert all(kind.__name__ in drawn for kind in CLASSES)
    assert {kind.__name__: kind.__bases__[0].__name__ for kind in CLASSES} == {
        "MidstreamError": "Exception",
        "SampleError": "MidstreamError",
        "TooManyErrors": "MidstreamError",
        "SourceError": "MidstreamError",
        "WorkerError": "MidstreamError",
        "CheckpointError": "MidstreamError",
        "ReplayDiverged": "CheckpointError",
    }


def test_an_origin_reads_as_source_row_part_and_epoch() -> None:
    assert str(ms.Origin("web", 0, 7)) == "web[7]"
    assert str(ms.Origin("web", 2, 7, 3)) == "web[7] part 3 epoch 2"


# -- what is nobody's sample --------------------------------------------------------------------------------------------


def dies(shard: int) -> Iterator[int]:
    for row in range(12):
        if shard == 1 and row == 5:
            raise OSError("connection lost")
        yield 100 * shard + row


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_cannot_go_on_ends_the_run_and_the_state_stays(workers: int) -> None:
    made = loader(ms.from_iterable(dies, name="net", num_shards=4), workers)
    iterator = iter(made)
    found: list[Any] = []
    with pytest.raises(ms.SourceError, match="shard 1 raised at row 5") as caught:
        while True:
            try:
                found.append(next(iterator))
            except ms.SampleError as error:
                found.append(error)
    assert found[:4] == [[shard * 100 + row for row in range(4)] for shard in range(4)]
    assert [item.origin for item in found if isinstance(item, ms.SampleError)] == [
        ms.Origin("net", 0, 5 * 4 + 1)
    ]
    state = made.state_dict()
    assert state["steps_done"] == sum(isinstance(item, list) for item in found)
    for _ in range(2):
        with pytest.raises(ms.SourceError) as again:
            next(iterator)
        assert str(again.value) == str(caught.value)
    assert made.state_dict() == state
    made.close()


class Broken(list):  # type: ignore[type-arg]
    """Fails otherwise than on one row: `__getitems__` returns nothing."""

    def __getitems__(self, index: list[int]) -> list[int]:
        return []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_reading_itself_is_told_with_its_traceback_and_stays(workers: int) -> None:
    ds = ms.concatenate(
        [
            ms.from_dataset(range(8), name="good"),
            ms.from_dataset(Broken([1, 2, 3, 4]), name="broken"),
        ]
    )
    made = loader(ds, workers)
    iterator = iter(made)
    assert [next(iterator), next(iterator)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    state = made.state_dict()
    for _ in range(2):
        with pytest.raises(ms.MidstreamError, match="rows"):
            next(iterator)
    assert made.state_dict() == state
    made.close()


KILL = """
    import json, os, signal, sys, warnings
    import midstream as ms

    class Kill:
        def __call__(self, x):
            if x == 150 and os.environ.get("KILL"):
                os.kill(os.getpid(), signal.SIGKILL)
            return x

    def make(stream, collate):
        ds = ms.from_dataset(range(400)).map(Kill())
        ds = ds.filter(lambda x: True) if stream else ds
        return ms.DataLoader(ds, 4, num_workers=int(os.environ["WORKERS"]), lanes=12, collate_fn=collate,
                             multiprocessing_context="fork" if os.environ["WORKERS"] != "0" else None)

    def plain(batch):
        return batch if isinstance(batch, list) else batch.tolist()

    for stream in (False, True):
        for collate in (list, None):
            os.environ.update(KILL="1", WORKERS="2")
            loader = make(stream, collate)
            found, states = [], [loader.state_dict()]
            raised = again = None
            try:
                for batch in loader:
                    found.append(plain(batch))
                    states.append(loader.state_dict())
            except Exception as error:
                raised = error
            state = loader.state_dict()
            closed = None
            try:
                loader.close()
            except Exception as error:
                closed = repr(error)
            os.environ.update(KILL="", WORKERS="0")
            whole = [plain(batch) for batch in make(stream, collate)]
            resumed = make(stream, collate)
            resumed.load_state_dict(state)
            rest = [plain(batch) for batch in resumed]
            print(json.dumps({"type": type(raised).__name__, "text": str(raised), "found": len(found), "closed": closed,
                              "last": state == states[-1], "whole": found + rest == whole}), flush=True)
"""


@pytest.fixture(scope="module")
def killed() -> tuple[list[dict[str, Any]], str, int]:
    """In a process of its own, whose whole error output is looked at."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return [json.loads(line) for line in ran.stdout.splitlines()], ran.stderr, ran.returncode


@pytest.mark.parametrize(
    "case", range(4), ids=["lists", "tensors", "stream of lists", "stream of tensors"]
)
@pytest.mark.processes
def test_a_killed_worker_is_a_worker_error_and_the_state_stays(
    case: int, killed: tuple[list[dict[str, Any]], str, int]
) -> None:
    outcomes, stderr, _ = killed
    assert len(outcomes) > case, stderr
    outcome = outcomes[case]
    assert outcome["type"] == "WorkerError", outcome["text"]
    assert outcome["last"], "the state is not that of the last batch handed out"
    assert outcome["whole"], "resumed from that state, the run is not whole"
    assert "SIGKILL" in outcome["text"]
    assert "worker" in outcome["text"]
    assert f"batch {outcome['found']} of epoch 0" in outcome["text"]


@pytest.mark.processes
def test_a_killed_worker_leaves_nothing_behind_that_raises_later(
    killed: tuple[list[dict[str, Any]], str, int],
) -> None:
    outcomes, stderr, returncode = killed
    assert [outcome["closed"] for outcome in outcomes] == [None] * 4
    assert "Traceback" not in stderr, stderr
    assert returncode == 0


HANG_UP = """
    import multiprocessing as mp, multiprocessing.resource_sharer as sharer, os, sys, threading
    from multiprocessing import connection
    from midstream.workers.signals import WorkerInit

    def worker(pipe):
        WorkerInit(None)(0)
        sharer.DupFd(os.open(os.devnull, os.O_RDONLY))  # starts the thread that hands descriptors over
        pipe.send(sharer._resource_sharer._address)
        pipe.recv()
        thread = sharer._resource_sharer._thread
        assert thread.is_alive()
        sys.excepthook(ValueError, ValueError("of the worker itself"), None)
        threading.Thread(target=lambda: 1 / 0).start()

    here, there = mp.Pipe()
    process = mp.get_context("fork").Process(target=worker, args=(there,))
    process.start()
    address = here.recv()
    for _ in range(3):
        half = connection.SocketClient(address)
        half.recv_bytes()  # the challenge: the other side now waits for the answer
        half.close()
    connection.Client(address, authkey=mp.current_process().authkey).close()  # accepted after the three above
    here.send(None)
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.processes
def test_a_worker_says_nothing_of_a_receiver_that_hung_up_but_tells_its_own_errors() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANG_UP)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "EOFError" not in ran.stderr and "ConnectionResetError" not in ran.stderr
    assert "of the worker itself" in ran.stderr and "ZeroDivisionError" in ran.stderr
