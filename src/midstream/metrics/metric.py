"""What a user tracks of samples, as totals that do not depend on the order, the ranks or the workers they were gathered in.

    Numbers        of ``fn(sample)``: count, sum, mean, min, max
    Spread         the same, and quantiles (`distribution`)
    Categories     how often each value came (`count`)

Totals of parts, joined in any order, are the totals of the whole to the last bit. A sum is an integer in units of 2**-96.
Quantiles come from counts in buckets of equal relative width, 64 to an octave (as in DDSketch, Masson et al., VLDB 2019, but
cut linearly within an octave, so that no logarithm's rounding matters); when their text becomes too long, neighbours are
joined in pairs (as in UDDSketch, Epicoco et al., IEEE Access 2020). Categories that become too many are left to one common
count by a hash of their name. How often either was done follows from what was seen, not from when.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

from midstream.common.plain_state import State, encode
from midstream.common.validation import require_callable
from midstream.errors import CheckpointError

__all__ = [
    "MOST_BYTES",
    "Categories",
    "Gathered",
    "History",
    "Metric",
    "Numbers",
    "Spread",
    "Totals",
    "Tracked",
    "as_metric",
    "count",
    "decode_tracked",
    "distribution",
    "encode_tracked",
    "join",
    "join_tracked",
    "totals_of",
    "valid",
]

MOST_BYTES = 1024
"""What the totals of one metric of one source may take in a checkpoint."""

_UNIT = 96
_LARGEST = 1e300
_BUCKET_BYTES = 480
_CATEGORY_BYTES = 960
_NAME = 64
_TOGETHER = 1024


@dataclass(frozen=True)
class Metric:
    """A function of a sample and how its values are put together. See `distribution` and `count`."""

    fn: Callable[[Any], Any]
    kind: str = "numbers"

    def value(self, sample: Any) -> Any:
        """What is to be counted of one sample.

        Raises:
            TypeError: If the function gives no number (for `count`: neither str, int, bool nor None).
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
            raise TypeError(f"count takes a str, int, bool or None of each sample; the function gave {kind.__name__}")
        if kind is not int and kind is not float:
            value = _number(value)
        if not -_LARGEST <= value <= _LARGEST:
            raise ValueError(f"a metric is a finite number of at most 1e300; the function gave {value!r:.40}")
        return value


def _within(values: Sequence[int | float]) -> bool:
    """Whether all are finite, and none too large. (One that is no number makes the sum none.)"""
    return not values or (min(values) >= -_LARGEST and max(values) <= _LARGEST and sum(values) * 0 == 0)


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
            f"a metric is one number of each sample; the function gave {type(value).__name__}: {value!r:.40}"
        )
    return value


def distribution(fn: Callable[[Any], float]) -> Metric:
    """For `Dataset.track`: the distribution of ``fn(sample)``: count, sum, mean, min, max and the quantiles 5, 50 and 95 %.

    Quantiles are right within 0.8 % of their value as long as the values lie within some seven octaves (20 to 2,500, say);
    for each further doubling of what has to be kept the error doubles. At most 1 KB of each source.

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

    Some fifty to a hundred categories of each source are told apart (1 KB); with more of them, those kept are chosen by a
    hash of their name and counted exactly, and the others together under ``"(others)"``.

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
            f"track takes functions of a sample, or ms.distribution(fn) and ms.count(fn); {name!r} is {type(value).__name__}"
        )
    return Metric(value)


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
        joined.least, joined.most = _plain(min(self.least, other.least)), _plain(max(self.most, other.most))
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
            or not all(type(edge) in (int, float) and math.isfinite(edge) for edge in (self.least, self.most))
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
    """An integer where it is one (the sign of zero goes too), a float where it is large, so that equal numbers are the same."""
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
        the level is the least one at which everything that was seen fits, whenever this is called."""
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
        return [*super().state(), self.level, self.zeros, *(part for side in self.sides for part in _packed(side))]

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
        ordered = [(-_middle(bucket, self.level), down[bucket]) for bucket in sorted(down, reverse=True)]
        ordered += [(0.0, self.zeros)] if self.zeros else []
        ordered += [(_middle(bucket, self.level), up[bucket]) for bucket in sorted(up)]
        below, found = 0, 0.0
        for middle, number in ordered:
            below, found = below + number, middle
            if below > target:
                break
        whole = type(self.least) is int and type(self.most) is int and not self.total % (1 << _UNIT)
        if whole and _bucket(nearest := round(found)) >> self.level == _bucket(found) >> self.level:
            found = nearest  # all were integers, as far as one can tell, and this one is in the bucket
        return min(max(found, self.least), self.most)

    def summary(self) -> dict[str, int | float]:
        """What it says, by name."""
        self._fit()
        return {**super().summary(), **{f"p{percent:02d}": self.quantile(percent / 100) for percent in (5, 50, 95)}}


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
        """Leave names out until the text is short enough: which ones follows from all that came, not from when."""
        while (
            sum(len(json.dumps(name)) + len(str(number)) + 2 for name, number in self.names.items()) > _CATEGORY_BYTES
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
        if not all(type(name) is str and type(number) is int and number > 0 for name, number in self.names.items()):
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
Tracked = dict[tuple[str, int], dict[str, Totals]]
"""Totals by name of the metric, by path of the node that tracks it and index of the source (-1: of several)."""

_KINDS: dict[str, type[Any]] = {"numbers": Numbers, "distribution": Spread, "count": Categories}


def totals_of(kind: str) -> Totals:
    """Totals of nothing, for a kind of metric."""
    return _KINDS[kind]()  # type: ignore[no-any-return]


class Gathered:
    """Values of the metrics of one place and source, put together many at a time."""

    __slots__ = ("kinds", "summed", "values")

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds, self.values = kinds, list[tuple[Any, ...]]()
        self.summed: dict[str, Totals] | None = None

    def add(self, values: Sequence[tuple[Any, ...]]) -> None:
        """Take in the values of some samples: for each of them one by metric, in the order of ``kinds``."""
        self.values += values
        if len(self.values) >= _TOGETHER:
            self.totals()

    def totals(self) -> dict[str, Totals]:
        """The totals of all, by name."""
        if self.summed is None:
            self.summed = {name: totals_of(kind) for name, kind in self.kinds.items()}
        for totals, column in zip(self.summed.values(), zip(*self.values)):
            totals.add(column)
        self.values.clear()
        return self.summed


def join(one: Mapping[str, Totals], other: Mapping[str, Totals]) -> dict[str, Totals]:
    """The totals of two parts, by name. Neither changes.

    Raises:
        CheckpointError: If a metric was gathered in another way before.
    """
    joined = dict(one)
    for name, totals in other.items():
        known: Any = joined.get(name)
        if known is not None and known.kind != totals.kind:
            raise CheckpointError(
                f"the metric {name!r} was gathered as {known.kind} so far, and is {totals.kind} now: their totals do not add "
                f"up. Track it as it was, or under another name."
            )
        joined[name] = totals if known is None else known.plus(totals)
    return joined


def encode_tracked(tracked: Tracked) -> str:
    """All totals as JSON: by path, source and name. What did not change is not encoded again."""
    paths: dict[str, list[str]] = {}
    for (path, source), named in sorted(tracked.items()):
        inner = ",".join(f"{json.dumps(name)}:{totals.text()}" for name, totals in sorted(named.items()))
        paths.setdefault(path, []).append(f'"{source}":{{{inner}}}')
    return "{" + ",".join(f"{json.dumps(path)}:{{{','.join(parts)}}}" for path, parts in paths.items()) + "}"


def decode_tracked(state: Any) -> Tracked:
    """The inverse, of the decoded JSON.

    Raises:
        ValueError: If it is not what `encode_tracked` gave.
    """
    tracked: Tracked = {}
    try:
        for path, sources in state.items():
            for source, named in sources.items():
                found = tracked.setdefault((path, int(source)), {})
                for name, part in named.items():
                    found[name] = totals_of(part[0])
                    found[name].load(part)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"no totals of metrics ({type(error).__name__}: {error})") from None
    return tracked


def join_tracked(parts: Iterable[Tracked]) -> Tracked:
    """The totals of several lanes or ranks."""
    tracked: Tracked = {}
    for part in parts:
        for key, named in part.items():
            known = tracked.get(key)
            tracked[key] = dict(named) if known is None else join(known, named)
    return tracked


_APART = 32


class History:
    """Totals after each of the last deliveries: whole after every 32 that brought anything, else what each brought.

    Whole ones after each would be up to a thousand copies of all buckets, and the copying dearer than the batch. Nothing that
    was handed out changes, and a reader that interrupts a change, a signal handler say, finds what was there before.
    """

    __slots__ = ("_known", "_parts")

    def __init__(self, totals: Tracked) -> None:
        self._parts: list[tuple[int, Tracked, list[tuple[int, Tracked]]]] = [(0, totals, [])]
        self._known = 0, totals  # the last answer: the next one goes on from there

    def add(self, number: int, more: Tracked) -> None:
        """What delivery ``number`` brings; it counts once `at` is asked for that number."""
        self._parts[-1][2].append((number, more))

    def settle(self, number: int, oldest: int) -> None:
        """Delivery ``number`` is done; nobody asks for a number below ``oldest - 1`` any more."""
        if len(self._parts[-1][2]) >= _APART:
            self._parts.append((number, self.at(number), []))
        while len(self._parts) > 1 and self._parts[1][0] < oldest:
            del self._parts[0]

    def at(self, number: int) -> Tracked:
        """The totals after delivery ``number``."""
        start, totals, added = next(part for part in reversed(self._parts) if part[0] <= number)
        if start <= self._known[0] <= number:
            start, totals = self._known
        if more := [each for at, each in added if start < at <= number]:
            totals = join_tracked([totals, join_tracked(more)])
        self._known = number, totals
        return totals

    def undo_to(self, number: int) -> None:
        """Forget all deliveries after ``number``."""
        parts = [part for part in self._parts if part[0] <= number]
        start, totals, added = parts[-1]
        parts[-1] = start, totals, [each for each in added if each[0] <= number]
        self._parts, self._known = parts, (start, totals)


def valid(state: Any) -> bool:
    """Whether `decode_tracked` takes it."""
    try:
        decode_tracked(state)
    except ValueError:
        return False
    return True
