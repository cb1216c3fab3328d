"""Any chain of ranks and workers delivers every sample exactly once."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.pipeline.single_lane import SingleLaneIterator
from tests.helpers.loaders import through_json
from tests.helpers.simulate import Cluster, run_alone

pytestmark = pytest.mark.filterwarnings("ignore:.*lanes are dealt to.*:RuntimeWarning")


def _mixed(rows: int = 600) -> ms.Dataset:
    """Random access: two shuffled sources, mixed, shuffled, in batches."""
    sources = {
        "web": ms.from_dataset(range(rows), name="web").shuffle(1),
        "code": ms.from_dataset(range(10_000, 10_000 + rows // 2), name="code").shuffle(2),
    }
    mix = ms.interleave(
        sources,
        weights={"web": 2, "code": 1},
        stopping_strategy="all_exhausted_without_replacement",
    )
    return mix.map(lambda x: x).shuffle(3).batch(4, collate_fn=tuple)


def _streamed(rows: int = 700) -> ms.Dataset:
    """A stream: filtered and shuffled in a buffer."""
    return (
        ms.from_dataset(range(rows), name="web")
        .shuffle(5)
        .filter(lambda x: x % 7)
        .shuffle(4, buffer_size=90)
        .batch(3, collate_fn=tuple)
    )


def _uneven(rows: int = 500) -> ms.Dataset:
    """A stream whose lanes end at very different steps."""
    return (
        ms.from_dataset(range(rows), name="web")
        .filter(lambda x: x % 48 > 30 or x > 300)
        .batch(2, collate_fn=tuple)
    )


def _lossy(rows: int = 300) -> ms.Dataset:
    """Random access, in which whole batches are lost."""

    def fail(x: int) -> int:
        if x % 8 in (4, 5):
            raise ValueError(x)
        return x

    return (
        ms.from_dataset(range(rows), name="web")
        .map(fail, on_error="skip")
        .batch(2, collate_fn=tuple)
    )


PIPELINES = {"mixed": _mixed, "streamed": _streamed, "uneven": _uneven, "lossy": _lossy}


def _in_step(pipeline: ms.Dataset, lanes: int) -> int:
    """How many batches of an epoch come before the first lane has drained: a rank whose lane has
    goes on with its next one.
    """
    if pipeline.random_access:
        return len(pipeline)
    return min(
        sum(1 for _ in SingleLaneIterator(pipeline.node, lane, lanes, 0)) * lanes + lane
        for lane in range(lanes)
    )


LEGS = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 3, 4, 6, 12, 24, 48]) | st.integers(1, 64),
        st.integers(0, 3),
        st.integers(0, 12),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", PIPELINES)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)
@given(lanes=st.sampled_from([12, 48]), legs=LEGS)
# Lane 45 of "streamed" drains while every rank still has a batch in every step: the order ends
# there, not at a short step.
@example(lanes=48, legs=[(4, 0, 12, True), (12, 1, 8, True)])
# Rank 2 of "lossy" loses all its batches: it is at its end before the others, also where it was so
# when it was loaded.
@example(lanes=12, legs=[(1, 0, 0, False), (1, 0, 2, False), (4, 0, 1, False), (4, 0, 1, False)])
@pytest.mark.slow
def test_any_chain_of_topologies_delivers_every_sample_exactly_once(
    name: str, lanes: int, legs: list[tuple[int, int, int, bool]]
) -> None:
    """Legs of (ranks, workers, steps, whether the states of the ranks are merged), and then one
    rank to the end.
    """
    pipeline = PIPELINES[name]()
    reference = run_alone(pipeline, lanes)
    in_step = _in_step(pipeline, lanes)
    promised = len(reference)  # so many batches are to come in the order of one rank
    seen: list[Any] = []
    state: Any = None
    for size, workers, steps, merge in legs:
        if not pipeline.random_access:
            size = (size - 1) % lanes + 1
            workers = min(workers, lanes // size)
            if size > 1:
                promised = min(promised, max(len(seen), in_step if lanes % size == 0 else 0))
        cluster = _cluster(pipeline, size, workers, state, lanes)
        cluster.run(steps)
        seen += cluster.sequence
        merged = ms.merge_states(cluster.states())
        state = merged if merge else cluster.states()
        if merged["epoch"] == 1:
            break
    else:
        cluster = _cluster(pipeline, 1, 0, state, lanes)
        cluster.run()
        seen += cluster.sequence
        merged = cluster.states()[0]
    assert merged["epoch"] == 1
    assert Counter(x for batch in seen for x in batch) == Counter(
        x for batch in reference for x in batch
    )
    told = ms.progress(merged)
    rows = {"mixed": 900, "streamed": 700, "uneven": 500, "lossy": 300}[name]
    lost = sum(
        one.filtered + one.dropped + sum(one.failures.values()) for one in told.sources.values()
    )
    assert sum(one.samples for one in told.sources.values()) + lost == rows, (
        "every row is delivered or counted as lost"
    )
    if name != "lossy":  # there ranks that lose whole batches stand at different batches
        assert seen[:promised] == reference[:promised]


def _cluster(pipeline: ms.Dataset, size: int, workers: int, state: Any, lanes: int) -> Cluster:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = lanes if state is None and (not pipeline.random_access or lanes >= size) else None
        return Cluster(pipeline, size, workers, state, lanes=asked, remainder="uneven")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_drop_gives_every_rank_as_many_batches_and_counts_the_others(ranks: int, cut: int) -> None:
    pipeline = ms.from_dataset(range(41), name="web").batch(2, collate_fn=tuple)
    first = Cluster(pipeline, 3, 0)
    first.run(cut)
    cluster = Cluster(pipeline, ranks, 0, ms.merge_states(first.states()))
    left = 21 - 3 * cut
    expected = left // ranks if ranks > 1 else left
    assert {len(loader) for loader in cluster.loaders} == {cut + expected}
    cluster.run()
    assert [len(step) for step in cluster.steps] == [ranks] * expected
    merged = ms.merge_states(cluster.states())
    assert (merged["epoch"], merged["batches"]) == (1, 0)
    told = ms.progress(merged).sources["web"]
    assert (told.samples + told.dropped, told.epochs) == (41, 1.0)


def test_pad_fills_the_last_round_with_the_first_batches_and_marks_them() -> None:
    pipeline = ms.from_dataset(range(20), name="web").batch(2, collate_fn=tuple)
    cluster = Cluster(pipeline, 4, 2, remainder="pad")
    cluster.run()
    assert cluster.sequence == [(2 * n, 2 * n + 1) for n in [*range(10), 0, 1]]
    assert [loader.trace().padded for loader in cluster.loaders] == [False, False, True, True]
    assert not any(loader.trace(1).padded for loader in cluster.loaders)
    assert [len(loader) for loader in cluster.loaders] == [3] * 4
    merged = ms.merge_states(cluster.states())
    told = ms.progress(merged).sources["web"]
    assert (merged["epoch"], told.samples, told.padded, told.dropped, told.epochs) == (
        1,
        20,
        4,
        0,
        1.0,
    )


def test_pad_of_fewer_batches_than_ranks_serves_every_rank() -> None:
    cluster = Cluster(ms.from_dataset(range(4)).batch(2, collate_fn=tuple), 5, 0, remainder="pad")
    cluster.run()
    assert cluster.sequence == [(0, 1), (2, 3), (0, 1), (2, 3), (0, 1)]


@pytest.mark.parametrize("pulled", [False, True])
def test_uneven_ranks_merge_at_every_step_and_at_the_end(pulled: bool) -> None:
    pipeline = ms.from_dataset(range(20), name="web").batch(2, collate_fn=tuple)
    reference = [(2 * n, 2 * n + 1) for n in range(10)]
    for steps in range(4):
        cluster = Cluster(pipeline, 4, 0, remainder="uneven")
        cluster.run(steps)
        if pulled and steps == 3:
            cluster.run()
        merged = ms.merge_states(cluster.states())
        assert (merged["epoch"], merged["batches"]) == ((1, 0) if steps == 3 else (0, 4 * steps))
        rest = Cluster(pipeline, 3, 0, cluster.states(), remainder="uneven")
        rest.run()
        assert cluster.sequence + rest.sequence == (
            reference if steps < 3 else reference + reference
        )
    assert [len(loader) for loader in cluster.loaders] == [3, 3, 2, 2]


@pytest.mark.parametrize("name", ["mixed", "streamed"])
def test_ranks_saved_at_different_steps_are_refused_by_step(name: str) -> None:
    cluster = Cluster(PIPELINES[name](), 2, 0)
    cluster.run(3)
    next(cluster.iterators[1])
    with pytest.raises(ms.CheckpointError, match=r"different steps: .*step 3 .*step 4.*state_at"):
        ms.merge_states(cluster.states())
    assert ms.merge_states([loader.state_at(3) for loader in cluster.loaders])["steps_done"] == 3


@pytest.mark.parametrize("name", ["mixed", "streamed"])
def test_scalars_of_another_rank_are_noticed(name: str) -> None:
    """What a checkpointer does that keeps one value of the numbers outside the lanes."""
    cluster = Cluster(PIPELINES[name](), 2, 0)
    cluster.run(3)
    next(cluster.iterators[1])
    mine, other = cluster.states()
    with pytest.raises(ms.CheckpointError, match="different steps"):
        cluster.loaders[0].load_state_dict({**other, "lanes": mine["lanes"]})


def test_a_rank_that_lost_whole_batches_stays_in_step() -> None:
    cluster = Cluster(_lossy(), 2, 0, remainder="uneven")
    cluster.run(20)
    states = cluster.states()
    assert len({state["batches"] for state in states}) == 1
    assert any('"ahead"' in lane for state in states for lane in state["lanes"].values())


def test_strict_order_refuses_ranks_that_do_not_divide_the_lanes() -> None:
    with pytest.raises(ValueError, match=r"48 lanes are dealt to 5 ranks.*1, 2, 3, 4, 6, 8"):
        Cluster(_streamed(), 5, 0, lanes=48, strict_order=True)
    with pytest.warns(
        RuntimeWarning, match="every sample comes exactly once, but batches come in another order"
    ):
        Cluster(_streamed(), 5, 0, lanes=48)
    Cluster(_streamed(), 6, 0, lanes=48, strict_order=True)
    Cluster(_mixed(), 5, 0, lanes=48, strict_order=True)


def test_more_ranks_or_workers_than_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 ranks.*2 lanes.*rank 0 of 3 is one of more"):
        Cluster(_streamed(), 3, 0, lanes=2)
    with pytest.raises(ValueError, match="4 lanes, 2 for some rank, and a worker without a lane"):
        Cluster(_streamed(), 2, 3, lanes=4)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_lost_to_errors_at_the_end_of_an_epoch_are_not_counted_as_dropped_too(
    ranks: int,
) -> None:
    def fail(x: int) -> int:
        if x >= 4:
            raise ValueError(x)
        return x

    rows = ms.from_dataset(range(13), name="web").map(fail, on_error="skip")
    cluster = Cluster(rows.batch(2, drop_last=True, collate_fn=tuple), ranks, 0, remainder="uneven")
    cluster.run()
    told = ms.progress(ms.merge_states(cluster.states())).sources["web"]
    assert (told.samples, sum(told.failures.values()), told.dropped) == (4, 8, 1)


def _lost(rows: int, lost: set[int], drop_last: bool = True) -> ms.Dataset:
    def fail(x: int) -> int:
        if x // 3 in lost:
            raise ValueError(x)
        return x

    data = ms.from_dataset(range(rows), name="web").map(fail, on_error="skip")
    return data.batch(3, drop_last=drop_last, collate_fn=tuple)


@pytest.mark.parametrize("remainder", ["drop", "pad", "uneven"])
@pytest.mark.parametrize("lost", [{0, 2, 4}, {2, 6}, {0, 3, 6, 7}, {4}])
def test_what_an_epoch_leaves_out_is_counted_once_though_a_rank_ends_first(
    remainder: str, lost: set[int]
) -> None:
    """Saved after every step, the last ones of rank 0 included, and loaded on as many ranks and on
    others, twice.
    """
    options = {"lanes": 12, "remainder": remainder}
    for rows in (26, 29):
        whole = Cluster(_lost(rows, lost), 2, 0, **options)
        whole.run()
        expected = ms.progress(ms.merge_states(whole.states())).sources["web"]
        for cut in range(len(whole.steps)):
            for ranks in (2, 3, 1):
                state = None
                for steps in (cut, 0, 1, None):
                    cluster = Cluster(
                        _lost(rows, lost), 2 if state is None else ranks, 0, state, **options
                    )
                    if cluster.epoch:
                        break
                    cluster.run(steps)
                    state = ms.merge_states(through_json(cluster.states()))
                told = ms.progress(state).sources["web"]
                if ranks == 2:
                    assert told == expected, (rows, cut)
                assert told.samples + told.dropped + sum(told.failures.values()) == rows, (
                    rows,
                    cut,
                    ranks,
                )
                assert told.dropped < 3 * (ranks if remainder == "drop" else 1)
    assert ms.merge_states(whole.states())["epoch"] == 1
    following = Cluster(_lost(rows, lost), 2, 0, ms.merge_states(whole.states()), **options)
    following.run()
    told = ms.progress(ms.merge_states(following.states())).sources["web"]
    assert (told.samples, told.dropped) == (2 * expected.samples, 2 * expected.dropped)
