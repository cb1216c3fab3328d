"""Callables that are pickled by value."""

from __future__ import annotations

import pickle
from typing import Any

import dill

# -- running ------------------------------------------------------------------------------------------------------


class PickledByValue:
    """A callable (or data) that pickles by value when a reference would not do: lambdas, closures,
    notebooks.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_bytes, (_to_bytes(self.value),)


def _to_bytes(value: Any) -> bytes:
    module = getattr(value, "__module__", None) or type(value).__module__
    if module != "__main__":
        try:
            return pickle.dumps(value)
        except Exception:
            pass
    return bytes(dill.dumps(value, recurse=True))


def _from_bytes(data: bytes) -> PickledByValue:
    return PickledByValue(dill.loads(data))
