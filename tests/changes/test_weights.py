"""set_weights: exact on any topology, recorded in the state, refused where it cannot be exact."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import midstream as ms
from tests.helpers.loaders import through_json
from tests.helpers.mixes import KINDS, cluster, flat, mixed, source
from tests.helpers.simulate import Cluster

EDITS = st.lists(
    st.tuples(st.integers(0, 6), st.sampled_from([(1, 1), (1, 9), (0, 1), (3, 2)])),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)
@given(edits=EDITS, data=st.data())
@pytest.mark.slow
def test_set_weights_is_exact_on_any_chain_of_topologies(
    kind: str, edits: Any, data: st.DataObject
) -> None:
    scheduled = data.draw(st.booleans(), "scheduled")
    # So many rows that no lane drains: the order is promised until one does.
    weights = (
        ms.schedule([(0, {"web": 7, "code": 3}), (40, {"web": 1, "code": 1})])
        if scheduled
        else None
    )
    pipeline = mixed(kind, weights, rows=1200)
    done: list[Any] = []
    script: list[tuple[int, dict[str, int]]] = []
    state: Any = None
    for steps, shares in edits:
        ranks, workers = (
            data.draw(st.sampled_from([1, 2, 3, 4]), "ranks"),
            data.draw(st.integers(0, 2), "workers"),
        )
        part = cluster(pipeline, ranks, workers, state)
        part.run(steps)
        script.append((ranks * steps, dict(zip(("web", "code"), shares))))
        for loader in part.loaders:
            loader.set_weights("mix", script[-1][1])
        if data.draw(st.booleans(), "go on before saving"):
            more = data.draw(st.integers(0, 3), "more")
            with_edit = cluster(pipeline, ranks, workers, part.states())
            part_steps = len(part.steps)
            _run(part, more)
            _run(with_edit, more)
            assert part.steps[part_steps:] == with_edit.steps
            script.append((ranks * more, {}))
        done += part.sequence
        state = part.states()
    last = cluster(pipeline, 1, 0, state)
    _run(last, 12)
    done += last.sequence
    reference = cluster(pipeline, 1, 0)
    for batches, new in script:
        _run(reference, batches)
        if new:
            reference.loaders[0].set_weights("mix", new)
    _run(reference, 12)
    assert done == reference.sequence
    assert len(set(flat(done))) == len(flat(done))
    merged = ms.merge_states(state)
    changes = [
        entry["weights"] for entry in ms.weights_history(merged) if entry["by"] == "set_weights"
    ]
    assert changes == [new for _, new in script if new]
    share = ms.asked_shares(merged)["web"]
    asked = changes[-1]["web"] / sum(changes[-1].values()) * (0.75 if kind == "nested" else 1)
    assert share == pytest.approx(asked)


def _run(part: Cluster, steps: int) -> None:
    """So many steps; iterators that were told of other weights start their readers anew, without
    processes.
    """
    from tests.helpers.simulate import simulated_workers

    with simulated_workers():
        part.run(steps)


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", ["rows", "buffered"])
@pytest.mark.processes
def test_set_weights_in_a_loop_changes_the_next_batch_and_the_epochs_after(
    kind: str, workers: int, persistent: bool
) -> None:
    pipeline = mixed(kind, rows=60, stopping_strategy="all_exhausted_without_replacement")
    loader = ms.DataLoader(pipeline, lanes=4, num_workers=workers, persistent_workers=persistent)
    plain = ms.DataLoader(pipeline, lanes=4)
    before = list(plain)
    epochs: list[list[Any]] = []
    states = []
    for epoch in range(3):
        assert loader.epoch == epoch
        epochs.append([])
        for batch in loader:
            epochs[-1].append(batch)
            if epoch == 0 and len(epochs[-1]) == 5:
                loader.set_weights("mix", {"web": 1, "code": 1})
            if epoch == 0 and len(epochs[-1]) == 9:
                loader.set_weights("mix", {"web": 1, "code": 9})
                loader.set_weights("mix", {"web": 0.2, "code": 1})
            states.append((epoch, len(epochs[-1]), loader.state_dict()))
    assert epochs[0][:5] == before[:5]
    assert epochs[0][5:9] != before[5:9]
    everything = sorted(flat(before))
    assert [sorted(flat(batches)) for batches in epochs] == [everything] * 3
    again = ms.DataLoader(
        mixed(
            kind,
            {"web": 0.2, "code": 1},
            rows=60,
            stopping_strategy="all_exhausted_without_replacement",
        ),
        lanes=4,
    )
    again.set_epoch(1)
    later = list(again)
    if kind == "rows":
        assert epochs[1] == later
    assert sum(row < 10_000 for row in flat(epochs[1])[:30]) < sum(
        row < 10_000 for row in flat(before)[:30]
    )
    resumed = ms.DataLoader(pipeline, num_workers=1)
    for epoch, step, state in [
        states[4],
        states[5],
        states[8],
        states[9],
        states[len(epochs[0]) + 2],
    ]:
        resumed.load_state_dict(state)
        known = (
            9 if epoch == 0 and step < 9 else None
        )  # then weights were set that this state does not know
        assert (
            list(itertools.islice(iter(resumed), known and known - step))
            == epochs[epoch][step:known]
        )
    assert list(resumed) == epochs[2]


@pytest.mark.parametrize("kind", ["rows", "buffered"])
def test_set_weights_with_threads_and_workers_started_early(kind: str) -> None:
    found = []
    options: list[dict[str, Any]] = [
        {},
        {"prefetch_factor": 4},
        {"num_workers": 2, "worker_type": "thread"},
    ]
    for option in options:
        loader = ms.DataLoader(mixed(kind), lanes=4, **option)
        loader.start()
        loader.set_weights("mix", {"web": 1, "code": 1})
        loader.start()
        found.append([])
        for batch in loader:
            found[-1].append(batch)
            if len(found[-1]) == 8:
                loader.set_weights("mix", {"web": 1, "code": 5})
            if len(found[-1]) == 30:
                break
        loader.close()
    assert found[1:] == found[:1] * 2


def test_set_weights_after_the_last_batch_is_for_the_next_epoch() -> None:
    for kind in ("rows", "tokens"):
        pipeline = mixed(kind, rows=30)
        loader = ms.DataLoader(pipeline, lanes=2)
        total = len(list(ms.DataLoader(pipeline, lanes=2)))
        seen = 0
        for _ in loader:
            seen += 1
            if seen == total:
                loader.set_weights("mix", {"web": 1, "code": 9})
        assert (seen, loader.epoch) == (total, 1)
        assert ms.weights_history(loader.state_dict())[-1]["epoch"] == 1
        following = flat(loader)
        assert sum(row < 10_000 for row in following[:20]) <= 12 if kind == "tokens" else 3


def test_set_weights_before_the_first_batch() -> None:
    for kind in KINDS:
        loader = ms.DataLoader(mixed(kind), lanes=4)
        loader.set_weights("mix", {"web": 0, "code": 1})
        first = [row for row in flat(itertools.islice(iter(loader), 12)) if row < 20_000]
        assert min(first) >= 10_000


def test_changes_that_cannot_be_exact_are_refused_and_change_nothing() -> None:
    parts = {"web": source(0, 90), "code": source(1, 90)}
    mix = ms.interleave(parts, {"web": 7, "code": 3}, name="mix")
    good = {"web": 1, "code": 1}
    for pipeline, reason in (
        (mix.shuffle(1).batch(3), "there is a shuffle above 'mix'.*Put the shuffle below"),
        (mix.repeat(2).batch(3), "there is a repeat above 'mix'"),
        (mix.filter(bool).batch(3), "read by position below a stream.*weights_by"),
    ):
        loader = ms.DataLoader(pipeline)
        next(iter(loader))
        state = loader.state_dict()
        with pytest.raises(ValueError, match=reason):
            loader.set_weights("mix", good)
        assert loader.state_dict() == state
    loader = ms.DataLoader(mix, batch_size=3)
    with pytest.raises(ValueError, match="no mix is named 'blend'; there are 'mix'"):
        loader.set_weights("blend", good)
    with pytest.raises(ValueError, match=r"expected \['code', 'web'\], found \['web'\]"):
        loader.set_weights("mix", {"web": 1})
    with pytest.raises(ValueError, match="at least one weight is above 0"):
        loader.set_weights("mix", {"web": 0, "code": 0})
    with pytest.raises(TypeError, match="the weight of 'web' is a number"):
        loader.set_weights("mix", {"web": "1", "code": 1})  # type: ignore[dict-item]


def test_set_weights_while_a_batch_is_half_told_is_refused() -> None:
    def fail(row: int) -> int:
        if row in (4, 5):
            raise ValueError(row)
        return row

    mix = ms.interleave({"web": source(0, 60), "code": source(1, 60)}, name="mix")
    loader = ms.DataLoader(mix.map(fail).batch(4, collate_fn=tuple))
    iterator = iter(loader)
    refused, seen = 0, []
    while True:
        try:
            seen += next(iterator)
        except ms.SampleError:
            try:
                loader.set_weights("mix", {"web": 1, "code": 3})
            except ValueError as error:
                refused += 1
                assert "Call it after the next batch" in str(error)
        except StopIteration:
            break
    assert refused >= 1
    assert len(set(seen)) == len(seen)


def test_ranks_that_were_given_different_weights_do_not_merge() -> None:
    part = cluster(mixed("rows"), 2, 0)
    part.run(2)
    part.loaders[0].set_weights("mix", {"web": 1, "code": 1})
    with pytest.raises(ms.CheckpointError, match="call set_weights on every rank"):
        ms.merge_states(part.states())


def test_a_damaged_history_is_refused() -> None:
    loader = ms.DataLoader(mixed("rows"))
    loader.set_weights("mix", {"web": 1, "code": 1})
    state = loader.state_dict()
    for edits in (
        state["edits"][:-1],
        "[1]",
        '[{"mix":"mix"}]',
        state["edits"].replace('"web"', '"wet"'),
    ):
        with pytest.raises(ms.CheckpointError, match="edits"):
            ms.DataLoader(mixed("rows")).load_state_dict({**state, "edits": edits})


@pytest.mark.parametrize("kind", ["rows", "streams", "tokens"])
def test_a_load_with_other_weights_is_recorded_and_may_be_followed_by_more(kind: str) -> None:
    first = cluster(mixed(kind), 2, 0)
    first.run(4)
    for loader in first.loaders:
        loader.set_weights("mix", {"web": 1, "code": 4})
    _run(first, 3)
    after = mixed(kind, {"web": 1, "code": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = ms.DataLoader(after)
        loader.load_state_dict(first.states(), strict=False)
    second = cluster(after, 1, 0, loader.state_dict())
    _run(second, 6)
    second.loaders[0].set_weights("mix", {"web": 0, "code": 1})
    _run(second, 3)
    third = cluster(after, 2, 1, second.states())
    _run(third, 4)
    state = ms.merge_states(third.states())
    told = [(entry["by"], entry["step"], entry["weights"]) for entry in ms.weights_history(state)]
    assert told == [
        ("pipeline", 0, {"web": 7, "code": 3}),
        ("set_weights", 4, {"web": 1, "code": 4}),
        ("load_state_dict", 7, {"web": 1, "code": 1}),
        ("set_weights", 13, {"web": 0, "code": 1}),
    ]
    seen = flat(first.sequence + second.sequence + third.sequence)
    assert len(set(seen)) == len(seen)
    assert min(flat(second.sequence[6:] + third.sequence)) >= 10_000
    if kind == "rows":
        whole = flat(cluster(mixed(kind), 1, 0).loaders[0])
        for low in (0, 10_000):
            own, expected = (
                [row for row in rows if low <= row < low + 10_000] for rows in (seen, whole)
            )
            assert own[: len(expected)] == expected[: len(own)]
    middle = flat(second.sequence[:6])
    assert kind == "tokens" or abs(sum(row < 10_000 for row in middle) - 9) <= (
        1 if kind == "rows" else 6
    )


def test_a_load_with_another_schedule_counts_its_borders_from_the_start_of_the_epoch() -> None:
    first = cluster(mixed("rows"), 1, 0)
    first.run(10)
    after = mixed("rows", ms.schedule([(0, {"web": 7, "code": 3}), (60, {"web": 0, "code": 1})]))
    loader = ms.DataLoader(after)
    loader.load_state_dict(first.states(), strict=False)
    found = flat(itertools.islice(iter(loader), 20))
    assert sum(row < 10_000 for row in found[:30]) == 21
    assert min(found[30:]) >= 10_000
    later = cluster(after, 3, 1, loader.state_dict())
    later.run(3)
    assert min(flat(later.sequence)) >= 10_000


def test_weights_set_when_a_rank_has_ended_are_one_change_for_all() -> None:
    """That rank tells the next epoch, the others this one: after any step the checkpoint is whole,
    and goes on exactly.
    """
    pipeline = ms.interleave(
        {
            "web": source(0, 30).filter(lambda row: row % 4 != 1 or row < 8),
            "code": source(1, 16).filter(lambda row: True),
        },
        name="mix",
        stopping_strategy="all_exhausted_without_replacement",
    ).batch(2, collate_fn=tuple)

    def ranks(count: int, state: Any = None) -> Cluster:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Cluster(pipeline, count, 0, state, lanes=2)

    whole = ranks(2)
    whole.run()
    assert len(whole.steps[-1]) == 1  # one rank ends before the other
    for step in range(len(whole.steps)):
        for order in (1, -1):
            begun = ranks(2)
            begun.run(step)
            for loader in begun.loaders:
                loader.set_weights("mix", {"web": 5, "code": 1})
            state = ms.merge_states(through_json(begun.states())[::order])
            (_, told) = ms.weights_history(state)
            assert (told["epoch"], told["step"]) == (0, step)
            later = ranks(1 if order > 0 else 2, state)
            later.run()
            assert Counter(flat([*begun.sequence, *later.sequence])) == Counter(
                flat(whole.sequence)
            )
            assert later.states()[0]["epoch"] == 1 or order < 0
