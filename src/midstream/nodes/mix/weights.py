"""Weights of a mix: schedules, and weights as integer quotas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from midstream.common.validation import require_int

_EXACT_BLOCK = 4096

_LARGE_BLOCK = 1 << 16

Weights = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Schedule:
    """Weights that change on the way; made by `schedule`.

    Attributes:
        phases: (where it begins, weights by name), the first at 0.
    """

    phases: tuple[tuple[int, Weights], ...]


def schedule(phases: Sequence[tuple[int, Mapping[str, float]]]) -> Schedule:
    """Weights of a mix that change at given counts: ``interleave(..., weights=ms.schedule([...]))``.

    Args:
        phases: ``(border, weights)``, the first border 0, each larger than the one before. A border
            counts the samples that the mix has given since the epoch began (with ``weights_by``:
            their tokens, and the sample in which it lies belongs to the phase before). On streams
            every lane has its share of it, ``border // lanes`` or one more.

    Raises:
        ValueError: If the borders do not rise from 0.
        TypeError: If something is not a pair of a whole number and weights by name.

    >>> import midstream as ms
    >>> sources = {"easy": ms.from_dataset([0] * 90), "hard": ms.from_dataset([1] * 90)}
    >>> mix = ms.interleave(sources, ms.schedule([(0, {"easy": 1, "hard": 0}), (5, {"easy": 1, "hard": 1})]))
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
    """Weights as they are kept: in the order of the datasets, whole ones as integers.

    Raises:
        ValueError: If the names are not those of the datasets, or a weight is negative or not
            finite.
        TypeError: If a weight is no number.
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
    """Integer quotas per block and the block's size.

    Exact when the weights are ratios of small numbers (a block of at most 4,096 picks), else within
    2**-17 of the share over blocks of 2**16.

    Raises:
        ValueError: If all weights are 0, or one that is not would round to 0.

    >>> quotas({"web": 0.7, "code": 0.3})
    ([7, 3], 10)
    """
    names, values = list(weights), list(weights.values())
    largest = max(values)
    if not largest:
        raise ValueError(f"interleave: at least one weight is above 0; found {dict(weights)}")
    # Floats are taken relative to the largest, so that neither tiny nor huge ones lose what they
    # mean.
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
        # What rounded down to nothing comes first: a source of the mix is never left out for want
        # of a remainder.
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
