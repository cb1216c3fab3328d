"""Plain JSON values, as states and checkpoints hold them: copy, encode, fingerprint, seal.

A state consists of dicts with string keys, lists, str, int, float, bool and None.
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
"""Version of the states that midstream writes."""

State = Any
"""A plain JSON value. (A recursive type alias would need a cast at every use.)"""


class Missing:
    """The type of `MISSING`, of which pickling makes no second instance."""

    _instance: Missing | None = None

    def __new__(cls) -> Missing:
        """Return the only instance."""
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __reduce__(self) -> str:
        return "MISSING"

    def __repr__(self) -> str:
        return "MISSING"


MISSING = Missing()
"""Means "no value" where None is a value."""


class Fragment:
    """A part of a state that is encoded already, so that unchanged parts are encoded once.

    >>> encode({"a": Fragment('{"b":1}')}), copy_plain([Fragment('{"b":1}')])
    ('{"a":{"b":1}}', [{'b': 1}])
    """

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def copy_plain(state: State) -> State:
    """A deep copy of ``state``.

    Raises:
        TypeError: If it contains anything but plain JSON values.

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


_PLACEHOLDER = "\x00fragment\x00"
_ENCODED_PLACEHOLDER = json.dumps(_PLACEHOLDER)


def encode(state: State) -> str:
    """The canonical JSON text of a state: sorted keys, no spaces.

    >>> encode({"b": 1, "a": None})
    '{"a":null,"b":1}'
    """
    texts: list[str] = []

    def placeholder_of(value: Any) -> str:
        if type(value) is not Fragment:
            raise TypeError(
                f"a state holds plain JSON values; found {type(value).__name__}: {value!r:.80}"
            )
        texts.append(value.text)
        return _PLACEHOLDER

    text = json.dumps(
        state,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=True,
        allow_nan=False,
        default=placeholder_of,
    )
    if not texts:
        return text
    parts = text.split(_ENCODED_PLACEHOLDER)
    if len(parts) != len(texts) + 1:
        raise ValueError(f"a state contains the reserved string {_PLACEHOLDER!r}")
    return "".join(part for pair in zip(parts, [*texts, ""]) for part in pair)


def decode(text: str) -> State:
    """The inverse of `encode`."""
    return json.loads(text)


def fingerprint(spec: State) -> str:
    """16 hexadecimal digits that depend on all of ``spec``: BLAKE2b of its canonical text.

    >>> fingerprint({"node": "shuffle"}) == fingerprint({"node": "shuffle"})
    True
    """
    return digest(encode(spec))


def digest(text: str) -> str:
    """The `fingerprint` of a state that is encoded already."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def seal(text: str) -> str:
    """Add a CRC-32 of its text to a JSON object, as the last entry, to detect damage.

    >>> seal('{"a":1}')
    '{"a":1,"crc":"561bacaf"}'
    """
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}'


_SEAL_LENGTH = len(',"crc":"00000000"}')


def unseal(text: str) -> State:
    """Decode an object that `seal` returned.

    Raises:
        ValueError: If its CRC does not match.
    """
    if seal(text[:-_SEAL_LENGTH] + "}") != text:
        raise ValueError("its CRC does not match")
    return decode(text[:-_SEAL_LENGTH] + "}")
