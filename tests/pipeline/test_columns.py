"""What is made of columns is what would be made of samples: values, dtypes, shapes, memory and
errors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import midstream as ms
import midstream.sources.row_groups
from midstream.dataset import Dataset
from midstream.nodes.collate import column_form
from midstream.pipeline.columns import rows_of_block
from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.iterator import Lane
from midstream.pipeline.ledger import Ledger
from midstream.pipeline.node import bind
from midstream.pipeline.passes import epoch_key
from midstream.pipeline.rows import as_origin_array
from midstream.pipeline.single_lane import LaneOutput
from midstream.sources.arrow_table import TableReader
from tests.helpers.loaders import through_json

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collate": ms.collate,
    "pad": ms.pad,
    "pad to 8": ms.pad(value=-1, multiple=8),
    "pad by name": functools.partial(ms.pad, value={"a": 7}),
    "pad with what does not fit": ms.pad(value=300.5),
    "pad with a wrong multiple": functools.partial(ms.pad, multiple=0),
    "flat": ms.flat,
    "flat, cu_seqlens": ms.flat(cu_seqlens=True),
    "ragged": ms.ragged,
}
TYPES = [
    *(
        pa.list_(kind)
        for kind in (pa.int8(), pa.int32(), pa.uint16(), pa.float16(), pa.float32(), pa.float64())
    ),
    pa.large_list(pa.int64()),
    pa.list_(pa.int32(), 3),
    *(pa.int8(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.bool_(), pa.string()),
]


def whole(value: Any) -> Any:
    """A batch, with types, dtypes and shapes, to be compared."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return type(value).__name__, str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [whole(item) for item in value]
    return type(value).__name__, value


def outcome(ds: Dataset) -> list[Any]:
    """Every batch, and in a failed one's place what the failure says."""
    found = []
    iterator = iter(ds)
    while True:
        try:
            found.append(whole(next(iterator)))
        except StopIteration:
            return found
        except ms.SampleError as error:
            found.append((error.node, error.error_type, error.original_message))


def same(sample: Any) -> Any:
    return sample


@st.composite
def values(draw: Any, kind: pa.DataType, count: int, nulls: bool, alike: bool) -> pa.ChunkedArray:
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    inner = getattr(kind, "value_type", kind)

    def one() -> Any:
        if nulls and rng.random() < 0.1:
            return None
        if pa.types.is_string(inner):
            return "x" * int(rng.integers(0, 4))
        if pa.types.is_boolean(inner):
            return bool(rng.integers(0, 2))
        if pa.types.is_floating(inner):
            return (
                np.float16(rng.integers(-100, 100) / 4)
                if inner == pa.float16()
                else float(rng.integers(-100, 100))
            )
        return int(rng.integers(0, 100)) if inner != pa.uint64() else int(rng.integers(0, 4)) << 62

    def row() -> Any:
        if kind is inner:
            return one()
        if nulls and rng.random() < 0.1:
            return None
        size = 3 if pa.types.is_fixed_size_list(kind) or alike else int(rng.integers(0, 5))
        return [one() for _ in range(size)]

    rows = [row() for _ in range(count)]
    cut = draw(st.integers(0, count))
    return pa.chunked_array(
        [pa.array(rows[:cut], kind), pa.array([*rows[:1], *rows[cut:]], kind)[1:]], kind
    )


@st.composite
def sources(draw: Any) -> list[Dataset]:
    count = draw(st.integers(1, 3))
    kinds = [draw(st.sampled_from(TYPES)) for _ in range(draw(st.integers(1, 2)))]
    alike, nulls = draw(st.booleans()), draw(st.sampled_from((False, False, True)))
    made = []
    for index in range(count):
        here = kinds if draw(st.integers(0, 4)) else [draw(st.sampled_from(TYPES)) for _ in kinds]
        rows = draw(st.integers(1, 12))
        names = ["a", "b"][: len(here)] if draw(st.integers(0, 5)) else ["b", "a"][: len(here)]
        table = pa.table(
            {name: draw(values(kind, rows, nulls, alike)) for name, kind in zip(names, here)}
        )
        made.append(
            ms.from_dataset(datasets.Dataset(datasets.table.InMemoryTable(table)), name=f"s{index}")
        )
    return made


@settings(max_examples=150, deadline=None)
@given(
    sources(), st.sampled_from(sorted(FUNCTIONS)), st.integers(1, 5), st.booleans(), st.booleans()
)
def test_a_batch_of_columns_is_the_batch_of_its_samples(
    parts: list[Dataset], name: str, size: int, mixed: bool, shuffled: bool
) -> None:
    def build(look: bool) -> Dataset:
        made = [ds.shuffle(index) if shuffled else ds for index, ds in enumerate(parts)]
        mix = (
            ms.interleave(
                {f"n{index}": ds for index, ds in enumerate(made)},
                stopping_strategy="all_exhausted_without_replacement",
            )
            if mixed
            else ms.concatenate(made)
        )
        # A map looks at every sample, so it makes dicts of columns.
        return (mix.map(same) if look else mix).batch(size, collate_fn=FUNCTIONS[name])

    assert outcome(build(False)) == outcome(build(True))


def table_of(rows: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"id": list(range(rows)), "ids": [list(range(row % 7)) for row in range(rows)]}
    )


@pytest.mark.parametrize(
    "kind", [pa.bool_(), pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64()]
)
@pytest.mark.parametrize("picked", [5, 60])
def test_numbers_of_many_small_chunks_are_those_of_one(kind: pa.DataType, picked: int) -> None:
    values = np.random.default_rng(0).integers(0, 100, 60).astype(kind.to_pandas_dtype())
    if kind == pa.uint64():
        values[::7] = 2**64 - 1
    chunks = [pa.array(values[first : first + 4], kind) for first in range(0, 60, 4)]
    rows = np.random.default_rng(1).permutation(60)[:picked]
    for column in (pa.chunked_array(chunks), pa.chunked_array([pa.array(values, kind)])):
        for repeats in (1, 10):  # few rows of each chunk, and many
            found = (
                TableReader(pa.table({"x": column}))
                .columns(np.tile(rows, repeats))
                .columns[0]
                .array
            )
            assert found is not None and found.dtype == values.dtype
            assert found.tolist() == np.tile(values[rows], repeats).tolist()


def columns_reach(ds: Dataset) -> bool:
    """Whether the rows of a pipeline are columns still."""
    length = ds.node.length()
    assert length is not None
    rows = bind(ds.node).rows(np.arange(length), epoch_key(0), np.array([0]))
    return rows.columns is not None


def test_nodes_that_only_pass_samples_on_make_none() -> None:
    one, two = ms.from_dataset(table_of(40), name="one"), ms.from_dataset(table_of(30), name="two")
    assert columns_reach(one.shuffle(1).take(33).skip(2).repeat(2))
    assert columns_reach(ms.interleave({"x": one.shuffle(1), "y": two}, {"x": 7, "y": 3}))
    assert columns_reach(ms.concatenate([one, two]))
    assert not columns_reach(one.map(same))


@pytest.mark.parametrize("name", ["collate", "pad", "flat", "ragged", "pad to 8", "pad by name"])
def test_the_ready_collate_functions_work_on_columns(name: str) -> None:
    assert column_form(FUNCTIONS[name]) is not None
    assert column_form(lambda samples: FUNCTIONS[name](samples)) is None


def test_sources_of_other_columns_mix_as_samples() -> None:
    one = ms.from_dataset(table_of(9), name="one")
    two = ms.from_dataset(datasets.Dataset.from_dict({"ids": [[1.5]] * 9}), name="two")
    mix = ms.interleave({"one": one, "two": two})
    assert not columns_reach(mix)
    assert [sorted(sample) for sample in mix][:4].count(["ids"]) == 2


def test_a_row_that_cannot_be_read_is_a_hole_among_columns() -> None:
    good = pa.array(["a", "b", "c"])
    bad = pa.Array.from_buffers(pa.string(), 3, [None, good.buffers()[1], pa.py_buffer(b"a\xffc")])
    ds = ms.from_dataset(datasets.Dataset(datasets.table.InMemoryTable(pa.table({"text": bad}))))
    rows = bind(ds.node).rows(np.arange(3), epoch_key(0), np.array([0]))
    assert rows.columns is None
    assert [type(sample) for sample in rows.samples] == [dict, FailedSample, dict]
    assert isinstance(rows.samples[1].errors[0], SampleFailure)
    assert [type(item) is tuple for item in outcome(ds.batch(3))] == [True, False]


def test_views_of_a_row_group_that_leaves_the_cache_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(
        pa.table({"ids": [[row] * 50 for row in range(60)]}),
        tmp_path / "x.parquet",
        row_group_size=10,
    )
    monkeypatch.setattr(midstream.sources.row_groups, "CACHE_BYTES", 1)
    ds = ms.read_parquet(str(tmp_path / "x.parquet"))
    rows = bind(ds.node).rows(np.arange(60)[::-1].copy(), epoch_key(0), np.array([0]))
    assert rows.columns is not None
    views = rows.columns.columns[0].values
    assert [view[0] for view in views] == list(range(60))[::-1]
    assert sum(view.base is None for view in views) == 50


def test_batches_share_no_memory_with_the_table_and_each_other() -> None:
    data = table_of(40)
    for fn in (ms.pad, ms.flat, ms.ragged):
        for batch in ms.from_dataset(data).batch(8, collate_fn=fn):
            for tensor in batch["ids"] if fn is ms.ragged else [batch["ids"]]:
                tensor += 100
    assert data[:]["ids"] == table_of(40)[:]["ids"]


@pytest.mark.parametrize("verb", ["flat", "ragged"])
def test_flat_and_ragged_refuse_what_is_no_sequence(verb: str) -> None:
    fn = getattr(ms, verb)
    with pytest.raises(TypeError, match=f"{verb}: a sample is not a sequence of numbers"):
        fn(["ab"])
    with pytest.raises(ValueError, match=f"{verb}: .* differs beyond its first dimension"):
        fn([{"x": np.zeros((2, 3))}, {"x": np.zeros((2, 4))}])
    with pytest.raises(ValueError, match="different keys"):
        fn([{"x": [1]}, {"y": [1]}])
    with pytest.raises(ValueError, match=f"{verb}: .* differs beyond"):
        fn([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 4)}])


def test_flat_and_ragged_take_arrays_tensors_and_lists() -> None:
    samples: list[Any] = [[1, 2], [], [3]]
    for kind in (
        lambda x: x,
        lambda x: np.array(x, np.int32),
        lambda x: torch.tensor(x, dtype=torch.int16),
    ):
        tensor, lengths, running = ms.flat(list(map(kind, samples)), cu_seqlens=True)
        assert (tensor.tolist(), lengths.tolist(), running.tolist()) == (
            [1, 2, 3],
            [2, 0, 1],
            [0, 2, 2, 3],
        )
        assert [each.tolist() for each in ms.ragged(list(map(kind, samples)))] == samples
    wide = ms.flat([{"x": np.ones((2, 3), np.float32)}, {"x": np.zeros((0, 3), np.float32)}])
    assert wide["x"].shape == (2, 3)
    assert wide["x"].dtype == torch.float32
    assert ms.flat([[], []])[0].shape == (0,)
    assert ms.flat(cu_seqlens=True)([[1]])[2].dtype == torch.int32


def deliveries(ds: Dataset, lane: Lane, state: Any = None, most: int = 10_000) -> list[Any]:
    """Every row with its origins, the state after it and what was counted on the way."""
    delivery = LaneOutput(bind(ds.node), lane, int(epoch_key(0)[0]), 0)
    if state is not None:
        delivery.iterator.load_state_dict(state)
    found = []
    for _ in range(most):
        try:
            sample, origins = delivery.next()
        except StopIteration:
            break
        after = through_json(delivery.iterator.state_dict())
        found.append(
            (whole(sample), as_origin_array(origins).tolist(), after, dict(lane.ledger.events))
        )
    return [*found, dict(lane.ledger.events)]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 40]), min_size=1, max_size=80
    ),
    seq_len=st.sampled_from([1, 4, 8, 16]),
    overflow=st.sampled_from(["split", "truncate", "drop"]),
    last=st.sampled_from(["pad", "drop"]),
    separator=st.sampled_from([None, 7, [1 << 40, 7]]),
    mode=st.sampled_from(
        [{"mode": "concat"}, {"mode": "fit", "window": 7}, {"mode": "fit", "min_fill": 0.0}]
    ),
    lane=st.sampled_from([(0, 1, 1), (0, 1, 8), (1, 2, 3), (2, 3, 64)]),
    data=st.data(),
)
def test_documents_are_packed_from_columns_as_from_samples(
    sizes: list[int],
    seq_len: int,
    overflow: Any,
    last: Any,
    separator: Any,
    mode: Any,
    lane: tuple[int, int, int],
    data: st.DataObject,
) -> None:
    rows = {"input_ids": [[row] * size for row, size in enumerate(sizes)]}
    types = pa.schema({"input_ids": pa.list_(pa.int32())})
    source = ms.from_dataset(
        datasets.Dataset(datasets.table.InMemoryTable(pa.table(rows, types)))
    ).shuffle(1)
    options = {
        "overflow": overflow,
        "last": last,
        "separator": separator if seq_len > 2 else None,
        **mode,
    }
    columns, samples = source.pack(seq_len, **options), source.map(same).pack(seq_len, **options)
    expected = deliveries(samples, Lane(*lane, Ledger()))
    assert deliveries(columns, Lane(*lane, Ledger())) == expected
    if len(expected) > 1:
        cut = data.draw(st.integers(0, len(expected) - 2), "cut")
        again = deliveries(columns, Lane(*lane, Ledger()), expected[cut][2])
        assert [each[:3] for each in again[:-1]] == [each[:3] for each in expected[cut + 1 : -1]]


def test_rows_that_are_packed_together_are_batched_without_a_copy_and_only_then() -> None:
    ds = ms.from_dataset(table_of(400)).pack(16, key="ids")
    rows = list(ds)
    assert rows[0]["input_ids"].base is None or rows[0]["input_ids"].base.shape[0] == 1
    batches = list(ds.batch(4))
    assert [batch["input_ids"].tolist() for batch in batches[:3]] == [
        [row["input_ids"].tolist() for row in rows[4 * number : 4 * number + 4]]
        for number in range(3)
    ]
    block, (one, two, three) = rows_of_block((3, 2), np.int64)
    block[:] = np.arange(6).reshape(3, 2)
    whole_one = ms.collate([one, two, three])
    assert whole_one.data_ptr() == block.__array_interface__["data"][0]
    for others in (
        [two, one, three],
        [one, two],
        [one, two, two],
        [one, two, three[:]],
        [one[::-1], two, three],
        [one[:1], two[:1], three[:1]],
    ):
        made = ms.collate(others)
        assert made.tolist() == [other.tolist() for other in others]
        assert made.data_ptr() != block.__array_interface__["data"][0]
    table = np.arange(6).reshape(3, 2)
    assert ms.collate(list(table)).data_ptr() != table.__array_interface__["data"][0]
