"""Tracked metrics: right, once per rank, and the same to the last bit on any way through the data."""

from __future__ import annotations

import enum
import itertools
import json
import math
import pickle
import tracemalloc
from collections import Counter
from fractions import Fraction
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.dataset import Dataset
from midstream.metrics.totals import (
    MAX_BYTES,
    CategoryCounts,
    NumberTotals,
    QuantileSketch,
    empty_totals,
)
from midstream.metrics.tracked import decode_tracked, encode_tracked
from tests.helpers.loaders import through_json
from tests.helpers.simulate import Cluster

values = st.one_of(
    st.integers(-(10**6), 10**6),
    st.integers(0, 300),
    st.floats(-1e6, 1e6),
    st.floats(-1e300, 1e300),
    st.sampled_from([0, 0.0, -0.0, 1, 1.0, 2**53, float(2**53), 2**60 + 1, 5e-324]),
)


def gathered(kind: str, parts: list[list[Any]]) -> Any:
    """Totals of several parts, joined one after the other; every second time by way of a
    checkpoint.
    """
    whole = empty_totals(kind)
    for number, part in enumerate(parts):
        more = empty_totals(kind)
        if part:
            more.add(part)
        whole = whole.plus(more)  # type: ignore[arg-type]
        if number % 2 and (kind == "count" or whole.count):
            again = empty_totals(kind)
            again.load(json.loads(whole.text()))
            whole = again
    return whole


# -- totals -----------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.lists(values, min_size=1, max_size=60),
    st.randoms(use_true_random=False),
    st.sampled_from(["numbers", "distribution"]),
)
def test_totals_do_not_depend_on_order_or_parts(numbers: list[Any], random: Any, kind: str) -> None:
    at_once = empty_totals(kind)
    at_once.add(numbers)
    shuffled = numbers.copy()
    random.shuffle(shuffled)
    cuts = sorted(random.randrange(len(numbers) + 1) for _ in range(4))
    parts = [shuffled[a:b] for a, b in itertools.pairwise([0, *cuts, len(numbers)])]
    assert gathered(kind, parts).text() == at_once.text()
    told = at_once.summary()
    assert told["count"] == len(numbers)
    assert (told["min"], told["max"]) == (
        float(min(numbers)) if abs(min(numbers)) > 2**53 else min(numbers),
        told["max"],
    )
    error = abs(Fraction(told["sum"]) - sum(map(Fraction, numbers)))
    assert error <= len(numbers) * Fraction(1, 2**96) + abs(Fraction(told["sum"])) * Fraction(
        1, 2**52
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=80), min_size=1, max_size=400), st.randoms(use_true_random=False))
def test_categories_do_not_depend_on_order_or_parts(names: list[str], random: Any) -> None:
    cut = [ms.count(lambda name: name).value(name) for name in names]
    at_once = CategoryCounts()
    at_once.add(cut)
    shuffled = cut.copy()
    random.shuffle(shuffled)
    middle = random.randrange(len(names) + 1)
    other = gathered("count", [shuffled[:middle], shuffled[middle:]])
    assert other.text() == at_once.text()
    true = Counter(cut)
    assert all(true[name] == number for name, number in at_once.names.items())
    assert sum(at_once.names.values()) + at_once.others == len(names)
    assert len(at_once.text()) <= MAX_BYTES


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.lognormal(6, 1, 20_000).astype(int),
        lambda rng: rng.lognormal(0, 8, 20_000),
        lambda rng: rng.normal(0, 1e6, 20_000),
        lambda rng: np.concatenate([np.zeros(500), rng.uniform(-1e-9, 1e12, 20_000)]),
        lambda rng: rng.integers(1, 100, 20_000),
        lambda rng: np.exp(rng.uniform(-600, 600, 20_000)),
        lambda rng: rng.choice([1e300, -1e300, 5e-324], 2_000),
    ],
)
def test_quantiles_are_near_and_totals_stay_small(draw: Any) -> None:
    sample = draw(np.random.default_rng(0)).tolist()
    totals = QuantileSketch()
    for start in range(0, len(sample), 64):
        totals.add(sample[start : start + 64])
    large = totals
    for _ in range(20):
        large = large.plus(large)  # a million times as many
    assert len(totals.text()) <= MAX_BYTES
    assert len(large.text()) <= MAX_BYTES
    width = 2.0 ** (totals.level - 6)
    for part, found in (
        (5, totals.summary()["p05"]),
        (50, totals.summary()["p50"]),
        (95, totals.summary()["p95"]),
    ):
        true = np.percentile(sample, part, method="lower")
        assert abs(found - true) <= abs(true) * width + 1e-300 or math.isclose(found, true), part
    wide = max(map(abs, sample)) / min(abs(value) for value in sample if value) > 2**40
    assert wide or totals.level <= 4


def test_sums_beyond_what_a_float_holds() -> None:
    totals = NumberTotals()
    totals.add([1e300, 0.5])
    for _ in range(40):
        totals = totals.plus(totals)
    told = totals.summary()
    assert told["sum"] > 10**312 - 10**297
    assert told["mean"] == 5e299


def test_quantiles_of_small_integers_are_integers() -> None:
    totals = QuantileSketch()
    totals.add([1, 2, 3, 3, 3, 50, 100, 127])
    assert [totals.summary()[f"p{percent:02d}"] for percent in (5, 50, 95)] == [1, 3, 100]


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (["numbers", 0, "0", 0, 0], "a count of nothing"),
        (["numbers", 1, "zz", 0, 0], "no number"),
        (["distribution", 3, "0", 0, 0, 0, 1, 0, "", 0, ""], "buckets that do not add up"),
        (["distribution", 3, "0", 0, 0, 99, 3, 0, "", 0, ""], "no level"),
        (["count", 0, 0, {"a": -1}], "negative"),
        (["numbers", 1.5, "0", 0, 0], "half a count"),
        (["distribution", 1, "0", 0, 0, 1.0, 1, 0, "", 0, ""], "a level that is no integer"),
        (["count", 1.0, 0, {"a": 1}], "the same"),
        (["other", 1], "no kind"),
        ([], "nothing"),
    ],
)
def test_damaged_totals_are_refused(state: Any, kind: str) -> None:
    with pytest.raises(ValueError):
        decode_tracked({"track": {"0": {"x": state}}})


# -- pipelines --------------------------------------------------------------------------------------------------------

NAMES = ("web", "code")


def rows(k: int, count: int) -> list[dict[str, int]]:
    return [{"id": 1000 * k + i, "size": (i * 37 + k) % 101} for i in range(count)]


def of_size(row: Any) -> int:
    return row["size"]


def of_id(row: Any) -> float:
    return row["id"] / 7


def language(row: Any) -> str:
    return "abc"[row["id"] % 3]


def no_seventh(row: Any) -> bool:
    return row["id"] % 7 != 3


def fails(row: Any) -> Any:
    if row["id"] % 11 == 5:
        raise ValueError("no good")
    return row


METRICS: dict[str, Any] = {
    "size": ms.distribution(of_size),
    "id": of_id,
    "language": ms.count(language),
}


def pipeline(kind: str) -> Dataset:
    parts: dict[str, Dataset] = {
        name: ms.from_dataset(rows(k, 90 + 30 * k), name=name).shuffle(k)
        for k, name in enumerate(NAMES)
    }
    if kind in ("stream", "buffered"):
        parts["web"] = parts["web"].filter(no_seventh)
    if kind == "per source":
        parts = {name: part.track(**METRICS) for name, part in parts.items()}
    mix = ms.interleave(parts, weights={"web": 2, "code": 1})
    if kind != "per source":
        mix = mix.track(**METRICS)
    if kind == "buffered":
        mix = mix.shuffle(1, buffer_size=40)
    if kind == "failing":
        mix = mix.map(fails, on_error="skip")
    return mix.batch(4, collate_fn=list)


KINDS = ("rows", "per source", "stream", "buffered", "failing")


def counted(samples: list[Any]) -> dict[str, Any]:
    """What the metrics of some samples are, by source and over all."""
    told: dict[str, Any] = {}
    for name, test in (
        ("web", lambda row: row["id"] < 1000),
        ("code", lambda row: row["id"] >= 1000),
        ("all", bool),
    ):
        some = [row for row in samples if test(row)]
        if not some:
            continue
        totals: dict[str, Any] = {
            "size": QuantileSketch(),
            "id": NumberTotals(),
            "language": CategoryCounts(),
        }
        totals["size"].add([of_size(row) for row in some])
        totals["id"].add([of_id(row) for row in some])
        totals["language"].add([language(row) for row in some])
        told[name] = {metric: totals[metric].summary() for metric in sorted(totals)}
    return told


def told(progress: ms.Progress) -> dict[str, Any]:
    found = {name: source.metrics for name, source in progress.sources.items() if source.metrics}
    return {**found, **({"all": progress.metrics} if progress.metrics else {})}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["rows", "per source", "stream"])
def test_totals_are_those_of_what_was_delivered_at_every_step(kind: str, workers: int) -> None:
    loader = ms.DataLoader(pipeline(kind), num_workers=workers, lanes=6)
    samples: list[Any] = []
    assert told(loader.progress()) == {}
    for batch in loader:
        samples += batch
        assert told(loader.progress()) == counted(samples)
    first = counted(samples)["all"]["size"]["count"]
    for _, batch in zip(range(3), loader):  # on into the next epoch
        samples += batch
    assert told(loader.progress()) == counted(samples)
    assert told(loader.progress())["all"]["size"]["count"] > first > 100


def test_what_failed_before_is_not_looked_at() -> None:
    for stream in (False, True):
        ds = ms.from_dataset(rows(0, 66)).map(fails, on_error="skip")
        ds = (ds.filter(bool) if stream else ds).track(
            number=lambda sample: 1, kind=ms.count(lambda sample: "a")
        )
        loader = ms.DataLoader(ds, batch_size=4, collate_fn=list)
        samples = [row for batch in loader for row in batch]
        assert len(samples) == 60
        assert (
            loader.progress().metrics["number"]["count"]
            == loader.progress().metrics["kind"]["a"]
            == 60
        )


def test_what_fails_further_on_counts_and_what_is_left_out_does_not() -> None:
    loader = ms.DataLoader(pipeline("failing"))
    samples = [row for batch in loader for row in batch]
    failed = sum(
        source.failures.get("ValueError", 0) for source in loader.progress().sources.values()
    )
    assert failed > 5
    assert loader.progress().metrics["size"]["count"] == len(samples) + failed
    loader = ms.DataLoader(pipeline("rows"))
    iterator = iter(loader)
    samples = next(iterator)
    following = ms.DataLoader(pipeline("rows"))
    ahead = iter(following)
    next(ahead), next(ahead)
    loader.exclude(following.trace()[:2])
    for _ in range(3):
        samples = samples + next(iterator)
    assert len(samples) == 14
    assert told(loader.progress()) == counted(samples)
    loader.skip(2)
    samples = samples + next(iterator)
    assert told(loader.progress()) == counted(samples)


def fails_at_eights(batch: list[Any]) -> list[Any]:
    if batch[0]["id"] % 8 == 0:
        raise ValueError("no good")
    return batch


WHOLE = {
    "collate": lambda ds: ds.batch(4, collate_fn=fails_at_eights),
    "map": lambda ds: ds.batch(4, collate_fn=list).map(fails_at_eights),
    "map, skipped": lambda ds: ds.batch(4, collate_fn=list).map(fails_at_eights, on_error="skip"),
    "batch of batches": lambda ds: ds.batch(4, collate_fn=fails_at_eights).batch(
        2, collate_fn=list
    ),
    "after a failed row": lambda ds: ds.map(fails, on_error="skip").batch(
        4, collate_fn=fails_at_eights
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("stream", [False, True])
def test_all_rows_of_a_batch_that_fails_count(kind: str, stream: bool) -> None:
    source = ms.from_dataset(rows(0, 40), name="web")
    loader = ms.DataLoader(
        WHOLE[kind]((source.filter(bool) if stream else source).track(**METRICS))
    )
    iterator, failed = iter(loader), 0
    while True:
        try:
            next(iterator)
        except StopIteration:
            break
        except ms.SampleError:
            failed += 1
    assert failed == {"map, skipped": 0, "after a failed row": 4}.get(kind, 5)
    assert told(loader.progress())["all"] == counted(rows(0, 40))["all"]


@pytest.mark.parametrize("raised", [True, False])
def test_errors_that_are_raised_count_once_over_resumes(raised: bool) -> None:
    def made() -> ms.DataLoader:
        return ms.DataLoader(
            ms.from_dataset(rows(0, 66)).track(**METRICS).map(fails), batch_size=4, collate_fn=list
        )

    loader = made()
    iterator = iter(loader)
    steps = 0
    while loader.state_dict()["epoch"] == 0:
        try:
            next(iterator)
        except StopIteration:
            break
        except ms.SampleError:
            pass
        steps += 1
        if raised or steps % 3:
            state = loader.state_dict()
            loader = made()
            loader.load_state_dict(through_json(state))
            assert loader.state_dict() == state
            iterator = iter(loader)
    assert told(loader.progress())["all"] == counted(rows(0, 66))["all"]


def test_what_a_resume_reads_again_does_not_count_again() -> None:
    ds = (
        ms.from_dataset(rows(0, 66))
        .filter(bool)
        .track(size=of_size)
        .shuffle(5, buffer_size=20)
        .batch(3, collate_fn=list)
    )
    whole = ms.DataLoader(ds, lanes=2)
    for batches, _ in zip(range(1, 22), whole):
        again = ms.DataLoader(ds, lanes=2)
        again.load_state_dict(whole.state_dict())
        assert sum(1 for _ in again) == 22 - batches
        assert told(again.progress())["all"]["size"]["count"] == 66


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_chain_of_topologies_gives_the_same_totals(data: Any) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    whole = ms.DataLoader(pipeline(kind), lanes=12)
    steps = sum(1 for _ in whole)
    expected = told(whole.progress())
    state: Any = None
    done = 0
    while done < steps:
        size = data.draw(st.sampled_from([1, 2, 3, 4]))
        workers = data.draw(st.sampled_from([0, 1, 3]))
        cluster = Cluster(pipeline(kind), size, workers, state, lanes=12, remainder="uneven")
        cluster.run(data.draw(st.integers(1, 20)))
        states = cluster.states()
        merged = ms.merge_states(states)
        held = [lane for lane in merged["lanes"].values() if '"tracked"' in lane]
        assert len(held) <= size  # once per rank
        state = data.draw(st.sampled_from([states, merged]))
        done += len(cluster.sequence)
        if merged["epoch"] == 1:
            break
    assert done == steps
    assert told(ms.progress(state)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_any_of_the_last_steps_has_the_totals_of_then(kind: str) -> None:
    loader = ms.DataLoader(pipeline(kind), lanes=6)
    states = [loader.state_dict()]
    for _, _batch in zip(range(25), loader):
        states.append(loader.state_dict())
    for step, state in enumerate(states):
        assert loader.state_at(step) == state
        assert told(ms.progress(state)) == told(ms.progress(loader.state_at(step)))


def test_a_state_saved_before_loads_into_more_ranks_and_counts_nothing_twice() -> None:
    first = Cluster(pipeline("rows"), 3, 0, lanes=12, remainder="drop")
    first.run(5)
    state = ms.merge_states(first.states())
    for size in (1, 2, 4):
        cluster = Cluster(pipeline("rows"), size, 0, state, lanes=12, remainder="drop")
        again = ms.merge_states(cluster.states())
        assert told(ms.progress(again)) == told(ms.progress(state))
        cluster.run(1)
        again = ms.merge_states(cluster.states())
        assert (
            ms.progress(again).metrics["size"]["count"]
            == ms.progress(state).metrics["size"]["count"] + 4 * size
        )


def test_other_weights_and_sources_keep_the_totals() -> None:
    def made(names: str, weights: dict[str, int]) -> ms.DataLoader:
        parts = {
            name: ms.from_dataset(rows(k, 90), name=name)
            for k, name in enumerate("abc")
            if name in names
        }
        return ms.DataLoader(
            ms.interleave(parts, weights).track(size=of_size), batch_size=4, collate_fn=list
        )

    loader = made("ab", {"a": 1, "b": 1})
    for _ in zip(range(6), loader):
        pass
    before = loader.progress()
    other = made("bc", {"b": 2, "c": 1})
    other.load_state_dict(loader.state_dict(), strict=False)
    after = other.progress()
    assert after.sources["b"].metrics == before.sources["b"].metrics
    assert (
        after.metrics == before.metrics
    )  # those of the source that is gone are in the whole still
    for _ in zip(range(3), other):
        pass
    assert other.progress().metrics["size"]["count"] == 36


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.filterwarnings("ignore:continuing with another pipeline")
def test_an_input_that_was_removed_counts_when_it_is_there_again(stream: bool) -> None:
    def made(names: str) -> ms.DataLoader:
        parts = {}
        for k, name in enumerate("ab"):
            if name in names:
                source = ms.from_dataset(rows(k, 90))
                parts[name] = (source.filter(no_seventh) if stream else source).track(size=of_size)
        return ms.DataLoader(ms.interleave(parts), batch_size=4, collate_fn=list, lanes=2)

    loader, seen = made("ab"), 0
    for names in ("ab", "b", "ab"):
        state, loader = loader.state_dict(), made(names)
        loader.load_state_dict(state, strict=False)
        for _, batch in zip(range(4), loader):
            seen += len(batch)
        assert loader.progress().metrics["size"]["count"] == seen
    again = loader.progress().sources["a"]
    assert again.metrics["size"]["count"] == again.samples
    assert again.filtered == (1 if stream else 0)  # row 3, again


def test_batches_that_only_fill_up_the_last_round_do_not_count() -> None:
    ranks = [
        ms.DataLoader(pipeline("rows"), rank=rank, world_size=4, remainder="pad", lanes=12)
        for rank in range(4)
    ]
    for loader in ranks:
        list(loader)
    merged = ms.merge_states([loader.state_dict() for loader in ranks])
    alone = ms.DataLoader(pipeline("rows"), lanes=12)
    samples = [row for batch in alone for row in batch]
    assert told(ms.progress(merged)) == counted(samples)
    assert sum(source.padded for source in ms.progress(merged).sources.values()) > 0


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_three_distributions_of_a_hundred_sources_stay_within_their_kilobyte() -> None:
    rng = np.random.default_rng(1)
    parts = {
        f"s{k:02d}": ms.from_dataset(rng.lognormal(6, 2, 400), name=f"s{k:02d}").track(
            a=ms.distribution(float),
            b=ms.distribution(lambda x: -x),
            c=ms.distribution(lambda x: x % 1),
        )
        for k in range(20)
    }
    loader = ms.DataLoader(
        ms.interleave(parts, stopping_strategy="all_exhausted_without_replacement"), batch_size=32
    )
    for _ in loader:
        pass
    state = loader.state_dict()
    tracked = [
        lane for lane in map(json.loads, filter(None, state["lanes"].values())) if "tracked" in lane
    ]
    assert len(tracked) == 1
    each = [
        len(json.dumps(totals, separators=(",", ":")))
        for sources in tracked[0]["tracked"].values()
        for named in sources.values()
        for totals in named.values()
    ]
    assert len(each) == 60
    assert max(each) <= MAX_BYTES
    assert len(max(state["lanes"].values(), key=len)) < 60 * (MAX_BYTES + 20) + 20 * 64 + 1024


@pytest.mark.slow
def test_a_thousand_steps_back_the_totals_of_many_sources_take_little_memory() -> None:
    parts = {f"s{k}": ms.from_dataset(range(k, 4000, 3), name=f"s{k}") for k in range(8)}
    mix = (
        ms.interleave(parts)
        .repeat()
        .track(a=ms.distribution(float), b=ms.distribution(lambda x: -x * x))
    )
    loader = ms.DataLoader(mix, batch_size=8, collate_fn=list)
    states = {}
    tracemalloc.start()
    try:
        for step, _ in zip(range(1, 1201), loader):
            if step == 200:
                before = tracemalloc.get_traced_memory()[0]
            if step > 180 and step % 17 == 0:
                states[step] = loader.state_dict()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 40 << 20  # whole totals after each step: 310 MB
    for step in (1190, 1020, 204, 1190):
        assert loader.state_at(step) == states[step]


# -- arguments, errors, looks ---------------------------------------------------------------------------------------------


def test_what_cannot_be_tracked_is_refused() -> None:
    ds = ms.from_dataset(range(9), name="nine")
    with pytest.raises(ValueError, match="at least one metric"):
        ds.track()
    with pytest.raises(TypeError, match="'x' is int"):
        ds.track(x=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'x' is tracked further down already"):
        ds.track(x=abs).map(abs).track(x=abs)
    with pytest.raises(TypeError, match="callable"):
        ms.distribution(3)  # type: ignore[arg-type]
    for fn, words in (
        (lambda x: "a", "one number for each sample; the function returned str"),
        (lambda x: float("nan"), "finite"),
        (lambda x: 10**400, "finite"),
        (lambda x: None, "NoneType"),
        (lambda x: np.zeros(3), "ndarray"),
    ):
        with pytest.raises(ms.SampleError, match=words) as caught:
            list(ds.track(bad=fn))
        assert "metric 'bad'" in str(caught.value)
        assert caught.value.node == "track"
    with pytest.raises(ms.SampleError, match="str, int, bool or None"):
        list(ds.track(bad=ms.count(float)))


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    for fn in (
        np.float32,
        np.int64,
        torch.tensor,
        bool,
        lambda x: np.array([x]),
        lambda x: torch.tensor(x) > 1,
    ):
        loader = ms.DataLoader(
            ms.from_dataset(range(4)).track(x=fn, n=ms.count(lambda x: np.int64(x))), batch_size=4
        )
        next(iter(loader))
        assert loader.progress().metrics["x"]["count"] == 4
        assert loader.progress().metrics["n"] == {"0": 1, "1": 1, "2": 1, "3": 1}


def test_a_track_is_pickled_by_value_and_changes_the_fingerprint_by_its_kinds_alone() -> None:
    ds = ms.from_dataset(range(9)).track(x=lambda x: x + 1, y=ms.count(lambda x: x % 2))
    again = pickle.loads(pickle.dumps(ds))
    assert again == ds
    assert list(again) == list(range(9))
    assert ds != ms.from_dataset(range(9)).track(x=lambda x: x + 1, y=lambda x: x)
    assert ds == ms.from_dataset(range(9)).track(x=abs, y=ms.count(abs))


def test_columns_stay_columns() -> None:
    table = {"ids": np.arange(60), "size": np.arange(60) % 7}
    plain = ms.from_dataset(datasets.Dataset.from_dict(table)).shuffle(1)
    tracked = plain.track(size=lambda row: int(row["size"]))
    for one, other in zip(ms.DataLoader(plain, batch_size=8), ms.DataLoader(tracked, batch_size=8)):
        assert all(torch.equal(one[key], other[key]) for key in table)


def test_two_branches_with_metrics_of_one_name() -> None:
    a = ms.from_dataset(range(8), name="a").track(x=float, y=float)
    b = ms.from_dataset(range(8), name="b").track(x=float, y=ms.count(int))
    loader = ms.DataLoader(ms.interleave({"a": a, "b": b}), batch_size=4)
    for _ in loader:
        pass
    told = loader.progress()
    assert told.metrics["x"]["count"] == told.metrics["y (a/track, numbers)"]["count"] + sum(
        told.metrics["y (b/track, count)"].values()
    )
    assert set(told.sources["a"].metrics) == {"x", "y (a/track, numbers)"}


def test_how_it_looks() -> None:
    loader = ms.DataLoader(pipeline("rows"), lanes=6)
    for _ in zip(range(10), loader):
        pass
    text, page, flat = (
        str(loader.progress()),
        loader.progress()._repr_html_(),
        loader.progress().to_dict(),
    )
    assert "tracked:" in text
    assert "counted:" in text
    assert all(len(line) < 120 for line in text.splitlines())
    assert page.count("<table") == 3
    assert flat["web/size/mean"] == loader.progress().sources["web"].metrics["size"]["mean"]
    assert flat["all/language/a"] == loader.progress().metrics["language"]["a"]
    assert encode_tracked(decode_tracked({})) == "{}"


def test_a_metric_keeps_its_kind() -> None:
    def made(names: str, **metrics: Any) -> ms.DataLoader:
        parts = {name: ms.from_dataset(rows(0, 60), name=name) for name in names}
        parts["a"] = parts["a"].track(**metrics) if "a" in parts else parts["b"]
        mix = ms.interleave({name: parts[name] for name in names})
        return ms.DataLoader(mix, batch_size=4, collate_fn=list)

    loader = made("ab", size=of_size)
    next(iter(loader))
    for names, metrics in (("b", {}), ("ab", {"size": ms.count(language)})):
        following = made(names, **metrics)
        following.load_state_dict(loader.state_dict(), strict=False)
        loader = following
    next(iter(loader))
    told = loader.progress()
    assert told.metrics["size (a/track, numbers)"]["count"] == 2
    assert told.metrics["size (a/track, count)"] == {"a": 1, "b": 1}
    with pytest.raises(ms.CheckpointError, match="'size' was gathered as .* so far, and is .* now"):
        made("b").load_state_dict(loader.state_dict(), strict=False)


class Language(str, enum.Enum):
    """As users have them."""

    EN = "en"


def test_a_category_of_an_enumeration_is_its_value() -> None:
    loader = ms.DataLoader(
        ms.from_dataset(range(4)).track(of=ms.count(lambda _: Language.EN)), batch_size=4
    )
    next(iter(loader))
    assert loader.progress().metrics["of"] == {"en": 4}
