"""Merges the states of all ranks into the state of the run; agrees on one position."""

from __future__ import annotations

from collections.abc import Sequence

from midstream.checkpoint.changes import Changes
from midstream.checkpoint.differences import diff_specs
from midstream.checkpoint.read import RunState, parse
from midstream.checkpoint.write import to_state
from midstream.common.plain_state import State, copy_plain
from midstream.errors import CheckpointError, bullet_list


def merge_states(states: Sequence[State]) -> dict[str, State]:
    """Merge the states of all ranks, saved after the same step, into the state of the run.

    Args:
        states: One state per rank, in any order.

    Raises:
        CheckpointError: If they are of different pipelines, epochs, steps or changes, or if a lane
            is missing or occurs twice.

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
                    f"lane {key} is in two of the states: pass each rank's state once"
                )
            # Before the first batch a rank's state also has the lanes of other ranks, empty.
            if value or key not in lanes:
                lanes[key] = value
    missing = [key for key in map("{:04d}".format, range(first.num_lanes)) if key not in lanes]
    if missing:
        shown = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
        raise CheckpointError(
            f"{len(missing)} of {first.num_lanes} lanes are missing ({shown}): the state of at"
            " least one rank was not given. Pass the states of all ranks that saved."
        )
    # The numbers outside the lanes may be those of any state: each lane has its rank's position.
    merged = dict(states[0])
    # A rank that has reached its end of the epoch records a change as of the next epoch, step 0;
    # the others as of this epoch and their step. The record of those is the one to keep.
    merged["edits"] = min((run_state.changes for run_state in parsed), key=_when).texts["edits"]
    for run_state in parsed:  # a rank without lanes has its position outside them only
        if not any(run_state.lanes.values()) and (run_state.epoch, run_state.steps_done) != (
            first.epoch,
            first.steps_done,
        ):
            raise CheckpointError(
                f"the ranks were saved at different steps: epoch {run_state.epoch}, step"
                f" {run_state.steps_done}; epoch {first.epoch}, step {first.steps_done}. Save all"
                " ranks after the same step."
            )
    return agreed({**merged, "lanes": dict(sorted(lanes.items()))})[0]


def _require_same_run(index: int, run_state: RunState, first: RunState) -> None:
    """Raise unless two ranks have the same pipeline, changes and number of lanes."""
    if run_state.fingerprint != first.fingerprint:
        raise CheckpointError(
            f"states of different pipelines cannot be merged; state {index} differs from state"
            f" 0:{bullet_list(diff_specs(first.spec, run_state.spec))}"
        )
    if not run_state.changes.same_weights(first.changes):
        raise CheckpointError(
            f"state {index} has other changes of weights than state 0: call set_weights on every"
            " rank, after the same step and with the same weights"
        )
    if run_state.changes.excluded != first.changes.excluded:
        raise CheckpointError(
            f"state {index} leaves other samples out than state 0: call exclude on every rank,"
            " after the same step and with the same origins"
        )
    if run_state.epoch == first.epoch and run_state.changes.adopted != first.changes.adopted:
        raise CheckpointError(
            f"state {index} resumed this epoch from another batch size or mix than state 0: load"
            " the same states on every rank"
        )
    if run_state.num_lanes != first.num_lanes:
        raise CheckpointError(
            f"state {index} has num_lanes={run_state.num_lanes}, state 0 has {first.num_lanes}:"
            " they are of different runs"
        )


def _when(changes: Changes) -> list[tuple[int, int]]:
    """Sort key: the lowest epoch first, and within an epoch the highest step first."""
    return [(change.epoch, -change.step) for change in changes.weights]


def agreed(state: dict[str, State]) -> tuple[dict[str, State], RunState]:
    """A state with the position that all its ranks agree on, and the same state decoded.

    Args:
        state: As `merge_states` returns it, or the state of one rank.

    Returns:
        A copy with this position, and its `RunState`.

    Raises:
        CheckpointError: If the state is damaged, or the ranks were saved at different steps.
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
