"""Ranks and workers come and go: every sample exactly once, in the same global order wherever that is promised."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from simulate import Cluster

import midstream as ms

pytestmark = pytest.mark.filterwarnings("ignore:.*lanes are dealt to.*:RuntimeWarning")


def _mixed(rows: int = 600) -> ms.Dataset:
    """Random access: two shuffled sources, mixed, shuffled, in batches."""
    sources = {
        "web": ms.from_dataset(range(rows), name="web").shuffle(1),
        "code": ms.from_dataset(range(10_000, 10_000 + rows // 2), name="code").shuffle(2),
    }
    mix = ms.interleave(sources, weights={"web": 2, "code": 1}, stopping_strategy="all_exhausted_without_replacement")
    return mix.map(lambda x: x).shuffle(3).batch(4, collate_fn=tuple)


def _streamed(rows: int = 700) -> ms.Dataset:
    """A stream: filtered and shuffled in a buffer."""
    return ms.from_dataset(range(rows), name="web").shuffle(5).filter(lambda x: x % 7).shuffle(4, buffer_size=90).batch(3, collate_fn=tuple)


def _uneven(rows: int = 500) -> ms.Dataset:
    """A stream whose lanes end at very different steps."""
    return ms.from_dataset(range(rows), name="web").filter(lambda x: x % 48 > 30 or x > 300).batch(2, collate_fn=tuple)


def _lossy(rows: int = 300) -> ms.Dataset:
    """Random access, in which whole batches are lost."""

    def fail(x: int) -> int:
        if x % 8 in (4, 5):
            raise ValueError(x)
        return x

    return ms.from_dataset(range(rows), name="web").map(fail, on_error="skip").batch(2, collate_fn=tuple)


PIPELINES = {"mixed": _mixed, "streamed": _streamed, "uneven": _uneven, "lossy": _lossy}


def _reference(pipeline: ms.Dataset, lanes: int) -> list[Any]:
    cluster = Cluster(pipeline, 1, 0, lanes=lanes)
    cluster.run()
    return cluster.sequence


@pytest.mark.parametrize("name", PIPELINES)
@settings(max_examples=int(os.environ.get('N','40')), deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_any_chain_of_topologies_delivers_every_sample_exactly_once(name: str, data: st.DataObject) -> None:
    pipeline = PIPELINES[name]()
    lanes = data.draw(st.sampled_from([12, 48]), "lanes")
    reference = _reference(pipeline, lanes)
    ranks = st.integers(1, 64 if pipeline.random_access else lanes)
    seen: list[Any] = []
    ordered = True
    state: Any = None
    for _ in range(data.draw(st.integers(1, 4), "cuts")):
        size, workers = data.draw(ranks, "ranks"), data.draw(st.integers(0, 3), "workers")
        if not pipeline.random_access:
            workers = min(workers, lanes // size)
            ordered &= lanes % size == 0
        cluster = _cluster(pipeline, size, workers, state, lanes)
        cluster.run(data.draw(st.integers(0, 12), "steps"))
        seen += cluster.sequence
        full = all(len(step) == size for step in cluster.steps)
        ordered &= full
        merged = ms.merge_states(cluster.states())
        state = data.draw(st.sampled_from([merged, cluster.states()]), "state")
        if merged["epoch"] == 1:
            break
    else:
        cluster = _cluster(pipeline, 1, 0, state, lanes)
        cluster.run()
        seen += cluster.sequence
        merged = cluster.states()[0]
    assert merged["epoch"] == 1
    assert Counter(x for batch in seen for x in batch) == Counter(x for batch in reference for x in batch)
    if ordered and name in ("mixed", "streamed", "uneven"):
        assert seen == reference


def _cluster(pipeline: ms.Dataset, size: int, workers: int, state: Any, lanes: int) -> Cluster:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = lanes if state is None and (not pipeline.random_access or lanes >= size) else None
        return Cluster(pipeline, size, workers, state, lanes=asked, remainder="uneven")
