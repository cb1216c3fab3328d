"""Reads, describes, compares and follows checkpoints, for the command line.

read        reads a state from a checkpoint of `midstream.checkpoint.save`, JSON or ``torch.save``
describe    its content as plain values
difference  how two states differ
follow      the rows that come next
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pickle
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import midstream as ms
from midstream.checkpoint.differences import diff_specs
from midstream.checkpoint.merge import agreed, merge_states
from midstream.checkpoint.progress import progress
from midstream.checkpoint.read import parse
from midstream.checkpoint.store import states as stored_states
from midstream.common.plain_state import State, decode
from midstream.dataset import Dataset
from midstream.errors import CheckpointError, Origin

__all__ = ["describe", "difference", "find", "follow", "loader_for", "read", "spec_lines"]


def find(name: str) -> Any:
    """Import the object that ``module:function`` or ``file.py:function`` names.

    Raises:
        ValueError: If it does not exist, or the import fails.
    """
    module, colon, path = name.partition(":")
    if not colon or not module or not path:
        raise ValueError(f"give module:function, or file.py:function; found {name!r}")
    if module.endswith(".py"):
        file = Path(module)
        if not file.is_file():
            raise ValueError(f"there is no file {module}")
        folder, module = str(file.resolve().parent), file.stem
    else:
        folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"importing {module} failed: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            names = [
                key
                for key, value in vars(found).items()
                if not key.startswith("_") and callable(value)
            ]
            raise ValueError(
                f"{module} has no {path!r}; it has {', '.join(names[:12]) or 'nothing'}"
            )
        found = getattr(found, part)
    return found


def read(path: str, key: str | None = None) -> dict[str, State]:
    """Read and check a state: of a whole run, or of one rank.

    Args:
        path: A checkpoint of `midstream.checkpoint.save` or a folder of them (also by URL), a JSON
            file, or a file of ``torch.save`` (read with ``weights_only``).
        key: Path of the state within the file, like ``trainer.loader``; needed only where there
            are several.

    Raises:
        CheckpointError: If there is no state, or it is damaged.
    """
    if "://" in path or os.path.isdir(path):
        found: list[Any] = stored_states(path)[1]
    else:
        content = _content(path)
        if key is not None:
            for part in key.split("."):
                if not isinstance(content, dict) or part not in content:
                    keys = (
                        sorted(map(str, content))[:12]
                        if isinstance(content, dict)
                        else type(content).__name__
                    )
                    raise CheckpointError(f"{path} has no {key!r}: at {part!r} there is {keys}")
                content = content[part]
        by_key = dict(_states_in(content))
        if not by_key:
            keys = (
                f"with the keys {sorted(map(str, content))[:12]}"
                if isinstance(content, dict)
                else ""
            )
            raise CheckpointError(
                f"{path} holds no midstream state: found a {type(content).__name__} {keys}".rstrip()
            )
        lists = {each.rpartition("[")[0] for each in by_key}
        # Several states are those of all ranks when they stand in one list.
        if len(by_key) > 1 and (len(lists) > 1 or ("" in lists and not isinstance(content, list))):
            raise CheckpointError(
                f"{path} holds several states: choose one with --key: {', '.join(by_key)}"
            )
        found = list(by_key.values())
    return merge_states(found) if len(found) > 1 else agreed(found[0])[0]


def _content(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    if start.lstrip()[:1] in (b"{", b"["):
        try:
            return json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged: it begins like JSON, but is not valid JSON ({error})"
            ) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} cannot be read: it is not JSON, and torch.load(weights_only=True) refuses it."
            " Either torch.save did not write it, or it holds more than tensors and plain values"
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"{path} is neither JSON nor a file of torch.save ({type(error).__name__}:"
            f" {str(error)[:120]})"
        ) from None


def _states_in(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """All states inside a value, each with its key."""
    if depth > 8:
        return
    if isinstance(value, dict):
        if ("midstream" in value and "lanes" in value) or (not depth and "midstream" in value):
            yield key, value
            return
        for name, item in value.items():
            yield from _states_in(item, f"{key}.{name}" if key else str(name), depth + 1)
    elif isinstance(value, (list, tuple)) and len(value) <= 100_000:
        for index, item in enumerate(value):
            yield from _states_in(item, f"{key}[{index}]", depth + 1)


def describe(state: dict[str, State]) -> dict[str, Any]:
    """The content of a state as plain values."""
    run_state = parse(state)
    lanes = {
        index: {
            "batches": lane["lane"]["rounds"] if lane and "lane" in lane else None,
            "done": bool(lane and lane.get("lane", {}).get("done")),
            "left_over": bool(lane and "lane" in lane and lane["lane"]["epoch"] < run_state.epoch),
            "samples": sum(lane["samples"]) if lane else 0,
            "bytes": len(state["lanes"][f"{index:04d}"]),
        }
        for index, lane in sorted(run_state.lanes.items())
    }
    return {
        "format": state["midstream"],
        "fingerprint": run_state.fingerprint,
        "epoch": run_state.epoch,
        "batches": run_state.batches,
        "steps_done": run_state.steps_done,
        "num_lanes": run_state.num_lanes,
        "lanes_here": len(run_state.lanes),
        "bytes": len(json.dumps(state, separators=(",", ":"))),
        "bytes_of_spec": len(state["spec"]),
        "progress": progress(state).to_dict(),
        "lanes": {f"{index:04d}": lane for index, lane in lanes.items()},
        "spec": run_state.spec,
    }


def spec_lines(spec: State, name: str = "") -> list[str]:
    """A checkpoint's pipeline as a tree, one line per node."""
    fields = {key: value for key, value in spec.items() if key not in ("node", "name", "inputs")}
    label = spec.get("name") or name
    words = ", ".join(
        f"{key}={json.dumps(value, ensure_ascii=False, sort_keys=True)}"
        for key, value in sorted(fields.items())
    )
    lines = [f"{f'{label}: ' if label else ''}{spec.get('node')}({words})"]
    inputs = sorted(spec.get("inputs", {}).items())
    for number, (key, child) in enumerate(inputs):
        last = number == len(inputs) - 1
        head, *tail = spec_lines(child, key)
        lines.append(f"{'└─ ' if last else '├─ '}{head}")
        lines.extend(f"{'   ' if last else '│  '}{line}" for line in tail)
    return lines


def difference(one: dict[str, State], other: dict[str, State]) -> dict[str, Any]:
    """How two states differ: of the same run, or of two runs that should agree.

    Returns:
        ``same``: whether they do not; ``pipeline``: how the pipelines differ, a line each;
        ``changes``: the same for changed weights, excluded samples and an epoch resumed with
        another batch size or mix; ``position``: epoch, batches, ... as pairs where they differ;
        ``progress``: counts as pairs where they differ; ``lanes``: numbers of the lanes that
        differ.
    """
    first, second = parse(one), parse(other)
    position = {
        name: [getattr(first, name), getattr(second, name)]
        for name in ("epoch", "batches", "steps_done", "num_lanes")
        if getattr(first, name) != getattr(second, name)
    }
    before, after = progress(one).to_dict(), progress(other).to_dict()
    counts = {
        name: [before.get(name), after.get(name)]
        for name in dict.fromkeys(chain(before, after))
        if name not in ("epoch", "batches") and before.get(name) != after.get(name)
    }
    keys = sorted({*one["lanes"], *other["lanes"]})
    lanes = [key for key in keys if one["lanes"].get(key) != other["lanes"].get(key)]
    pipeline = (
        diff_specs(first.spec, second.spec) if first.fingerprint != second.fingerprint else []
    )
    changes = first.changes.differences(second.changes)
    return {
        "same": not (position or counts or lanes or pipeline or changes),
        "pipeline": pipeline,
        "changes": changes,
        "position": position,
        "progress": counts,
        "lanes": lanes,
    }


def loader_for(target: Any, state: dict[str, State]) -> ms.DataLoader:
    """A loader that continues from a state.

    Args:
        target: A dataset, or a function that returns a dataset or a loader. A dataset is batched
            as it was when the state was saved.
        state: The state.

    Raises:
        TypeError: If the target makes no midstream dataset or loader.
        CheckpointError: If the state is of another pipeline.
    """
    made = target
    if not isinstance(target, Dataset):
        parameters = inspect.signature(target).parameters
        values = {"num_workers": 0, "rank": 0, "world_size": 1}
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        made = target(
            **{name: value for name, value in values.items() if takes_all or name in parameters}
        )
    if isinstance(made, Dataset):
        options: dict[str, Any] = {}
        spec = decode(state["spec"])
        if (
            made.fingerprint != state["fingerprint"]
            and not made.batch_rows
            and spec.get("node") == "batch"
        ):
            options = {"batch_size": spec["batch_size"], "drop_last": bool(spec.get("drop_last"))}
            if "collate_fn" in spec:
                options["collate_fn"] = _collate_named(spec["collate_fn"])
        made = ms.DataLoader(made, rank=0, world_size=1, remainder="uneven", **options)
    if not isinstance(made, ms.DataLoader):
        raise TypeError(
            f"the function makes a {type(made).__name__}; a midstream dataset or loader is needed"
        )
    made.load_state_dict(state)
    return made


def _collate_named(name: str) -> Any:
    """A collate function with the name that was saved.

    It returns the samples as they are: only their rows are shown.
    """
    if name == "pad":
        return ms.pad

    def collate(samples: list[Any]) -> list[Any]:
        return samples

    collate.__name__ = collate.__qualname__ = name
    return collate


def follow(loader: ms.DataLoader, steps: int) -> Iterator[tuple[int, int, list[Origin] | str]]:
    """Epoch, batch of the epoch and origins of each of the next batches.

    Where a batch raises, the text of the error in place of the origins.
    """
    left = steps
    while left > 0:
        epoch, seen = loader.epoch, 0
        batches = iter(loader)
        done = loader.state_dict()["steps_done"]
        while left > 0:
            try:
                next(batches)
            except StopIteration:
                break
            except ms.SampleError as error:
                yield (
                    epoch,
                    done + seen + 1,
                    f"{error.error_type}: {error.original_message} at {error.origin}",
                )
                left -= 1
                continue
            seen += 1
            left -= 1
            yield epoch, done + seen, list(loader.trace())
        if not seen and loader.epoch <= epoch:
            return
