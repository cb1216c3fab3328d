"""Weights that `DataLoader.set_weights` changed during a run, as a lane sees them."""

from __future__ import annotations

from collections.abc import Mapping

from midstream.common.plain_state import State


class LaneEdits:
    """Changes of weights during a run (`DataLoader.set_weights`), as one lane applies them.

    The run lists the changes of each mix, in order. A lane applies a change at its first pick after
    it received the list, and records the pass and the pick in its state. A replay of earlier picks
    therefore uses the weights of that time.

    Args:
        known: The run's changes: path of the mix to its weights, in order.
        applied: A state of this class.

    State: ``{path of the mix: [[number of the change, pass, pick], ...]}``.
    """

    def __init__(self, known: Mapping[str, list[dict[str, float]]], applied: State = None) -> None:
        self.known = known
        self.applied = {path: list(changes) for path, changes in (applied or {}).items()}

    def of(self, path: str) -> MixEdits | None:
        """The changes of one mix; None if there are none."""
        known = self.known.get(path)
        return MixEdits(known, self.applied.setdefault(path, [])) if known else None

    def state(self) -> State:
        """Where this lane applied changes; see the class."""
        return {
            path: [list(each) for each in changes]
            for path, changes in self.applied.items()
            if changes
        }

    def forget(self) -> None:
        """Keeps only the last change of each mix, when a new epoch begins."""
        for changes in self.applied.values():
            del changes[:-1]


class MixEdits:
    """The changes of one mix in one lane; see `LaneEdits`."""

    __slots__ = ("applied", "known")

    def __init__(self, known: list[dict[str, float]], applied: list[list[int]]) -> None:
        self.known, self.applied = known, applied

    def in_force(self, pass_: int, picks: int, *, live: bool) -> int:
        """The number of the change in force at a pick, or -1.

        Args:
            pass_: Pass of the mix.
            picks: Number of the pick.
            live: Whether the pick is new, not read again: then the newest change is applied here.
        """
        last = len(self.known) - 1
        if live and (not self.applied or self.applied[-1][0] < last):
            self.applied.append([last, pass_, picks])
        found = -1
        for number, *applied_at in self.applied:
            if applied_at <= [pass_, picks]:
                found = number
        return found

    def weights(self, number: int, pass_: int) -> tuple[dict[str, float], int]:
        """The weights of a change, and the first pick of this pass that uses them."""
        first = next(
            picks if applied_in == pass_ else 0
            for change, applied_in, picks in self.applied
            if change == number
        )
        return self.known[number], first
