"""Checkpoints on disk: committed whole or not at all, whenever and wherever a process is killed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream import checkpoint
from midstream.checkpoint import store as storage
from tests.helpers.simulate import Cluster


def _pipeline() -> ms.Dataset:
    return ms.from_dataset(range(200), name="web").shuffle(1).batch(4, collate_fn=tuple)


def _save_all(root: Any, cluster: Cluster, **options: Any) -> list[str]:
    return [checkpoint.save(root, loader, **options) for loader in cluster.loaders]


def _position(path: str | None) -> int | None:
    """The step at which a checkpoint stands; None for none."""
    if path is None:
        return None
    loader = ms.DataLoader(_pipeline())
    checkpoint.load(path, loader)
    return int(loader.state_dict()["steps_done"])


@pytest.mark.parametrize("url", [False, True])
def test_saved_by_three_ranks_loaded_by_two(tmp_path: Path, url: bool) -> None:
    root = f"memory://{tmp_path}" if url else str(tmp_path)
    reference = Cluster(_pipeline(), 1, 0)
    reference.run()
    cluster = Cluster(_pipeline(), 3, 0)
    cluster.run(4)
    paths = _save_all(root, cluster, state={"weights": torch.arange(3)})
    assert len(set(paths)) == 1 and checkpoint.latest(root) == paths[0]
    other = Cluster(_pipeline(), 2, 0, None, remainder="uneven")
    extra = [checkpoint.load(root, loader) for loader in other.loaders]
    assert extra[1]["weights"].tolist() == [0, 1, 2]
    other.iterators = [iter(loader) for loader in other.loaders]
    other.run()
    assert cluster.sequence + other.sequence == reference.sequence


def test_a_checkpoint_counts_when_the_last_rank_has_saved(tmp_path: Path) -> None:
    cluster = Cluster(_pipeline(), 3, 0)
    cluster.run(2)
    for loader in cluster.loaders[:2]:
        checkpoint.save(tmp_path, loader)
        assert checkpoint.latest(tmp_path) is None
    with pytest.raises(ms.CheckpointError, match="no committed checkpoint"):
        checkpoint.load(tmp_path)
    path = checkpoint.save(tmp_path, cluster.loaders[2])
    assert checkpoint.latest(tmp_path) == path


def test_what_a_dead_attempt_left_is_no_part_of_another(tmp_path: Path) -> None:
    first = Cluster(_pipeline(), 2, 0)
    first.run(2)
    _save_all(tmp_path, first)
    first.run(2)
    checkpoint.save(tmp_path, first.loaders[0], global_step=9)  # rank 1 dies before it saved
    second = Cluster(
        _pipeline(),
        2,
        0,
        first.loaders[0].state_dict() and [loader.state_at(2) for loader in first.loaders],
    )
    second.run(3)
    checkpoint.save(tmp_path, second.loaders[1], global_step=9)
    assert _position(checkpoint.latest(tmp_path)) == 2
    checkpoint.save(tmp_path, second.loaders[0], global_step=9)
    assert _position(checkpoint.latest(tmp_path)) == 5


def test_a_repeated_save_keeps_every_moment_valid(tmp_path: Path) -> None:
    cluster = Cluster(_pipeline(), 2, 0)
    cluster.run(2)
    _save_all(tmp_path, cluster, state=1)
    path = checkpoint.save(tmp_path, cluster.loaders[0], state=2)
    assert checkpoint.load(path) == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_ones_are_kept(tmp_path: Path, keep: int) -> None:
    cluster = Cluster(_pipeline(), 2, 0)
    paths = []
    for step in range(4):
        cluster.run(1)
        if step == 2:
            checkpoint.save(tmp_path, cluster.loaders[0], keep=keep)  # never committed
        else:
            paths.append(_save_all(tmp_path, cluster, keep=keep)[0])
    assert sorted(os.path.join(tmp_path, name) for name in os.listdir(tmp_path)) == paths[-keep:]


def test_ranks_that_prune_at_once_do_not_mind_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank removes all of a checkpoint before each thing that this one does to it."""
    plain = {name: getattr(storage, name) for name in ("_sync",)}
    for turn in itertools.count():
        root = tmp_path / str(turn)
        loader = ms.DataLoader(ms.from_dataset(range(40)), batch_size=2)
        iterator = iter(loader)
        for _ in range(2):
            next(iterator)
            ms.checkpoint.save(root, loader)
        old, new = sorted(path.name for path in root.iterdir())
        store = storage._Store(root)
        done = 0

        def meanwhile() -> None:
            nonlocal done
            if done == turn:
                shutil.rmtree(root / old)
            done += 1

        for place, name in (
            (storage, "_sync"),
            (store.files, "rm_file"),
            (store.files, "rmdir"),
            (store.files, "ls"),
        ):
            call = plain.get(name) or getattr(type(place), name)

            def instead(
                *given: Any, call: Any = call, bound: bool = name not in plain, **options: Any
            ) -> Any:
                meanwhile()
                return call(store.files, *given, **options) if bound else call(*given, **options)

            monkeypatch.setattr(place, name, instead)
        storage._prune(store, new, 1)
        monkeypatch.undo()
        assert not (root / old).exists()
        assert ms.checkpoint.latest(root) == str(root / new)
        if done <= turn:
            break
    assert turn >= 5


def test_a_rank_that_ended_alone_asks_for_the_training_step(tmp_path: Path) -> None:
    cluster = Cluster(ms.from_dataset(range(20)).batch(2), 4, 0, remainder="uneven")
    cluster.run()
    with pytest.raises(ValueError, match="global_step"):
        checkpoint.save(tmp_path, cluster.loaders[2])
    _save_all(tmp_path, cluster, global_step=3)
    loader = ms.DataLoader(ms.from_dataset(range(20)).batch(2))
    checkpoint.load(tmp_path, loader)
    assert loader.epoch == 1


def test_the_state_of_an_earlier_step_is_saved(tmp_path: Path) -> None:
    cluster = Cluster(_pipeline(), 1, 0)
    cluster.run(5)
    assert _position(checkpoint.save(tmp_path, cluster.loaders[0], step=3)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Killed at every system call
# ---------------------------------------------------------------------------------------------------------------------

_CALLS = (
    "open",
    "write",
    "fsync",
    "close",
    "replace",
    "rename",
    "mkdir",
    "remove",
    "unlink",
    "rmdir",
)


def _killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Run ``work`` in a forked process that is killed before its system call ``number``; whether it
    came to that.
    """
    pid = os.fork()
    if pid == 0:
        count = 0

        def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return call(*args, **kwargs)

            return run

        for name in _CALLS:
            setattr(os, name, wrapped(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the save itself failed"
    return False


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("keep", [None, 1])
@pytest.mark.processes
def test_killed_at_every_system_call_a_save_is_there_or_not(
    tmp_path: Path, ranks: int, keep: int | None
) -> None:
    calls = 0
    for number in range(1000):
        root = tmp_path / str(number)
        cluster = Cluster(_pipeline(), ranks, 0)
        cluster.run(2)
        _save_all(root, cluster, state="old")
        cluster.run(3)
        others, last = cluster.loaders[1:], cluster.loaders[0]
        for loader in others:
            checkpoint.save(root, loader, keep=keep)
        killed = _killed_at(
            number, lambda last=last, root=root: checkpoint.save(root, last, state="new", keep=keep)
        )
        newest = checkpoint.latest(root)
        stands = _position(newest)
        assert newest is not None and stands in ((2, 5) if killed else (5,))
        assert checkpoint.load(newest) == ("old" if stands == 2 else "new")
        again = Cluster(_pipeline(), ranks, 0, None)
        for loader in again.loaders:
            checkpoint.load(root, loader)
        again.iterators = [iter(loader) for loader in again.loaders]
        again.run(6 - stands)
        _save_all(root, again, state="newer", keep=1)
        assert _position(checkpoint.latest(root)) == 6
        assert os.listdir(root) == ["epoch-000000-batch-000000000006"]
        calls += killed
        if not killed:
            break
    assert calls >= 15


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.processes
def test_killed_at_every_system_call_the_first_save_leaves_none_or_one(tmp_path: Path) -> None:
    for number in range(1000):
        root = tmp_path / str(number)
        cluster = Cluster(_pipeline(), 1, 0)
        cluster.run(2)
        killed = _killed_at(
            number, lambda root=root, cluster=cluster: checkpoint.save(root, cluster.loaders[0])
        )
        assert _position(checkpoint.latest(root)) in ((None, 2) if killed else (2,))
        if not killed:
            return


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def _two(root: Path) -> tuple[str, str]:
    cluster = Cluster(_pipeline(), 2, 0)
    cluster.run(1)
    (old, _) = _save_all(root, cluster, state={"a": 1})
    cluster.run(1)
    (new, _) = _save_all(root, cluster, state={"a": 2})
    return old, new


@pytest.mark.parametrize("which", ["rank-00000", "rank-00001", "state", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(
    tmp_path: Path, which: str, damage: str
) -> None:
    old, new = _two(tmp_path)
    (file,) = (path for path in Path(new).iterdir() if path.name.startswith(which))
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(
            {"truncated": data[:-1], "empty": b"", "flipped": bytes([data[0] ^ 1]) + data[1:]}[
                damage
            ]
        )
    loader = ms.DataLoader(_pipeline())
    before = loader.state_dict()
    with pytest.raises(ms.CheckpointError):
        checkpoint.load(new, loader)
    assert loader.state_dict() == before
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert checkpoint.latest(tmp_path) == old
    assert len(told) == (damage != "missing" or which != "checkpoint.json")


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.text(max_size=5)
    | st.just("../../secret-0.json"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(key=st.sampled_from(["midstream_checkpoint", "world_size", "files", None]), value=_json)
def test_a_forged_marker_is_refused(tmp_path: Path, key: str | None, value: Any) -> None:
    root = tmp_path / "forged"
    new = checkpoint.latest(root) if root.exists() else None
    if new is None:
        _, new = _two(root)
    marker = Path(new, "checkpoint.json")
    good = marker.read_bytes()
    content = json.loads(good)
    forged = value if key is None else {**content, key: value}
    marker.write_text(json.dumps(forged))
    try:
        if forged != content:
            with pytest.raises(ms.CheckpointError):
                checkpoint.load(new, ms.DataLoader(_pipeline()))
    finally:
        marker.write_bytes(good)


@pytest.mark.parametrize("ranks", [3_000_000, 1, 0, -2, 2.0, "2"])
def test_a_damaged_number_of_ranks_takes_no_memory(tmp_path: Path, ranks: Any) -> None:
    old, new = _two(tmp_path)
    marker = Path(new, "checkpoint.json")
    marker.write_text(json.dumps({**json.loads(marker.read_bytes()), "world_size": ranks}))
    tracemalloc.start()
    try:
        with pytest.raises(
            ms.CheckpointError,
            match=rf"checkpoint.json is damaged: .* files of 2 of {ranks!r} ranks",
        ):
            checkpoint.load(new)
        with pytest.warns(RuntimeWarning, match="Trying the checkpoint before it"):
            assert checkpoint.latest(tmp_path) == old
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_ranks_of_any_number_of_digits_are_no_files_of_a_checkpoint(tmp_path: Path) -> None:
    _, new = _two(tmp_path)
    marker = Path(new, "checkpoint.json")
    content = json.loads(marker.read_bytes())
    forged = f"rank-{'9' * 5000}-of-00002-{'0' * 8}-{'0' * 32}.json"
    marker.write_text(json.dumps({**content, "files": [*content["files"][1:], forged]}))
    with pytest.raises(ms.CheckpointError, match="checkpoint.json is damaged"):
        checkpoint.load(new)
