"""Weights of a mix: schedules, checks, and integer quotas.

The *quota* of a dataset is the number of its picks in a *block* of picks, an integer proportional
to its weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from midstream.common.validation import require_int

_EXACT_BLOCK = 4096  # the most picks in a block whose quotas are exact

_LARGE_BLOCK = 1 << 16  # picks in a block whose quotas are rounded

Weights = tuple[tuple[str, float], ...]
"""``(name, weight)`` of each dataset, in the order of the datasets."""


@dataclass(frozen=True)
class Schedule:
    """Weights that change within an epoch; made by `schedule`.

    Attributes:
        phases: ``(border, weights)``: the sample at which a phase begins, and its weights by name.
            The first border is 0.
    """

    phases: tuple[tuple[int, Weights], ...]


def schedule(phases: Sequence[tuple[int, Mapping[str, float]]]) -> Schedule:
    """Makes weights that change during an epoch: ``interleave(..., weights=ms.schedule([...]))``.

    Args:
        phases: ``(border, weights)`` of each phase. The first border is 0, each is larger than the
            one before. A phase begins when the mix has given ``border`` samples since the epoch
            began. With ``weights_by`` a border counts tokens instead; the sample that crosses it
            belongs to the phase before. On streams each lane counts for itself, to its share of the
            border: ``border // lanes`` or one more.

    Raises:
        ValueError: If the borders do not rise from 0.
        TypeError: If a phase is not a pair of an integer and weights by name.

    >>> import midstream as ms
    >>> sources = {"easy": ms.from_dataset([0] * 90), "hard": ms.from_dataset([1] * 90)}
    >>> phases = [(0, {"easy": 1, "hard": 0}), (5, {"easy": 1, "hard": 1})]
    >>> mix = ms.interleave(sources, ms.schedule(phases))
    >>> list(mix)[:5], sum(list(mix)[5:15])
    ([0, 0, 0, 0, 0], 5)
    """
    if isinstance(phases, (str, Mapping)) or not isinstance(phases, Sequence) or not phases:
        raise TypeError(
            "schedule takes a list of (border, weights), like [(0, {'web': 1}), ...]; found"
            f" {phases!r:.80}"
        )
    made: list[tuple[int, Weights]] = []
    for phase in phases:
        if not isinstance(phase, Sequence) or len(phase) != 2 or not isinstance(phase[1], Mapping):
            raise TypeError(f"schedule: a phase is (border, weights by name); found {phase!r:.80}")
        require_int(phase[0], "a border", 0, "schedule")
        if (phase[0] == 0) != (not made) or (made and phase[0] <= made[-1][0]):
            raise ValueError(
                "schedule: borders begin with 0 and rise; found"
                f" {[phase[0] for phase in phases][:12]}"
            )
        made.append((int(phase[0]), tuple(phase[1].items())))
    return Schedule(tuple(made))


def check_weights(weights: Mapping[str, Any], names: Sequence[str], where: str) -> Weights:
    """Checks weights and brings them into the order of the datasets, whole numbers as integers.

    Raises:
        ValueError: If the names are not those of the datasets, or a weight is negative or not
            finite.
        TypeError: If a weight is not a number.
    """
    if set(weights) != set(names):
        raise ValueError(
            f"{where}: weights are by the names of the datasets; expected {sorted(names, key=str)},"
            f" found {sorted(weights, key=str)}"
        )
    for key, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float, np.number)):
            raise TypeError(f"{where}: the weight of {key!r} is a number; found {weight!r}")
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(
                f"{where}: the weight of {key!r} is a finite number of at least 0; found {weight}"
            )
    return tuple(
        (key, int(weights[key]) if _is_whole(weights[key]) else float(weights[key]))
        for key in names
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) or (isinstance(value, float) and value.is_integer())


def quotas(weights: Mapping[str, float]) -> tuple[list[int], int]:
    """Turns weights into integer quotas.

    The quotas are exact if a block of at most 4,096 picks can have these shares. Otherwise the
    block has 2**16 picks, and each quota is within 2**-17 of its share.

    Returns:
        The picks of each dataset in a block, and their sum, the size of a block.

    Raises:
        ValueError: If all weights are 0, or a weight above 0 gets the quota 0.

    >>> quotas({"web": 0.7, "code": 0.3})
    ([7, 3], 10)
    """
    names, values = list(weights), list(weights.values())
    largest = max(values)
    if not largest:
        raise ValueError(f"interleave: at least one weight is above 0; found {dict(weights)}")
    # Floats are divided by the largest, so that the precision is the same at any scale.
    fractions = [
        (
            Fraction(value)
            if isinstance(value, int)
            else Fraction(value / largest).limit_denominator(1_000_000)
        )
        for value in (
            values if all(isinstance(value, int) for value in values) else map(float, values)
        )
    ]
    total = sum(fractions)
    shares = [fraction / total for fraction in fractions]
    exact_total = math.fsum(values)
    close = all(
        abs(float(share) - value / exact_total) <= 1e-12 for share, value in zip(shares, values)
    )
    block = math.lcm(*(share.denominator for share in shares))
    if close and block <= _EXACT_BLOCK:
        result, size = [int(share * block) for share in shares], block
    else:
        size = _LARGE_BLOCK
        ideal = [value / exact_total * size for value in values]
        result = [int(value) for value in ideal]
        # Quotas of 0.5 to 1 that were rounded down to 0 come first, then the largest remainders.
        by_remainder = sorted(
            range(len(ideal)),
            key=lambda index: (
                result[index] > 0 or ideal[index] < 0.5,
                result[index] - ideal[index],
                names[index],
            ),
        )
        for index in by_remainder[: size - sum(result)]:
            result[index] += 1
    for name, value, quota in zip(names, values, result):
        if value and not quota:
            raise ValueError(
                f"interleave: the weight of {name!r} is {value / exact_total:.2g} of the whole, too"
                f" small to be kept (under 1 in {2 * _LARGE_BLOCK:,}). Give it 0 to leave it out,"
                " or more."
            )
    return result, size
