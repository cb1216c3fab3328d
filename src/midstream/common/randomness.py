"""Counter-based randomness: draws hash (seed, salt, key, index), permutations are formulas.

No function has state or uses a global generator. All arithmetic is modulo 2**64. The values are
frozen by tests/golden: a released order never changes within a format version.

The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014); the permutation is a
keyed generalised Feistel network with cycle walking (Black and Rogaway 2002).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "draw",
    "fold",
    "fold_array",
    "generator",
    "mix",
    "mix_array",
    "pass_key",
    "permute",
    "salt",
    "uniform32",
]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_U = np.uint64
_GOLDEN_U, _M1_U, _M2_U = _U(_GOLDEN), _U(_M1), _U(_M2)
_S30, _S27, _S31, _S32, _S64 = _U(30), _U(27), _U(31), _U(32), 64
_ROUNDS = 6  # of the Feistel network
_SMALL = 256  # rows up to which a permutation is drawn whole
_FEW = 8  # values up to which Python's integers are faster than numpy


def mix(value: int) -> int:
    """SplitMix64's finaliser on one integer.

    >>> mix(1) == int(mix_array(np.array([1], dtype=np.uint64))[0])
    True
    """
    value &= _MASK
    value = ((value ^ (value >> 30)) * _M1) & _MASK
    value = ((value ^ (value >> 27)) * _M2) & _MASK
    return value ^ (value >> 31)


def mix_array(values: U64) -> U64:
    """`mix` over an array of uint64 (any shape); a new array."""
    out: U64 = values ^ (values >> _S30)
    out *= _M1_U
    out ^= out >> _S27
    out *= _M2_U
    out ^= out >> _S31
    return out


def fold(*values: int) -> int:
    """Hash a chain of integers into one of 64 bits; their order matters.

    >>> fold(1, 2) != fold(2, 1)
    True
    """
    result = 0
    for value in values:
        result = mix(result * _GOLDEN + (int(value) & _MASK) + _GOLDEN)
    return result


def fold_array(head: int | U64, values: Any) -> U64:
    """Extend a `fold` by one more value, elementwise.

    Args:
        head: The fold so far: an integer, or uint64 of a shape that broadcasts with ``values``.
        values: Integers, at least 1-d.
    """
    values = np.atleast_1d(np.asarray(values)).astype(np.uint64)
    if isinstance(head, int):
        return mix_array(values + _U((head * _GOLDEN + _GOLDEN) & _MASK))
    return mix_array(head * _GOLDEN_U + values + _GOLDEN_U)


def salt(text: str) -> int:
    """A 64-bit integer for a name: BLAKE2b, which unlike ``hash`` never varies."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def pass_key(keys: U64, passes: Any) -> U64:
    """The seed keys of passes. Pass 0 keeps its key, so that ``repeat(1)`` changes no order.

    Args:
        keys: uint64, shape [1] (one for all) or [k].
        passes: int64, shape [k] (or [1]).
    """
    passes = np.asarray(passes)
    if not passes.any():
        return keys
    return np.where(passes == 0, keys, fold_array(keys, passes))


def draw(seed: int, start: int, count: int) -> U64:
    """Hashes number ``start`` ... ``start + count - 1`` of the seed, uint64, shape [count]."""
    return fold_array(seed, np.arange(start, start + count, dtype=np.uint64))


def uniform32(seed: int, start: int, count: int) -> I64:
    """Integers uniform in [0, 2**32), int64, shape [count]. Arguments as for `draw`."""
    return (draw(seed, start, count) >> _S32).astype(np.int64)


def generator(*key: int) -> np.random.Generator:
    """A numpy generator that depends on ``key`` alone. Philox takes 12 µs: for user code only."""
    return np.random.Generator(np.random.Philox(key=[fold(*key), fold(1, *key)]))


def permute(positions: I64, length: int, seed: int, keys: U64) -> I64:
    """The images of ``positions`` under a random permutation of [0, length), in O(1) memory.

    Up to 256 rows the permutation is drawn whole, by sorting hashes. Beyond that, it is a six-round
    Feistel network over pairs (high, low), with about as many values for each and as few pairs as
    cover the range. A result outside [0, length) is permuted again until it lies inside.

    Args:
        positions: int64, shape [k], each in [0, length).
        length: Size of the permuted range, at least 1.
        seed: 64-bit integer: the caller's seed and salt.
        keys: uint64, shape [1] or [k]: the pass. Positions with equal keys share one permutation.

    Returns:
        int64, shape [k].
    """
    if length <= _SMALL:
        return _permute_small(positions, length, seed, keys)
    high_size = math.isqrt(length - 1) + 1
    low_size = -(-length // high_size)
    if keys.size == 1:
        base = mix(fold(seed) * _GOLDEN + int(keys[0]) + _GOLDEN)
        plain = [mix(base + index * _GOLDEN) for index in range(_ROUNDS)]
        if len(positions) <= _FEW:  # frequent in a mix of many sources
            few = [
                _permute_one(position, length, plain, high_size, low_size)
                for position in positions.tolist()
            ]
            return np.array(few, dtype=np.int64)
        rounds: list[Any] = list(map(_U, plain))
    else:
        bases = fold_array(fold(seed), keys)
        rounds = [mix_array(bases + _U(index * _GOLDEN & _MASK)) for index in range(_ROUNDS)]
    values = _feistel(positions.astype(np.uint64), rounds, high_size, low_size)
    limit = _U(length)
    outside = np.flatnonzero(values >= limit)
    if keys.size == 1 and outside.size <= _FEW:
        for index in outside.tolist():
            values[index] = _permute_one(int(values[index]), length, plain, high_size, low_size)
        return values.astype(np.int64)
    while outside.size:
        inner = rounds if keys.size == 1 else [key[outside] for key in rounds]
        again = _feistel(values[outside], inner, high_size, low_size)
        values[outside] = again
        outside = outside[again >= limit]
    return values.astype(np.int64)


def _permute_one(value: int, length: int, rounds: list[int], high_size: int, low_size: int) -> int:
    """`_feistel` for one value in Python's integers, repeated until the result is below length."""
    while True:
        high, low = divmod(value, low_size)
        size, other = high_size, low_size
        for key in rounds:
            hashed = ((low ^ key) * _M1) & _MASK
            hashed ^= hashed >> 32
            hashed = (hashed * _M2) & _MASK
            high += ((hashed >> 32) * size) >> 32
            high, low, size, other = low, high if high < size else high - size, other, size
        value = high * low_size + low
        if value < length:
            return value


def _permute_small(positions: I64, length: int, seed: int, keys: U64) -> I64:
    """`permute` by sorting: one row of ``length`` hashes for each distinct key."""
    distinct, which = np.unique(keys, return_inverse=True)
    bases = fold_array(fold(seed), distinct)
    order = np.argsort(
        fold_array(bases[:, None], np.arange(length, dtype=np.uint64)[None, :]),
        axis=1,
        kind="stable",
    )
    return np.asarray(order[which.reshape(-1) if keys.size > 1 else 0, positions], dtype=np.int64)


def _feistel(values: U64, rounds: list[Any], high_size: int, low_size: int) -> U64:
    """Apply the network to pairs in [0, high_size) x [0, low_size), encoded in one integer.

    Each round adds a hash of one half to the other half.
    """
    low_count = _U(low_size)
    high, low = np.divmod(values, low_count)
    size, other = _U(high_size), low_count
    hashed, spare = np.empty_like(low), np.empty_like(low)
    for key in rounds:
        np.bitwise_xor(low, key, out=hashed)
        hashed *= _M1_U
        np.right_shift(hashed, _S32, out=spare)
        hashed ^= spare
        hashed *= _M2_U
        hashed >>= _S32
        hashed *= size
        hashed >>= _S32  # uniform in [0, size), without a division
        high += hashed
        np.subtract(high, size, out=spare)  # below zero is a huge number here
        np.minimum(high, spare, out=high)
        high, low, size, other = low, high, other, size
    result: U64 = high * low_count + low
    return result
