"""Finding out what happened: rows behind origins, batches made again, samples that were skipped."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import midstream as ms


def jsonl(folder: Path, name: str, numbers: range) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"id": number}) + "\n" for number in numbers))
    return str(path)


def sources(folder: Path) -> dict[str, ms.Dataset]:
    """Every kind of source over the rows 0 ... 29."""
    rows = [{"id": number} for number in range(30)]
    pq.write_table(pa.table({"id": list(range(30))}), folder / "rows.parquet", row_group_size=7)
    for part in range(3):
        with gzip.open(folder / f"part{part}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"id": number}) + "\n" for number in range(part, 30, 3))
    return {
        "sequence": ms.from_dataset(rows, name="s"),
        "arrow": ms.from_dataset(datasets.Dataset.from_list(rows), name="s"),
        "parquet": ms.read_parquet(str(folder / "rows.parquet"), name="s"),
        "jsonl": ms.read_json(jsonl(folder, "rows.jsonl", range(30)), name="s"),
        "jsonl stream": ms.read_json(str(folder / "part*.jsonl.gz"), name="s"),
        "iterable": ms.from_iterable(lambda: iter(rows), name="s"),
        "shards": ms.from_iterable(lambda shard: iter(rows[shard::4]), name="s", num_shards=4),
        "stride": ms.from_iterable(lambda: iter(rows), name="s", split="stride"),
        "hub": ms.from_dataset(
            datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=5), name="s"
        ),
    }


KINDS = [
    "sequence",
    "arrow",
    "parquet",
    "jsonl",
    "jsonl stream",
    "iterable",
    "shards",
    "stride",
    "hub",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_row_fetches_what_a_source_holds_behind_every_origin(
    kind: str, workers: int, tmp_path: Path
) -> None:
    ds = sources(tmp_path)[kind].map(lambda row: row).filter(lambda row: row["id"] % 7)
    workers = min(workers, 1) if kind == "iterable" else workers  # of one shard
    loader = ms.DataLoader(ds, 4, num_workers=workers, collate_fn=list)
    seen = 0
    for batch in loader:
        for origin, sample in zip(loader.trace(), batch, strict=True):
            assert ds.row(origin) == sample
            seen += 1
    assert seen == sum(number % 7 > 0 for number in range(30))


@pytest.mark.parametrize("kind", KINDS)
def test_row_refuses_what_is_not_there(kind: str, tmp_path: Path) -> None:
    ds = sources(tmp_path)[kind]
    with pytest.raises(ValueError, match=r"no source 'web'.*its sources: s"):
        ds.row(("web", 0, 1))
    for row in (10**6, -1):
        with pytest.raises(IndexError, match="30|no row|0 to 29"):
            ds.row(("s", 0, row))


def test_row_of_a_row_that_cannot_be_read_is_its_error() -> None:
    class Bad(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            raise OSError("no disk")

    with pytest.raises(ms.SampleError, match="no disk"):
        ms.from_dataset(Bad([1, 2]), name="s").row(("s", 0, 1))


# -- replay -------------------------------------------------------------------------------------------------------------


def pipelines() -> dict[str, ms.Dataset]:
    web, code = (
        ms.from_dataset(range(90), name="web"),
        ms.from_dataset(range(1000, 1060), name="code"),
    )
    mix = ms.interleave({"web": web.shuffle(1), "code": code.shuffle(1)}, {"web": 2, "code": 1})
    return {
        "random": mix.map(lambda x: x + 1),
        "stream": mix.filter(lambda x: x % 5).shuffle(2, buffer_size=40),
        "endless": web.shuffle(3).repeat(),
    }


@pytest.mark.parametrize("name", ["random", "stream", "endless"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_replay_makes_the_batches_that_followed_a_checkpoint(name: str, ranks: int) -> None:
    ds = pipelines()[name]
    loaders = [
        ms.DataLoader(ds, 4, collate_fn=list, rank=rank, world_size=ranks) for rank in range(ranks)
    ]
    iterators = [iter(loader) for loader in loaders]
    for _ in range(4):
        [next(iterator) for iterator in iterators]
    states = [loader.state_dict() for loader in loaders]
    followed = []
    traces = []
    for _ in range(3):
        for iterator, loader in zip(iterators, loaders):
            followed.append(next(iterator))
            traces.append(list(loader.trace()))
    before = [loader.state_dict() for loader in loaders]
    for given_ in (ds, loaders[0]):
        again = ms.replay(given_, states, len(followed), batch_size=4, collate_fn=list)
        found = []
        for batch in again:
            found.append(batch)
            assert list(again.trace()) == traces[len(found) - 1]
        assert found == followed
    for rank in range(ranks):
        mine = list(
            ms.replay(ds, states, 3, batch_size=4, collate_fn=list, rank=rank, world_size=ranks)
        )
        assert mine == followed[rank::ranks]
    assert [loader.state_dict() for loader in loaders] == before


def test_replay_goes_on_into_the_next_epoch_and_without_a_number_ends_with_this_one() -> None:
    ds = pipelines()["random"]
    loader = ms.DataLoader(ds, 8, collate_fn=list)
    states, batches = [], []
    for _ in range(2):
        for batch in loader:
            batches.append(batch)
            states.append(loader.state_dict())
    length = len(loader)
    assert list(ms.replay(loader, states[length - 3], 6)) == batches[length - 2 : length + 4]
    assert list(ms.replay(loader, states[length - 3])) == batches[length - 2 : length]


def test_replay_meets_the_failures_again_and_refuses_another_pipeline() -> None:
    ds = ms.from_dataset(range(20)).map(lambda x: x if x != 5 else 1 // 0)
    loader = ms.DataLoader(ds, 4, collate_fn=list)
    again = ms.replay(loader, loader.state_dict(), 3)
    assert next(again) == [0, 1, 2, 3]
    with pytest.raises(ms.SampleError):
        next(again)
    assert next(again) == [4, 6, 7]
    with pytest.raises(ms.CheckpointError):
        ms.replay(ms.from_dataset(range(21)), loader.state_dict(), 1, batch_size=4)


# -- quarantine ---------------------------------------------------------------------------------------------------------


def bad(x: Any) -> Any:
    if x % 10 == 3:
        raise ValueError(f"bad {x}")
    return x


def skipping(folder: str, kind: str) -> ms.Dataset:
    ds = ms.from_dataset(range(200), name="n")
    if kind == "map":
        return ds.map(bad, on_error="skip", quarantine=folder)
    if kind == "refill":
        return ds.map(bad, on_error="refill", quarantine=folder)
    if kind == "filter":
        return ds.filter(lambda x: bad(x) >= 0, on_error="skip", quarantine=folder)
    if kind == "flat_map":
        return ds.flat_map(lambda x: [bad(x)], on_error="skip", quarantine=folder)
    return (
        ds.map(bad, on_error="skip", quarantine=folder)
        .filter(lambda x: True)
        .shuffle(1, buffer_size=60)
    )


@pytest.mark.parametrize("kind", ["map", "refill", "filter", "flat_map", "behind a buffer"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_quarantine_holds_each_skipped_sample_once_however_often_the_run_was_resumed(
    kind: str, workers: int, tmp_path: Path
) -> None:
    folder = str(tmp_path / "quarantine")
    ds = skipping(folder, kind)
    kept: list[Any] = []
    state: Any = {}
    for _ in range(60):
        loader = ms.DataLoader(ds, 8, num_workers=workers, collate_fn=list, lanes=4)
        loader.load_state_dict(state)
        if loader.epoch:
            break
        for step, batch in enumerate(loader):
            kept += batch
            state = loader.state_dict()
            if step == (4 if workers else 0):
                break
        loader.close()
    whole = ms.DataLoader(skipping(str(tmp_path / "other"), kind), 8, collate_fn=list, lanes=4)
    assert kept == [x for batch in whole for x in batch]
    assert sum(loader.progress().sources["n"].failures.values()) == 20
    found = ms.read_quarantine(folder)
    assert [one.origin.row for one in found if one.origin] == list(range(3, 200, 10))
    for one in found:
        assert one.origin is not None and ds.row(one.origin) == one.origin.row
        assert one.error_type == "ValueError" and one.message == f"bad {one.origin.row}"
        assert "in bad" in one.traceback and one.preview == str(one.origin.row)
        assert (
            one.node.split("/")[-1].split("#")[0] in ("map", "filter", "flat_map")
            and "@" in one.function
        )
    lines = [
        line for file in Path(folder).glob("*.jsonl") for line in file.read_text().splitlines()
    ]
    if (
        not workers and kind == "map"
    ):  # nothing was read ahead of a checkpoint, so nothing was written twice
        assert len(lines) == 20


def test_looking_writes_nothing_to_a_quarantine(tmp_path: Path) -> None:
    folder = tmp_path / "quarantine"
    ds = skipping(str(folder), "map")
    ds.row(("n", 0, 3))
    repr(ds)
    assert not folder.exists()


def test_a_torn_line_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "quarantine"
    list(skipping(str(folder), "map"))
    (file,) = folder.glob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.warns(RuntimeWarning, match="1 lines are incomplete"):
        found = ms.read_quarantine(folder)
    assert len(found) == 19
    with pytest.raises(FileNotFoundError, match="no quarantine"):
        ms.read_quarantine(tmp_path / "other")


def test_a_quarantine_that_cannot_be_written_is_a_warning_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ds = ms.from_dataset(range(30)).map(bad, on_error="skip", quarantine=str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="could not be written to the quarantine"):
        assert len(list(ds)) == 27
    loader = ms.DataLoader(ds, 5, collate_fn=list)
    with pytest.warns(RuntimeWarning, match="could not be written to the quarantine"):
        assert sum(len(batch) for batch in loader) == 27


def test_previews_are_short_whatever_the_sample(tmp_path: Path) -> None:
    class Nasty:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    rows = [{"text": "x" * 10**6, "ids": np.arange(10**5)}, ["y"] * 10**5, Nasty()]
    ds = ms.from_dataset(rows, name="n").map(
        lambda x: 1 // 0, on_error="skip", quarantine=str(tmp_path)
    )
    list(ds)
    previews = [one.preview for one in ms.read_quarantine(tmp_path)]
    assert len(previews) == 3 and all(len(preview) <= 2000 for preview in previews)
    assert "shape=(100000,)" in previews[0] and "Nasty" in previews[2]


@pytest.mark.slow
def test_a_killed_run_leaves_whole_lines(tmp_path: Path) -> None:
    program = f"""
        import midstream as ms
        def bad(x):
            raise ValueError("bad")
        for _ in ms.from_dataset(range(10**6), name="n").map(bad, on_error="skip", quarantine={str(tmp_path)!r}):
            pass
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    while not any(file.stat().st_size > 20_000 for file in tmp_path.glob("*.jsonl")):
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = ms.read_quarantine(tmp_path)  # a warning would be an error here
    assert [one.origin.row for one in found if one.origin] == list(range(len(found)))


def test_a_quarantine_goes_with_skip() -> None:
    for make in (
        lambda: ms.from_dataset([1]).map(bad, quarantine="x"),
        lambda: ms.from_dataset([1]).filter(bad, quarantine="x"),
        lambda: ms.from_dataset([1]).flat_map(bad, quarantine="x"),
    ):
        with pytest.raises(ValueError, match="quarantine keeps skipped samples"):
            make()
    with pytest.raises(TypeError, match="path of a folder"):
        ms.from_dataset([1]).map(bad, on_error="skip", quarantine=b"x")  # type: ignore[arg-type]


# -- error rates --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=120),
    st.integers(1, 40),
    st.sampled_from([0.02, 0.1, 0.25, 0.5]),
)
def test_a_rate_is_over_where_a_window_has_too_many(
    fails: list[bool], window: int, rate: float
) -> None:
    def fn(x: int) -> int:
        return 1 // 0 if fails[x] else x

    most = int(rate * window + 1e-9)
    expected: int | None = None
    for end in range(len(fails)):
        if fails[end] and sum(fails[max(0, end + 1 - window) : end + 1]) > most:
            expected = end
            break
    ds = ms.from_dataset(range(len(fails))).map(
        fn, on_error="skip", max_errors=ms.ErrorRate(rate, window)
    )
    found = []
    raised = False
    try:
        for x in ds:
            found.append(x)
    except ms.TooManyErrors as error:
        raised = True
        assert f"window={window}" in str(error)
    assert raised == (expected is not None)
    assert found == [x for x in range(len(fails) if expected is None else expected) if not fails[x]]
    loader = ms.DataLoader(ds, 1, collate_fn=list)
    found = []
    try:
        for batch in loader:
            found += batch
        assert expected is None
    except ms.TooManyErrors:
        assert expected is not None
        assert found == [x for x in range(expected) if not fails[x]]


def test_a_rate_is_checked() -> None:
    for rate in (0, 1, -0.5, 7):
        with pytest.raises(ValueError, match="rate of max_errors"):
            ms.from_dataset([1]).map(bad, on_error="skip", max_errors=ms.ErrorRate(rate))
    with pytest.raises(ValueError, match="window"):
        ms.from_dataset([1]).map(bad, on_error="skip", max_errors=ms.ErrorRate(0.1, 0))
    with pytest.raises(ValueError, match="on_error"):
        ms.from_dataset([1]).map(bad, max_errors=ms.ErrorRate(0.1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_window_begins_anew_at_a_resume(workers: int) -> None:
    ds = ms.from_dataset(range(400), name="n").map(
        bad, on_error="skip", max_errors=ms.ErrorRate(0.15, 100)
    )
    loader = ms.DataLoader(ds, 10, num_workers=workers, collate_fn=list)
    iterator = iter(loader)
    kept = [x for _ in range(20) for x in next(iterator)]
    again = ms.DataLoader(ds, 10, num_workers=0, collate_fn=list)
    again.load_state_dict(loader.state_dict())
    kept += [x for batch in again for x in batch]
    assert kept == [x for x in range(400) if x % 10 != 3]
    loader.close()
