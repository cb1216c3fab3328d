"""What a user tracks of samples, as totals that do not depend on the order, the ranks or the workers they were gathered in.

    Numbers        of ``fn(sample)``: count, sum, mean, min, max
    Spread         the same, and quantiles (`distribution`)
    Categories     how often each value came (`count`)

Totals of parts, joined in any order, are the totals of the whole to the last bit. A sum is an
integer in units of 2**-96. Quantiles come from counts in buckets of equal relative width, 64 to an
octave (as in DDSketch, Masson et al., VLDB 2019, but cut linearly within an octave, so that no
logarithm's rounding matters); when their text becomes too long, neighbours are joined in pairs (as
in UDDSketch, Epicoco et al., IEEE Access 2020). Categories that become too many are left to one
common count by a hash of their name. How often either was done follows from what was seen, not from
when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from midstream.common.validation import require_callable

_LARGEST = 1e300

_NAME = 64


@dataclass(frozen=True)
class Metric:
    """A function of a sample and how its values are put together. See `distribution` and `count`."""

    fn: Callable[[Any], Any]
    kind: str = "numbers"

    def value(self, sample: Any) -> Any:
        """What is to be counted of one sample.

        Raises:
            TypeError: If the function gives no number (for `count`: neither str, int, bool nor
                None).
            ValueError: If the number is not finite, or beyond 1e300.
        """
        return self.checked(self.fn(sample))

    def values(self, samples: Iterable[Any]) -> list[Any]:
        """`value` of each."""
        values = list(map(self.fn, samples))
        if self.kind == "count" or {*map(type, values)} - {int, float} or not _within(values):
            return list(map(self.checked, values))
        return values

    def checked(self, value: Any) -> Any:
        """What the function gave, as it is counted."""
        kind = type(value)
        if self.kind == "count":
            if isinstance(value, str):
                value = str.__str__(value)  # of an enumeration, its value
                return value if len(value) <= _NAME else value[: _NAME - 1] + "…"
            if value is None or isinstance(value, int):
                return str(value) if value is None or kind is bool else int.__repr__(value)
            if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # a numpy scalar
                return str(value.item())[:_NAME]
            raise TypeError(
                "count takes a str, int, bool or None of each sample; the function gave"
                f" {kind.__name__}"
            )
        if kind is not int and kind is not float:
            value = _number(value)
        if not -_LARGEST <= value <= _LARGEST:
            raise ValueError(
                f"a metric is a finite number of at most 1e300; the function gave {value!r:.40}"
            )
        return value


def _within(values: Sequence[int | float]) -> bool:
    """Whether all are finite, and none too large. (One that is no number makes the sum none.)"""
    return not values or (
        min(values) >= -_LARGEST and max(values) <= _LARGEST and sum(values) * 0 == 0
    )


def _number(value: Any) -> int | float:
    """A plain number."""
    if isinstance(value, bool):
        return int(value)
    if hasattr(value, "item"):
        try:
            value = value.item()  # of numpy or torch, with one element
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"a metric is one number of each sample; the function gave {type(value).__name__}"
            ) from None
        if isinstance(value, bool):
            return int(value)
    if not isinstance(value, (int, float)):
        raise TypeError(
            f"a metric is one number of each sample; the function gave {type(value).__name__}:"
            f" {value!r:.40}"
        )
    return value


def distribution(fn: Callable[[Any], float]) -> Metric:
    """For `Dataset.track`: the distribution of ``fn(sample)``: count, sum, mean, min, max and the quantiles 5, 50 and 95 %.

    Quantiles are right within 0.8 % of their value as long as the values lie within some seven
    octaves (20 to 2,500, say); for each further doubling of what has to be kept the error doubles.
    At most 1 KB of each source.

    >>> import midstream as ms
    >>> ds = ms.from_dataset([[0] * n for n in range(1, 101)], name="docs").track(length=ms.distribution(len))
    >>> loader = ms.DataLoader(ds, batch_size=100, collate_fn=list)
    >>> _ = next(iter(loader))
    >>> told = loader.progress().sources["docs"].metrics["length"]
    >>> told["count"], told["mean"], told["max"], round(told["p50"])
    (100, 50.5, 100, 50)
    """
    require_callable(fn, "distribution")
    return Metric(fn, "distribution")


def count(fn: Callable[[Any], Any]) -> Metric:
    """For `Dataset.track`: how many samples there were of each ``fn(sample)``, a str, an int, a bool or None.

    Some fifty to a hundred categories of each source are told apart (1 KB); with more of them,
    those kept are chosen by a hash of their name and counted exactly, and the others together under
    ``"(others)"``.

    >>> import midstream as ms
    >>> rows = [{"language": "en"}, {"language": "de"}, {"language": "en"}]
    >>> loader = ms.DataLoader(ms.from_dataset(rows).track(language=ms.count(lambda row: row["language"])), batch_size=3)
    >>> _ = next(iter(loader))
    >>> loader.progress().metrics["language"]
    {'de': 1, 'en': 2}
    """
    require_callable(fn, "count")
    return Metric(fn, "count")


def as_metric(value: Any, name: str) -> Metric:
    """A metric; a plain function is one of numbers.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(value, Metric):
        return value
    if not callable(value):
        raise TypeError(
            f"track takes functions of a sample, or ms.distribution(fn) and ms.count(fn); {name!r}"
            f" is {type(value).__name__}"
        )
    return Metric(value)
