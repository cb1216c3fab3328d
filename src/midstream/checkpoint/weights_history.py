"""Which weights held when, and the shares that were asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midstream.checkpoint.merge import merge_states
from midstream.checkpoint.read import RunState, parse
from midstream.checkpoint.spec import walk
from midstream.common.plain_state import State


def weights_history(state: State) -> list[dict[str, Any]]:
    """Which weights every mix of a run had when, read from a checkpoint.

    Args:
        state: A loader's ``state_dict()``, a merged one, or a list of the states of all ranks.

    Returns:
        A dict per change, in order, first those that the run began with: ``"mix"`` (its path),
        ``"weights"`` (by name; with a schedule a list of ``[border, weights]``), ``"epoch"`` and
        ``"step"`` (batches of a rank in that epoch) after which they held, ``"by"``:
        ``"pipeline"``, ``"set_weights"`` or ``"load_state_dict"``.

    >>> import midstream as ms
    >>> mix = ms.interleave({"a": ms.from_dataset(range(9)), "b": ms.from_dataset(range(9))}, {"a": 2, "b": 1}, name="mix")
    >>> loader = ms.DataLoader(mix, batch_size=2)
    >>> _ = next(iter(loader))
    >>> loader.set_weights("mix", {"a": 1, "b": 5})
    >>> for entry in ms.weights_history(loader.state_dict()):
    ...     print(entry["step"], entry["weights"], entry["by"])
    0 {'a': 2, 'b': 1} pipeline
    1 {'a': 1, 'b': 5} set_weights
    """
    run_state = parse(merge_states(state) if isinstance(state, list) else state)
    changes = run_state.changes
    history = []
    for path, spec in _mixes(run_state.spec):
        loads = [change.was for change in changes.of_mix(path) if change.was is not None]
        first = loads[0] if loads else weights_of(spec)
        history.append({"mix": path, "weights": first, "epoch": 0, "step": 0, "by": "pipeline"})
    keys = ("mix", "weights", "epoch", "step", "by")
    return [*history, *({key: getattr(change, key) for key in keys} for change in changes.weights)]


def asked_shares(state: State) -> dict[str, float | None]:
    """The share of each source that a run asks for where it stands: schedules and edits counted in, nested mixes multiplied.

    Args:
        state: A loader's ``state_dict()``, a merged one, or a list of the states of all ranks.

    Returns:
        By name of the source, as `midstream.progress` has them. A stream with a schedule: the mean
        over its lanes. None for sources that share a part in another way (``concatenate``).

    >>> import midstream as ms
    >>> mix = ms.interleave({"a": ms.from_dataset(range(9)), "b": ms.from_dataset(range(9))}, {"a": 3, "b": 1})
    >>> ms.asked_shares(ms.DataLoader(mix, batch_size=2).state_dict())
    {'a': 0.75, 'b': 0.25}
    """
    return shares_asked(parse(merge_states(state) if isinstance(state, list) else state))


def shares_asked(run_state: RunState) -> dict[str, float | None]:
    """`asked_shares` of a checked state."""
    changed = run_state.changes.weights_set()
    paths = {id(spec): path for path, spec in _mixes(run_state.spec)}
    phases = {
        path: found
        for path, spec in _mixes(run_state.spec)
        if (found := _lane_phases(run_state, spec, path))
    }
    shares: dict[str, float | None] = {}

    def down(spec: Any, share: float | None, rows: float) -> None:
        if "name" in spec:
            shares[spec["name"]] = share
            return
        inputs = spec.get("inputs", {})
        if spec["node"] != "interleave":
            rows = rows * spec.get("batch_size", 1) + (
                spec.get("n", 0) if spec["node"] == "skip" else 0
            )
            for _, child in sorted(inputs.items()):
                down(child, share if len(inputs) == 1 else None, rows)
            return
        path = paths[id(spec)]
        if path in changed:
            parts = _normed(changed[path][-1])
        else:
            steps = [[0, spec["weights"]], *spec.get("schedule", [])]
            now = max(index for index, (border, _) in enumerate(steps) if border <= rows)
            each = [
                _normed(steps[min(index, len(steps) - 1)][1]) for index in phases.get(path, [now])
            ]
            parts = {name: sum(part[name] for part in each) / len(each) for name in each[0]}
        for name, child in sorted(inputs.items()):
            down(child, None if share is None else share * parts[name], rows * parts[name])

    down(run_state.spec, 1.0, run_state.batches)
    return shares


def weights_of(spec: Mapping[str, Any]) -> State:
    """The weights that a mix's spec gives: by name, or with a schedule ``[[border, weights],
    ...]``.
    """
    return [[0, spec["weights"]], *spec["schedule"]] if "schedule" in spec else spec["weights"]


def _normed(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _mixes(spec: Any) -> list[tuple[str, Any]]:
    """Path and spec of every mix."""
    return [(node.path, node.spec) for node in walk(spec) if node.spec["node"] == "interleave"]


def _lane_phases(run_state: RunState, spec: Any, path: str) -> list[int]:
    """The phases in which the lanes of a stream are in the schedule of a mix."""
    found: list[int] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            if "phase" in value and value.get("of") == path:
                found.append(value["phase"][0])
                return
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                look(item)

    if "schedule" in spec:
        for lane in run_state.lanes.values():
            look((lane or {}).get("lane", {}).get("state"))
    return found
