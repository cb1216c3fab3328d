"""PickledByValue: callables and data that are pickled by value."""

from __future__ import annotations

import pickle
from typing import Any

import dill


class PickledByValue:
    """Wraps a callable, or data, and pickles it by value where pickle's reference by name fails.

    So lambdas, closures and functions of a notebook reach worker processes under spawn.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return from_bytes, (to_bytes(self.value),)


def to_bytes(value: Any) -> bytes:
    """Pickle a value: by reference where that works in another process, else by value."""
    module = getattr(value, "__module__", None) or type(value).__module__
    if module != "__main__":
        try:
            return pickle.dumps(value)
        except Exception:
            pass
    return bytes(dill.dumps(value, recurse=True))


def from_bytes(data: bytes) -> PickledByValue:
    """Load a value that `to_bytes` pickled."""
    return PickledByValue(dill.loads(data))
