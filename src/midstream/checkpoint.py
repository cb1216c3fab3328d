"""The canonical state of a run: its format, how ranks' states merge, and how two pipelines differ.

    {
      "midstream": 1,            version of this format
      "fingerprint": "...",      hash of "spec"
      "spec": {...},             the pipeline as data: nodes, names, seeds, weights, lengths
      "epoch": 2,                the epoch in progress (or the next to start)
      "batches": 96,             batches of the epoch that were delivered, over all ranks
      "steps_done": 48,          batches of the epoch that a rank handed out
      "num_lanes": 48,           fixed for the run
      "lanes": {"0000": "...", ...}
    }

A rank's state holds the lanes l = rank (mod world size); a merged state holds all. Each lane is one string, empty before
it has anything to say, else JSON:

    {
      "lane": {"rounds", "done", "state", "marks"},   streams: batches made, ended, the nodes' state, counted up to
      "samples": [..], "rows": [..],                  delivered over the whole run, by source (as numbered in "spec")
      "tokens": [..],                                 the same for tokens, where the pipeline packs them
      "events": {"filtered|path|source": 12, ...},    dropped and failed over the whole run
      "told": [batch, errors]                         random access: errors of a batch already raised
    }

Random access needs "batches" alone to go on; its lanes only carry the counts, so that they add up over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from midstream._state import State, copy_plain, decode, encode, fingerprint
from midstream.core import FORMAT
from midstream.errors import CheckpointError, bullet_list

__all__ = ["Canonical", "diff_specs", "merge_states", "parse", "source_names"]

_KEYS: dict[str, type] = {
    "midstream": int,
    "fingerprint": str,
    "spec": dict,
    "epoch": int,
    "batches": int,
    "steps_done": int,
    "num_lanes": int,
    "lanes": dict,
}
_MAX_LANES = 1 << 24


class Canonical:
    """A checked state.

    Attributes:
        lanes: The decoded lanes by number; None where a lane has nothing to say yet.
    """

    def __init__(self, state: dict[str, State]) -> None:
        self.fingerprint: str = state["fingerprint"]
        self.spec: dict[str, State] = state["spec"]
        self.epoch: int = state["epoch"]
        self.batches: int = state["batches"]
        self.steps_done: int = state["steps_done"]
        self.num_lanes: int = state["num_lanes"]
        self.lanes: dict[int, dict[str, Any] | None] = {
            int(key): _lane(key, value) for key, value in state["lanes"].items()
        }


def parse(state: Any) -> Canonical:
    """Check a state of a loader (one rank's, or merged).

    Raises:
        CheckpointError: If it is not one, or of an unknown version.
    """
    if not isinstance(state, dict):
        raise CheckpointError(
            f"a loader's state is a dict (or a list of the dicts of all ranks); found {type(state).__name__}"
        )
    if "midstream" not in state:
        raise CheckpointError(
            f"this is no midstream state: the key 'midstream' is missing; found {sorted(map(str, state))[:12]}"
        )
    if state["midstream"] != FORMAT or type(state["midstream"]) is not int:
        raise CheckpointError(f"this state has format {state['midstream']!r}; this midstream reads format {FORMAT}")
    for key, kind in _KEYS.items():
        if key not in state:
            raise CheckpointError(f"this state is incomplete: the key {key!r} is missing")
        if type(state[key]) is not kind:
            raise CheckpointError(
                f"this state is damaged: {key!r} is a {kind.__name__}; found {type(state[key]).__name__}"
            )
        if kind is int and not 0 <= state[key] < 1 << 62:
            raise CheckpointError(f"this state is damaged: {key!r} is not negative and below 2**62; found {state[key]}")
    num_lanes = state["num_lanes"]
    if not 1 <= num_lanes <= _MAX_LANES:
        raise CheckpointError(f"this state is damaged: num_lanes is in [1, 2**24]; found {num_lanes}")
    for key, value in state["lanes"].items():
        if type(key) is not str or not key.isdecimal() or not key.isascii() or not 0 <= int(key) < num_lanes:
            raise CheckpointError(
                f"this state is damaged: lanes are numbered '0000' to '{num_lanes - 1:04d}'; found {key!r:.40}"
            )
        if type(value) is not str:
            raise CheckpointError(f"this state is damaged: lane {key} is a string; found {type(value).__name__}")
    try:
        found = fingerprint(copy_plain(state["spec"]))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"this state is damaged: its spec is not plain data ({error})") from None
    if found != state["fingerprint"]:
        raise CheckpointError(
            f"this state is damaged: its spec has the fingerprint {found}, not {state['fingerprint']!r:.40}"
        )
    return Canonical(state)


def _lane(key: str, text: str) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        lane = decode(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"this state is damaged: lane {key} is not JSON: {text!r:.60}") from None
    good = isinstance(lane, dict)
    good = good and all(
        isinstance(lane.get(name), list) and all(type(n) is int and 0 <= n < 1 << 62 for n in lane[name])
        for name in ("samples", "rows", *(["tokens"] if "tokens" in lane else []))
    )
    good = good and isinstance(lane.get("events"), dict) and all(type(n) is int for n in lane["events"].values())
    run = lane.get("lane") if good else None
    if good and run is not None:
        good = (
            isinstance(run, dict)
            and type(run.get("rounds")) is int
            and 0 <= run["rounds"] < 1 << 62
            and type(run.get("done")) is bool
            and "state" in run
            and isinstance(run.get("marks"), dict)
        )
    told = lane.get("told") if good else None
    if good and told is not None:
        good = isinstance(told, list) and len(told) == 2 and all(type(n) is int and n >= 0 for n in told)
    if not good:
        raise CheckpointError(f"this state is damaged: lane {key} does not have the expected parts: {text!r:.60}")
    return lane  # type: ignore[no-any-return]


def merge_states(states: Sequence[State]) -> dict[str, State]:
    """Merge the states of all ranks, saved at the same step, into the run's.

    Args:
        states: One state per rank, in any order.

    Raises:
        CheckpointError: If they are of different pipelines, epochs or batches, if a lane is missing or there twice.

    >>> import midstream as ms
    >>> ds = ms.from_dataset(range(8)).batch(2)
    >>> ranks = [ms.DataLoader(ds, rank=rank, world_size=2) for rank in (0, 1)]
    >>> merged = ms.merge_states([loader.state_dict() for loader in ranks])
    >>> len(merged["lanes"])
    48
    """
    if isinstance(states, dict):
        states = [states]
    if not states:
        raise CheckpointError("there is nothing to merge: the list of states is empty")
    parsed = [parse(state) for state in states]
    first = parsed[0]
    lanes: dict[str, str] = {}
    for index, (state, canonical) in enumerate(zip(states, parsed)):
        if canonical.fingerprint != first.fingerprint:
            raise CheckpointError(
                f"the states of different pipelines do not merge; state {index} differs from state 0:"
                f"{bullet_list(diff_specs(first.spec, canonical.spec))}"
            )
        for name in ("num_lanes", "epoch", "batches"):
            if name == "batches" and (_is_stream(canonical) or _is_stream(first)):
                continue  # lanes know where they stand, and drain at different steps
            found, expected = getattr(canonical, name), getattr(first, name)
            if found != expected:
                hint = ""
                if name == "batches":
                    hint = (
                        " The ranks were saved at different steps: save all after the same one, with "
                        "loader.state_at(step) of the smallest."
                    )
                raise CheckpointError(f"state {index} has {name}={found}, state 0 has {expected}.{hint}")
        for key, value in state["lanes"].items():
            if key in lanes:
                raise CheckpointError(f"lane {key} is in two of the states; each rank's state is given once")
            lanes[key] = value
    missing = [key for key in map("{:04d}".format, range(first.num_lanes)) if key not in lanes]
    if missing:
        shown = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
        raise CheckpointError(
            f"{len(missing)} of {first.num_lanes} lanes are missing ({shown}): the state of at least one rank is not there. "
            f"Give the states of all ranks that saved."
        )
    merged = dict(copy_plain({key: value for key, value in states[0].items() if key != "lanes"}))
    merged["batches"] = max(canonical.batches for canonical in parsed)
    merged["steps_done"] = max(canonical.steps_done for canonical in parsed)
    merged["lanes"] = dict(sorted(lanes.items()))
    return merged


def _is_stream(canonical: Canonical) -> bool:
    return any(lane is not None and lane.get("lane") is not None for lane in canonical.lanes.values())


def source_names(spec: State) -> list[str]:
    """Names of the sources of a pipeline, as a checkpoint numbers them."""
    if "name" in spec:
        return [spec["name"]]
    return [name for _, child in sorted(spec.get("inputs", {}).items()) for name in source_names(child)]


def diff_specs(saved: State, here: State, path: str = "") -> list[str]:
    """What differs between the pipeline that was saved and this one, a line each.

    >>> diff_specs({"node": "shuffle", "seed": 1}, {"node": "shuffle", "seed": 2})
    ['shuffle: seed 1 → 2']
    """
    title = f"{saved.get('node')}{f' {path!r}' if path else ''}"
    if saved.get("node") != here.get("node"):
        return [f"{path or 'the root'}: {saved.get('node')} → {here.get('node')}"]
    lines = []
    for key in sorted((set(saved) | set(here)) - {"inputs", "node"}):
        before, after = saved.get(key), here.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changes = [
                f"{name} {before.get(name)} → {after.get(name)}"
                for name in sorted(set(before) | set(after))
                if before.get(name) != after.get(name)
            ]
            lines.append(f"{key} of {title}: {', '.join(changes)}")
        else:
            lines.append(f"{title}: {key} {_value(before)} → {_value(after)}")
    old, new = saved.get("inputs", {}), here.get("inputs", {})
    for name in sorted(set(old) | set(new)):
        below = "/".join(part for part in (path, name) if part)
        if name not in new:
            lines.append(f"{title}: input {name!r} was removed")
        elif name not in old:
            lines.append(f"{title}: input {name!r} is new")
        else:
            lines.extend(diff_specs(old[name], new[name], below))
    return lines


def _value(value: State) -> str:
    return "(none)" if value is None else encode(value)
