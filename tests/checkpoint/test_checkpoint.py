"""The checkpoint format: whatever is damaged, hostile or of another run is a `CheckpointError`, and
nothing is loaded.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.checkpoint.changes import AdoptedEpoch, Changes, WeightChange, decode_changes
from midstream.checkpoint.read import parse
from midstream.checkpoint.spec import Paths, walk
from midstream.common.plain_state import seal, unseal
from midstream.pipeline.node import bind
from tests.helpers.loaders import through_json
from tests.helpers.simulate import Cluster


def _random() -> ms.Dataset:
    return ms.from_dataset(range(90), name="web").shuffle(1).batch(4, collate_fn=tuple)


def _stream() -> ms.Dataset:
    mix = ms.interleave(
        {
            "a": ms.from_dataset(range(90), name="a"),
            "b": ms.from_iterable(lambda: range(50), name="b", split="stride"),
        },
        weights={"a": 2, "b": 1},
    )
    return mix.filter(lambda x: x % 3).shuffle(1, buffer_size=40).batch(3, collate_fn=tuple)


PIPELINES = {"random": _random, "stream": _stream}


def _saved(name: str, steps: int = 4) -> tuple[ms.Dataset, dict[str, Any]]:
    pipeline = PIPELINES[name]()
    cluster = Cluster(pipeline, 2, 0, lanes=4)
    cluster.run(steps)
    return pipeline, ms.merge_states(cluster.states())


def _loads_or_refuses(pipeline: ms.Dataset, state: Any, *, read: bool = True) -> None:
    """Either a `CheckpointError`, and the loader is as it was; or a state to go on from."""
    loader = ms.DataLoader(pipeline)
    before = loader.state_dict()
    try:
        loader.load_state_dict(state)
    except ms.CheckpointError:
        assert loader.state_dict() == before
        return
    assert through_json(loader.state_dict()) == loader.state_dict()
    if read:
        try:
            for _, _ in zip(range(3), loader):
                pass
        except ms.CheckpointError:
            pass


_anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.sampled_from([2**31, 2**61, 2**62, 10**30, -1]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("name", PIPELINES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_state_with_any_value_in_any_place_is_refused_or_loads(
    name: str, data: st.DataObject
) -> None:
    pipeline, state = _saved(name)
    key = data.draw(st.sampled_from(sorted(state)))
    if data.draw(st.booleans()):
        del state[key]
    else:
        state[key] = data.draw(_anything)
    _loads_or_refuses(pipeline, state)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(found for key, child in inner for found in _paths(child, (*path, key)))]


@pytest.mark.parametrize("name", PIPELINES)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_forged_lane_is_refused_or_loads(name: str, data: st.DataObject) -> None:
    """With a check number that fits: whoever forges states gets no other exception out of us
    either.
    """
    pipeline, state = _saved(name)
    key = data.draw(
        st.sampled_from([key for key, value in sorted(state["lanes"].items()) if value])
    )
    lane = unseal(state["lanes"][key])
    path = data.draw(st.sampled_from(_paths(lane)[1:]))
    parent = lane
    for part in path[:-1]:
        parent = parent[part]
    if data.draw(st.booleans()) and isinstance(parent, dict):
        del parent[path[-1]]
    else:
        parent[path[-1]] = data.draw(_anything.filter(_is_json))
    text = json.dumps(lane, sort_keys=True, separators=(",", ":"))
    state["lanes"][key] = seal(text)
    _loads_or_refuses(pipeline, state)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("name", PIPELINES)
def test_a_truncated_or_flipped_lane_is_refused(name: str) -> None:
    pipeline, state = _saved(name)
    key, text = next((key, value) for key, value in state["lanes"].items() if value)
    for at in range(1, len(text)):
        for damaged in (text[:at], text[: at - 1] + chr(ord(text[at - 1]) ^ 1) + text[at:]):
            with pytest.raises(ms.CheckpointError, match=f"lane {key}"):
                ms.DataLoader(pipeline).load_state_dict(
                    {**state, "lanes": {**state["lanes"], key: damaged}}
                )


@pytest.mark.parametrize(
    "state",
    [
        1,
        None,
        "text",
        [],
        [1],
        [{}],
        [[]],
        {"a": 1},
        {1: 2},
        {"midstream": 99},
        [{"midstream": True}],
    ],
)
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ms.CheckpointError):
        ms.DataLoader(_random()).load_state_dict(state)


def test_keys_that_are_no_lanes_are_refused() -> None:
    pipeline, state = _saved("random")
    for key in ("4", "1", "00001", "-1", "0004", "²", "x", "9" * 400):
        with pytest.raises(ms.CheckpointError, match="lanes are numbered"):
            ms.DataLoader(pipeline).load_state_dict({**state, "lanes": {**state["lanes"], key: ""}})


def test_a_missing_rank_and_one_given_twice_are_named() -> None:
    cluster = Cluster(_random(), 3, 0, lanes=12)
    cluster.run(2)
    first, second, third = cluster.states()
    with pytest.raises(
        ms.CheckpointError, match="4 of 12 lanes are missing .0001, 0004.*at least one rank"
    ):
        ms.merge_states([first, third])
    with pytest.raises(ms.CheckpointError, match="lane 0001 is in two of the states"):
        ms.merge_states([first, second, second, third])
    with pytest.raises(ms.CheckpointError, match="state of one rank of several"):
        ms.DataLoader(_random()).load_state_dict(first)
    with pytest.raises(ms.CheckpointError, match="num_lanes"):
        other = Cluster(_random(), 1, 0, lanes=6)
        ms.merge_states([first, second, third, *other.states()])


@pytest.mark.parametrize("name", PIPELINES)
def test_states_load_with_weights_only(name: str, tmp_path: Any) -> None:
    pipeline, state = _saved(name)
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert again == state
    ms.DataLoader(pipeline).load_state_dict(again)


@pytest.mark.parametrize("name", PIPELINES)
def test_loading_changes_nothing_of_the_state_given(name: str) -> None:
    pipeline, state = _saved(name)
    before = copy.deepcopy(state)
    loader = ms.DataLoader(pipeline)
    loader.load_state_dict(state)
    loader.state_dict()["lanes"].clear()
    next(iter(loader))
    assert state == before
    loader.load_state_dict(state)
    assert loader.state_dict() == before


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", PIPELINES)
def test_what_was_loaded_is_the_state_of_each_rank(name: str, ranks: int) -> None:
    pipeline, state = _saved(name)
    for rank in range(ranks):
        loader = ms.DataLoader(pipeline, rank=rank, world_size=ranks)
        loader.load_state_dict(state)
        own = {key: value for key, value in state["lanes"].items() if int(key) % ranks == rank}
        assert loader.state_dict() == {**state, "lanes": own}


# -- nodes by number ------------------------------------------------------------------------------------------------------


def _nested() -> ms.Dataset:
    parts = {
        name: ms.from_dataset(range(20)).shuffle(1).shuffle(2).filter(bool).filter(bool)
        for name in ("b", "a", "3", "c d")
    }
    inner = ms.interleave({"x": parts["b"], "y": parts["a"]}, name="mix rows")
    whole = ms.concatenate(
        [inner.repeat(2), ms.interleave({"z": parts["3"], "w": parts["c d"]}, name="7")]
    )
    return whole.filter(bool).batch(2).map(len)


@pytest.mark.parametrize("make", [_random, _stream, _nested])
def test_nodes_of_a_spec_have_the_paths_and_sources_of_its_places(make: Any) -> None:
    pipeline = make()
    places = {place.path: place for place in bind(pipeline.node).walk()}
    nodes = list(walk(json.loads(json.dumps(pipeline.spec(), sort_keys=True))))
    assert len(nodes) == len(places)
    for node in nodes:
        place = places[node.path]
        assert node.spec["node"] == place.node.kind
        assert set(node.sources) == {each.source for each in place.walk() if each.source >= 0}


@given(st.data())
def test_counts_and_marks_by_number_are_read_back(data: Any) -> None:
    pipeline = data.draw(st.sampled_from([_random, _stream, _nested]))()
    known = [place.path for place in bind(pipeline.node).walk()]
    paths = Paths(pipeline.spec())
    path = st.one_of(
        st.sampled_from(known),
        st.sampled_from(known).map("{}/gone".format),
        st.sampled_from(["", "7", "7 rows", "3", "/3", "12/x rows", "a b/c"]),
    )
    kinds = st.sampled_from(
        ["filtered", "failed a.<lambda>.Error", "dropped", "removed web", "tokens dropped"]
    )
    key = st.tuples(kinds, path, st.integers(-1, 5)).map(lambda parts: "|".join(map(str, parts)))
    events = data.draw(st.dictionaries(key, st.integers(0, 1 << 60)))
    assert paths.events(json.loads(json.dumps(paths.short_events(events)))) == events
    mark = st.one_of(path, st.sampled_from(known).map("{} rows".format))
    epoch = data.draw(st.integers(0, 3))
    marks = data.draw(st.dictionaries(mark, st.lists(st.integers(0, 5), min_size=2, max_size=2)))
    assert paths.marks(json.loads(json.dumps(paths.short_marks(marks, epoch))), epoch) == marks


def test_what_was_dropped_in_a_second_pass_is_counted_once_after_a_resume() -> None:
    def made() -> ms.DataLoader:
        ds = ms.from_dataset(range(30), name="web").filter(lambda x: x % 3).repeat(3)
        return ms.DataLoader(ds.shuffle(1, buffer_size=9), batch_size=4, lanes=1)

    whole = made()
    for _ in whole:
        pass
    assert whole.progress().sources["web"].filtered == 30
    for cut in range(1, 15):
        loader = made()
        for _ in zip(range(cut), loader):
            pass
        state = loader.state_dict()
        loader = made()
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        for _ in loader:
            pass
        assert loader.progress() == whole.progress()


@pytest.mark.parametrize(
    "entry",
    [
        {"events": {"filtered": {"99": 1}}},
        {"events": {"filtered": {"x": 1}}},
        {"events": {"filtered": {"0|-2": 1}}},
        {"events": {"filtered": {"0|0": -1}}},
        {"events": {"filt|ered": {"0|0": 1}}},
        {"events": {"filtered": 3}},
        {"events": []},
        {"tracked": {"track": {"0": {"x": ["numbers", 1, "0", 0]}}}},
        {"tracked": {"track": {"zero": {}}}},
        {"tracked": 3},
    ],
)
def test_counts_of_what_is_not_there_are_refused(entry: dict[str, Any]) -> None:
    pipeline, state = _saved("stream")
    key = next(key for key, text in state["lanes"].items() if text)
    lane = {**unseal(state["lanes"][key]), **entry}
    damaged = {**state, "lanes": {**state["lanes"], key: seal(json.dumps(lane))}}
    with pytest.raises(ms.CheckpointError, match=f"lane {key}"):
        ms.DataLoader(pipeline).load_state_dict(damaged)


# -- changes -------------------------------------------------------------------------------------

_COUNTS = st.integers(0, 1 << 40)
_NAMES = st.sampled_from(["web", "code", "a/mix", 'ü "quoted"'])
_WEIGHTS = st.dictionaries(_NAMES, st.integers(0, 9) | st.floats(0.5, 9), min_size=1)
_SET = st.builds(
    WeightChange, _NAMES, _WEIGHTS, _COUNTS, _COUNTS, st.none() | _COUNTS, st.just("set_weights")
)
_SCHEDULES = st.lists(st.tuples(_COUNTS, _WEIGHTS).map(list), min_size=1)
_LOADED = st.builds(
    WeightChange,
    _NAMES,
    _WEIGHTS | _SCHEDULES,
    _COUNTS,
    _COUNTS,
    st.just(0),
    st.just("load_state_dict"),
    _WEIGHTS | _SCHEDULES,
    _COUNTS,
)
_ORIGINS = st.sets(
    st.tuples(_NAMES, _COUNTS, _COUNTS, _COUNTS).map(lambda at: ms.Origin(*at)), max_size=6
)
_ADOPTED = st.builds(AdoptedEpoch, st.dictionaries(_NAMES, _COUNTS), _COUNTS)
CHANGES = st.builds(
    Changes,
    st.lists(_SET | _LOADED, max_size=4).map(tuple),
    _ORIGINS.map(sorted).map(tuple),
    st.none() | _ADOPTED,
)


@given(changes=CHANGES)
def test_changes_come_back_as_they_were_written(changes: Changes) -> None:
    texts = changes.texts
    back = decode_changes(texts)
    assert back == changes
    assert back.texts == texts
    assert list(texts) == ["rest", "edits", "excluded"]
    assert all(text == "" or json.loads(text) for text in texts.values())


@given(one=CHANGES, other=CHANGES)
def test_changes_that_differ_have_differences_in_words(one: Changes, other: Changes) -> None:
    assert bool(one.differences(other)) == (one != other)
    assert not one.differences(decode_changes(one.texts))


def test_texts_of_changes_are_those_of_the_format() -> None:
    changes = Changes(
        (
            WeightChange("mix", {"web": 1, "code": 2.5}, 2, 700, 11200, "set_weights"),
            WeightChange("mix", {"web": 3}, 2, 800, 0, "load_state_dict", {"web": 1}, 5),
        ),
        (ms.Origin("code", 1, 7, 3), ms.Origin("web", 0, 4), ms.Origin("web", 0, 5)),
        AdoptedEpoch({"web": 700, "code": 2}, 96),
    )
    assert changes.texts == {
        "rest": '{"offsets":{"code":2,"web":700},"skip":96}',
        "edits": '[{"at":11200,"by":"set_weights","epoch":2,"mix":"mix","step":700,'
        '"weights":{"code":2.5,"web":1}},'
        '{"at":0,"by":"load_state_dict","epoch":2,"given":5,"mix":"mix","step":800,'
        '"was":{"web":1},"weights":{"web":3}}]',
        "excluded": '{"code":[[1,7,3]],"web":[[0,4,0],[0,5,0]]}',
    }
    assert Changes().texts == {"rest": "", "edits": "", "excluded": ""}


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("rest", "{", "its rest is not"),
        ("rest", "[]", "its rest is not"),
        ("rest", '{"offsets":{}}', "its rest is not"),
        ("rest", '{"offsets":{"a":-1},"skip":0}', "its rest is not"),
        ("rest", '{"offsets":{},"skip":true}', "its rest is not"),
        ("edits", '{"a":1}', "its edits are not"),
        ("edits", '[{"mix":"mix"}]', "its edits are not"),
        ("excluded", "[1]", "what it excludes is not"),
        ("excluded", '{"a":[[1,2]]}', "what it excludes is not"),
        ("excluded", '{"a":[[1,2,-3]]}', "what it excludes is not"),
        ("excluded", '{"a":["123"]}', "what it excludes is not"),
        ("excluded", None, "what it excludes is not"),
    ],
)
def test_damaged_changes_are_refused(key: str, text: Any, words: str) -> None:
    state = ms.DataLoader(_random()).state_dict()
    with pytest.raises(ms.CheckpointError, match=words):
        parse({**state, key: text})


def test_ranks_that_resumed_an_epoch_differently_do_not_merge() -> None:
    cluster = Cluster(_random(), 2, 0)
    cluster.run(2)
    saved = cluster.states()
    ranks = []
    for rank, size in ((0, 2), (1, 2)):
        pipeline = ms.from_dataset(range(90), name="web").shuffle(1).batch(size, collate_fn=tuple)
        loader = ms.DataLoader(pipeline, rank=rank, world_size=2)
        loader.load_state_dict(saved)
        ranks.append(loader.state_dict())
    merged = ms.merge_states(ranks)
    assert parse(merged).changes.adopted == AdoptedEpoch({}, 16)
    other = {**ranks[1], "rest": '{"offsets":{},"skip":12}'}
    with pytest.raises(ms.CheckpointError, match="resumed this epoch from another batch size"):
        ms.merge_states([ranks[0], other])
