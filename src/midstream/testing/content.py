"""Names samples by their content, and compares values of any type."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["digest", "first_names", "name_samples", "plain"]

_LONGEST = 48
"""Characters of a name."""

_SMALL = 16
"""Elements of an array that is named by its values."""


def plain(value: Any) -> Any:
    """Returns a value as plain Python data that can be compared: dicts, lists and numbers.

    Arrays and tensors become a list of their type and their values.

    >>> plain({"x": np.arange(2, dtype=np.int32)})
    {'x': ['int32', [0, 1]]}
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return [str(value.dtype).removeprefix("torch."), value.tolist()]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    return value


def digest(value: Any) -> str:
    """Returns 16 hexadecimal digits of a value's content: types, shapes and bytes.

    >>> digest({"a": 1, "b": [2.0]}) == digest({"b": [2.0], "a": 1})
    True
    >>> digest(torch.zeros(2)) == digest(torch.zeros(2, dtype=torch.int64))
    False
    """
    state = hashlib.blake2b(digest_size=8)
    _feed(state.update, value)
    return state.hexdigest()


def _feed(put: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        put(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        put(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        put(f"array {value.dtype.str} {value.shape}:".encode())
        put(value.tobytes())
    elif isinstance(value, Mapping):
        put(f"dict {len(value)}:".encode())
        for key in sorted(value, key=repr):
            _feed(put, key)
            _feed(put, value[key])
    elif isinstance(value, (list, tuple)) or (
        isinstance(value, np.ndarray) and value.dtype == object
    ):
        # A tuple counts as a list: torch turns some tuples into lists.
        put(f"list {len(value)}:".encode())
        for item in value:
            _feed(put, item)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        put(f"{type(value).__name__} {value!r};".encode())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        put(type(value).__qualname__.encode())
        _feed(put, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    else:
        data = value.tobytes() if hasattr(value, "tobytes") else pickle.dumps(value)
        put(f"{type(value).__qualname__} {len(data)}:".encode())
        put(data)


def samples_of(batch: Any) -> list[Any]:
    """Returns the samples in a batch: rows of a tensor, items of a list, rows of a dict of columns.

    A batch of any other type is one sample.
    """
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        return list(batch) if batch.ndim else [batch]
    if isinstance(batch, Mapping):
        columns = {key: value for key, value in batch.items() if _rows(value) is not None}
        sizes = {_rows(value) for value in columns.values()}
        if len(sizes) == 1 and (size := sizes.pop()) is not None:
            return [{key: value[row] for key, value in columns.items()} for row in range(size)]
        return [batch]
    if isinstance(batch, (list, tuple)):
        sizes = {_rows(value) for value in batch}
        if (
            len(sizes) == 1
            and isinstance(batch[0], (torch.Tensor, np.ndarray))
            and (size := sizes.pop()) is not None
        ):
            # A list of columns, as torch's default_collate makes it of tuples.
            return [[column[row] for column in batch] for row in range(size)]
        return list(batch)
    return [batch]


def _rows(value: Any) -> int | None:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, (list, tuple)) else None


def name_samples(batch: Any, key: Callable[[Any], Any] | None = None) -> list[str]:
    """Returns a name for every sample of a batch; samples of the same content have the same name.

    Args:
        batch: A batch of any loader.
        key: Function that names a sample; by default the name is the content, shortened.

    >>> name_samples({"id": torch.tensor([3, 4]), "text": ["a", "b"]})
    ["{'id': 3, 'text': 'a'}", "{'id': 4, 'text': 'b'}"]
    >>> name_samples([7, 8], key=lambda sample: f"row {sample}")
    ['row 7', 'row 8']
    """
    return [
        _name(sample) if key is None else str(_readable(key(sample)))
        for sample in samples_of(batch)
    ]


def _name(sample: Any) -> str:
    text = repr(_readable(sample))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 10]}… #{digest(sample)[:8]}"


def _readable(value: Any) -> Any:
    """Returns plain data for a name: arrays without their types, large ones as a hash."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        size = value.numel() if isinstance(value, torch.Tensor) else value.size
        return value.tolist() if size <= _SMALL else f"{tuple(value.shape)}#{digest(value)[:8]}"
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _readable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(item) for item in value]
    return value


def first_names(items: Sequence[str], most: int = 6) -> str:
    """Returns the first few names as text.

    >>> first_names(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = ", ".join(items[:most])
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")
