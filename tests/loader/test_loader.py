"""The loader: epochs, resuming, progress, ranks, and what a trainer expects of it."""

from __future__ import annotations

import copy
import json
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torchdata.stateful_dataloader import StatefulDataLoader

import midstream as ms
from midstream.dataset import Dataset
from tests.cases import build, identify, numbers, plain
from tests.helpers.loaders import LANES, loader, through_json, whole

pytestmark = pytest.mark.filterwarnings("ignore:the loader was left after batch:UserWarning")


@pytest.mark.processes
def test_lambdas_and_closures_travel_to_spawned_workers() -> None:
    offset = 5
    ds = ms.from_dataset(range(40)).map(lambda x: x + offset).filter(lambda x: x % 2)
    assert whole(ds, 2, method="spawn") == whole(ds)


@pytest.mark.parametrize(
    ("workers", "persistent"), [(0, False), (1, False), (2, False), (1, True), (2, True)], ids=str
)
@pytest.mark.parametrize("row", ["interleave", "interleave streams"])
def test_three_epochs_with_a_save_at_every_step(row: str, workers: int, persistent: bool) -> None:
    ds = build(row)
    options: dict[str, Any] = {"persistent_workers": True} if persistent else {}
    made = loader(ds, workers, **options)
    epochs: list[list[Any]] = []
    states: list[tuple[int, int, Any]] = [(0, 0, made.state_dict())]
    for epoch in range(3):
        assert made.epoch == epoch
        epochs.append([])
        for batch in made:
            epochs[-1].append(plain(batch))
            states.append((epoch, len(epochs[-1]), through_json(made.state_dict())))
        states.append(
            (epoch, len(epochs[-1]), through_json(made.state_dict()))
        )  # after StopIteration
    made.close()
    assert epochs[0] != epochs[1]
    assert [whole(ds, workers)] == epochs[:1]
    for epoch, step, state in states:
        resumed = loader(ds)
        resumed.load_state_dict(state)
        ended = step == len(epochs[epoch])
        assert (resumed.epoch, state["steps_done"]) == ((epoch + 1, 0) if ended else (epoch, step))
        rest = [[plain(batch) for batch in resumed] for _ in range(resumed.epoch, 3)]
        assert rest == ([] if ended else [epochs[epoch][step:]]) + epochs[epoch + 1 :]


def test_the_epoch_is_over_when_nobody_pulls_stop_iteration() -> None:
    for ds in (numbers(0, 20), numbers(0, 20).filter(bool)):
        made = loader(ds)
        iterator = iter(made)
        count = len(whole(ds))
        first = [plain(next(iterator)) for _ in range(count)]
        assert made.epoch == 1
        assert made.state_dict()["epoch"] == 1
        assert made.state_dict()["steps_done"] == 0
        second = [plain(batch) for batch in made]
        assert sorted(identify(second)) == sorted(identify(first))
        assert made.epoch == 2


def test_a_trainer_that_calls_set_epoch_changes_nothing() -> None:
    ds = numbers(0, 40).shuffle(1)
    plainly = loader(ds)
    expected = [[plain(batch) for batch in plainly] for _ in range(3)]
    told = loader(ds)
    found = []
    for epoch in range(3):
        told.set_epoch(epoch)
        found.append([plain(batch) for batch in told])
        told.set_epoch(epoch + 1)
        told.set_epoch(epoch + 1)
    assert found == expected


def test_set_epoch_keeps_a_loaded_position_and_ignores_an_earlier_epoch() -> None:
    ds = numbers(0, 40).shuffle(1)
    made = loader(ds)
    epochs = [[plain(batch) for batch in made] for _ in range(3)]
    made = loader(ds)
    list(made)
    iterator = iter(made)
    for _ in range(4):
        next(iterator)
    state = made.state_dict()
    resumed = loader(ds)
    resumed.load_state_dict(state)
    resumed.set_epoch(0)
    resumed.set_epoch(7)
    assert resumed.state_dict() == state
    assert [plain(batch) for batch in resumed] == epochs[1][4:]
    with pytest.warns(UserWarning, match=r"set_epoch\(1\) is ignored"):
        resumed.set_epoch(1)
    assert [plain(batch) for batch in resumed] == epochs[2]


@pytest.mark.processes
def test_break_and_iterate_again_restarts_a_finite_epoch_with_one_warning() -> None:
    ds = numbers(0, 40).shuffle(1)
    expected = whole(ds)
    for options in ({}, {"workers": 2}, {"workers": 2, "persistent_workers": True}):
        made = loader(ds, **options)  # type: ignore[arg-type]
        for _, _ in zip(range(3), made):
            pass
        with pytest.warns(UserWarning, match=r"set_epoch\(1\)"):
            again = [plain(batch) for batch in made]
        assert again == expected
        for _, _ in zip(range(2), made):
            pass
        made.set_epoch(5)
        assert made.epoch == 5
        assert sorted(identify([plain(b) for b in made])) == sorted(identify(expected))
        made.close()


@pytest.mark.processes
def test_break_and_iterate_again_goes_on_where_an_endless_pipeline_stands() -> None:
    for ds in (numbers(0, 10).shuffle(1).repeat(), numbers(0, 30).filter(bool).repeat()):
        for options in ({}, {"workers": 2}, {"workers": 2, "persistent_workers": True}):
            made = loader(ds, **options)  # type: ignore[arg-type]
            expected = [plain(batch) for _, batch in zip(range(30), made)]
            made.close()
            made = loader(ds, **options)  # type: ignore[arg-type]
            found = []
            for count in (4, 1, 13, 12):
                for _, batch in zip(range(count), iter(made)):
                    found.append(plain(batch))
            made.close()
            assert found == expected


@pytest.mark.parametrize("row", ["interleave", "interleave streams", "everything"])
def test_state_at_answers_for_earlier_batches(row: str) -> None:
    ds = build(row)
    made = loader(ds)
    states = [made.state_dict()]
    batches = []
    for batch in made:
        batches.append(plain(batch))
        states.append(made.state_dict())
    for step, state in enumerate(states):
        assert made.state_at(step) == state
    for step in (0, 1, len(states) // 2):
        resumed = loader(ds)
        resumed.load_state_dict(made.state_at(step))
        assert [plain(batch) for batch in resumed] == batches[step:]
    with pytest.raises(ValueError, match="not kept"):
        made.state_at(len(states))


@pytest.mark.processes
def test_progress_survives_resumes_and_epochs() -> None:
    ds = build("interleave streams")
    made = loader(ds)
    for _ in made:
        pass
    total = made.progress().samples
    state = None
    for _ in range(4):
        resumed = loader(ds, 2)
        if state is not None:
            resumed.load_state_dict(state)
        for _ in zip(range(5), resumed):
            pass
        state = resumed.state_dict()
        resumed.close()
    resumed = loader(ds)
    resumed.load_state_dict(state)
    for _ in resumed:
        pass
    assert resumed.progress().to_dict() == made.progress().to_dict()
    for _ in resumed:
        pass
    assert resumed.progress().samples > total
    assert ms.progress(resumed.state_dict()) == resumed.progress()


def test_filtered_samples_are_counted_once_however_often_they_are_replayed() -> None:
    ds = numbers(0, 200).filter(lambda x: x % 2).shuffle(1, buffer_size=120)
    expected = loader(ds)
    for _ in expected:
        pass
    state = loader(ds).state_dict()
    while state["epoch"] == 0:
        part = loader(ds)
        part.load_state_dict(state)
        for _ in zip(range(2), part):
            pass
        state = part.state_dict()
    assert ms.progress(state).to_dict() == expected.progress().to_dict()
    assert expected.progress().sources["data"].filtered == 100


@pytest.mark.parametrize("workers", [0, 2])
def test_the_main_process_own_dataset_is_untouched(workers: int) -> None:
    ds = build("interleave streams")
    before = ds.state_dict()
    made = loader(ds, workers)
    for _ in zip(range(5), made):
        pass
    made.close()
    assert ds.state_dict() == before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "row", ["interleave", "interleave streams", "buffered shuffle", "batch stream", "everything"]
)
def test_a_bare_stateful_dataloader_resumes(row: str, workers: int) -> None:
    options: dict[str, Any] = {"num_workers": workers, "batch_size": None}
    made = StatefulDataLoader(build(row), **options)
    batches, states = [], []
    for batch in made:
        batches.append(plain(batch))
        states.append(through_json(made.state_dict()))
    cuts = {1, 2, len(batches) // 2, len(batches) - 1}
    for cut in sorted(cuts):
        resumed = StatefulDataLoader(build(row), **options)
        resumed.load_state_dict(states[cut - 1])
        assert [plain(batch) for batch in resumed] == batches[cut:]


def test_a_bare_stateful_dataloader_on_other_workers_is_refused_by_name() -> None:
    ds = build("interleave")
    run = iter(ds)
    next(run)
    state = run.state_dict()
    state["lane"] = [0, 2]
    with pytest.raises(ms.CheckpointError, match="num_workers=2"):
        iter(ds).load_state_dict(state)


@pytest.mark.parametrize("row", ["interleave", "interleave streams"])
def test_states_of_ranks_merge_and_load(row: str) -> None:
    ds = build(row)
    ranks = [loader(ds, rank=rank, world_size=2, remainder="uneven") for rank in range(2)]
    iterators = [iter(made) for made in ranks]
    for _ in range(3):
        for iterator in iterators:
            next(iterator)
    states = [made.state_dict() for made in ranks]
    merged = ms.merge_states(states)
    assert len(merged["lanes"]) == LANES
    expected = [[plain(batch) for batch in iterator] for iterator in iterators]
    for given in (states, merged):
        resumed = [loader(ds, rank=rank, world_size=2, remainder="uneven") for rank in range(2)]
        for made, state in zip(resumed, states):
            made.load_state_dict(given)
            assert made.state_dict() == state
        assert [[plain(batch) for batch in made] for made in resumed] == expected
    total = ms.progress(states)
    assert total.samples == sum(made.samples for made in map(ms.progress, states))


def test_drop_gives_every_rank_as_many_batches() -> None:
    ds = numbers(0, 4 * 11)
    for remainder, counts in (("drop", [3, 3, 3]), ("uneven", [4, 4, 3])):
        made = [loader(ds, rank=rank, world_size=3, remainder=remainder) for rank in range(3)]
        assert [len(one) for one in made] == counts
        assert [len(list(one)) for one in made] == counts


def test_fewer_batches_than_ranks_is_refused_by_name() -> None:
    ds = ms.from_dataset(range(8), name="small")
    for options in (
        {"rank": 0, "world_size": 4},
        {"rank": 3, "world_size": 4, "remainder": "uneven"},
    ):
        made = ms.DataLoader(ds, batch_size=4, **options)  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=r"2 batches in all.*small: from_dataset\(range, 8 rows\)"
        ):
            iter(made)


def test_fewer_shards_than_workers_or_ranks_is_refused_by_name() -> None:
    ds = ms.from_iterable(lambda shard: range(10), name="logs", num_shards=2)
    with pytest.raises(ValueError, match="'logs' has 2 shards.*split='stride'"):
        iter(ms.DataLoader(ds, batch_size=4, num_workers=3))
    with pytest.raises(ValueError, match="3 ranks.*'logs' has 2 shards"):
        iter(ms.DataLoader(ds, batch_size=4, rank=0, world_size=3))
    with pytest.raises(ValueError, match="lanes=4"):
        iter(ms.DataLoader(ds, batch_size=4, lanes=4))


def test_a_stream_shorter_than_its_readers_is_refused_by_name() -> None:
    ds = ms.from_dataset(range(9), name="small").filter(bool)
    with pytest.raises(ValueError, match="only 3 of 48 lanes have any data.*small"):
        iter(ms.DataLoader(ds, batch_size=4, num_workers=4))
    with pytest.raises(ValueError, match="only 3 of 48 lanes"):
        iter(ms.DataLoader(ds, batch_size=4, rank=3, world_size=4))


def test_empty_lanes_beside_full_ones_are_merely_drained() -> None:
    ds = ms.from_dataset(range(9), name="small").filter(lambda x: True)
    made = ms.DataLoader(ds, batch_size=4, num_workers=2)
    assert sorted(identify([plain(batch) for batch in made])) == list(range(9))


class Squares(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor(index), "y": float(index**2), "name": f"row {index}"}


def test_map_style_data_gives_torch_batches() -> None:
    theirs = list(torch.utils.data.DataLoader(Squares(), batch_size=3, drop_last=True))
    ours = list(ms.DataLoader(Squares(), batch_size=3, drop_last=True))
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs):
        assert a["x"].equal(b["x"])
        assert a["y"].equal(b["y"])
        assert a["y"].dtype == b["y"].dtype == torch.float64
        assert a["name"] == b["name"]


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 1, "multiprocessing_context": "fork"}, {"prefetch_factor": 2}]
)
@pytest.mark.processes
def test_reading_draws_nothing_from_the_generator_of_torch(options: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    made = ms.DataLoader(numbers(0, 8), batch_size=4, **options)
    assert [batch.tolist() for batch in made] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.get_rng_state().equal(before)
    made.close()


def test_without_workers_reading_happens_in_this_thread_and_nothing_of_torchdata_runs() -> None:
    seen: set[Any] = set()

    def look(sample: Any) -> Any:
        seen.add((threading.get_ident(), torch.utils.data.get_worker_info()))
        return sample

    def never(worker: int) -> None:
        raise AssertionError("there is no worker")

    made = ms.DataLoader(numbers(0, 8).map(look), batch_size=4, worker_init_fn=never, timeout=1e-9)
    assert [batch.tolist() for batch in made] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert seen == {(threading.get_ident(), None)}
    assert not isinstance(made._iterator, _BaseDataLoaderIter)


def test_shuffle_takes_the_seed_of_torch_and_the_checkpoint_keeps_it() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = ms.DataLoader(Squares(), batch_size=3, shuffle=True, num_workers=0)
    batches = [batch["x"].tolist() for _, batch in zip(range(3), made)]
    assert torch.get_rng_state().equal(before)
    state = made.state_dict()
    rest = [
        batch["x"].tolist() for batch in iter(ms.DataLoader(Squares(), batch_size=3, shuffle=True))
    ][3:]
    torch.manual_seed(6)
    resumed = ms.DataLoader(Squares(), batch_size=3, shuffle=True)
    resumed.load_state_dict(state)
    assert [batch["x"].tolist() for batch in resumed] == rest
    assert sorted(sum(batches + rest, [])) == list(range(20))


@pytest.mark.processes
def test_a_loader_rebuilt_from_its_attributes_yields_the_same_batches() -> None:
    import inspect

    names = [
        name for name in inspect.signature(ms.DataLoader.__init__).parameters if name != "self"
    ]
    makers = [
        lambda: ms.DataLoader(Squares(), batch_size=3, shuffle=True, drop_last=True, lanes=24),
        lambda: ms.DataLoader(numbers(0, 40).shuffle(3), batch_size=8, collate_fn=list),
        lambda: ms.DataLoader(
            numbers(0, 40).shuffle(3).batch(5), num_workers=2, remainder="uneven"
        ),
        lambda: ms.DataLoader(numbers(0, 40).filter(bool), batch_size=None),
        lambda: ms.DataLoader([1, 2, 3], sampler=[2, 0, 1], batch_size=2),
    ]
    for make in makers:
        made = make()
        attributes = {name: getattr(made, name) for name in names}
        if (
            attributes["batch_sampler"] is not None
        ):  # torch makes one of batch_size, and takes either
            attributes["batch_sampler"] = None
        again = ms.DataLoader(**attributes)
        assert [plain(batch) for batch in again] == [plain(batch) for batch in made]
        assert again.batch_size == made.batch_size


def test_loader_is_what_trainers_look_for() -> None:
    made = ms.DataLoader(Squares(), batch_size=3)
    assert isinstance(made, torch.utils.data.DataLoader)
    assert isinstance(made, StatefulDataLoader)
    assert isinstance(made.dataset, torch.utils.data.IterableDataset)
    assert len(made.dataset) == 20
    assert made.batch_size == 3
    with pytest.raises(TypeError, match="known only by reading"):
        len(ms.DataLoader(numbers(0, 5).filter(bool)))
    with pytest.raises(TypeError, match="no end"):
        len(ms.DataLoader(numbers(0, 5).repeat()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shuffle": True}, r"\.shuffle\(seed\)\.batch\(4\)"),
        ({"batch_size": 3}, r"already ends in \.batch\(4\)"),
        ({"drop_last": True}, r"\.batch\(4, drop_last=True\)"),
        ({"collate_fn": list}, r"\.batch\(4, collate_fn=\.\.\.\)"),
        ({"sampler": [1]}, "own order"),
        ({"in_order": False}, "in_order"),
    ],
)
def test_arguments_that_contradict_the_pipeline_are_errors_that_give_the_fix(
    options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        ms.DataLoader(numbers(0, 20).batch(4), **options)


def test_foreign_data_passes_through_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    sampler = torch.utils.data.SequentialSampler(range(6))
    with caplog.at_level("WARNING", logger="midstream"):
        made = ms.DataLoader(Squares(), sampler=sampler, batch_size=2)
    assert len(caplog.records) == 1
    assert [batch["x"].tolist() for batch in made] == [[0, 1], [2, 3], [4, 5]]
    assert "_snapshot" in made.state_dict() or "_num_yielded" in made.state_dict()
    with pytest.raises(TypeError, match="StatefulDataLoader"):
        made.progress()


def test_a_state_of_another_pipeline_is_refused_with_the_difference() -> None:
    def mix(web: int, seed: int) -> Dataset:
        parts = {"web": numbers(0, 20).shuffle(seed), "code": numbers(1, 20)}
        return ms.interleave(parts, {"web": web, "code": 3}, name="mix")

    state = loader(mix(7, 1)).state_dict()
    with pytest.raises(ms.CheckpointError, match="weights of interleave: web 7 → 5") as caught:
        loader(mix(5, 2)).load_state_dict(state)
    assert "shuffle 'web': seed 1 → 2" in str(caught.value)
    made = loader(mix(5, 2))
    before = made.state_dict()
    with pytest.raises(ms.CheckpointError):
        made.load_state_dict(state)
    assert made.state_dict() == before


def test_states_of_ranks_that_do_not_fit_are_refused() -> None:
    ds = numbers(0, 80).shuffle(1)
    ranks = [loader(ds, rank=rank, world_size=2) for rank in range(2)]
    first = [iter(made) for made in ranks]
    next(first[0])
    with pytest.raises(ms.CheckpointError, match="different steps"):
        ms.merge_states([made.state_dict() for made in ranks])
    next(first[1])
    states = [made.state_dict() for made in ranks]
    with pytest.raises(ms.CheckpointError, match="6 of 12 lanes are missing"):
        ms.merge_states(states[:1])
    with pytest.raises(ms.CheckpointError, match="two of the states"):
        ms.merge_states([states[0], states[0]])
    with pytest.raises(ms.CheckpointError, match="one rank of several"):
        loader(ds).load_state_dict(states[0])


def test_load_after_iter_leaves_the_old_iterator_behind() -> None:
    ds = numbers(0, 40).shuffle(1)
    made = loader(ds)
    expected = whole(ds)
    old = iter(made)
    next(old)
    state = made.state_dict()
    next(old)
    made.load_state_dict(state)
    with pytest.raises(RuntimeError, match="left behind"):
        next(old)
    assert [plain(batch) for batch in made] == expected[1:]


def test_state_dict_before_iter_starts_no_worker() -> None:
    made = loader(numbers(0, 40), 2)
    made.state_dict()
    assert made._iterator is None
    made.load_state_dict(made.state_dict())
    made.state_dict()
    assert made._iterator is None


def test_numbers_in_the_global_state_stay_json() -> None:
    ds = ms.from_dataset(np.arange(40)).take(np.int64(30)).shuffle(np.int64(3))
    made = ms.DataLoader(ds, batch_size=4)
    next(iter(made))
    json.dumps(made.state_dict())
    json.dumps(ds.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_what_drop_last_leaves_out_is_counted(workers: int) -> None:
    for ds, count in ((numbers(0, 43), 3), (numbers(0, 83).filter(bool), None)):
        made = loader(ds, workers, drop_last=True)
        delivered = sum(len(batch) for _ in range(2) for batch in made)
        dropped = made.progress().sources["data"].dropped
        assert dropped == (2 * count if count is not None else 2 * 82 - delivered)
        made.close()
    mix = ms.interleave({"web": numbers(0, 43), "code": numbers(1, 43)})
    made = loader(mix, workers, drop_last=True)
    delivered = sum(len(batch) for batch in made)
    assert made.progress().unattributed == {"dropped": len(mix) - delivered}
    made.close()


@pytest.mark.parametrize(("count", "size"), [(100, 100_000), (10_000, 10)])
def test_a_full_buffer_of_any_samples_leaves_the_state_small(count: int, size: int) -> None:
    """Three sources, the buffer full, lanes 1 and 12: at most 1 KB a lane and 64 bytes for each
    source.
    """
    parts = {name: ms.from_dataset(range(3 * count)).shuffle(1) for name in "abc"}
    ds = (
        ms.interleave(parts)
        .map(lambda row: {"id": row, "data": bytes(size)})
        .filter(lambda row: True)
    )
    for lanes in (1, 12):
        made = ms.DataLoader(
            ds.shuffle(2, buffer_size=count), batch_size=4, lanes=lanes, collate_fn=list
        )
        iterator = iter(made)
        for _ in range(12):
            next(iterator)
        state = made.state_dict()
        assert max(map(len, state["lanes"].values())) <= 1024 + 3 * 64
        resumed = ms.DataLoader(
            ds.shuffle(2, buffer_size=count), batch_size=4, lanes=lanes, collate_fn=list
        )
        resumed.load_state_dict(state)
        assert [row["id"] for row in next(iter(resumed))] == [row["id"] for row in next(iterator)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("row", ["interleave", "interleave streams", "everything"])
def test_a_state_taken_in_a_signal_handler_restores_what_follows(row: str, workers: int) -> None:
    """Trainers save inside signal handlers, which run between any two steps of the interpreter."""
    import signal
    import sys

    ds = build(row)
    expected = whole(ds)
    made = loader(ds, workers)
    states: list[tuple[int, Any]] = []
    handed: list[Any] = []

    def handler(signum: int, frame: Any) -> None:
        states.append((len(handed), made.state_dict()))

    before = signal.signal(signal.SIGALRM, handler)
    interval = sys.getswitchinterval()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
        for batch in made:
            handed.append(plain(batch))
            if len(handed) == len(expected):
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.setswitchinterval(interval)
        made.close()
    assert handed == expected
    assert states
    for seen, state in states[:: max(1, len(states) // 40)]:
        resumed = loader(ds)
        resumed.load_state_dict(through_json(state))
        if state["epoch"] == 1:
            assert seen >= len(expected) - 1
            continue
        # The handler may have run after a batch was counted and before the loop had it in hand.
        assert state["steps_done"] in (seen, seen + 1)
        assert [plain(batch) for batch in resumed] == expected[state["steps_done"] :]


def test_a_delivery_that_is_interrupted_half_way_is_undone() -> None:
    """Whatever raises inside ``next()``, at any line (an alarm, say): the state is as before it."""
    import sys

    for row in ("interleave", "interleave streams"):
        ds = build(row)
        expected = whole(ds)
        interrupted = 0
        for target in range(1, 400, 2):
            made = loader(ds)
            iterator = iter(made)
            next(iterator)
            state = made.state_dict()
            lines = 0

            def trace(frame: Any, event: str, arg: Any) -> Any:
                nonlocal lines
                if frame.f_code.co_filename.endswith(("loader/position.py", "loader/iterator.py")):
                    lines += event == "line"
                    if lines == target:
                        raise MemoryError("interrupted")
                    return trace
                return None

            before = sys.gettrace()
            sys.settrace(trace)
            done = 1
            try:
                assert (
                    plain(next(iterator)) == expected[1]
                )  # what was fetched before the interruption is still handed out
                done = 2
            except MemoryError:
                interrupted += 1
            finally:
                sys.settrace(before)
            if lines < target:
                break
            if done == 1:
                assert made.state_dict() == state, f"interrupted at line {target}"
            made.load_state_dict(made.state_dict())
            assert [plain(batch) for batch in made] == expected[done:]
        assert interrupted > 20


def test_the_log_goes_back_more_than_a_thousand_batches_and_says_when_it_ends() -> None:
    made = ms.DataLoader(ms.from_dataset(range(3000)).shuffle(1), batch_size=1)
    states = [made.state_dict()]
    for _ in made:
        states.append(made.state_dict())
    for step in (3000, 2999, 2500, 1976):
        assert made.state_at(step) == states[step]
    with pytest.raises(ValueError, match="there are those after batch 1976 to 3000"):
        made.state_at(1975)


def test_a_copy_of_a_loader_moves_by_itself() -> None:
    def make() -> ms.DataLoader:
        return ms.DataLoader(ms.from_dataset(range(24)), batch_size=4)

    loader = make()
    batches = iter(loader)
    next(batches), next(batches)
    other = copy.copy(loader)
    assert other.state_dict() == loader.state_dict()
    other.load_state_dict(make().state_dict())
    other.world_size, other.rank = 2, 1
    assert [batch.tolist() for batch in other] == [[4, 5, 6, 7], [12, 13, 14, 15], [20, 21, 22, 23]]
    assert (loader.state_dict()["steps_done"], len(loader)) == (2, 6)
    assert next(batches).tolist() == [8, 9, 10, 11]
