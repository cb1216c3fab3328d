"""Metrics: functions of a sample that `Dataset.track` evaluates. `totals` sums up their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from midstream.common.validation import require_callable

_MAX_VALUE = 1e300

_MAX_NAME_LENGTH = 64  # characters of a category


@dataclass(frozen=True)
class Metric:
    """A function of a sample, and the kind of totals of its values.

    See `distribution` and `count`.

    Attributes:
        fn: Returns the value for one sample.
        kind: "numbers", "distribution" or "count", see `midstream.metrics.totals`.
    """

    fn: Callable[[Any], Any]
    kind: str = "numbers"

    def value(self, sample: Any) -> Any:
        """The value for one sample, checked.

        Raises:
            TypeError: If the function does not return a number (for `count`: neither str, int, bool
                nor None).
            ValueError: If the number is not finite, or beyond 1e300.
        """
        return self.checked(self.fn(sample))

    def values(self, samples: Iterable[Any]) -> list[Any]:
        """The value for each sample, checked."""
        values = list(map(self.fn, samples))
        if self.kind == "count" or {*map(type, values)} - {int, float} or not _within(values):
            return list(map(self.checked, values))
        return values

    def checked(self, value: Any) -> Any:
        """Check a value that the function returned, and convert it to a plain number or text.

        Raises:
            TypeError, ValueError: As `value`.
        """
        kind = type(value)
        if self.kind == "count":
            if isinstance(value, str):
                value = str.__str__(value)  # of a member of a str enumeration: its value
                return (
                    value if len(value) <= _MAX_NAME_LENGTH else value[: _MAX_NAME_LENGTH - 1] + "…"
                )
            if value is None or isinstance(value, int):
                return str(value) if value is None or kind is bool else int.__repr__(value)
            if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # a numpy scalar
                return str(value.item())[:_MAX_NAME_LENGTH]
            raise TypeError(
                "count takes a str, int, bool or None for each sample; the function returned"
                f" {kind.__name__}"
            )
        if kind is not int and kind is not float:
            value = _number(value)
        if not -_MAX_VALUE <= value <= _MAX_VALUE:
            raise ValueError(
                f"a metric is a finite number of at most 1e300; the function returned {value!r:.40}"
            )
        return value


def _within(values: Sequence[int | float]) -> bool:
    """Whether all values are finite and none is too large. (A NaN among them makes the sum NaN.)"""
    return not values or (
        min(values) >= -_MAX_VALUE and max(values) <= _MAX_VALUE and sum(values) * 0 == 0
    )


def _number(value: Any) -> int | float:
    """Convert a bool, or a one-element array or tensor, to a plain number.

    Raises:
        TypeError: If the value is not a number.
    """
    if isinstance(value, bool):
        return int(value)
    if hasattr(value, "item"):
        try:
            value = value.item()  # of an array or tensor with one element
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                "a metric is one number for each sample; the function returned"
                f" {type(value).__name__}"
            ) from None
        if isinstance(value, bool):
            return int(value)
    if not isinstance(value, (int, float)):
        raise TypeError(
            f"a metric is one number for each sample; the function returned {type(value).__name__}:"
            f" {value!r:.40}"
        )
    return value


def distribution(fn: Callable[[Any], float]) -> Metric:
    """Track the distribution of ``fn(sample)``, see `Dataset.track`.

    The totals are count, sum, mean, min, max and the quantiles 5, 50 and 95 %, at most 1 KB for
    each source. The relative error of a quantile is at most 0.8 % if all values lie within about
    seven octaves (for example 20 to 2,500). Each doubling of that range doubles the error.

    >>> import midstream as ms
    >>> docs = ms.from_dataset([[0] * n for n in range(1, 101)], name="docs")
    >>> ds = docs.track(length=ms.distribution(len))
    >>> loader = ms.DataLoader(ds, batch_size=100, collate_fn=list)
    >>> _ = next(iter(loader))
    >>> length = loader.progress().sources["docs"].metrics["length"]
    >>> length["count"], length["mean"], length["max"], round(length["p50"])
    (100, 50.5, 100, 50)
    """
    require_callable(fn, "distribution")
    return Metric(fn, "distribution")


def count(fn: Callable[[Any], Any]) -> Metric:
    """Track how many samples have each value of ``fn(sample)``, see `Dataset.track`.

    ``fn`` returns a str, an int, a bool or None: the category of a sample. About fifty to a hundred
    categories of each source are counted separately (1 KB). If there are more, a hash of the name
    chooses those that are still counted exactly; all others are counted together under
    ``"(others)"``.

    >>> import midstream as ms
    >>> rows = [{"language": "en"}, {"language": "de"}, {"language": "en"}]
    >>> ds = ms.from_dataset(rows).track(language=ms.count(lambda row: row["language"]))
    >>> loader = ms.DataLoader(ds, batch_size=3)
    >>> _ = next(iter(loader))
    >>> loader.progress().metrics["language"]
    {'de': 1, 'en': 2}
    """
    require_callable(fn, "count")
    return Metric(fn, "count")


def as_metric(value: Any, name: str) -> Metric:
    """Return a metric as it is, and make a metric of numbers of a plain function.

    Raises:
        TypeError: If the value is neither.
    """
    if isinstance(value, Metric):
        return value
    if not callable(value):
        raise TypeError(
            f"track takes functions of a sample, or ms.distribution(fn) and ms.count(fn); {name!r}"
            f" is {type(value).__name__}"
        )
    return Metric(value)
