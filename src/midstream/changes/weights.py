"""Weights that were changed while a run was going on: what was changed when, and what follows for an epoch.

A state says so in "edits", empty before the first one, else a JSON list in order, the run's history:

    {"mix": "mix",                path of the mix
     "weights": {"web": 1, ...},  from here on
     "epoch": 2, "step": 700,     after which step of a rank
     "at": 11200,                 random access: the position of the mix; null when it takes effect with the next epoch
     "by": "set_weights"}         or "load_state_dict", with the weights before it in "was": then the pipeline has these

Random access: in the epoch of an edit the mix that runs has one more phase in its schedule; in later epochs it has the new
weights from the start. Streams: each lane places the edit where it next picks (`midstream.nodes.mix.picks.LaneEdits`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from midstream.checkpoint.read import Canonical, merge_states, parse
from midstream.checkpoint.spec import walk
from midstream.common.plain_state import State, decode, encode
from midstream.errors import CheckpointError
from midstream.nodes.batch import Batch
from midstream.nodes.concatenate import Concatenate
from midstream.nodes.mix.interleave import Interleave
from midstream.nodes.mix.picks import Weights, check_weights, quotas
from midstream.nodes.skip import Skip
from midstream.nodes.take import Take
from midstream.pipeline.node import Node, Place, bind

__all__ = [
    "add",
    "apply",
    "asked_shares",
    "in_epoch",
    "lane_edits",
    "note_load",
    "replaced",
    "shares_asked",
    "weights_history",
]


def _entries(text: str) -> list[dict[str, Any]]:
    return decode(text) if text else []


def in_epoch(text: str, epoch: int) -> bool:
    """Whether weights were changed in the middle of an epoch."""
    return any(entry["epoch"] == epoch for entry in _entries(text))


def apply(pipeline: Node, text: str, epoch: int) -> Node:
    """The pipeline that runs in an epoch.

    Raises:
        CheckpointError: If the edits do not fit the pipeline.
    """
    if not text or not pipeline.random_access:
        return pipeline
    try:
        for path in dict.fromkeys(entry["mix"] for entry in _entries(text)):
            pipeline = replaced(bind(pipeline), path, functools.partial(_edited, edits_of(text, path), epoch))
        return pipeline
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"this state is damaged: its edits {text!r:.80} do not fit the pipeline ({error})"
        ) from None


def _edited(entries: list[dict[str, Any]], epoch: int, mix: Any) -> Node:
    """A mix with the phases that its edits give it in an epoch."""
    phases, changed = phases_in(mix.phases, [name for name, _ in mix.datasets], entries, epoch)
    if not changed:
        return mix  # type: ignore[no-any-return]
    return dataclasses.replace(mix, weights=phases[0][1], later=tuple(phases[1:]), edited=True)  # type: ignore[no-any-return]


def phases_in(
    planned: Sequence[tuple[int, Weights]], names: Sequence[str], entries: list[dict[str, Any]], epoch: int
) -> tuple[list[tuple[int, Weights]], bool]:
    """The phases of a mix in an epoch, and whether they are others than planned.

    Args:
        planned: What the pipeline says.
        names: Of the datasets.
        entries: The edits of this mix.
        epoch: The epoch.
    """
    phases, changed = list(planned), False
    for entry in entries:
        if entry["by"] != "set_weights":  # the pipeline has had these weights since, and the mix was counted anew
            given = entry["given"] if entry["epoch"] == epoch else 0
            begun = max(index for index, (border, _) in enumerate(planned) if border <= given)
            phases = [(max(0, border - given), weights) for border, weights in planned[begun:]]
            changed = given > 0 and len(planned) > 1
            continue
        border = entry["at"] if entry["epoch"] == epoch else 0
        if border is not None:
            weights = check_weights(entry["weights"], names, "set_weights")
            phases = [*(phase for phase in phases if phase[0] < border), (border, weights)]
            changed = True
    return phases, changed


def edits_of(text: str, path: str) -> list[dict[str, Any]]:
    """The edits of one mix."""
    return [entry for entry in _entries(text) if entry["mix"] == path]


def replaced(place: Place, path: str, change: Callable[[Any], Node]) -> Node:
    """The tree with the node at a path changed."""
    node: Any = place.node
    if place.path == path:
        return change(node)
    for key, child in place.inputs.items():
        if all(each.path != path for each in child.walk()):
            continue
        new = replaced(child, path, change)
        if key == "":
            return dataclasses.replace(node, source=new)  # type: ignore[no-any-return]
        if isinstance(node, Interleave):
            datasets = tuple((name, new if name == key else dataset) for name, dataset in node.datasets)
            return dataclasses.replace(node, datasets=datasets)
        return dataclasses.replace(  # type: ignore[no-any-return]
            node, datasets=tuple(new if str(index) == key else dataset for index, dataset in enumerate(node.datasets))
        )
    raise KeyError(path)


def lane_edits(text: str) -> dict[str, list[dict[str, float]]]:
    """What `midstream.nodes.mix.picks.LaneEdits` knows: the weights set for each mix, in order, since it was last loaded anew."""
    known: dict[str, list[dict[str, float]]] = {}
    for entry in _entries(text):
        if entry["by"] == "set_weights":
            known.setdefault(entry["mix"], []).append(entry["weights"])
        else:
            known.pop(entry["mix"], None)
    return known


def add(canonical: Canonical, place: Place, mix: str, weights: Mapping[str, float]) -> str:
    """The edits with one more: from the next batch on.

    Args:
        canonical: Where the run stands.
        place: Of the pipeline that runs.
        mix: Name or path of the mix.
        weights: By name.

    Raises:
        ValueError: If there is no such mix, the names are not its datasets', or it cannot be done exactly; with the reason.
        TypeError: If a weight is no number.
    """
    mixes = [each for each in place.walk() if isinstance(each.node, Interleave)]
    found = [each for each in mixes if mix in (each.path, each.node.label)]
    if len(found) != 1:
        there = ", ".join(repr(each.path) for each in mixes) or "none"
        raise ValueError(
            f"set_weights: {'several mixes are' if found else 'no mix is'} named {mix!r}; there are {there}. Name one with "
            f"interleave(..., name=...), or give its path."
        )
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"set_weights takes weights by name, like {{'web': 1, 'code': 2}}; found {type(weights).__name__}"
        )
    target, node = found[0], found[0].node
    assert isinstance(node, Interleave)
    checked = check_weights(weights, [name for name, _ in node.datasets], f"set_weights of {mix!r}")
    quotas(dict(checked))
    epoch, step, at = canonical.epoch + canonical.finished, canonical.steps_done, None
    if canonical.finished:
        step = 0
    if not place.node.random_access:
        if node.random_access:
            raise ValueError(
                f"set_weights: {mix!r} is read by position under a stream, each lane at another one, so there is no place at "
                f"which its weights could change for all. Make it a stream too: interleave(..., weights_by=lambda sample: 1) "
                f"counts samples, or give weights_by the length in tokens."
            )
    else:
        if canonical.ahead or (canonical.told and not canonical.finished):
            raise ValueError(
                "set_weights: a batch raised an error and is not handed out yet, or this rank lost whole batches and is ahead "
                "of the others, so weights cannot change here without losing rows. Call it after the next batch, or in the "
                "next epoch."
            )
        done = 0 if canonical.finished else canonical.batches
        at = _given(place, target, done, mix)
        length = node.length()
        if length is not None and at >= length > 0:
            at = None  # there is nothing left of it in this epoch
    entry = {"mix": target.path, "weights": dict(checked), "epoch": epoch, "step": step, "at": at, "by": "set_weights"}
    return encode([*_entries(canonical.edits), entry])


def _given(place: Place, target: Place, count: int, mix: str) -> int:
    """How many samples of a mix are among the first ``count`` of a place above it."""
    node = place.node
    length = node.length()
    count = count if length is None else min(count, length)
    if place is target:
        return count
    if node.one_to_one:
        return _given(place.input, target, count, mix)
    if isinstance(node, Batch):
        return _given(place.input, target, count * node.batch_size, mix)
    if isinstance(node, Skip):
        return _given(place.input, target, count + int(node.n), mix)
    if isinstance(node, Take):
        return _given(place.input, target, count, mix)
    if isinstance(node, Interleave):
        layout = node.layout()
        counts = layout.counts(count).tolist()
        for index, (key, _) in enumerate(node.datasets):
            if target in place.inputs[key].walk():
                if layout.repeats[index] == 1 or counts[index] <= layout.lengths[index]:
                    return _given(place.inputs[key], target, counts[index], mix)
                raise ValueError(f"set_weights: {mix!r} has started over in this epoch; call it in the next one")
    if isinstance(node, Concatenate):
        for dataset, child in zip(node.datasets, place.inputs.values()):
            if target in child.walk():
                return _given(child, target, max(0, count), mix)
            count -= dataset.length() or 0
    raise ValueError(
        f"set_weights: there is a {node.kind} above {mix!r}, so what was delivered is not the beginning of the mix, and its "
        f"weights cannot change without losing or repeating rows. Put the {node.kind} below the mix (on its datasets)."
    )


def note_load(canonical: Canonical, path: str, was: State, now: State, given: int) -> str:
    """The edits with a load (``strict=False``) that goes on with the weights of another pipeline."""
    entry: dict[str, State] = {
        "mix": path,
        "weights": now,
        "was": was,
        "epoch": canonical.epoch,
        "step": canonical.steps_done,
        "at": 0,
        "given": given,
        "by": "load_state_dict",
    }
    return encode([*_entries(canonical.edits), entry])


# ---------------------------------------------------------------------------------------------------------------------
# Reading it back
# ---------------------------------------------------------------------------------------------------------------------


def weights_history(state: State) -> list[dict[str, Any]]:
    """Which weights every mix of a run had when, read from a checkpoint.

    Args:
        state: A loader's ``state_dict()``, a merged one, or a list of the states of all ranks.

    Returns:
        A dict per change, in order, first those that the run began with: ``"mix"`` (its path), ``"weights"`` (by name; with a
        schedule a list of ``[border, weights]``), ``"epoch"`` and ``"step"`` (batches of a rank in that epoch) after which
        they held, ``"by"``: ``"pipeline"``, ``"set_weights"`` or ``"load_state_dict"``.

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
    canonical = parse(merge_states(state) if isinstance(state, list) else state)
    entries = _entries(canonical.edits)
    history = []
    for path, spec in _mixes(canonical.spec):
        loads = [entry for entry in entries if entry["mix"] == path and "was" in entry]
        first = loads[0]["was"] if loads else weights_of(spec)
        history.append({"mix": path, "weights": first, "epoch": 0, "step": 0, "by": "pipeline"})
    keys = ("mix", "weights", "epoch", "step", "by")
    return [*history, *({key: entry[key] for key in keys} for entry in entries)]


def asked_shares(state: State) -> dict[str, float | None]:
    """The share of each source that a run asks for where it stands: schedules and edits counted in, nested mixes multiplied.

    Args:
        state: A loader's ``state_dict()``, a merged one, or a list of the states of all ranks.

    Returns:
        By name of the source, as `midstream.progress` has them. A stream with a schedule: the mean over its lanes. None for
        sources that share a part in another way (``concatenate``).

    >>> import midstream as ms
    >>> mix = ms.interleave({"a": ms.from_dataset(range(9)), "b": ms.from_dataset(range(9))}, {"a": 3, "b": 1})
    >>> ms.asked_shares(ms.DataLoader(mix, batch_size=2).state_dict())
    {'a': 0.75, 'b': 0.25}
    """
    return shares_asked(parse(merge_states(state) if isinstance(state, list) else state))


def shares_asked(canonical: Canonical) -> dict[str, float | None]:
    """`asked_shares` of a checked state."""
    edited: dict[str, dict[str, float]] = {}
    for entry in _entries(canonical.edits):
        if entry["by"] == "set_weights":
            edited[entry["mix"]] = entry["weights"]
        else:
            edited.pop(entry["mix"], None)
    paths = {id(spec): path for path, spec in _mixes(canonical.spec)}
    phases = {path: found for path, spec in _mixes(canonical.spec) if (found := _lane_phases(canonical, spec, path))}
    shares: dict[str, float | None] = {}

    def down(spec: Any, share: float | None, rows: float) -> None:
        if "name" in spec:
            shares[spec["name"]] = share
            return
        inputs = spec.get("inputs", {})
        if spec["node"] != "interleave":
            rows = rows * spec.get("batch_size", 1) + (spec.get("n", 0) if spec["node"] == "skip" else 0)
            for _, child in sorted(inputs.items()):
                down(child, share if len(inputs) == 1 else None, rows)
            return
        path = paths[id(spec)]
        if path in edited:
            parts = _normed(edited[path])
        else:
            steps = [[0, spec["weights"]], *spec.get("schedule", [])]
            now = max(index for index, (border, _) in enumerate(steps) if border <= rows)
            each = [_normed(steps[min(index, len(steps) - 1)][1]) for index in phases.get(path, [now])]
            parts = {name: sum(part[name] for part in each) / len(each) for name in each[0]}
        for name, child in sorted(inputs.items()):
            down(child, None if share is None else share * parts[name], rows * parts[name])

    down(canonical.spec, 1.0, canonical.batches)
    return shares


def weights_of(spec: Mapping[str, Any]) -> State:
    """The weights that a mix's spec gives: by name, or with a schedule ``[[border, weights], ...]``."""
    return [[0, spec["weights"]], *spec["schedule"]] if "schedule" in spec else spec["weights"]


def _normed(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _mixes(spec: Any) -> list[tuple[str, Any]]:
    """Path and spec of every mix."""
    return [(node.path, node.spec) for node in walk(spec) if node.spec["node"] == "interleave"]


def _lane_phases(canonical: Canonical, spec: Any, path: str) -> list[int]:
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
        for lane in canonical.lanes.values():
            look((lane or {}).get("lane", {}).get("state"))
    return found
