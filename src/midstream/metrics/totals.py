"""Totals that do not depend on the order of what they add: numbers, a quantile sketch, categories."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

from midstream.common.plain_state import State, encode

MOST_BYTES = 1024
"""What the totals of one metric of one source may take in a checkpoint."""

_UNIT = 96

_BUCKET_BYTES = 480

_CATEGORY_BYTES = 960


class Numbers:
    """Count, sum, least and most of numbers."""

    kind: ClassVar[str] = "numbers"
    __slots__ = ("_text", "count", "least", "most", "total")

    def __init__(self) -> None:
        self.count, self.total = 0, 0  # the sum in units of 2**-96
        self.least: int | float = 0
        self.most: int | float = 0
        self._text: str | None = None

    def add(self, values: Sequence[Any]) -> None:
        """Take in the values of some samples."""
        self._text = None
        least, most = min(values), max(values)
        if self.count:
            least, most = min(least, self.least), max(most, self.most)
        # Of numbers that compare equal, 1 and 1.0 say, the same one is kept whichever came first.
        self.least, self.most = _plain(least), _plain(most)
        self.count += len(values)
        whole = 0
        for value in values:
            if type(value) is int:
                whole += value
            else:
                numerator, denominator = value.as_integer_ratio()
                self.total += (numerator << _UNIT) // denominator
        self.total += whole << _UNIT

    def plus(self: _N, other: _N) -> _N:
        """Both together. Neither changes."""
        if not self.count or not other.count:
            return other if not self.count else self
        joined = type(self)()
        joined.count, joined.total = self.count + other.count, self.total + other.total
        joined.least, joined.most = (
            _plain(min(self.least, other.least)),
            _plain(max(self.most, other.most)),
        )
        joined._join(self, other)
        return joined

    def _join(self: _N, one: _N, other: _N) -> None:
        """What a subclass has besides."""

    def text(self) -> str:
        """Its part of a checkpoint, as JSON; made once."""
        if self._text is None:
            self._text = encode(self.state())
        return self._text

    def state(self) -> State:
        """A plain list, first the kind."""
        return [self.kind, self.count, f"{self.total:x}", self.least, self.most]

    def load(self, state: list[Any]) -> None:
        """Take what `state` gave."""
        _, self.count, total, self.least, self.most = state[:5]
        self.total = int(total, 16)
        if (
            type(self.count) is not int
            or self.count < 1
            or not all(
                type(edge) in (int, float) and math.isfinite(edge)
                for edge in (self.least, self.most)
            )
        ):
            raise ValueError("no count, or edges that are no numbers")

    def summary(self) -> dict[str, int | float]:
        """What it says, by name."""
        return {
            "count": self.count,
            "sum": _ratio(self.total, 1),
            "mean": _ratio(self.total, self.count),
            "min": self.least,
            "max": self.most,
        }


_N = TypeVar("_N", bound=Numbers)


def _plain(value: int | float) -> int | float:
    """An integer where it is one (the sign of zero goes too), a float where it is large, so that
    equal numbers are the same.
    """
    if abs(value) >= 1 << 53:
        return float(value)
    return int(value) if type(value) is float and value.is_integer() else value


def _ratio(total: int, count: int) -> int | float:
    """``total * 2**-96 / count``, an integer where it is one."""
    whole, rest = divmod(total, count << _UNIT)
    return whole if not rest or abs(whole) >= 1 << 1023 else total / (count << _UNIT)


class Spread(Numbers):
    """Numbers with the counts of buckets: of zero, of positive and of negative ones (by their size).

    Attributes:
        level: How often buckets were joined in pairs: there are 64 >> level to an octave.
        zeros: How many were 0.
        sides: Counts by bucket, first of positive, then of negative numbers.
    """

    kind: ClassVar[str] = "distribution"
    __slots__ = ("level", "sides", "zeros")

    def __init__(self) -> None:
        super().__init__()
        self.level, self.zeros = 0, 0
        self.sides: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def add(self, values: Sequence[Any]) -> None:
        """Take in the values of some samples."""
        super().add(values)
        up, down = self.sides
        level = self.level
        for value in values:
            if value:
                side, bucket = (up if value > 0 else down), _bucket(value) >> level
                side[bucket] = side.get(bucket, 0) + 1
            else:
                self.zeros += 1
        if len(up) + len(down) > _BUCKET_BYTES:
            self._fit()

    def _join(self, one: Any, other: Any) -> None:
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
        """Join buckets until the text is short enough. The text only grows with what is taken in, and only shrinks by joining:
        the level is the least one at which everything that was seen fits, whenever this is called.
        """
        while sum(map(_num_bytes, self.sides)) > _BUCKET_BYTES:
            self.level += 1
            halved: tuple[dict[int, int], dict[int, int]] = ({}, {})
            for mine, theirs in zip(halved, self.sides):
                for bucket, number in theirs.items():
                    mine[bucket >> 1] = mine.get(bucket >> 1, 0) + number
            self.sides = halved

    def state(self) -> State:
        """A plain list, first the kind; the counts of neighbouring buckets as base 85 of varints."""
        self._fit()
        return [
            *super().state(),
            self.level,
            self.zeros,
            *(part for side in self.sides for part in _packed(side)),
        ]

    def load(self, state: list[Any]) -> None:
        """Take what `state` gave."""
        super().load(state)
        self.level, self.zeros = state[5:7]
        self.sides = (_unpacked(*state[7:9]), _unpacked(*state[9:11]))
        whole = type(self.level) is type(self.zeros) is int
        if not whole or not 0 <= self.level < 24 or self.zeros < 0 or len(state) != 11:
            raise ValueError("no such buckets")
        if self.zeros + sum(sum(side.values()) for side in self.sides) != self.count:
            raise ValueError("its buckets hold another number of values than it counts")

    def quantile(self, part: float) -> int | float:
        """The value that so large a part of all lies below, as the middle of its bucket."""
        target = part * (self.count - 1)
        up, down = self.sides
        ordered = [
            (-_middle(bucket, self.level), down[bucket]) for bucket in sorted(down, reverse=True)
        ]
        ordered += [(0.0, self.zeros)] if self.zeros else []
        ordered += [(_middle(bucket, self.level), up[bucket]) for bucket in sorted(up)]
        below, found = 0, 0.0
        for middle, number in ordered:
            below, found = below + number, middle
            if below > target:
                break
        whole = type(self.least) is int and type(self.most) is int and not self.total % (1 << _UNIT)
        if whole and _bucket(nearest := round(found)) >> self.level == _bucket(found) >> self.level:
            found = (
                nearest  # all were integers, as far as one can tell, and this one is in the bucket
            )
        return min(max(found, self.least), self.most)

    def summary(self) -> dict[str, int | float]:
        """What it says, by name."""
        self._fit()
        return {
            **super().summary(),
            **{f"p{percent:02d}": self.quantile(percent / 100) for percent in (5, 50, 95)},
        }


def _bucket(value: int | float) -> int:
    """The number of the bucket of a value's size, before any are joined."""
    part, power = math.frexp(value)
    return ((power + 1075) << 6) + int((abs(part) - 0.5) * 128)


def _middle(bucket: int, level: int) -> float:
    """The value in the middle of a bucket."""
    return (_edge(bucket << level) + _edge((bucket + 1) << level)) / 2


def _edge(bucket: int) -> float:
    power, part = bucket >> 6, bucket & 63
    return math.ldexp(0.5 + part / 128, min(power - 1075, 1023))


def _varint_size(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))


def _num_bytes(side: Mapping[int, int]) -> int:
    if not side:
        return 0
    return max(side) - min(side) + 1 - len(side) + sum(map(_varint_size, side.values()))


def _packed(side: Mapping[int, int]) -> tuple[int, str]:
    """The first bucket, and all counts from there to the last one."""
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


class Categories:
    """How often each name came.

    Attributes:
        level: Names are kept whose hash begins with so many zero bits.
        names: Counts of those.
        others: Count of all other names.
    """

    kind: ClassVar[str] = "count"
    __slots__ = ("_text", "level", "names", "others")

    def __init__(self) -> None:
        self.level, self.others = 0, 0
        self.names: dict[str, int] = {}
        self._text: str | None = None

    def add(self, values: Sequence[str]) -> None:
        """Take in the values of some samples."""
        self._text = None
        names = self.names
        for name in values:
            if name in names:
                names[name] += 1
            elif not self.level or _kept(name, self.level):
                names[name] = 1
            else:
                self.others += 1
        if len(names) > _CATEGORY_BYTES // 4:
            self._fit()

    def plus(self, other: Categories) -> Categories:
        """Both together. Neither changes."""
        joined = Categories()
        joined.level, joined.others = max(self.level, other.level), self.others + other.others
        for part in (self, other):
            for name, number in part.names.items():
                if part.level == joined.level or _kept(name, joined.level):
                    joined.names[name] = joined.names.get(name, 0) + number
                else:
                    joined.others += number
        if len(joined.names) > _CATEGORY_BYTES // 4:
            joined._fit()
        return joined

    def _fit(self) -> None:
        """Leave names out until the text is short enough: which ones follows from all that came,
        not from when.
        """
        while (
            sum(len(json.dumps(name)) + len(str(number)) + 2 for name, number in self.names.items())
            > _CATEGORY_BYTES
        ):
            self.level += 1
            kept = {name: number for name, number in self.names.items() if _kept(name, self.level)}
            self.others += sum(self.names.values()) - sum(kept.values())
            self.names = kept

    def text(self) -> str:
        """Its part of a checkpoint, as JSON; made once."""
        if self._text is None:
            self._text = encode(self.state())
        return self._text

    def state(self) -> State:
        """A plain list, first the kind."""
        self._fit()
        return [self.kind, self.level, self.others, dict(sorted(self.names.items()))]

    def load(self, state: list[Any]) -> None:
        """Take what `state` gave."""
        _, self.level, self.others, names = state
        self.names = dict(names)
        whole = type(self.level) is type(self.others) is int
        if not whole or not 0 <= self.level < 64 or self.others < 0:
            raise ValueError("no such categories")
        if not all(
            type(name) is str and type(number) is int and number > 0
            for name, number in self.names.items()
        ):
            raise ValueError("counts that are no numbers")

    def summary(self) -> dict[str, int | float]:
        """Counts by name, in the names' order."""
        self._fit()
        others = {"(others)": self.others} if self.others else {}
        return {**dict(sorted(self.names.items())), **others}


def _kept(name: str, level: int) -> bool:
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - level) == 0


Totals: TypeAlias = "Numbers | Categories"

_KINDS: dict[str, type[Any]] = {"numbers": Numbers, "distribution": Spread, "count": Categories}


def totals_of(kind: str) -> Totals:
    """Totals of nothing, for a kind of metric."""
    return _KINDS[kind]()  # type: ignore[no-any-return]
