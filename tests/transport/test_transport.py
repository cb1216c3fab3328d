"""The laws of the way from worker to main process: what arrives is what was made, nobody waits, and
nothing is left behind.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import gc
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from multiprocessing.context import set_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.transport import packing as transport
from midstream.transport import parcel
from midstream.transport.arena import Arena
from midstream.transport.once import Once
from midstream.transport.packing import DIRECT, INLINE, empty, pack, use_arena
from midstream.transport.parcel import Parcel
from midstream.workers.messages import BATCH, Message, pack_turn, unpack_turn


def travel(value: Any) -> Any:
    return pickle.loads(pickle.dumps(pack(value))).open()


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Record:
    tokens: torch.Tensor
    name: str


TENSORS = {
    "contiguous": torch.arange(12).view(3, 4),
    "bfloat16": torch.arange(24.0).view(2, 3, 4).to(torch.bfloat16),
    "bool": torch.tensor([True, False]),
    "complex": torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "channels_last": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.arange(6).view(2, 3).T,
    "expanded": torch.arange(3).view(3, 1).expand(3, 1000),
    "scalar": torch.tensor(3.5),
    "every second": torch.arange(10)[::2],
    "offset": torch.arange(10)[3:],
    "empty": torch.zeros(0, 3, dtype=torch.int16),
    "sparse": torch.eye(3).to_sparse(),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "gradient": torch.ones(2, requires_grad=True),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_arrives_with_dtype_shape_and_values(name: str) -> None:
    tensor = TENSORS[name]
    found = travel([tensor])[0]
    assert type(found) is type(tensor)
    assert (found.dtype, found.shape, found.layout) == (tensor.dtype, tensor.shape, tensor.layout)
    assert found.requires_grad == tensor.requires_grad
    assert torch.equal(found.to_dense(), tensor.to_dense())
    if name in ("channels_last", "transposed", "expanded"):
        assert found.stride() == tensor.stride()
    if name not in ("expanded", "sparse", "parameter", "gradient", "empty"):
        found.zero_()  # writable
        assert not found.any()


ARRAYS = {
    "plain": np.arange(5),
    "scalar": np.array(3.0),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "strided": np.arange(10)[::3],
    "big endian": np.arange(3, dtype=">i4"),
    "text": np.array(["a", "bb"]),
    "dates": np.array(["2020-01-01", "2021-01-01"], dtype="M8[D]"),
    "structured": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "objects": np.array([{"a": 1}, None]),
    "empty": np.zeros((0, 2)),
    "masked": np.ma.array([1, 2], mask=[0, 1]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_arrives_with_dtype_shape_and_values_writable(name: str) -> None:
    array = ARRAYS[name].copy()
    array.flags.writeable = False
    found = travel({"x": array})["x"]
    assert type(found) is type(array)
    assert (found.dtype, found.shape, found.strides if name == "fortran" else None) == (
        array.dtype,
        array.shape,
        array.strides if name == "fortran" else None,
    )
    assert np.array_equal(np.asarray(found), np.asarray(array))
    assert found.flags.writeable


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.builds(
        lambda size, kind: np.arange(size).astype(kind),
        st.integers(0, 6000),
        st.sampled_from(["i1", "f4", "f8"]),
    ),
    st.builds(
        lambda size, kind: torch.arange(size).to(kind),
        st.integers(0, 6000),
        st.sampled_from([torch.int8, torch.float64]),
    ),
)
nestings = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.builds(lambda x: collections.OrderedDict(x=x), inner),
    ),
    max_leaves=12,
)


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.equal(right)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        assert np.array_equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for pair in zip(left, right):
            assert_same(*pair)
    else:
        assert left == right


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    """An arena of which this process is both the worker and the main process."""
    monkeypatch.setattr(transport, "_writer", None)
    arena = Arena(1, 3)
    use_arena(arena, 0)
    yield arena


@settings(max_examples=60, deadline=None)
@given(values=st.lists(nestings, max_size=8), hold=st.lists(st.booleans(), min_size=8, max_size=8))
def test_any_nesting_arrives_whatever_is_held(values: list[Any], hold: list[bool]) -> None:
    """In one process: three slots, of which some are looked into while the next values are packed."""
    before, transport._writer = transport._writer, None
    try:
        arena = Arena(1, 3)
        use_arena(arena, 0)
        held: list[tuple[Any, Any]] = []
        for value, keep in zip(values, hold):
            held.append((travel(value), value))
            for pair in held:
                assert_same(*pair)
            pair = None
            if not keep:
                held.pop()
        held.clear()
        assert not any(arena.used[:3])
    finally:
        transport._writer = before


def test_a_slot_is_taken_again_only_when_nothing_looks_into_it(worker: Arena) -> None:
    def batch(fill: int) -> dict[str, Any]:
        return {"x": torch.full((INLINE,), fill, dtype=torch.uint8), "y": np.full(10, fill)}

    first, second, third = travel(batch(1)), travel(batch(2)), travel(batch(3))
    assert list(worker.used[:3]) == [1, 1, 1]
    copied = travel(batch(4))  # no slot: nobody waits
    assert list(worker.used[:3]) == [1, 1, 1]
    row = first["x"][5:7].view(1, 2)
    only = third["y"][1:]
    del first, second, third
    assert list(worker.used[:3]) == [1, 0, 1]
    again = travel(batch(5))
    assert (row == 1).all()
    assert (only == 3).all()
    assert (copied["x"] == 4).all()
    assert (again["x"] == 5).all()
    del row, only
    gc.collect()
    assert list(worker.used[:3]) == [0, 1, 0]


def test_a_parcel_that_nobody_opens_gives_its_slot_back(worker: Arena) -> None:
    arrived = pickle.loads(pickle.dumps(pack(np.zeros(INLINE))))
    assert worker.used[0] == 1
    del arrived
    assert worker.used[0] == 0


@pytest.mark.processes
def test_a_fork_of_the_main_process_gives_no_slot_back(worker: Arena) -> None:
    found = travel(np.zeros(INLINE))
    child = os.fork()
    if child == 0:
        del found
        os._exit(0)
    os.waitpid(child, 0)
    assert worker.used[0] == 1
    del found
    assert worker.used[0] == 0


def test_a_pinned_parcel_gives_its_slot_back(
    worker: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = pickle.loads(pickle.dumps(pack([torch.ones(INLINE)])))
    monkeypatch.setattr(
        parcel.pin_memory, "pin_memory", lambda value: [each.clone() for each in value]
    )
    pinned = arrived.pin_memory()
    assert worker.used[0] == 0
    assert pinned.open()[0].equal(torch.ones(INLINE))


def test_an_array_made_in_the_slot_is_not_copied_and_may_be_kept(worker: Arena) -> None:
    kept = []
    for turn in range(5):
        small = np.full(3, turn)
        array = empty((DIRECT,), np.uint8)
        array[:] = turn
        other = empty((7, DIRECT // 7), np.float32)  # the mapping may grow between the two
        other[:] = turn
        found = travel({"small": small, "array": array, "tensor": torch.from_numpy(other)})
        assert (found["small"] == turn).all()
        assert (found["array"] == turn).all()
        assert (found["tensor"] == turn).all()
        if turn < 3:
            array[0] = 99  # the same memory, so it shows
            assert found["array"][0] == 99
            array[0] = turn
        kept.append(array)
        for index, each in enumerate(kept):
            assert (each == index).all(), "a kept array was written over"
        del found
    late = travel(kept[0])  # of an earlier turn: copied
    kept[0][:] = 77
    assert (late == 0).all()


def test_what_was_not_sent_leaves_the_slot_to_the_next(worker: Arena) -> None:
    array = empty((DIRECT,), np.uint8)
    array[:] = 7
    assert travel("nothing of it") == "nothing of it"
    found = travel(np.full(INLINE, 3, np.uint8))
    assert (array == 7).all()
    assert (found == 3).all()


# -- through a loader ------------------------------------------------------------------------------------------------


class Uneven:
    """Batches of very different sizes, on both sides of the border."""

    def __call__(self, rows: list[int]) -> dict[str, Any]:
        size = (rows[0] * 7919) % (3 * INLINE)
        return {
            "rows": torch.tensor(rows),
            "x": torch.full((size,), rows[0] % 100, dtype=torch.int16),
            "y": [np.full(size // 2, rows[0]), ("text", None, rows[0])],
            "record": Record(torch.full((3,), rows[0]), "r"),
        }


def uneven(workers: int, **options: Any) -> ms.DataLoader:
    return ms.DataLoader(
        ms.from_dataset(range(240)).shuffle(1).batch(4, collate_fn=Uneven()),
        num_workers=workers,
        **options,
    )


def plain(batch: dict[str, Any]) -> Any:
    return (
        batch["rows"].tolist(),
        batch["x"].tolist(),
        batch["x"].dtype,
        batch["y"][0].tolist(),
        batch["y"][1],
        batch["record"].tokens.tolist(),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"multiprocessing_context": "fork"},
        {"multiprocessing_context": "fork", "persistent_workers": True},
        {"multiprocessing_context": "spawn"},
        {"multiprocessing_context": "forkserver", "prefetch_factor": 1},
        {"worker_type": "thread"},
    ],
    ids=str,
)
@pytest.mark.processes
def test_a_whole_list_of_batches_is_right(options: dict[str, Any]) -> None:
    """It holds more batches than there are slots."""
    expected = [plain(batch) for batch in uneven(0)]
    made = uneven(2, **options)
    found = list(made)
    assert [plain(batch) for batch in found] == expected
    found[0]["x"].add_(1)
    made.close()
    assert [plain(batch) for batch in found[1:]] == expected[1:]


@pytest.mark.processes
def test_memory_is_bounded_and_slots_come_back(caplog: pytest.LogCaptureFixture) -> None:
    made = uneven(2, multiprocessing_context="fork", persistent_workers=True)
    for _ in range(2):
        for batch in made:
            assert made.trace()
    del batch, _
    arena = made._pool.runner.arena  # type: ignore[union-attr]
    assert arena is not None
    number = arena.num_workers * arena.slots
    assert not any(arena.used[:number]), "a slot is held by nobody"
    taken = os.fstat(arena.fd).st_blocks * 512
    largest = 3 * INLINE * 2 + 3 * INLINE // 2 * 8 + 1000
    assert 0 < taken <= number * (largest * 1.25 + (64 << 10))
    for count in range(5):  # batches that were ready and are thrown away
        made.set_epoch(made.epoch + 1)
        for thrown in zip(range(count), made):
            del thrown
    made.set_epoch(made.epoch + 1)
    kept = list(made)
    assert sum(arena.used[:number]) == number
    del kept
    assert not any(arena.used[:number])
    assert os.fstat(arena.fd).st_blocks * 512 <= number * (largest * 1.25 + (64 << 10))
    made.close()
    assert not caplog.records


@pytest.mark.processes
def test_without_memory_batches_go_through_the_pipe_and_the_loader_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [plain(batch) for batch in uneven(0)]

    def refuse(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("posix_fallocate", "memfd_create"):
        caplog.clear()
        monkeypatch.setattr(os, function, refuse)  # a fork inherits it
        made = uneven(2, multiprocessing_context="fork")
        with caplog.at_level(logging.WARNING, "midstream"):
            assert [plain(batch) for batch in made] == expected
        made.close()
        assert len(caplog.records) == 1
        assert "no shared memory for" in caplog.text
        assert "No space left on device" in caplog.text


@pytest.mark.processes
def test_a_worker_lets_go_of_the_memory_of_other_loaders() -> None:
    """But for slots that the main process looked into just when it forked."""
    first = uneven(1, multiprocessing_context="fork", persistent_workers=True)
    for batch in first:
        pass
    del batch
    ds = ms.from_dataset(range(4)).map(
        lambda x: [os.readlink(f"/proc/self/fd/{fd}") for fd in held_files()]
    )
    second = ms.DataLoader(ds, None, num_workers=1, multiprocessing_context="fork")
    found = list(second)[-1]
    own = sum("memfd:midstream" in name for name in found)
    assert own == 2, "the file, and the mapping of its beginning"
    first.close()
    second.close()


def held_files() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        found.append(int(name))
    return found


@pytest.mark.processes
def test_a_batch_that_cannot_travel_is_an_error_that_says_so() -> None:
    ds = ms.from_dataset(range(8)).map(lambda x: x if x < 4 else iter_of(x))
    made = ms.DataLoader(ds, None, num_workers=2, multiprocessing_context="fork")
    iterator = iter(made)
    assert [next(iterator) for _ in range(4)] == [0, 1, 2, 3]
    state = made.state_dict()
    with pytest.raises(
        ms.WorkerError, match=r"batch 4 \(generator\) cannot leave its worker process.*pickle"
    ):
        next(iterator)
    assert made.state_dict() == state
    made.close()


def iter_of(x: int) -> Iterator[int]:
    yield x


def test_pipes_travel_as_multiprocessing_sends_them() -> None:
    left, right = torch.multiprocessing.Pipe()
    sent, tensor = travel([right, torch.ones(3)])
    assert sent.fileno() != right.fileno()
    left.send("through it")
    assert sent.recv() == "through it"
    assert tensor.equal(torch.ones(3))


def test_origins_do_not_hold_a_slot(worker: Arena) -> None:
    origins = np.arange(5 * INLINE).reshape(-1, 5)
    packed = pack_turn((3, -1, [Message(BATCH, torch.ones(INLINE), origins, True, "s", None)]))
    assert isinstance(packed, Parcel)
    number, lane, (out,) = unpack_turn(pickle.loads(pickle.dumps(packed)))
    assert (number, lane, out.final, out.state) == (3, -1, True, "s")
    assert np.array_equal(out.origins, origins)
    kept = out.origins
    del out
    assert not any(worker.used[:3])
    assert np.array_equal(kept, origins)


class Spawning:
    """What multiprocessing keeps while it starts a process: here the files go to this one."""

    def duplicate_for_child(self, fd: int) -> int:
        return os.dup(fd)

    def DupFd(self, fd: int) -> Any:
        return Detached(fd)


@dataclasses.dataclass
class Detached:
    fd: int

    def detach(self) -> int:
        return self.fd


@pytest.fixture
def spawning() -> Iterator[None]:
    set_spawning_popen(Spawning())
    yield
    set_spawning_popen(None)


class Counts:
    pickled = 0

    def __init__(self, table: Any) -> None:
        self.table = table

    def __getstate__(self) -> Any:
        Counts.pickled += 1
        return self.__dict__


@pytest.mark.usefixtures("spawning")
def test_what_is_shipped_to_new_interpreters_is_pickled_once_and_lies_in_memory_once() -> None:
    table = pa.table({"x": np.arange(50_000)})
    array = np.arange(70_000)
    once = Once(Counts([table, array]))
    first, second = (pickle.loads(pickle.dumps(once)).value.table for _ in range(2))
    assert Counts.pickled == 1
    assert first[0] == second[0] == table
    assert len(pickle.dumps(once)) < 10_000
    first[1][0] = 99  # its own
    assert second[1][0] == array[0] == 0
    set_spawning_popen(None)
    assert pickle.loads(pickle.dumps(once)).value.table[0] == table


def test_the_memory_of_a_loader_travels_only_while_a_worker_is_started() -> None:
    with pytest.raises(TypeError, match="only to a worker"):
        pickle.dumps(Arena(1, 1))


@pytest.mark.usefixtures("spawning")
def test_what_only_multiprocessing_can_send_is_left_to_it() -> None:
    once = Once({"lock": torch.ones(3)})
    assert ForkingPickler.loads(ForkingPickler.dumps(once)).value["lock"].equal(torch.ones(3))


LEAK = """
    import json, os, sys, torch
    import midstream as ms

    class Big:
        def __call__(self, x):
            if os.environ.get("FAIL") and x == 50:
                raise OSError("no")
            return torch.full((100_000,), x)

    def run(method):
        loader = ms.DataLoader(ms.from_dataset(range(4000)).map(Big()), 2, num_workers=2, multiprocessing_context=method)
        iterator = iter(loader)
        held = [next(iterator) for _ in range(12)]
        pids = [os.getpid()] + [worker.pid for worker in loader._iterator._workers]
        print(json.dumps(pids), flush=True)
        end = sys.argv[2]
        if end == "wait":
            sys.stdin.readline()
        elif end == "close":
            loader.close()
        elif end == "gc":
            del iterator, loader
        elif end == "exception":
            raise RuntimeError("mine")

    if __name__ == "__main__":
        run(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("method", "end"),
    [
        ("fork", "main"),
        ("fork", "worker"),
        ("fork", "both"),
        ("spawn", "both"),
        ("forkserver", "main"),
        ("fork", "close"),
        ("fork", "gc"),
        ("fork", "exception"),
        ("fork", "leave"),
    ],
)
@pytest.mark.processes
def test_nothing_is_left_in_dev_shm_nor_any_process(method: str, end: str, tmp_path: Any) -> None:
    script = tmp_path / "leak.py"
    script.write_text(textwrap.dedent(LEAK))
    killed = end in ("main", "worker", "both")
    process = subprocess.Popen(
        [sys.executable, str(script), method, "wait" if killed else end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    for pid in {"main": pids[:1], "worker": pids[1:2], "both": pids}.get(end, []):
        os.kill(pid, signal.SIGKILL)
    process.communicate("\n" if end == "worker" else None, timeout=60)
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in pids[1:]) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [
        name for name in os.listdir("/dev/shm") if any(str(pid) in name.split("_") for pid in pids)
    ]
    assert left == []
    assert not [pid for pid in pids[1:] if holds_our_file(pid)]


def holds_our_file(pid: int) -> bool:
    try:
        return any(
            "memfd:midstream" in os.readlink(f"/proc/{pid}/fd/{fd}")
            for fd in os.listdir(f"/proc/{pid}/fd")
        )
    except OSError:
        return False
