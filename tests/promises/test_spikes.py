"""The way past a loss spike: batches passed over and samples left out, exact on any topology and
under resumes.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.dataset import Dataset
from tests.helpers.loaders import through_json
from tests.helpers.simulate import Cluster, simulated_workers

ROWS = 180
KINDS = ("rows", "stream", "mix", "buffered", "failing", "two epochs")
TOPOLOGIES = ((1, 0), (2, 0), (3, 2), (4, 1))


def even(row: int) -> bool:
    return row % 5 != 1


def fails(row: int) -> int:
    if row % 7 == 3:
        raise ValueError(row)
    return row


def pipeline(kind: str) -> Dataset:
    data = ms.from_dataset(range(ROWS), name="a").shuffle(1)
    if kind == "stream":
        data = data.filter(even)
    if kind == "mix":
        other = ms.from_dataset(range(1000, 1000 + ROWS), name="b")
        data = ms.interleave({"a": data, "b": other}, {"a": 2, "b": 1}, name="mix")
    if kind == "buffered":
        data = data.filter(even).shuffle(3, buffer_size=48)
    if kind == "failing":
        data = data.map(fails, on_error="skip")
    if kind == "two epochs":
        data = data.repeat(2)
    return data.batch(3, collate_fn=tuple)


def ordered(kind: str, expected: list[Any]) -> int:
    """So many batches come in one order on every topology: all, and on streams those before the
    first lane ends.
    """
    return 36 if kind in ("stream", "buffered") else len(expected)


def whole(kind: str, epochs: int = 1) -> list[list[tuple[int, ...]]]:
    loader = ms.DataLoader(pipeline(kind), lanes=12)
    return [list(loader) for _ in range(epochs)]


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),
)
@given(st.data())
def test_what_is_skipped_is_what_would_have_come(data: Any) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    expected = whole(kind)[0]
    end = ordered(kind, expected)
    state: Any = None
    got: list[Any] = []
    done, passed = 0, 0
    for _ in range(data.draw(st.integers(1, 4))):
        ranks, workers = data.draw(st.sampled_from(TOPOLOGIES))
        cluster = Cluster(pipeline(kind), ranks, workers, state, lanes=12)
        for _ in range(data.draw(st.integers(1, 3))):
            left = (end - done) // ranks
            steps = data.draw(st.integers(0, min(left, 4)))
            cluster.run(steps)
            done += steps * ranks
            jump = data.draw(st.integers(0, min((end - done) // ranks, 5)))
            if jump:
                with simulated_workers():
                    for loader in cluster.loaders:
                        loader.skip(jump)
                passed += sum(map(len, expected[done : done + jump * ranks]))
                del expected[done : done + jump * ranks]
                end -= jump * ranks
        state = ms.merge_states(through_json(cluster.states()))
        got += cluster.sequence
        assert got == expected[: len(got)] and len(got) == done
        counts = Counter[str]()
        for source in ms.progress(state).sources.values():
            counts.update(source.counts)
        assert counts["skipped"] == passed
        if state["epoch"]:
            return


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),
)
@given(st.data())
def test_what_is_excluded_leaves_its_place_and_nothing_else_moves(data: Any) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    expected = whole(kind)[0]
    again = ms.DataLoader(pipeline(kind), lanes=12)
    traces = [list(again.trace()) for _ in again]
    origins = [origin for trace in traces for origin in trace]
    out: set[Any] = set()
    state: Any = None
    got: list[Any] = []
    done = 0
    met: set[Any] = set()
    for _ in range(data.draw(st.integers(1, 4))):
        ranks, workers = data.draw(st.sampled_from(TOPOLOGIES))
        cluster = Cluster(pipeline(kind), ranks, workers, state, lanes=12)
        for _ in range(data.draw(st.integers(1, 2))):
            chosen = data.draw(st.lists(st.sampled_from(origins), max_size=8))
            # One of each batch at least stays: a batch of which nothing is left does not come at
            # all.
            more = []
            for origin in chosen:
                tried = out | set(more) | {origin}
                if all(any(each not in tried for each in trace) for trace in traces):
                    more.append(origin)
            with simulated_workers():
                for loader in cluster.loaders:
                    loader.exclude(more)
                out |= set(more)
                steps = data.draw(st.integers(0, min((ordered(kind, expected) - done) // ranks, 6)))
                cluster.run(steps)
            for number in range(done, done + steps * ranks):
                got.append(
                    tuple(
                        row
                        for row, each in zip(expected[number], traces[number])
                        if each not in out
                    )
                )
                met |= out & set(traces[number])
            done += steps * ranks
        assert cluster.sequence == got[len(got) - len(cluster.sequence) :]
        state = ms.merge_states(through_json(cluster.states()))
        told = ms.progress(state)
        assert sum(source.counts.get("excluded", 0) for source in told.sources.values()) == len(met)
        assert told.samples == sum(map(len, got))
        assert set(cluster.loaders[0].excluded) == out
        if state["epoch"]:
            return


READERS = (
    {"num_workers": 0},
    {"num_workers": 2},
    {"num_workers": 2, "persistent_workers": True},
    {"num_workers": 2, "worker_type": "thread"},
)


@pytest.mark.parametrize("kind", ["rows", "stream"])
@pytest.mark.parametrize("options", READERS, ids=str)
@pytest.mark.processes
def test_a_loop_goes_on_after_skip_and_exclude_into_the_next_epoch(
    kind: str, options: dict[str, Any]
) -> None:
    first, second = whole(kind, 2)
    again = ms.DataLoader(pipeline(kind), lanes=12)
    traces = [list(again.trace()) for _ in again]
    loader = ms.DataLoader(pipeline(kind), lanes=12, **options)
    loader.skip(2)  # before anything is read
    got = []
    for batch in loader:
        got.append(batch)
        if len(got) == 2:
            loader.skip(3)
        if len(got) == 4:
            loader.exclude([traces[9][0]])
        if len(got) == 10:
            assert loader.state_dict()["steps_done"] == 15
            loader.skip(len(first) - 15 + 1)  # all that is left, and one of the next epoch
    assert got == [*first[2:4], *first[7:9], first[9][1:], *first[10:15]]
    assert loader.epoch == 1
    assert list(loader) == second[1:]
    assert loader.epoch == 2
    counts = loader.progress().sources["a"].counts
    skipped = [*first[:2], *first[4:7], *first[15:], second[0]]
    assert counts == {"excluded": 1, "skipped": sum(map(len, skipped))}
    loader.close()


def short(kind: str) -> Dataset:
    data = ms.from_dataset(range(20), name="a").shuffle(1)
    if kind == "buffered":
        data = data.filter(even).shuffle(3, buffer_size=16)
    return data.batch(3, collate_fn=tuple)


def place(loader: Any) -> Any:
    """Where a loader stands, without what it has counted and leaves out."""
    state = through_json(loader.state_dict())
    leaves = {name: json.loads(text) for name, text in state["lanes"].items() if text}
    for leaf in leaves.values():
        for counted in ("samples", "rows", "events", "crc"):
            leaf.pop(counted, None)
    return {**state, "lanes": leaves, "excluded": ""}


def three_epochs(
    make: Callable[[], Any], at: int = -1, act: Any = None
) -> tuple[list[Any], list[Any]]:
    """The batches of a rank's first three epochs, and where it stood after each; ``act(loader)``
    after number ``at``.
    """
    loader, got = make(), []
    places = [place(loader)]
    if at == 0:
        act(loader)
    while loader.epoch < 3 and len(got) < 60:
        for batch in loader:
            got.append(batch)
            places.append(place(loader))
            if len(got) == at:
                act(loader)
    return got, places


BEFORE = {
    "": lambda loader: None,
    "exclude": lambda loader: loader.exclude([("a", 77, 1)]),
    "skip": lambda loader: loader.skip(1),
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize(
    ("ranks", "remainder"), [(1, "drop"), (2, "drop"), (2, "pad"), (2, "uneven")]
)
@pytest.mark.parametrize("kind", ["rows", "buffered"])
@pytest.mark.slow
def test_skip_crosses_the_end_of_an_epoch_from_any_batch(
    kind: str, ranks: int, remainder: Any, before: str
) -> None:
    """On each rank of a loop, its last batches included: what comes and every place is as if
    nothing had been skipped.
    """
    for rank in range(ranks):

        def make(rank: int = rank) -> Any:
            return ms.DataLoader(
                short(kind), rank=rank, world_size=ranks, lanes=4, remainder=remainder
            )

        expected, places = three_epochs(make)
        for at in range(len(expected) // 2):
            for jump in (1, 2, 5):
                end = at + jump + (before == "skip")

                def act(loader: Any, jump: int = jump, end: int = end) -> None:
                    BEFORE[before](loader)
                    loader.skip(jump)
                    assert place(loader) == places[end]

                got, _ = three_epochs(make, at, act)
                assert got == expected[:at] + expected[end:], (rank, at, jump)


class Agreed:
    """`midstream.distributed.topology.Agreement` for ranks that are threads."""

    def __init__(self, group: Any, world_size: int) -> None:
        self.group = group

    def all(self, value: int) -> list[int]:
        self.group.values[self.group.own.rank] = value
        self.group.barrier.wait()
        found = list(self.group.values)
        self.group.barrier.wait()
        return found

    def least(self, value: int) -> int:
        return min(self.all(value))


@pytest.mark.parametrize("before", ["", "exclude"])
@pytest.mark.parametrize("kind", ["rows", "buffered"])
def test_skip_crosses_an_end_that_the_ranks_agree_on(kind: str, before: str) -> None:
    """``sync_end``: what the lanes of a rank have left when another is through comes first in its
    next epoch.
    """

    def both(at: int = -1, act: Any = None) -> list[tuple[list[Any], list[Any]]]:
        group = SimpleNamespace(
            values=[0, 0], barrier=threading.Barrier(2, timeout=60), own=threading.local()
        )

        def one(rank: int) -> tuple[list[Any], list[Any]]:
            group.own.rank = rank
            options = {"rank": rank, "world_size": 2, "lanes": 4, "sync_end": group}
            try:
                return three_epochs(
                    lambda: ms.DataLoader(short(kind), **options),
                    at,
                    act and (lambda loader: act(rank, loader)),
                )
            except BaseException:
                group.barrier.abort()
                raise

        with ThreadPoolExecutor(2) as ranks:
            return list(ranks.map(one, range(2)))

    with mock.patch("midstream.loader.run.Agreement", Agreed):
        whole = both()
        assert (
            len(whole[0][0])
            == len(whole[1][0])
            < len(three_epochs(lambda: ms.DataLoader(short(kind), lanes=4))[0])
        )
        for at in range(len(whole[0][0]) // 2 + 1):
            for jump in (1, 2, 4):

                def act(rank: int, loader: Any, at: int = at, jump: int = jump) -> None:
                    BEFORE[before](loader)
                    loader.skip(jump)
                    assert place(loader) == whole[rank][1][at + jump]

                for (got, _), (expected, _) in zip(both(at, act), whole):
                    assert got == expected[:at] + expected[at + jump :], (at, jump)


def test_skip_goes_on_where_a_loop_was_left() -> None:
    expected = whole("rows")[0]
    loader = ms.DataLoader(pipeline("rows"))
    for number, _ in enumerate(loader):
        if number == 1:
            break
    loader.skip(3)
    assert list(loader) == expected[5:]


def test_an_epoch_passed_over_counts_and_packed_tokens_are_no_tokens_delivered() -> None:
    documents = ms.from_dataset(
        [{"input_ids": list(range(1 + row % 7))} for row in range(90)], name="docs"
    )
    loader = ms.DataLoader(documents.pack(8), batch_size=2, lanes=6)
    batches = iter(loader)
    tokens = sum(origin.tokens for _ in zip(range(3), batches) for origin in loader.trace())
    before = loader.progress()
    loader.skip(4)
    told = loader.progress()
    assert before.tokens == told.tokens == tokens
    assert told.sources["docs"].samples == before.sources["docs"].samples
    assert told.sources["docs"].counts["tokens skipped"] > 0
    for _ in batches:
        pass
    end = loader.progress()
    assert end.tokens + end.sources["docs"].counts["tokens skipped"] == sum(
        1 + row % 7 for row in range(90)
    )
    padding, slots = end.unattributed["padding tokens"], sum(1 + row % 7 for row in range(90))
    assert end.packing_waste == padding / (padding + slots) == end.to_dict()["packing_waste"]
    assert (
        f"{end.packing_waste:.1%}" in str(end) and f"{end.packing_waste:.1%}" in end._repr_html_()
    )


def test_a_batch_without_any_sample_left_does_not_come() -> None:
    loader = ms.DataLoader(ms.from_dataset(range(9), name="n"), batch_size=3)
    loader.exclude(("n", 0, row) for row in (3, 4, 5, 7))
    assert [batch.tolist() for batch in loader] == [[0, 1, 2], [6, 8]]
    assert loader.progress().sources["n"].counts == {"excluded": 4}
    assert loader.progress().sources["n"].epochs == 1.0


def test_without_batches_single_samples_are_left_out() -> None:
    for data in (
        ms.from_dataset(range(6), name="n"),
        ms.from_dataset(range(6), name="n").filter(lambda row: True),
    ):
        loader = ms.DataLoader(data, batch_size=None, lanes=1)
        loader.exclude([("n", 0, 4), ("n", 1, 0)])
        assert list(loader) == [0, 1, 2, 3, 5]
        assert list(loader) == [1, 2, 3, 4, 5]


def test_what_cannot_be_left_out_is_refused_and_changes_nothing() -> None:
    loader = ms.DataLoader(pipeline("rows"))
    state = loader.state_dict()
    with pytest.raises(ValueError, match="no source is named 'b'; there are 'a'"):
        loader.exclude([("b", 0, 1)])
    with pytest.raises(ValueError, match="at most 4,096"):
        loader.exclude([("a", 0, row) for row in range(5000)])
    with pytest.raises(TypeError, match="exclude takes origins"):
        loader.exclude([3])
    with pytest.raises(ValueError, match="at least 0"):
        loader.exclude([("a", 0, -1)])
    with pytest.raises(ValueError, match="num_batches"):
        loader.skip(-1)
    assert loader.state_dict() == state
    ranks = [ms.DataLoader(pipeline("rows"), rank=rank, world_size=2) for rank in (0, 1)]
    ranks[1].exclude([("a", 0, 1)])
    with pytest.raises(ms.CheckpointError, match="leaves other samples out"):
        ms.merge_states([rank.state_dict() for rank in ranks])
    with pytest.raises(ms.CheckpointError, match="what it excludes"):
        loader.load_state_dict({**state, "excluded": '{"a":[[1]]}'})


@pytest.mark.parametrize(
    ("above", "name"),
    [
        (lambda batches: batches.shuffle(3, buffer_size=20), "shuffle"),
        (lambda batches: batches.flat_map(lambda batch: [batch]).map(tuple), "flat_map"),
        (
            lambda batches: batches.map(lambda found: found, batched=True, batch_size=2),
            "map_batched",
        ),
        (
            lambda batches: ms.interleave(
                {"x": batches.shuffle(3, buffer_size=20), "y": source(9)}
            ),
            "x/shuffle",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_left_out_below_what_reads_batches_again(
    stream: bool, above: Any, name: str
) -> None:
    """The batches it holds would not be what they were: a resume would have to raise
    `ReplayDiverged`.
    """
    data = source(90).filter(lambda row: True) if stream else source(90)
    pipeline = above(data.batch(3, collate_fn=tuple))
    loader = ms.DataLoader(pipeline, batch_size=None, lanes=2)
    batches = iter(loader)
    got = [next(batches) for _ in range(4)]
    state = loader.state_dict()
    with pytest.raises(ValueError, match=rf"(?s)again at '{name}', above .batch.*below the .batch"):
        loader.exclude([("a90", 0, 50)])
    assert loader.state_dict() == state and loader.excluded == []
    assert [*got, *batches] == list(ms.DataLoader(pipeline, batch_size=None, lanes=2))


def source(rows: int) -> Dataset:
    return ms.from_dataset(range(rows), name=f"a{rows}")


@pytest.mark.parametrize("above", ["filter", "take", "repeat", "mix"])
def test_what_reads_nothing_again_may_stand_above_the_batches(above: str) -> None:
    """Cut after every batch, with rows left out of batches that were read and of ones to come."""
    data = source(60).filter(lambda row: True).shuffle(1, buffer_size=12).batch(3, collate_fn=tuple)
    pipeline = {
        "filter": data.filter(lambda batch: sum(batch) % 3 < 2),
        "take": data.take(14),
        "repeat": data.repeat(2),
        "mix": ms.interleave(
            {"x": data, "y": ms.from_dataset([(9,)] * 5, name="y")}, {"x": 2, "y": 1}
        ),
    }[above]
    out = [("a60", 0, row) for row in range(0, 60, 7)]
    for at in range(0, 12, 3):
        loader = ms.DataLoader(pipeline, batch_size=None, lanes=2)
        batches = iter(loader)
        for _ in range(at):
            next(batches)
        loader.exclude(out)
        expected, states = [], [loader.state_dict()]
        for batch in batches:
            expected.append(batch)
            states.append(loader.state_dict())
        assert len(expected) > 1
        for number, state in enumerate(states):
            again = ms.DataLoader(pipeline, batch_size=None, lanes=2)
            again.load_state_dict(through_json(state))
            if again.epoch == 0:
                assert list(again) == expected[number:], (at, number)


def test_a_failure_in_a_skipped_batch_is_counted_and_not_raised() -> None:
    data = ms.from_dataset(range(30), name="n").map(fails).batch(3, collate_fn=tuple)
    expected = [tuple(row for row in range(n, n + 3) if row % 7 != 3) for n in range(0, 30, 3)]
    loader = ms.DataLoader(data)
    batches = iter(loader)
    assert next(batches) == expected[0]
    loader.skip(6)
    assert [next(batches)] == expected[7:8]
    assert loader.progress().sources["n"].failures == {"ValueError": 3}


def test_the_state_holds_sixteen_bytes_or_so_for_each() -> None:
    loader = ms.DataLoader(pipeline("rows"))
    before = len(json.dumps(loader.state_dict()))
    loader.exclude(("a", 0, row) for row in range(4096))
    assert len(json.dumps(loader.state_dict())) - before < 16 * 4096
    loader.load_state_dict(through_json(loader.state_dict()))
    assert len(loader.excluded) == 4096


def test_asked_and_real_shares_stand_side_by_side() -> None:
    one = ms.DataLoader(pipeline("rows"), batch_size=None)
    assert one.progress().sources["a"].asked is None and "asked" not in str(one.progress())
    loader = ms.DataLoader(pipeline("mix"))
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    told = loader.progress()
    assert {name: source.asked for name, source in told.sources.items()} == {"a": 2 / 3, "b": 1 / 3}
    assert told.to_dict()["a/asked"] == 2 / 3
    loader.set_weights("mix", {"a": 1, "b": 3})
    loader.skip(1)
    loader.exclude([("b", 0, 60)])  # a loop goes on after all three
    next(batches)
    assert loader.progress().sources["b"].asked == 0.75
    assert "75.0%" in str(loader.progress()) and "asked" in loader.progress()._repr_html_()
    tokens = ms.DataLoader(
        ms.interleave(
            {
                k: ms.from_dataset([{"input_ids": [1] * size}] * 40, name=k)
                for k, size in (("x", 2), ("y", 6))
            }
        ).pack(8),
        batch_size=1,
        lanes=1,
    )
    for _ in zip(range(8), tokens):
        pass
    shares = {name: source.token_share for name, source in tokens.progress().sources.items()}
    assert shares["y"] > 0.7 and sum(shares.values()) == 1.0
    assert tokens.progress().to_dict()["y/token_share"] == shares["y"]
    assert "token share" in str(tokens.progress())
