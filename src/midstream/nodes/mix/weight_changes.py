"""Weights changed during a run, as a lane sees them."""

from __future__ import annotations

from collections.abc import Mapping

from midstream.common.plain_state import State


class LaneEdits:
    """Weights that were changed on the way (`DataLoader.set_weights`), as one lane sees them.

    The run knows the edits of each mix, in order. A lane places one where it first picks after
    hearing of it: at a pass and a number of picks, which its state keeps, so that whatever is read
    again is picked by the weights of then.

    State: ``{path of the mix: [[edit, pass, pick], ...]}``.
    """

    def __init__(self, known: Mapping[str, list[dict[str, float]]], placed: State = None) -> None:
        self.known, self.placed = (
            known,
            {path: list(places) for path, places in (placed or {}).items()},
        )

    def of(self, path: str) -> MixEdits | None:
        """Those of one mix; None where there are none."""
        known = self.known.get(path)
        return MixEdits(known, self.placed.setdefault(path, [])) if known else None

    def state(self) -> State:
        """Where edits were placed."""
        return {
            path: [list(place) for place in places]
            for path, places in self.placed.items()
            if places
        }

    def forget(self) -> None:
        """Keep only the last of each mix: a new epoch begins."""
        for places in self.placed.values():
            del places[:-1]


class MixEdits:
    """The part of `LaneEdits` that is of one mix."""

    __slots__ = ("known", "placed")

    def __init__(self, known: list[dict[str, float]], placed: list[list[int]]) -> None:
        self.known, self.placed = known, placed

    def bound(self, pass_: int, picks: int, *, live: bool) -> int:
        """The edit in force at a pick, -1 for none; where the pick is not read again, what is new
        is placed here.
        """
        last = len(self.known) - 1
        if live and (not self.placed or self.placed[-1][0] < last):
            self.placed.append([last, pass_, picks])
        found = -1
        for number, *place in self.placed:
            if place <= [pass_, picks]:
                found = number
        return found

    def weights(self, number: int, pass_: int) -> tuple[dict[str, float], int]:
        """The weights of an edit, and the first pick of this pass that is by them."""
        first = next(
            picks if place == pass_ else 0 for edit, place, picks in self.placed if edit == number
        )
        return self.known[number], first
