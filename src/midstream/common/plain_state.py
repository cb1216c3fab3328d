"""Plain-value state: what a checkpoint may hold, how it is copied, encoded and fingerprinted.

A state is JSON: dict with string keys, list, str, int, float, bool, None. Nothing here knows what a
state means.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

__all__ = [
    "FORMAT",
    "MISSING",
    "Fragment",
    "Missing",
    "State",
    "copy_plain",
    "decode",
    "digest",
    "encode",
    "fingerprint",
    "seal",
    "unseal",
]

FORMAT = 1
"""Version of every state midstream writes."""

State = Any
"""A plain JSON value. (A recursive alias would say more and check less: every use narrows it at
once.)
"""


class Missing:
    """The type of `MISSING`; survives pickling as the same object."""

    _instance: Missing | None = None

    def __new__(cls) -> Missing:
        """The one instance."""
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __reduce__(self) -> str:
        return "MISSING"

    def __repr__(self) -> str:
        return "MISSING"


MISSING = Missing()
"""Stands for "no value" where None is a value."""


class Fragment:
    """A part of a state that is JSON text already, so that what has not changed is not encoded again.

    >>> encode({"a": Fragment('{"b":1}')}), copy_plain([Fragment('{"b":1}')])
    ('{"a":{"b":1}}', [{'b': 1}])
    """

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def copy_plain(state: State) -> State:
    """A copy that shares nothing mutable with ``state``.

    Raises:
        TypeError: If there is anything but plain JSON values inside.

    >>> copy_plain({"at": [1, 2]})
    {'at': [1, 2]}
    """
    kind = type(state)
    if kind is int or kind is str or state is None or kind is bool or kind is float:
        return state
    if kind is dict:
        for key in state:
            if type(key) is not str:
                raise TypeError(f"a state's keys are strings; found {key!r}")
        return {key: copy_plain(value) for key, value in state.items()}
    if kind is list:
        return [copy_plain(value) for value in state]
    if kind is Fragment:
        return decode(state.text)
    raise TypeError(f"a state holds plain JSON values; found {kind.__name__}: {state!r:.80}")


_HERE = "\x00fragment\x00"
_PLACED = json.dumps(_HERE)


def encode(state: State) -> str:
    """One canonical string for a plain state: sorted keys, no spaces.

    >>> encode({"b": 1, "a": None})
    '{"a":null,"b":1}'
    """
    texts: list[str] = []

    def place(value: Any) -> str:
        if type(value) is not Fragment:
            raise TypeError(
                f"a state holds plain JSON values; found {type(value).__name__}: {value!r:.80}"
            )
        texts.append(value.text)
        return _HERE

    text = json.dumps(
        state,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=True,
        allow_nan=False,
        default=place,
    )
    if not texts:
        return text
    parts = text.split(_PLACED)
    if len(parts) != len(texts) + 1:
        raise ValueError("a state holds a string that stands for something else")
    return "".join(part for pair in zip(parts, [*texts, ""]) for part in pair)


def decode(text: str) -> State:
    """The inverse of `encode`."""
    return json.loads(text)


def fingerprint(spec: State) -> str:
    """16 hexadecimal digits that change when anything in ``spec`` does (BLAKE2b of its canonical string).

    >>> fingerprint({"node": "shuffle"}) == fingerprint({"node": "shuffle"})
    True
    """
    return digest(encode(spec))


def digest(text: str) -> str:
    """`fingerprint` of what is encoded already."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def seal(text: str) -> str:
    """A JSON object with a check number of its text as the last entry, so that a damaged one is noticed.

    >>> seal('{"a":1}')
    '{"a":1,"crc":"561bacaf"}'
    """
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}'


_SEAL = len(',"crc":"00000000"}')


def unseal(text: str) -> State:
    """The object that `seal` sealed.

    Raises:
        ValueError: If it is not as it was sealed.
    """
    if seal(text[:-_SEAL] + "}") != text:
        raise ValueError("its check number does not fit")
    return decode(text[:-_SEAL] + "}")
