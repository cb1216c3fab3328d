"""A checkpoint continued with another batch size, other weights or other inputs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import midstream as ms
from midstream.dataset import Dataset
from tests.helpers.simulate import Cluster, run_alone

pytestmark = pytest.mark.filterwarnings("ignore:.*lanes are dealt to.*:RuntimeWarning")


@pytest.mark.parametrize("cut", [0, 1, 5, 13])
def test_random_access_goes_on_at_the_position_with_another_batch_size(cut: int) -> None:
    rows = ms.from_dataset(range(200), name="web").shuffle(3)
    everything = list(rows)
    first = Cluster(rows.batch(4, collate_fn=tuple), 3, 0)
    first.run(cut)
    second = Cluster(rows.batch(7, collate_fn=tuple), 2, 2, first.states(), remainder="uneven")
    assert len(second.loaders[0]) == cut + -(--(-(200 - 12 * cut) // 7) // 2)
    second.run(2)
    third = Cluster(rows.batch(5, collate_fn=tuple), 1, 0, second.states())
    again = Cluster(rows.batch(5, collate_fn=tuple), 1, 0, third.states())
    third.run()
    again.run()
    assert again.sequence == third.sequence
    assert [
        x for batch in first.sequence + second.sequence + third.sequence for x in batch
    ] == everything
    state = third.states()[0]
    assert (state["epoch"], state["rest"]) == (1, "")
    following = Cluster(rows.batch(5, collate_fn=tuple), 1, 0, state)
    following.run()
    assert following.sequence == [
        tuple(rows.rows(range(at, at + 5), epoch=1)) for at in range(0, 200, 5)
    ]


@pytest.mark.parametrize("stride", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 3, 9])
def test_streams_stay_exactly_once_with_another_batch_size(cut: int, stride: bool) -> None:
    rows: ms.Dataset = (
        ms.from_iterable(lambda: range(400), name="web", split="stride")
        if stride
        else ms.from_dataset(range(400))
    )
    rows = rows.filter(lambda x: x % 5).shuffle(1, buffer_size=60)
    first = Cluster(rows.batch(4, collate_fn=tuple), 2, 0, lanes=12)
    first.run(cut)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = Cluster(rows.batch(3, collate_fn=tuple), 3, 2, first.states())
        second.run(4)
        third = Cluster(rows.batch(8, collate_fn=tuple), 1, 0, second.states())
    third.run()
    seen = [x for batch in first.sequence + second.sequence + third.sequence for x in batch]
    assert sorted(seen) == [x for x in range(400) if x % 5]


def _two(
    weights: dict[str, int], *, stream: bool = False, strategy: Any = "first_exhausted"
) -> ms.Dataset:
    starts = {"web": 0, "code": 1000, "math": 2000}
    sources = {
        name: ms.from_dataset(range(starts[name], starts[name] + 300), name=name).shuffle(1)
        for name in weights
    }
    if stream:
        sources = {name: source.filter(lambda x: x % 10) for name, source in sources.items()}
    return ms.interleave(sources, weights=weights, stopping_strategy=strategy, name="mix").batch(
        3, collate_fn=tuple
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_strict_false_goes_on_with_other_weights_and_inputs(stream: bool, cut: int) -> None:
    before = _two({"web": 7, "code": 3}, stream=stream)
    after = _two({"web": 1, "math": 1}, stream=stream, strategy="first_exhausted")
    first = Cluster(before, 2, 0, lanes=12)
    first.run(cut)
    fresh = ms.DataLoader(after, rank=0, world_size=1)
    with pytest.raises(
        ms.CheckpointError, match=r"(?s)weights of interleave.*web 7 → 1.*strict=False"
    ):
        fresh.load_state_dict(first.states())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh.load_state_dict(first.states(), strict=False)
        loaded = fresh.state_dict()
        second = Cluster(after, 2, 0, loaded)
    second.run(20)
    then = Cluster(after, 1, 0, second.states())
    then.run()
    seen = [x for batch in first.sequence + second.sequence + then.sequence for x in batch]
    assert len(set(seen)) == len(seen)
    web = [x for x in seen if x < 1000]
    if not stream:
        math = [x for x in seen if x >= 2000]
        for part, pipeline, low in ((web, before, 0), (math, after, 2000)):
            whole = [x for batch in run_alone(pipeline, 12) for x in batch if low <= x < low + 1000]
            assert part[: len(whole)] == whole[: len(part)]
        assert len(web) == 300 or len(math) == 300
    half = [x for batch in second.sequence for x in batch]
    assert abs(sum(x < 1000 for x in half) - len(half) / 2) <= (2 if not stream else 14)
    told = ms.progress(then.states()[0])
    assert told.sources["web"].samples == len(web)
    removed = sum(1000 <= x < 2000 for x in seen)
    assert (
        sum(count for kind, count in told.unattributed.items() if kind == "removed code") == removed
    )


def test_differences_that_cannot_be_honoured_are_refused_with_the_reason() -> None:
    state = ms.DataLoader(_two({"web": 7, "code": 3})).state_dict()
    shuffled = ms.DataLoader(
        Dataset(_two({"web": 7, "code": 3}).node.inputs()[""]).shuffle(1).batch(3, collate_fn=tuple)
    )
    with pytest.raises(ms.CheckpointError, match="input|root|shuffle"):
        shuffled.load_state_dict(state, strict=False)
    again = ms.DataLoader(_two({"web": 7, "code": 2}, strategy="all_exhausted"))
    with pytest.raises(ms.CheckpointError, match="stopping_strategy"):
        again.load_state_dict(state, strict=False)
    assert again.state_dict()["batches"] == 0
