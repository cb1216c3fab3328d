"""Changes of a run as one value: weights, excluded samples, and an adopted epoch.

A checkpoint holds them as three JSON texts, each empty while there is no change of its kind:

    "edits"     [{"mix": "mix", "weights": {"web": 1, ...}, "epoch": 2, "step": 700, "at": 11200,
                  "by": "set_weights"}, ...]: the entries are those of `WeightChange`, in order
    "excluded"  {"web": [[epoch, row, part], ...]}: the samples that are left out, by source
    "rest"      {"offsets": {"web": 700, ...}, "skip": 96}: the entries are those of `AdoptedEpoch`
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midstream.common.plain_state import State, decode, encode
from midstream.errors import CheckpointError, Origin

__all__ = ["NO_CHANGES", "AdoptedEpoch", "Changes", "WeightChange", "decode_changes", "is_count"]

_SHOWN = 4
"""The most values that a line of differences lists."""


@dataclass(frozen=True)
class WeightChange:
    """New weights of a mix, set during the run.

    Attributes:
        mix: Path of the mix.
        weights: The new weights by name of the dataset; those of a loaded pipeline with a schedule
            as ``[[border, weights], ...]``.
        epoch: The epoch of the change.
        step: Batches of a rank in this epoch after which it was made.
        at: Random access: the position of the mix from which on they hold; None when they hold from
            the next epoch on. Streams: None; they hold from the next pick of each lane on.
        by: ``"set_weights"``, or ``"load_state_dict"`` when the weights are those of the pipeline
            that loaded the state.
        was: The weights before; of a ``"load_state_dict"`` only.
        given: Rows that the mix had given in this epoch; of a ``"load_state_dict"`` only.
    """

    mix: str
    weights: State
    epoch: int
    step: int
    at: int | None
    by: str
    was: State = None
    given: int | None = None

    @property
    def is_load(self) -> bool:
        """Whether the pipeline that loaded the state has these weights itself."""
        return self.by == "load_state_dict"

    def __str__(self) -> str:
        return f"{encode(self.weights)} after step {self.step} of epoch {self.epoch} ({self.by})"


@dataclass(frozen=True)
class AdoptedEpoch:
    """Rows that were delivered in an epoch before it was resumed with another batch size or mix.

    Until the epoch ends, the pipeline that runs skips them (`midstream.changes.running`). Random
    access only; in a stream each lane's state has its own position.

    Attributes:
        offsets: Rows of each input of the mix that were delivered; empty when the mix is unchanged.
        skip: Rows delivered after those, counted right below the batches.
    """

    offsets: Mapping[str, int]
    skip: int

    def __str__(self) -> str:
        inputs = "".join(
            f", {rows:,} of input {name!r}" for name, rows in sorted(self.offsets.items())
        )
        return f"{self.skip:,} rows skipped below the batches{inputs}"


@dataclass(frozen=True)
class Changes:
    """All changes made to a run, as one value that can be compared.

    Attributes:
        weights: The changes of weights, in order.
        excluded: The samples that are left out, sorted.
        adopted: Rows delivered before this epoch was resumed with another batch size or mix; None
            if it was not.

    >>> changes = Changes(excluded=(Origin("web", 0, 4),))
    >>> changes.texts
    {'rest': '', 'edits': '', 'excluded': '{"web":[[0,4,0]]}'}
    >>> decode_changes(changes.texts) == changes
    True
    """

    weights: tuple[WeightChange, ...] = ()
    excluded: tuple[Origin, ...] = ()
    adopted: AdoptedEpoch | None = None

    @functools.cached_property
    def texts(self) -> dict[str, str]:
        """The entries of a checkpoint. The inverse of `decode_changes`."""
        optional = ("was", "given")
        weights = [
            {
                name: value
                for name, value in vars(change).items()
                if name not in optional or value is not None
            }
            for change in self.weights
        ]
        excluded: dict[str, list[list[int]]] = {}
        for source, epoch, row, part, _ in self.excluded:
            excluded.setdefault(source, []).append([epoch, row, part])
        return {
            "rest": encode(vars(self.adopted)) if self.adopted is not None else "",
            "edits": encode(weights) if weights else "",
            "excluded": encode(excluded) if excluded else "",
        }

    @property
    def lasting(self) -> Changes:
        """The changes that hold after this epoch too: all but the adopted epoch."""
        return dataclasses.replace(self, adopted=None) if self.adopted is not None else self

    def of_mix(self, path: str) -> list[WeightChange]:
        """The changes of one mix's weights."""
        return [change for change in self.weights if change.mix == path]

    def weights_changed_in(self, epoch: int) -> bool:
        """Whether weights were changed in the middle of this epoch."""
        return any(change.epoch == epoch for change in self.weights)

    def weights_set(self) -> dict[str, list[dict[str, float]]]:
        """The weights that ``set_weights`` gave each mix, in order, by path.

        A load with other weights starts the list of its mix anew.
        """
        by_mix: dict[str, list[dict[str, float]]] = {}
        for change in self.weights:
            if change.is_load:
                by_mix.pop(change.mix, None)
            else:
                by_mix.setdefault(change.mix, []).append(change.weights)
        return by_mix

    def same_weights(self, other: Changes) -> bool:
        """Whether another rank made the same changes of weights after the same step.

        Where a change has no position (``at``), its epoch and step are history only and may differ:
        a lane of a stream has its own position, and a rank at its end of the epoch records the next
        epoch.
        """

        def compared(changes: Changes) -> list[WeightChange]:
            return [
                dataclasses.replace(change, epoch=0, step=0) if change.at is None else change
                for change in changes.weights
            ]

        return self.weights == other.weights or compared(self) == compared(other)

    def differences(self, other: Changes) -> list[str]:
        """How two runs' changes differ, a line each.

        >>> Changes(excluded=(Origin("web", 0, 4),)).differences(Changes())
        ['excluded samples: only in the first: web[4]']
        """
        lines = []
        for which, ours, theirs in (("first", self, other), ("second", other, self)):
            known = set(theirs.excluded)
            if only := [origin for origin in ours.excluded if origin not in known]:
                lines.append(f"excluded samples: only in the {which}: {_shown(only)}")
        for mix in dict.fromkeys(change.mix for change in (*self.weights, *other.weights)):
            before, after = self.of_mix(mix), other.of_mix(mix)
            if before != after:
                lines.append(
                    f"changed weights of {mix!r}: first {_shown(before, '; ')}; second"
                    f" {_shown(after, '; ')}"
                )
        if self.adopted != other.adopted:
            lines.append(
                "epoch resumed with another batch size or mix: first"
                f" {self.adopted or 'none'}; second {other.adopted or 'none'}"
            )
        if self != other and not lines:
            lines.append("changed weights: the same for each mix, made in another order")
        return lines


NO_CHANGES = Changes()
"""The changes of a run that nobody changed."""


def _shown(values: Sequence[Any], between: str = ", ") -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return between.join(map(str, values[:_SHOWN])) + more if values else "none"


def decode_changes(state: Mapping[str, Any]) -> Changes:
    """Decode the changes in a state.

    Args:
        state: With the texts "rest", "edits" and "excluded"; a missing one is empty.

    Raises:
        CheckpointError: If one of the texts is not as it was saved.
    """
    edits, excluded, rest = (state.get(key, "") for key in ("edits", "excluded", "rest"))
    return Changes(
        _decoded(edits, _weight_changes, (), "its edits are"),
        _decoded(excluded, _origins, (), "what it excludes is"),
        _decoded(rest, _adopted_epoch, None, "its rest is"),
    )


def _decoded(text: Any, build: Any, empty: Any, words: str) -> Any:
    if text == "":
        return empty
    try:
        if isinstance(text, str):
            return build(decode(text))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        pass
    raise CheckpointError(f"this state is damaged: {words} not what was saved: {text!r:.80}")


def _weight_changes(entries: Any) -> tuple[WeightChange, ...]:
    changes = tuple(WeightChange(**entry) for entry in entries)
    if not all(
        isinstance(change.mix, str)
        and isinstance(change.weights, (dict, list))
        and change.by in ("set_weights", "load_state_dict")
        and is_count(change.epoch)
        and is_count(change.step)
        and (change.at is None or is_count(change.at))
        and (is_count(change.given) if change.is_load else change.given is None)
        and (change.was is not None) == change.is_load
        for change in changes
    ):
        raise ValueError("no changes of weights")
    return changes


def _origins(known: Any) -> tuple[Origin, ...]:
    origins = [
        Origin(source, epoch, row, part)
        for source, rows in known.items()
        for epoch, row, part in rows
    ]
    if not all(map(is_count, (number for origin in origins for number in origin[1:]))):
        raise ValueError("no origins")
    return tuple(sorted(origins))


def _adopted_epoch(value: Any) -> AdoptedEpoch:
    adopted = AdoptedEpoch(**value)
    if not isinstance(adopted.offsets, dict) or not all(
        map(is_count, (*adopted.offsets.values(), adopted.skip))
    ):
        raise ValueError("no counts of rows")
    return adopted


def is_count(value: Any) -> bool:
    """Whether a value is an integer from 0 to 2**62 - 1."""
    return type(value) is int and 0 <= value < 1 << 62
