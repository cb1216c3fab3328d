"""Totals of metric values: numbers, a quantile sketch, counts of categories.

    NumberTotals      count, sum, mean, minimum, maximum
    QuantileSketch    the same, and quantiles (`midstream.distribution`)
    CategoryCounts    how often each category occurred (`midstream.count`)

Totals do not depend on the order of the values, nor on the workers and ranks that saw them: totals
of parts, merged in any order, equal the totals of the whole to the last bit. For that, a sum is an
integer in units of 2**-96.

Quantiles come from counts in buckets of equal relative width, 64 to an octave, as in DDSketch
(Masson et al., VLDB 2019). Within an octave buckets are linear, which needs no logarithm and so has
no rounding that could differ between machines. If the encoded counts become too long, neighbouring
buckets are merged in pairs, as in UDDSketch (Epicoco et al., IEEE Access 2020).

If there are too many categories, a hash of their name decides which are still counted, and the
others share one count. How often buckets are merged or categories dropped depends on all values
seen, not on their order.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

from midstream.common.plain_state import State, encode

MAX_BYTES = 1024
"""Upper limit of the encoded totals of one metric of one source in a checkpoint."""

_FRACTION_BITS = 96  # sums are integers in units of 2**-96

_BUCKET_BYTES = 480  # upper limit of the encoded bucket counts of a sketch

_CATEGORY_BYTES = 960  # upper limit of the encoded counts of categories


class NumberTotals:
    """Count, sum, minimum and maximum of numbers.

    Attributes:
        count: How many values were added.
        total: Their sum in units of 2**-96.
        minimum: The smallest value.
        maximum: The largest value.
    """

    kind: ClassVar[str] = "numbers"
    __slots__ = ("_text", "count", "maximum", "minimum", "total")

    def __init__(self) -> None:
        self.count, self.total = 0, 0
        self.minimum: int | float = 0
        self.maximum: int | float = 0
        self._text: str | None = None

    def add(self, values: Sequence[Any]) -> None:
        """Add the values of some samples, at least one."""
        self._text = None
        minimum, maximum = min(values), max(values)
        if self.count:
            minimum = min(minimum, self.minimum)
            maximum = max(maximum, self.maximum)
        # Of numbers that compare equal, like 1 and 1.0, the same one is kept whichever came first.
        self.minimum, self.maximum = _normalized(minimum), _normalized(maximum)
        self.count += len(values)
        whole = 0
        for value in values:
            if type(value) is int:
                whole += value
            else:
                numerator, denominator = value.as_integer_ratio()
                self.total += (numerator << _FRACTION_BITS) // denominator
        self.total += whole << _FRACTION_BITS

    def plus(self: _N, other: _N) -> _N:
        """The totals of both. Neither changes."""
        if not self.count or not other.count:
            return other if not self.count else self
        merged = type(self)()
        merged.count, merged.total = self.count + other.count, self.total + other.total
        merged.minimum, merged.maximum = (
            _normalized(min(self.minimum, other.minimum)),
            _normalized(max(self.maximum, other.maximum)),
        )
        merged._merge(self, other)
        return merged

    def _merge(self: _N, one: _N, other: _N) -> None:
        """Set the attributes that only a subclass has to those of both totals together."""

    def text(self) -> str:
        """The state as JSON, encoded once."""
        if self._text is None:
            self._text = encode(self.state())
        return self._text

    def state(self) -> State:
        """The state as a plain list, which begins with the kind."""
        return [self.kind, self.count, f"{self.total:x}", self.minimum, self.maximum]

    def load(self, state: list[Any]) -> None:
        """Load a list that `state` returned.

        Raises:
            ValueError: If it is no such list.
        """
        _, self.count, total, self.minimum, self.maximum = state[:5]
        self.total = int(total, 16)
        if (
            type(self.count) is not int
            or self.count < 1
            or not all(
                type(value) in (int, float) and math.isfinite(value)
                for value in (self.minimum, self.maximum)
            )
        ):
            raise ValueError("no count, or a minimum or maximum that is not a number")

    def summary(self) -> dict[str, int | float]:
        """Count, sum, mean, min and max, by name."""
        return {
            "count": self.count,
            "sum": _ratio(self.total, 1),
            "mean": _ratio(self.total, self.count),
            "min": self.minimum,
            "max": self.maximum,
        }


_N = TypeVar("_N", bound=NumberTotals)


def _normalized(value: int | float) -> int | float:
    """One form for all numbers that compare equal: an int if it is whole and below 2**53 (also for
    -0.0), else a float.
    """
    if abs(value) >= 1 << 53:
        return float(value)
    return int(value) if type(value) is float and value.is_integer() else value


def _ratio(total: int, count: int) -> int | float:
    """``total * 2**-96 / count``, as an int if it is whole."""
    quotient, remainder = divmod(total, count << _FRACTION_BITS)
    # Beyond 2**1023 a float might overflow.
    if not remainder or abs(quotient) >= 1 << 1023:
        return quotient
    return total / (count << _FRACTION_BITS)


class QuantileSketch(NumberTotals):
    """Numbers with quantiles, from counts of values in buckets of equal relative width.

    Attributes:
        level: How often buckets were merged in pairs: a bucket is 2**level of `_bucket`'s wide.
        zeros: How many values are 0.
        sides: Counts by bucket number: of positive values, and of the sizes of negative ones.
    """

    kind: ClassVar[str] = "distribution"
    __slots__ = ("level", "sides", "zeros")

    def __init__(self) -> None:
        super().__init__()
        self.level, self.zeros = 0, 0
        self.sides: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def add(self, values: Sequence[Any]) -> None:
        """Add the values of some samples, at least one."""
        super().add(values)
        positive, negative = self.sides
        level = self.level
        for value in values:
            if value:
                side = positive if value > 0 else negative
                bucket = _bucket(value) >> level
                side[bucket] = side.get(bucket, 0) + 1
            else:
                self.zeros += 1
        if len(positive) + len(negative) > _BUCKET_BYTES:
            self._fit()

    def _merge(self, one: Any, other: Any) -> None:
        self.level = max(one.level, other.level)
        self.zeros = one.zeros + other.zeros
        for part in (one, other):
            shift = self.level - part.level
            for mine, theirs in zip(self.sides, part.sides):
                for bucket, number in theirs.items():
                    mine[bucket >> shift] = mine.get(bucket >> shift, 0) + number
        if sum(map(len, self.sides)) > _BUCKET_BYTES:
            self._fit()

    def _fit(self) -> None:
        """Merge buckets in pairs until their encoded counts are short enough.

        More values only make them longer, and only merging makes them shorter. So the level is the
        lowest one at which all values seen fit, no matter when this method is called.
        """
        while sum(map(_num_bytes, self.sides)) > _BUCKET_BYTES:
            self.level += 1
            halved: tuple[dict[int, int], dict[int, int]] = ({}, {})
            for mine, theirs in zip(halved, self.sides):
                for bucket, number in theirs.items():
                    mine[bucket >> 1] = mine.get(bucket >> 1, 0) + number
            self.sides = halved

    def state(self) -> State:
        """The state as a plain list: that of `NumberTotals`, level, zeros, and for both signs the
        first bucket and the counts from there on, as varints in base 85.
        """
        self._fit()
        return [
            *super().state(),
            self.level,
            self.zeros,
            *(part for side in self.sides for part in _packed(side)),
        ]

    def load(self, state: list[Any]) -> None:
        """Load a list that `state` returned.

        Raises:
            ValueError: If it is no such list.
        """
        super().load(state)
        self.level, self.zeros = state[5:7]
        self.sides = (_unpacked(*state[7:9]), _unpacked(*state[9:11]))
        are_ints = type(self.level) is type(self.zeros) is int
        if not are_ints or not 0 <= self.level < 24 or self.zeros < 0 or len(state) != 11:
            raise ValueError("no such buckets")
        if self.zeros + sum(sum(side.values()) for side in self.sides) != self.count:
            raise ValueError("the buckets hold another number of values than the count")

    def quantile(self, q: float) -> int | float:
        """The q-quantile: the middle of the bucket in which it lies.

        If all values seem to be integers, an integer in that bucket.

        Args:
            q: In [0, 1].
        """
        target = q * (self.count - 1)
        positive, negative = self.sides
        ordered = [
            (-_middle(bucket, self.level), negative[bucket])
            for bucket in sorted(negative, reverse=True)
        ]
        ordered += [(0.0, self.zeros)] if self.zeros else []
        ordered += [(_middle(bucket, self.level), positive[bucket]) for bucket in sorted(positive)]
        below, found = 0, 0.0
        for middle, number in ordered:
            below, found = below + number, middle
            if below > target:
                break
        all_ints = type(self.minimum) is type(self.maximum) is int and not self.total % (
            1 << _FRACTION_BITS
        )  # as far as the totals show
        if all_ints:
            nearest = round(found)
            if _bucket(nearest) >> self.level == _bucket(found) >> self.level:
                found = nearest
        return min(max(found, self.minimum), self.maximum)

    def summary(self) -> dict[str, int | float]:
        """The summary of `NumberTotals` and the quantiles, by name."""
        self._fit()
        return {
            **super().summary(),
            **{f"p{percent:02d}": self.quantile(percent / 100) for percent in (5, 50, 95)},
        }


def _bucket(value: int | float) -> int:
    """The number of the bucket of a value's size, at level 0: 64 buckets to an octave."""
    mantissa, exponent = math.frexp(value)
    return ((exponent + 1075) << 6) + int((abs(mantissa) - 0.5) * 128)


def _middle(bucket: int, level: int) -> float:
    """The value in the middle of a bucket of a level."""
    return (_edge(bucket << level) + _edge((bucket + 1) << level)) / 2


def _edge(bucket: int) -> float:
    """The lower edge of a bucket at level 0."""
    exponent, index = bucket >> 6, bucket & 63
    return math.ldexp(0.5 + index / 128, min(exponent - 1075, 1023))


def _varint_size(number: int) -> int:
    """Bytes of a number as a varint: 7 bits to a byte."""
    return max(1, -(-number.bit_length() // 7))


def _num_bytes(side: Mapping[int, int]) -> int:
    """Bytes of counts by bucket as varints, before base 85."""
    if not side:
        return 0
    return max(side) - min(side) + 1 - len(side) + sum(map(_varint_size, side.values()))


def _packed(side: Mapping[int, int]) -> tuple[int, str]:
    """The first bucket, and all counts from there to the last one, as varints in base 85."""
    if not side:
        return 0, ""
    first, data = min(side), bytearray()
    for bucket in range(first, max(side) + 1):
        number = side.get(bucket, 0)
        while number > 127:
            data.append(number & 127 | 128)
            number >>= 7
        data.append(number)
    return first, base64.b85encode(bytes(data)).decode()


def _unpacked(first: int, text: str) -> dict[int, int]:
    """The counts by bucket that `_packed` encoded."""
    if type(first) is not int or not 0 <= first < 1 << 24 or len(text) > 2 * _BUCKET_BYTES:
        raise ValueError("no such buckets")
    side: dict[int, int] = {}
    number = shift = 0
    for byte in base64.b85decode(text):
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            if number:
                side[first] = number
            first, number, shift = first + 1, 0, 0
    return side


class CategoryCounts:
    """How often each category occurred.

    Attributes:
        level: Categories are counted separately if the hash of their name begins with this many
            zero bits.
        names: Their counts by name.
        others: The count of all other categories together.
    """

    kind: ClassVar[str] = "count"
    __slots__ = ("_text", "level", "names", "others")

    def __init__(self) -> None:
        self.level, self.others = 0, 0
        self.names: dict[str, int] = {}
        self._text: str | None = None

    def add(self, values: Sequence[str]) -> None:
        """Add the values of some samples, at least one."""
        self._text = None
        names = self.names
        for name in values:
            if name in names:
                names[name] += 1
            elif not self.level or _is_kept(name, self.level):
                names[name] = 1
            else:
                self.others += 1
        if len(names) > _CATEGORY_BYTES // 4:
            self._fit()

    def plus(self, other: CategoryCounts) -> CategoryCounts:
        """The counts of both. Neither changes."""
        merged = CategoryCounts()
        merged.level, merged.others = max(self.level, other.level), self.others + other.others
        for part in (self, other):
            for name, number in part.names.items():
                if part.level == merged.level or _is_kept(name, merged.level):
                    merged.names[name] = merged.names.get(name, 0) + number
                else:
                    merged.others += number
        if len(merged.names) > _CATEGORY_BYTES // 4:
            merged._fit()
        return merged

    def _fit(self) -> None:
        """Drop names until the encoded counts are short enough. Which ones depends on all names
        seen, not on their order.
        """
        while (
            sum(len(json.dumps(name)) + len(str(number)) + 2 for name, number in self.names.items())
            > _CATEGORY_BYTES
        ):
            self.level += 1
            kept = {
                name: number for name, number in self.names.items() if _is_kept(name, self.level)
            }
            self.others += sum(self.names.values()) - sum(kept.values())
            self.names = kept

    def text(self) -> str:
        """The state as JSON, encoded once."""
        if self._text is None:
            self._text = encode(self.state())
        return self._text

    def state(self) -> State:
        """The state as a plain list, which begins with the kind."""
        self._fit()
        return [self.kind, self.level, self.others, dict(sorted(self.names.items()))]

    def load(self, state: list[Any]) -> None:
        """Load a list that `state` returned.

        Raises:
            ValueError: If it is no such list.
        """
        _, self.level, self.others, names = state
        self.names = dict(names)
        are_ints = type(self.level) is type(self.others) is int
        if not are_ints or not 0 <= self.level < 64 or self.others < 0:
            raise ValueError("no such categories")
        if not all(
            type(name) is str and type(number) is int and number > 0
            for name, number in self.names.items()
        ):
            raise ValueError("counts that are not positive integers")

    def summary(self) -> dict[str, int | float]:
        """Counts by name, sorted by name."""
        self._fit()
        others = {"(others)": self.others} if self.others else {}
        return {**dict(sorted(self.names.items())), **others}


def _is_kept(name: str, level: int) -> bool:
    """Whether the hash of a name begins with ``level`` zero bits."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - level) == 0


Totals: TypeAlias = "NumberTotals | CategoryCounts"

_KINDS: dict[str, type[Any]] = {
    kind.kind: kind for kind in (NumberTotals, QuantileSketch, CategoryCounts)
}


def empty_totals(kind: str) -> Totals:
    """Totals without values, for a kind of metric."""
    return _KINDS[kind]()  # type: ignore[no-any-return]
