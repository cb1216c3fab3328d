"""Columns of Arrow tables in many pieces."""

from __future__ import annotations

import gc
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.sources.arrow_table import TableReader

PIECES = st.sampled_from(
    [
        pa.list_(pa.int32()),
        pa.large_list(pa.float64()),
        pa.list_(pa.int8(), 2),
        pa.int16(),
        pa.float32(),
        pa.bool_(),
    ]
)


@st.composite
def pieces(draw: Any) -> pa.ChunkedArray:
    """A column in pieces that lie anywhere in memory, in any order, cut, empty, some of them with
    nulls.
    """
    kind = draw(PIECES)
    inner = getattr(kind, "value_type", kind)
    number = st.booleans() if inner == pa.bool_() else st.integers(0, 9)
    if pa.types.is_floating(inner):
        number = number.map(float)
    if pa.types.is_fixed_size_list(kind):
        value: Any = st.lists(number, min_size=2, max_size=2)
    else:
        value = number if inner is kind else st.lists(number, max_size=4)
    nulls = draw(st.integers(0, 3)) == 0
    chunks = []
    for rows in draw(
        st.lists(
            st.lists(st.none() | value if nulls else value, max_size=6), min_size=1, max_size=7
        )
    ):
        whole = pa.array(rows, kind)
        start = draw(st.integers(0, len(rows)))
        chunks.append(
            whole.slice(start, draw(st.integers(0, len(rows) - start)))
            if draw(st.booleans())
            else whole
        )
    chunks = draw(st.permutations(chunks))
    if draw(st.booleans()):  # one after the other, as a file has them
        whole = pa.table({"x": pa.chunked_array(chunks, kind)})
        return pa.ipc.open_stream(_stream(whole)).read_all().column(0)
    return pa.chunked_array(chunks, kind)


@settings(max_examples=300)
@given(pieces(), st.data())
def test_a_column_in_pieces_gives_its_values(column: pa.ChunkedArray, data: Any) -> None:
    reader, expected = TableReader(pa.table({"x": column})), column.to_pylist()
    if not expected:
        return
    for _ in range(4):  # pieces are looked up when one of their rows is first asked for
        rows = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=12))
        found = reader.columns(np.array(rows)).columns[0]
        values = [
            value.tolist() if isinstance(value, np.ndarray) else value for value in found.values
        ]
        assert values == [expected[row] for row in rows]
        if found.dtype is not None:
            assert found.lengths.tolist() == [len(value) for value in values]
            assert all(not value.flags.writeable for value in found.values if len(value))


def test_a_view_keeps_the_memory_it_looks_into(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"x": [[number] * 50 for number in range(300)]}).save_to_disk(
        tmp_path
    )
    batches = pa.memory_map(str(next(tmp_path.glob("*.arrow"))))
    table = pa.ipc.open_stream(batches).read_all()
    table = pa.concat_tables([table.slice(start, 100) for start in (0, 100, 200)])
    views = TableReader(table).columns(np.array([5, 150, 299])).columns[0].values
    del table, batches
    gc.collect()
    assert [view.tolist() for view in views] == [[5] * 50, [150] * 50, [299] * 50]
    assert all(
        pickle.loads(pickle.dumps(view)).tolist() == view.tolist() and len(pickle.dumps(view)) < 700
        for view in views
    )


def test_threads_that_open_a_column_at_once_read_its_values() -> None:
    column = pa.chunked_array(
        [
            pa.array([[number] * 3 for number in range(start, start + 5)])
            for start in range(0, 200, 5)
        ]
    )
    numbers = pa.chunked_array([pa.array(range(start, start + 5)) for start in range(0, 200, 5)])
    table = pa.ipc.open_stream(_stream(pa.table({"x": column, "n": numbers}))).read_all()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            for seed in range(150):
                reader = TableReader(table)
                orders = [
                    np.random.default_rng((seed, number)).permutation(200)[:20]
                    for number in range(6)
                ]
                for order, found in zip(orders, pool.map(reader.columns, orders)):
                    assert [view.tolist() for view in found.columns[0].values] == [
                        [row] * 3 for row in order
                    ]
                    assert found.columns[1].values == order.tolist()
    finally:
        sys.setswitchinterval(interval)


def _stream(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
