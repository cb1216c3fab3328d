"""History of a run's weights, and the share that they ask of each source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midstream.checkpoint.merge import merge_states
from midstream.checkpoint.read import RunState, parse
from midstream.checkpoint.spec import walk
from midstream.common.plain_state import State


def weights_history(state: State) -> list[dict[str, Any]]:
    """The weights that each mix of a run had over time, read from a checkpoint.

    Args:
        state: A loader's ``state_dict()``, a merged one, or a list of the states of all ranks.

    Returns:
        A dict per change, in order, first the weights with which the run began: ``"mix"`` (its
        path), ``"weights"`` (by name; with a schedule a list of ``[border, weights]``),
        ``"epoch"`` and ``"step"`` (batches of a rank in that epoch) after which they held, and
        ``"by"``: ``"pipeline"``, ``"set_weights"`` or ``"load_state_dict"``.

    >>> import midstream as ms
    >>> sources = {"a": ms.from_dataset(range(9)), "b": ms.from_dataset(range(9))}
    >>> mix = ms.interleave(sources, {"a": 2, "b": 1}, name="mix")
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
    """The share of each source that the weights of a run ask for at its position.

    Schedules and changed weights are taken into account; shares of nested mixes are multiplied.

    Args:
        state: A loader's ``state_dict()``, a merged one, or a list of the states of all ranks.

    Returns:
        Shares by the names of the sources in `midstream.progress`. In a stream with a schedule, the
        mean over its lanes. None for a source whose share no weights set (``concatenate``).

    >>> import midstream as ms
    >>> sources = {"a": ms.from_dataset(range(9)), "b": ms.from_dataset(range(9))}
    >>> mix = ms.interleave(sources, {"a": 3, "b": 1})
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

    def visit(spec: Any, share: float | None, rows: float) -> None:
        if "name" in spec:
            shares[spec["name"]] = share
            return
        inputs = spec.get("inputs", {})
        if spec["node"] != "interleave":
            rows = rows * spec.get("batch_size", 1) + (
                spec.get("n", 0) if spec["node"] == "skip" else 0
            )
            for _, child in sorted(inputs.items()):
                visit(child, share if len(inputs) == 1 else None, rows)
            return
        path = paths[id(spec)]
        if path in changed:
            parts = _normalized(changed[path][-1])
        else:
            steps = [[0, spec["weights"]], *spec.get("schedule", [])]
            current = max(index for index, (border, _) in enumerate(steps) if border <= rows)
            of_lanes = [
                _normalized(steps[min(index, len(steps) - 1)][1])
                for index in phases.get(path, [current])
            ]
            parts = {
                name: sum(part[name] for part in of_lanes) / len(of_lanes) for name in of_lanes[0]
            }
        for name, child in sorted(inputs.items()):
            visit(child, None if share is None else share * parts[name], rows * parts[name])

    visit(run_state.spec, 1.0, run_state.batches)
    return shares


def weights_of(spec: Mapping[str, Any]) -> State:
    """The weights in a mix's spec: by name, or with a schedule ``[[border, weights], ...]``."""
    return [[0, spec["weights"]], *spec["schedule"]] if "schedule" in spec else spec["weights"]


def _normalized(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _mixes(spec: Any) -> list[tuple[str, Any]]:
    """Path and spec of every mix."""
    return [(node.path, node.spec) for node in walk(spec) if node.spec["node"] == "interleave"]


def _lane_phases(run_state: RunState, spec: Any, path: str) -> list[int]:
    """The phase of a mix's schedule in which each lane of a stream is."""
    found: list[int] = []

    def search(value: Any) -> None:
        if isinstance(value, dict):
            if "phase" in value and value.get("of") == path:
                found.append(value["phase"][0])
                return
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                search(item)

    if "schedule" in spec:
        for lane in run_state.lanes.values():
            search((lane or {}).get("lane", {}).get("state"))
    return found
