"""Several envelopes a trip: in order whatever the sizes, nothing is lost, and no worker gets ahead
for good.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
import random
import select
import time
import weakref
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

import midstream as ms
from midstream.transport import bundles
from midstream.transport import packing as transport
from midstream.transport.bundles import MAX_PARCELS, Bundler, Unbundler, new_counts, restart_counts


class Torch:
    """What torch does with the workers: ``prefetch`` bundles of each asked for, handed out in the
    order they were asked for.
    """

    def __init__(self, workers: list[Bundler], prefetch: int) -> None:
        self.workers: list[Bundler | None] = list(workers)
        self.cycle = 0
        self.asked: deque[Any] = deque()
        for _ in range(prefetch * len(workers)):
            self.ask()

    def ask(self) -> None:
        for _ in self.workers:
            number, self.cycle = self.cycle, (self.cycle + 1) % len(self.workers)
            worker = self.workers[number]
            if worker is not None:
                try:
                    self.asked.append(next(worker))
                except StopIteration:
                    self.workers[number] = None
                    self.asked.append(None)
                except Exception as error:
                    self.asked.append(error)
                return

    def __next__(self) -> Any:
        while self.asked:
            found = self.asked.popleft()
            self.ask()
            if isinstance(found, Exception):
                raise found
            if found is not None:
                return found
        raise StopIteration


class Lazy(Torch):
    """The same, of workers that make a bundle some time between being asked and being waited for."""

    def __init__(self, workers: list[Bundler], prefetch: int) -> None:
        self.random = random.Random(1)
        self.prefetch = prefetch
        super().__init__(workers, prefetch)

    def ask(self) -> None:
        for _ in self.workers:
            number, self.cycle = self.cycle, (self.cycle + 1) % len(self.workers)
            if self.workers[number] is not None:
                self.asked.append([number])
                return

    def make(self, cell: list[Any]) -> None:
        for each in self.asked:  # what the same worker was asked for before
            if len(each) == 1 and each[0] == cell[0]:
                each.append(next(self.workers[cell[0]], None))
            if each is cell:
                return

    def __next__(self) -> Any:
        while self.asked:
            for cell in self.asked:
                if len(cell) == 1 and self.random.random() < 0.3:
                    self.make(cell)
            self.make(self.asked[0])
            number, found = self.asked.popleft()
            if (
                found is None and self.workers[number] is not None
            ):  # what else it was asked for is forgotten
                self.workers[number] = None
                self.asked = deque(cell for cell in self.asked if cell[0] != number)
            self.ask()
            if found is not None:
                return found
        raise StopIteration


def through(
    lists: list[list[Any]], prefetch: int, most_waiting: list[int] | None = None
) -> list[Any]:
    """What arrives of these, one list for each worker."""
    totals = new_counts(len(lists), prefetch)
    workers = [
        Bundler(iter(each), transport.pack, number, totals) for number, each in enumerate(lists)
    ]
    reader = Unbundler(Torch(workers, prefetch), len(lists), prefetch, totals)
    found = []
    for parcel in reader:
        found.append(parcel.open())
        if most_waiting is not None:
            most_waiting.append(max(map(len, reader._waiting)))
    with pytest.raises(StopIteration):
        next(reader)
    return found


def in_turn(lists: list[list[Any]]) -> list[Any]:
    """One of each while it has any."""
    longest = max(map(len, lists))
    return [each[number] for number in range(longest) for each in lists if number < len(each)]


@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=5),
    st.integers(1, 5),
    st.lists(st.sampled_from([0.0, 0.0, 0.0, 2e-3, 5e-3]), min_size=1, max_size=12),
    st.data(),
)
@settings(max_examples=150)
def test_the_order_is_that_of_turns_whatever_bundles_hold(lengths, prefetch, times, data):
    lists = [
        [(worker, number) for number in range(length)] for worker, length in enumerate(lengths)
    ]
    clock = 0.0

    def now() -> float:
        nonlocal clock
        clock += data.draw(st.sampled_from(times), label="seconds")
        return clock

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "perf_counter", now)
        assert through(lists, prefetch) == in_turn(lists)


def test_bundles_grow_and_no_worker_gets_ahead():
    waiting: list[int] = []
    lists = [list(range(4000)), list(range(4000)), list(range(4000))]
    assert through(lists, 2, waiting) == in_turn(lists)
    assert MAX_PARCELS // 2 <= max(waiting) <= 2 * MAX_PARCELS


def test_a_worker_with_large_batches_does_not_let_the_others_pile_up(monkeypatch):
    """Bundles that are cut are owed for: over a long run all workers have sent as much."""
    monkeypatch.setattr(bundles, "_FULL", 1 << 12)
    small, large = torch.zeros(1), torch.zeros(1 << 11)
    phases = [large if number // 400 % 2 else small for number in range(6000)]
    waiting: list[int] = []
    found = through([phases, [small] * 6000], 2, waiting)
    assert [len(each) for each in found] == [
        len(each) for each in in_turn([phases, [small] * 6000])
    ]
    assert max(waiting) <= 8 * MAX_PARCELS


def test_an_error_comes_after_what_was_made_before_it():
    def fails():
        yield from range(20)
        raise OSError("the disk is gone")

    totals = new_counts(1, 2)
    totals.mul_(MAX_PARCELS)
    reader = Unbundler(Torch([Bundler(fails(), transport.pack, 0, totals)], 2), 1, 2, totals)
    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for parcel in reader:
            found.append(parcel.open())
    assert found == list(range(20))


def _slow(worker: int, number: int) -> float:
    return 1e-2 if worker == 0 and number % 81 == 0 else 1e-5


def _phases(worker: int, number: int) -> float:
    return 5e-3 if worker == 1 and number // 10 % 2 else 1e-5


@pytest.mark.parametrize(
    ("lengths", "seconds", "size"),
    [
        pytest.param(
            [20_000, 20_000], _slow, 0, id="a batch is late now and then, the first of its bundle"
        ),
        pytest.param(
            [20_000, 20_000], lambda *_: 1e-5, bundles._FULL, id="a batch is large now and then"
        ),
        pytest.param([10, 20_000, 20_000], _phases, 0, id="a worker has ended"),
        pytest.param([10, 10, 20_000, 20_000], _phases, 0, id="two workers have ended"),
        pytest.param([5000, 10, 20_000, 9000], _phases, 0, id="they end one after the other"),
    ],
)
@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_what_waits_does_not_grow_with_the_run(monkeypatch, lengths, seconds, size, prefetch):
    clock = 0.0
    monkeypatch.setattr(bundles, "perf_counter", lambda: clock)

    def made(worker: int, length: int) -> Iterator[tuple[int, int]]:
        nonlocal clock
        for number in range(length):
            clock += seconds(worker, number)
            yield worker, number

    def pack(value: tuple[int, int]) -> Any:
        worker, number = value
        return SimpleNamespace(value=value, size=size if worker == 0 and number % 81 == 0 else 1)

    totals = new_counts(len(lengths), prefetch)
    workers = [Bundler(made(*each), pack, each[0], totals) for each in enumerate(lengths)]
    reader = Unbundler(Lazy(workers, prefetch), len(lengths), prefetch, totals)
    found, waiting = [], []
    for parcel in reader:
        found.append(parcel.value)
        waiting.append(max(map(len, reader._waiting)))
    assert found == in_turn(
        [[(worker, number) for number in range(length)] for worker, length in enumerate(lengths)]
    )
    assert max(waiting) <= (prefetch + len(lengths) + 2) * MAX_PARCELS


def test_the_next_epoch_begins_with_the_smallest_bundles_of_late():
    totals = new_counts(2, 2)
    totals.copy_(torch.tensor([8, 16, 20, 24, 32, 40, 48, 56, 64, 72, 80, 88]).roll(5))
    restart_counts(totals)
    assert totals.tolist() == list(range(4, 52, 4))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_quick_batches_travel_together_and_slow_ones_alone(context):
    ds = ms.from_dataset(range(4000)).shuffle(1)
    alone = ms.DataLoader(ds, batch_size=2)
    expected = [batch.tolist() for batch in alone]
    following = [batch.tolist() for batch in alone]
    options: dict[str, Any] = {
        "num_workers": 2,
        "persistent_workers": True,
        "multiprocessing_context": context,
    }
    loader = ms.DataLoader(ds, batch_size=2, **options)
    largest = 0
    for epoch in range(2):
        iterator = iter(loader)
        found = []
        for batch in iterator:
            found.append(batch.tolist())
            largest = max(largest, iterator._pass._turns._size)
        assert found == (following if epoch else expected)
    assert largest == MAX_PARCELS
    loader.close()
    slow = ms.DataLoader(
        ds.map(_wait), batch_size=2, num_workers=2, multiprocessing_context=context
    )
    iterator = iter(slow)
    assert [next(iterator).tolist() for _ in range(20)] == expected[:20]
    assert iterator._pass._turns._size == 1
    slow.close()


@pytest.mark.slow
@pytest.mark.parametrize("hugging_face", [False, True])
def test_a_source_that_waits_for_the_training_loop_gets_what_it_waits_for(hugging_face):
    """Each batch is asked for before the row after the next exists: what is made must not wait for
    it.
    """
    ear, mouth = os.pipe()

    def rows() -> Iterator[dict[str, int]]:
        while select.select([ear], [], [], 20)[0] and (row := int(os.read(ear, 4))) >= 0:
            yield {"x": row}

    source = datasets.IterableDataset.from_generator(rows) if hugging_face else None
    ds = ms.from_dataset(source) if source is not None else ms.from_iterable(rows)
    loader = ms.DataLoader(ds, batch_size=1, num_workers=1, multiprocessing_context="fork")
    for row in range(3):
        os.write(mouth, b"%4d" % row)
    found = []
    for number, batch in enumerate(loader):
        found += batch["x"].tolist()
        os.write(mouth, b"%4d" % (number + 3 if number < 60 else -1))
    assert found == list(range(63))
    loader.close()
    os.close(ear)
    os.close(mouth)


def _wait(sample: int) -> int:
    time.sleep(3e-3)
    return sample


@dataclasses.dataclass
class Record:
    tensors: list[torch.Tensor]


def test_a_list_cut_from_one_tensor_travels_as_one(worker):
    pieces = transport.split(torch.arange(3000), [1000, 0, 1500, 500])
    parcel = transport.pack({"ids": pieces, "deep": [{"again": pieces}]})
    assert len(parcel._spans) == 2  # where it begins, and its size
    found = pickle.loads(pickle.dumps(parcel)).open()
    for arrived in (found["ids"], found["deep"][0]["again"]):
        assert type(arrived) is list
        assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(arrived, pieces, strict=True))


CHANGES = {
    "another list": lambda pieces: pieces[:2],
    "another order": lambda pieces: [pieces[0], pieces[2], pieces[1]],
    "a shape": lambda pieces: [pieces[0].unsqueeze_(0), *pieces[1:]],
    "other memory": lambda pieces: [
        pieces[0],
        _with_data(pieces[1], torch.full((3,), 7)),
        pieces[2],
    ],
    "another dtype": lambda pieces: [pieces[0], _with_data(pieces[1], torch.zeros(3)), pieces[2]],
    "values": lambda pieces: [pieces[0].fill_(9), *pieces[1:]],
    "strides": lambda pieces: [pieces[0], pieces[1].as_strided_((3,), (2,)), pieces[2]],
    "a smaller home": lambda pieces: [_with_data(pieces[0], torch.arange(2) + 5), *pieces[1:]],
    "something more": lambda pieces: [*pieces, torch.zeros(2)],
}


def _with_data(tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    tensor.data = data
    return tensor


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_changed_travels_as_it_is(worker, change):
    changed = CHANGES[change](transport.split(torch.arange(9), [2, 3, 4]))
    found = transport.pack([changed]).open()[0]
    assert [(a.shape, a.dtype, a.tolist()) for a in found] == [
        (b.shape, b.dtype, b.tolist()) for b in changed
    ]


def test_what_is_there_twice_arrives_as_one(worker):
    pieces = transport.split(torch.arange(9), [2, 3, 4])
    both: dict[str, Any] = {"ids": pieces, "labels": pieces}
    both["self"] = both
    found = transport.pack([both, both]).open()
    assert found[0] is found[1] is found[0]["self"]
    assert found[0]["ids"] is found[0]["labels"]


def test_what_nobody_wants_is_not_kept_until_the_turn_ends(worker):
    """A filter may drop any number of batches before there is one to send."""
    wholes = []
    for _ in range(3):
        whole = torch.arange(9)
        wholes.append(weakref.ref(whole))
        pieces = transport.split(whole, [2, 3, 4])
        del whole
    gc.collect()
    assert [each() for each in wholes] == [None] * 3
    assert len(transport.pack({"ids": pieces})._spans) == 2


def test_a_gradient_asked_for_travels(worker):
    pieces = transport.split(torch.arange(9.0), [2, 3, 4])
    pieces[1].requires_grad_()
    assert [each.requires_grad for each in transport.pack(pieces).open()] == [False, True, False]


def test_cut_tensors_travel_as_one_wherever_they_are(worker):
    record = Record(transport.split(torch.arange(9), [2, 3, 4]))
    parcel = transport.pack(record)
    assert len(parcel._spans) == 2
    assert [each.tolist() for each in parcel.open().tensors] == [[0, 1], [2, 3, 4], [5, 6, 7, 8]]


def test_functions_over_trees_know_the_list(worker):
    doubled = tree_map(lambda each: each * 2, {"ids": transport.split(torch.arange(3), [1, 2])})
    assert [each.tolist() for each in doubled["ids"]] == [[0], [2, 4]]


def test_a_sparse_tensor_put_into_the_list_travels(worker):
    pieces = transport.split(torch.arange(9), [2, 3, 4])
    pieces[1] = torch.arange(3).to_sparse()
    assert transport.pack(pieces).open()[1].to_dense().tolist() == [0, 1, 2]


@pytest.fixture
def worker(monkeypatch):
    """This process packs as a worker does."""
    arena = transport.Arena(1, 3)
    monkeypatch.setattr(transport, "_writer", None)
    transport.use_arena(arena, 0)
    yield arena
    transport._writer = None
