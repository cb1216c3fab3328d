"""Merges the states of all ranks into the state of the run."""

from __future__ import annotations

from collections.abc import Sequence

from midstream.checkpoint.changes import Changes
from midstream.checkpoint.differences import diff_specs
from midstream.checkpoint.read import RunState, parse
from midstream.checkpoint.write import to_state
from midstream.common.plain_state import State, copy_plain
from midstream.errors import CheckpointError, bullet_list


def merge_states(states: Sequence[State]) -> dict[str, State]:
    """Merge the states of all ranks, saved at the same step, into the run's.

    Args:
        states: One state per rank, in any order.

    Raises:
        CheckpointError: If they are of different pipelines, epochs or steps, if a lane is missing
            or there twice.

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
    for index, (state, run_state) in enumerate(zip(states, parsed)):
        _require_same_run(index, run_state, first)
        for key, value in state["lanes"].items():
            if value and lanes.get(key):
                raise CheckpointError(
                    f"lane {key} is in two of the states; each rank's state is given once"
                )
            if (
                value or key not in lanes
            ):  # before the first batch a rank names the lanes of others too, empty
                lanes[key] = value
    missing = [key for key in map("{:04d}".format, range(first.num_lanes)) if key not in lanes]
    if missing:
        shown = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
        raise CheckpointError(
            f"{len(missing)} of {first.num_lanes} lanes are missing ({shown}): the state of at"
            " least one rank is not there. Give the states of all ranks that saved."
        )
    # The numbers of any one state do here: where each rank stood is in its lanes. One without lanes
    # has them alone.
    merged = dict(states[0])
    # A rank at its end of the epoch may have recorded a change for the next one; the others know
    # the epoch and step in which it was made.
    merged["edits"] = min((run_state.changes for run_state in parsed), key=_when).texts["edits"]
    for run_state in parsed:
        if not any(run_state.lanes.values()) and (run_state.epoch, run_state.steps_done) != (
            first.epoch,
            first.steps_done,
        ):
            raise CheckpointError(
                f"the ranks were saved at different steps: epoch {run_state.epoch}, step"
                f" {run_state.steps_done}; epoch {first.epoch}, step {first.steps_done}. Save all"
                " after the same one."
            )
    return agreed({**merged, "lanes": dict(sorted(lanes.items()))})[0]


def _require_same_run(index: int, run_state: RunState, first: RunState) -> None:
    """Raise unless a rank's state is of the same run as that of the first rank."""
    if run_state.fingerprint != first.fingerprint:
        raise CheckpointError(
            f"the states of different pipelines do not merge; state {index} differs from state"
            f" 0:{bullet_list(diff_specs(first.spec, run_state.spec))}"
        )
    if not run_state.changes.same_weights(first.changes):
        raise CheckpointError(
            f"state {index} has other changes of weights than state 0: call set_weights on"
            " every rank, after the same step and with the same weights"
        )
    if run_state.changes.excluded != first.changes.excluded:
        raise CheckpointError(
            f"state {index} leaves other samples out than state 0: call exclude on every rank,"
            " after the same step and with the same origins"
        )
    if run_state.epoch == first.epoch and run_state.changes.adopted != first.changes.adopted:
        raise CheckpointError(
            f"state {index} resumed this epoch with another batch size or mix than state 0:"
            " every rank loads the same states"
        )
    if run_state.num_lanes != first.num_lanes:
        raise CheckpointError(
            f"state {index} has num_lanes={run_state.num_lanes}, state 0 has {first.num_lanes}:"
            " they are of different runs"
        )


def _when(changes: Changes) -> list[tuple[int, int]]:
    return [(change.epoch, -change.step) for change in changes.weights]


def agreed(state: dict[str, State]) -> tuple[dict[str, State], RunState]:
    """A checked state with the position that all its ranks agree on, as a fresh copy, and the same
    decoded.
    """
    run_state = parse(state)
    if run_state.over:
        return to_state(run_state, state), run_state
    position = {
        "epoch": run_state.epoch,
        "batches": run_state.batches,
        "steps_done": run_state.steps_done,
    }
    return {
        **copy_plain({**state, "lanes": {}}),
        **position,
        "lanes": dict(state["lanes"]),
    }, run_state
