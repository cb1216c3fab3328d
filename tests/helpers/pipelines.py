"""Small pipelines and functions that several test files use."""

from __future__ import annotations

import midstream as ms
from midstream.dataset import Dataset


def numbers(n: int = 30, name: str | None = None) -> Dataset:
    return ms.from_dataset(range(n), name=name)


def stream(n: int = 30) -> Dataset:
    return numbers(n).filter(lambda _: True)


def stop_at_5(x: int) -> int:
    if x == 5:
        raise StopIteration("five")
    return x
