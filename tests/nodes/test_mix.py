"""Schedules, mixing by tokens, and weights that change while a run goes on: exact at every cut, on
any topology.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.dataset import Dataset
from midstream.nodes.mix.interleave import Interleave
from midstream.pipeline.single_lane import SingleLaneIterator
from tests.helpers.loaders import through_json
from tests.helpers.simulate import Cluster

STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")
GOLDEN = Path(__file__).parent.parent / "golden" / "mixing-1.json"
NAMES = ("web", "code", "math")


def source(k: int, count: int) -> Dataset:
    return ms.from_dataset(range(10_000 * k, 10_000 * k + count), name=NAMES[k])


def keep(row: int) -> bool:
    return row % 10 != 3


def tokens(row: int) -> int:
    return (row * 7) % 41


def mixed(kind: str, weights: Any = None, rows: int = 240, **options: Any) -> Dataset:
    """A mix of two sources, named "mix", by positions ("rows"), as a stream, by tokens, or below
    other nodes.
    """
    parts: dict[str, Dataset] = {
        "web": source(0, rows).shuffle(1),
        "code": source(1, rows).shuffle(2),
    }
    if kind != "rows":
        parts = {name: part.filter(keep) for name, part in parts.items()}
    by = {"weights_by": tokens} if kind in ("tokens", "buffered") else {}
    mix = ms.interleave(parts, weights or {"web": 7, "code": 3}, name="mix", **by, **options)
    if kind == "buffered":
        mix = mix.map(int).shuffle(5, buffer_size=60).flat_map(lambda row: [row])
    if kind == "nested":
        mix = ms.interleave({"inner": mix, "math": source(2, rows)}, {"inner": 3, "math": 1})
    return mix.batch(3, collate_fn=tuple)


KINDS = ("rows", "streams", "tokens", "buffered", "nested")


def flat(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch]


# -- closed forms against a reading step by step --------------------------------------------------------------------------

mixes = st.integers(1, 4).flatmap(
    lambda k: st.tuples(
        st.lists(st.integers(0, 25), min_size=k, max_size=k),
        st.lists(
            st.tuples(
                st.integers(1, 30),
                st.lists(st.sampled_from([1, 1, 2, 0, 5]), min_size=k, max_size=k).filter(any),
            ),
            min_size=1,
            max_size=4,
        ),
    )
)


def step_by_step(
    ds: Dataset, lengths: list[int], lane: int | None = None, share: Any = int
) -> list[tuple[int, int]]:
    """What a mix gives by its definition: dataset and row, counted over its passes."""
    mix = ds.node
    assert isinstance(mix, Interleave)
    strategy = mix.stopping_strategy
    k, out, taken, phase = len(lengths), [], [0] * len(lengths), 0
    borders = [share(border) for border, _ in mix.phases]
    weights = [[weight for _, weight in pairs] for _, pairs in mix.phases]
    pick = 0
    while True:
        gone = [taken[c] >= lengths[c] for c in range(k)]
        while phase + 1 < len(borders) and len(out) >= borders[phase + 1]:
            phase, pick = phase + 1, 0
        here = [c for c in range(k) if weights[phase][c]]
        to_come = [c for c in range(k) if any(w[c] for w in weights[phase:])]
        if strategy == "first_exhausted" and any(gone[c] for c in here):
            return out
        if strategy != "first_exhausted" and all(gone[c] for c in to_come):
            return out
        if strategy == "all_exhausted_without_replacement" and all(gone[c] for c in here):
            if phase + 1 == len(borders):
                return out
            phase, pick = phase + 1, 0
            continue
        picks = mix.picks(phase)
        block, inside = divmod(pick, picks.block)
        chosen = int(picks.of(int(picks.choose(block, 0 if lane is None else 1 + lane)[0]))[inside])
        pick += 1
        if strategy == "all_exhausted_without_replacement" and gone[chosen]:
            continue
        out.append((chosen, taken[chosen]))
        taken[chosen] += 1
        if strategy == "all_exhausted" and len(out) > 3000:
            return out


def _make(
    lengths: list[int], steps: list[tuple[int, list[int]]], strategy: Any, seed: int, stream: bool
) -> Dataset:
    names = [f"s{c}" for c in range(len(lengths))]
    borders = [0, *itertools.accumulate(length for length, _ in steps[:-1])]
    plan = ms.schedule(
        [(border, dict(zip(names, weights))) for border, (_, weights) in zip(borders, steps)]
    )
    parts: dict[str, Dataset] = {
        name: ms.from_dataset([100 * c + row for row in range(length)], name=name)
        for c, (name, length) in enumerate(zip(names, lengths))
    }
    if stream:
        parts = {name: part.filter(lambda row: True) for name, part in parts.items()}
    return ms.interleave(parts, plan, seed=seed, stopping_strategy=strategy)


@settings(max_examples=250, deadline=None)
@given(mixes, st.sampled_from(STRATEGIES), st.integers(0, 20))
def test_a_schedule_by_position_is_its_reading_step_by_step(
    made: Any, strategy: Any, seed: int
) -> None:
    lengths, steps = made
    mix = _make(lengths, steps, strategy, seed, stream=False)
    if strategy == "all_exhausted" and any(
        length == 0 and any(weights[c] for _, weights in steps) for c, length in enumerate(lengths)
    ):
        with pytest.raises(ValueError, match="has no rows"):
            len(mix)
        return
    expected = step_by_step(mix, lengths)
    assert len(mix) == len(expected)
    assert list(mix) == [100 * c + row % max(1, lengths[c]) for c, row in expected]
    layout = mix.node.layout()
    for position in range(0, len(expected) + 1, 7):
        counts = Counter(c for c, _ in expected[:position])
        assert layout.counts(position).tolist() == [counts[c] for c in range(len(lengths))]


@settings(max_examples=150, deadline=None)
@given(mixes, st.integers(0, 20), st.sampled_from([(0, 1), (1, 3), (0, 2)]))
def test_a_schedule_of_streams_is_its_reading_step_by_step_in_every_lane(
    made: Any, seed: int, lane: tuple[int, int]
) -> None:
    lengths, steps = made
    mix = _make(lengths, steps, "all_exhausted_without_replacement", seed, stream=True)
    index, lanes = lane
    own = [
        [100 * c + row for row in range(index, length, lanes)] for c, length in enumerate(lengths)
    ]
    expected = step_by_step(
        mix, list(map(len, own)), index, lambda border: border // lanes + (index < border % lanes)
    )
    assert list(SingleLaneIterator(mix.node, index, lanes, 0)) == [
        own[c][row] for c, row in expected
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=30), min_size=1, max_size=5),
    st.lists(st.integers(1, 9), min_size=5, max_size=5),
    st.integers(0, 9),
    st.integers(0, 4),
)
def test_by_tokens_the_source_furthest_behind_comes_next(
    sizes: list[list[int]], weights: list[int], seed: int, lane: int
) -> None:
    names = [f"s{c}" for c in range(len(sizes))]
    parts = {
        name: ms.from_dataset([(c, size) for size in sizes[c]], name=name)
        for c, name in enumerate(names)
    }
    mix = ms.interleave(
        parts, dict(zip(names, weights)), seed=seed, weights_by=lambda sample: sample[1]
    )
    given, total = np.zeros(len(sizes)), sum(weights[: len(sizes)])
    shares = np.array(weights[: len(sizes)]) / total
    longest = [max(size) for size in sizes]
    found = list(SingleLaneIterator(mix.node, 0, 1, lane))
    for c, size in found:
        behind = shares * given.sum() - given
        assert behind[c] == behind.max()
        given[c] += size
        assert (given - shares * given.sum() <= np.array(longest) + 1e-6).all()
    left = Counter(c for c, _ in found)
    assert any(
        left[c] == len(size) for c, size in enumerate(sizes)
    )  # it ended because one had run out


# -- tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [4])
def test_short_and_long_documents_are_mixed_by_tokens(lanes: int) -> None:
    """1:1 between documents of 50 and of 5,000 tokens, nine of ten of one dropped by its own
    filter.
    """
    short = ms.from_dataset(range(60_000), name="short").filter(lambda row: row // 4 % 10 == 0)
    long = ms.from_dataset(range(100_000, 100_080), name="long")
    mix = ms.interleave(
        {"short": short, "long": long}, weights_by=lambda row: 5000 if row >= 100_000 else 50
    )
    runs = [SingleLaneIterator(mix.node, lane, lanes, 0) for lane in range(lanes)]
    total = np.zeros(2)
    given = np.zeros((lanes, 2))
    documents = 0
    for step in range(1000):
        for lane, run in enumerate(runs):
            row = next(run)
            kind = int(row >= 100_000)
            given[lane, kind] += (50, 5000)[kind]
            total[kind] += (50, 5000)[kind]
            documents += 1
            if step >= 20:
                assert abs(given[lane, 0] - given[lane].sum() / 2) <= 5000
            if documents > 20 * lanes:
                assert abs(total[0] - total.sum() / 2) <= 4 * 5000
    assert given[:, 1].min() >= 5 * 5000


def test_what_cannot_be_counted_is_one_failed_sample() -> None:
    parts = {"web": ms.from_dataset([3, -1, 2, 5]), "code": ms.from_dataset([1, 1, 1, 1, 1, 1])}
    run = SingleLaneIterator(
        ms.interleave(
            parts, weights_by=lambda row: row, stopping_strategy="all_exhausted_without_replacement"
        ).node,
        0,
        1,
        0,
    )
    found, errors = [], 0
    while True:
        try:
            found.append(next(run))
        except ms.SampleError as error:
            errors += 1
            assert "whole numbers of at least 0" in str(error)
        except StopIteration:
            break
    assert (sorted(found), errors) == ([1, 1, 1, 1, 1, 1, 2, 3, 5], 1)


def test_a_column_may_be_counted_by_its_length() -> None:
    short = ms.from_dataset([{"text": "ab"} for _ in range(50)])
    long = ms.from_dataset([{"text": "abcdefghij"} for _ in range(50)])
    found = list(ms.interleave({"short": short, "long": long}, weights_by="text"))[:36]
    assert Counter(len(sample["text"]) for sample in found) == {2: 30, 10: 6}


# -- schedules on every topology -------------------------------------------------------------------------------------------

PLAN = [(0, {"web": 7, "code": 3}), (100, {"web": 1, "code": 1}), (190, {"web": 1, "code": 9})]


def cluster(pipeline: Dataset, ranks: int, workers: int, state: Any = None) -> Cluster:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Cluster(
            pipeline, ranks, workers, state, lanes=None if state else 12, remainder="uneven"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_crossing_its_border_in_a_batch_resumes_around_it(kind: str) -> None:
    """100 is in the middle of batch 33 (and of a lane's batch, on streams): before, on and after
    it, other topologies.
    """
    by_tokens = kind in ("tokens", "buffered")
    plan = ms.schedule(
        [(20 * border if by_tokens else border, weights) for border, weights in PLAN]
    )
    pipeline = mixed(kind, plan)
    whole = cluster(pipeline, 1, 0)
    whole.run()
    reference = whole.sequence
    for step in (0, 15, 16, 17, 22, 31, 33, 34):
        first = cluster(pipeline, 2, 1)
        first.run(step)
        second = cluster(pipeline, 3, 2, first.states())
        second.run(1)
        third = cluster(pipeline, 1, 3, second.states())
        third.run(14)
        found = first.sequence + second.sequence + third.sequence
        assert len(found) == 2 * step + 17
        assert found == reference[: len(found)], f"resumed after step {step}"
    if kind == "rows":
        shares = [
            sum(row < 10_000 for row in flat(reference)[a:b]) for a, b in ((0, 100), (100, 190))
        ]
        assert shares == [70, 45]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_a_schedule_resumes_with_real_workers_at_every_batch_around_its_border(
    kind: str, workers: int
) -> None:
    pipeline = mixed(
        kind, ms.schedule([(0, {"web": 7, "code": 3}), (23, {"web": 1, "code": 9})]), rows=40
    )
    reference = list(ms.DataLoader(pipeline, lanes=4))
    loader = ms.DataLoader(pipeline, lanes=4, num_workers=workers)
    states = [loader.state_dict(), *(loader.state_dict() for _ in loader)]
    resumed = ms.DataLoader(pipeline, num_workers=2 - workers)
    for step in (6, 7, 8):
        resumed.load_state_dict(states[step])
        assert list(resumed) == reference[step:]


# -- weights that change on the way ----------------------------------------------------------------------------------------

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
        (mix.filter(bool).batch(3), "read by position under a stream.*weights_by"),
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


# -- what never counts anything --------------------------------------------------------------------------------------------


def breaks(row: int) -> int:
    raise ValueError(row)


def counts_nothing(kind: str) -> Dataset:
    """Web fails, is filtered or counts 0, in all its rows or (code's first pass apart) after a
    while; code is 12 rows.
    """
    web = source(0, 7).shuffle(1).filter(lambda row: kind != "filtered")
    if kind in ("failing", "failing by position"):
        web = (source(0, 7) if kind == "failing by position" else web).map(
            breaks, on_error="skip", max_errors=99
        )
    by = breaks if kind == "uncountable" else lambda row: 0
    mix = ms.interleave(
        {"web": web, "code": source(1, 12).filter(lambda row: True)},
        {"web": 3, "code": 1},
        weights_by=lambda row: 2 if row >= 10_000 else by(row),
        stopping_strategy="all_exhausted",
    )
    return mix.batch(2, collate_fn=tuple)


@pytest.mark.parametrize("kind", ["failing", "failing by position", "filtered", "zero"])
@pytest.mark.parametrize("lanes", [1, 4])
def test_what_counts_nothing_in_a_whole_pass_does_not_start_over(kind: str, lanes: int) -> None:
    """Else it would be furthest below its share for ever, and the mix would never end."""
    loader = ms.DataLoader(counts_nothing(kind), lanes=lanes)
    states = [loader.state_dict()]
    batches = []
    for batch in itertools.islice(loader, 50):
        batches.append(batch)
        states.append(loader.state_dict())
    assert loader.epoch == 1  # it ended
    rows = Counter(flat(batches))
    assert {row for row in rows if row >= 10_000} == set(range(10_000, 10_012))
    assert all(count == 1 for count in rows.values())
    assert {row for row in rows if row < 10_000} == (set(range(7)) if kind == "zero" else set())
    for done, state in enumerate(states[:-1]):
        again = ms.DataLoader(counts_nothing(kind), lanes=lanes)
        again.load_state_dict(through_json(state))
        assert list(again) == batches[done:]
        assert again.state_dict() == states[-1]


def test_what_can_never_be_counted_fails_once_each_and_the_mix_ends() -> None:
    run, errors, found = SingleLaneIterator(counts_nothing("uncountable").node, 0, 1, 0), 0, []
    while errors <= 7:
        try:
            found.append(next(run))
        except ms.SampleError:
            errors += 1
        except StopIteration:
            break
    assert (errors, sorted(flat(found))) == (7, list(range(10_000, 10_012)))


# -- arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [[2, 1], [2], [], (0.7, 0.3), np.array([2, 1]), 2, "web", [("web", 2), ("code", 1)]]
)
def test_weights_without_names_are_refused_for_what_they_are(weights: Any) -> None:
    with pytest.raises(
        TypeError, match=r"interleave takes weights by name.*\{'web': 1, 'code': 1\}.*found "
    ):
        ms.interleave({"web": source(0, 9), "code": source(1, 9)}, weights)
    with pytest.raises(TypeError, match="interleave takes datasets by name.*found list"):
        ms.interleave([source(0, 9), source(1, 9)], weights)  # type: ignore[arg-type]


def test_weights_of_other_names_are_told_whatever_the_names_are() -> None:
    with pytest.raises(ValueError, match=r"expected \['code', 'web'\], found \[0, 'web'\]"):
        ms.interleave({"web": source(0, 9), "code": source(1, 9)}, {"web": 1, 0: 2})  # type: ignore[dict-item]


# -- passes in passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_passes_nested_too_deep_are_refused_before_anything_is_read(stream: bool) -> None:
    """They are numbered in 64 bits: one more factor, and it was an epoch in the middle of a run
    that could not be read.
    """

    def part(k: int) -> Dataset:
        data = source(k, 3 + k)
        return data.filter(lambda row: True) if stream else data

    two = ms.interleave({"web": part(0), "code": part(1)}, stopping_strategy="all_exhausted")
    inner = ms.interleave(
        {"inner": two, "math": part(2)}, stopping_strategy="all_exhausted", name="outer"
    )
    for pipeline in (inner.repeat(2).repeat(), inner.repeat(1 << 7)):
        if stream:
            path = "repeat > outer > inner/interleave: endless passes"
            with pytest.raises(
                ValueError,
                match=path.replace("repeat >", "repeat#2 > repeat >")
                if pipeline.node.infinite
                else path,
            ):
                ms.DataLoader(pipeline, batch_size=2, lanes=1)
        else:  # by position it is known how many passes there are
            assert next(iter(ms.DataLoader(pipeline, batch_size=None))) >= 0
    deepest = ms.DataLoader(inner.repeat(1 << 6), batch_size=2, lanes=1)
    deepest.set_epoch((1 << 16) - 1)
    assert len(list(itertools.islice(deepest, 40))) == 40


# -- ranks that end before others -------------------------------------------------------------------------------------------


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


# -- below concatenate --------------------------------------------------------------------------------------------------


def _planned(phases: Any, strategy: Any) -> Dataset:
    parts = {"web": source(0, 20).shuffle(1), "code": source(1, 12)}
    return ms.interleave(parts, ms.schedule(phases), name="mix", stopping_strategy=strategy)


def _one_after_the_other(mix: Dataset, part: str, batched: bool) -> Any:
    """The mix between two others, batch by batch across their borders or each in batches of its
    own.
    """
    part_ = {"mix": mix, "map": mix.map(int), "take": mix.take(9), "skip": mix.skip(4)}[part]
    parts = [
        ms.from_dataset(range(-7, 0), name="before"),
        part_,
        ms.from_dataset(range(90_000, 90_011), name="after"),
    ]
    if batched:
        return ms.DataLoader(ms.concatenate([each.batch(2, collate_fn=tuple) for each in parts]))
    return ms.DataLoader(ms.concatenate(parts), batch_size=3, collate_fn=tuple)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["mix", "map", "take", "skip"]),
    st.booleans(),
    st.sampled_from(STRATEGIES),
    st.lists(
        st.tuples(st.integers(0, 14), st.sampled_from([(1, 1), (1, 9), (5, 0)])),
        min_size=1,
        max_size=3,
    ),
)
def test_below_concatenate_weights_change_as_a_schedule_says(
    part: str, batched: bool, strategy: Any, changes: list[tuple[int, tuple[int, int]]]
) -> None:
    """From the first row of the mix that was not delivered; when there is none, in the next epoch."""
    plan: list[tuple[int, dict[str, int]]] = [(0, {"web": 2, "code": 1})]
    loader = _one_after_the_other(_planned(plan, strategy), part, batched)
    loop, got = iter(loader), []
    for steps, (web, code) in changes:
        got += itertools.islice(loop, steps)
        if loader.epoch:
            break
        given = sum(0 <= row < 90_000 for row in flat(got)) + 4 * (part == "skip")
        weights = {"web": web, "code": code}
        loader.set_weights("mix", weights)
        if given < len(_planned(plan, strategy)):
            plan = [*(phase for phase in plan if phase[0] < given), (given, weights)]
    got += loop
    assert got == list(_one_after_the_other(_planned(plan, strategy), part, batched))
    last = ms.weights_history(loader.state_dict())[-1]["weights"]
    expected = _one_after_the_other(
        _planned([(0, last if isinstance(last, dict) else plan[0][1])], strategy), part, batched
    )
    expected.set_epoch(1)
    assert list(loader) == list(expected)


# -- max_epochs ------------------------------------------------------------------------------------------------------------


def test_max_epochs_end_the_mix_or_share_the_weight() -> None:
    parts = {"web": source(0, 20).shuffle(1), "code": source(1, 30), "math": source(2, 50)}
    for stream in (False, True):
        made = {
            name: part.filter(lambda row: True) if stream else part for name, part in parts.items()
        }
        stop = list(ms.interleave(made, {"web": 2, "code": 1, "math": 1}, max_epochs={"web": 2}))
        assert sorted(row for row in stop if row < 10_000) == sorted([*range(20), *range(20)])
        assert stop[:10] != stop[20:30]
        share = list(
            ms.interleave(
                made,
                {"web": 2, "code": 1, "math": 1},
                max_epochs={"web": 1, "code": 2, "math": 1},
                then="share",
            )
        )
        assert Counter(row // 10_000 for row in share) == {0: 20, 1: 60, 2: 50}
        alone = share[45:100]  # web is through after 20 of 40: the others have equal weights
        assert abs(sum(row >= 20_000 for row in alone) - len(alone) / 2) <= 3
        endless = ms.interleave(made, max_epochs={"web": 1}, then="share")
        assert Counter(row // 10_000 for row in itertools.islice(iter(endless), 500))[0] == 20
        with pytest.raises(TypeError, match="no end|only by reading"):
            len(endless)


def test_a_lane_without_rows_of_what_ends_the_mix_ends() -> None:
    for by in (None, tokens):
        mix = ms.interleave(
            {"web": source(0, 5).filter(keep), "code": source(1, 30).filter(keep)},
            max_epochs={"web": 2},
            weights_by=by,
        )
        found = Counter(flat(ms.DataLoader(mix, batch_size=3, lanes=12, collate_fn=tuple)))
        assert all(found[row] == 2 for row in range(5) if keep(row))


def test_max_epochs_that_contradict_are_refused() -> None:
    parts = {"web": source(0, 20), "code": source(1, 30)}
    with pytest.raises(ValueError, match="takes no stopping_strategy"):
        ms.interleave(parts, max_epochs=2, stopping_strategy="all_exhausted")
    with pytest.raises(ValueError, match="by the names of the datasets"):
        ms.interleave(parts, max_epochs={"wet": 2})
    with pytest.raises(ValueError, match="at least 1; found 0"):
        ms.interleave(parts, max_epochs=0)
    with pytest.raises(ValueError, match="'web' never ends"):
        ms.interleave({**parts, "web": parts["web"].repeat()}, max_epochs=2)
    with pytest.raises(ValueError, match="then= says what follows max_epochs"):
        ms.interleave(parts, then="stop")


@pytest.mark.parametrize(
    ("phases", "error"),
    [
        ([], TypeError),
        ({0: {"a": 1}}, TypeError),
        ([(0, 1)], TypeError),
        ([(0.5, {"a": 1})], TypeError),
        ([(1, {"a": 1})], ValueError),
        ([(0, {"a": 1}), (0, {"a": 1})], ValueError),
        ([(0, {"a": 1}), (9, {"a": 1}), (5, {"a": 1})], ValueError),
    ],
)
def test_schedules_that_are_none_are_refused(phases: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="schedule"):
        ms.schedule(phases)
    with pytest.raises(ValueError, match="names of the datasets"):
        ms.interleave({"a": source(0, 5)}, ms.schedule([(0, {"a": 1}), (9, {"b": 1})]))


# -- size, and orders frozen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [None, tokens])
def test_states_of_a_hundred_sources_stay_within_their_bound(by: Any) -> None:
    names = [f"source{index:03d}" for index in range(100)]
    weights = {name: 1 + index for index, name in enumerate(names)}
    plan = ms.schedule([(0, weights), (5000, dict.fromkeys(names, 1))])
    parts: dict[str, Dataset] = {
        name: ms.from_dataset(range(10_000 * index, 10_000 * index + 5000), name=name).shuffle(
            index
        )
        for index, name in enumerate(names)
    }
    if by is None:
        parts = {name: part.filter(keep) for name, part in parts.items()}
    loader = ms.DataLoader(ms.interleave(parts, plan, weights_by=by), batch_size=64, lanes=2)
    iterator = iter(loader)
    for _ in range(150):
        next(iterator)
    loader.set_weights("interleave", weights)
    for _ in range(10):
        next(iterator)
    for text in loader.state_dict()["lanes"].values():
        lane = json.loads(text)["lane"]
        assert len(json.dumps(lane, separators=(",", ":"))) <= 1024 + 64 * 100


def _orders() -> dict[str, Any]:
    plan = ms.schedule(
        [(0, {"web": 6, "code": 3, "math": 1}), (40, {"web": 1, "code": 1, "math": 1})]
    )
    parts: dict[str, Dataset] = {
        name: source(k, 60 * (k + 1)).shuffle(1) for k, name in enumerate(NAMES)
    }
    streams: dict[str, Dataset] = {name: part.filter(keep) for name, part in parts.items()}
    edited = ms.DataLoader(ms.interleave(parts, plan, name="mix"), batch_size=4, collate_fn=list)
    lanes = ms.DataLoader(
        ms.interleave(streams, plan, name="mix"), batch_size=4, collate_fn=list, lanes=2
    )

    def first(ds: Dataset, lane: int = 0, lanes: int = 1) -> list[Any]:
        return list(itertools.islice(SingleLaneIterator(ds.node, lane, lanes, 0), 80))

    def after(loader: Any) -> list[Any]:
        found = []
        for number, batch in enumerate(loader):
            found.append(batch)
            if number == 5:
                loader.set_weights("mix", {"web": 1, "code": 0, "math": 3})
            if number == 15:
                break
        return found

    return {
        "schedule": first(ms.interleave(parts, plan, seed=1)),
        "schedule of streams, lane 1 of 2": first(ms.interleave(streams, plan, seed=1), 1, 2),
        "by tokens": first(
            ms.interleave(parts, {"web": 5, "code": 3, "math": 1}, weights_by=tokens)
        ),
        "by tokens with a schedule, lane 2 of 3": first(
            ms.interleave(streams, plan, weights_by=tokens, seed=2), 2, 3
        ),
        "max_epochs": first(
            ms.interleave(parts, max_epochs={"web": 1, "code": 1, "math": 1}, then="share")
        ),
        "set_weights": after(edited),
        "set_weights on streams": after(lanes),
    }


def test_the_orders_are_those_that_were_released() -> None:
    assert json.loads(json.dumps(_orders())) == json.loads(GOLDEN.read_text())


if __name__ == "__main__" and "--write" in sys.argv:
    GOLDEN.write_text(
        "{\n"
        + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in _orders().items())
        + "\n}\n"
    )
