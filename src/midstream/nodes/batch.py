"""Batch: groups of samples, torch's default collate, and `pad` for samples of different lengths."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from midstream._check import require_callable, require_int
from midstream._state import MISSING, State
from midstream.core import I64, U64, Dataset, Item, Iterator, Lane, Place, Rows, join_origins, pick, require_dataset
from midstream.errors import ReplayDiverged
from midstream.failures import Failure, Hole, callable_name, describe_callable


@dataclass(frozen=True, eq=False, repr=False)
class Batch(Dataset):
    """Samples in groups of ``batch_size``, collated.

    A sample that user code failed on leaves its batch shorter by one over random access; over a stream the batch goes on
    with the next sample. When the collate function fails, its whole batch is lost.

    State: random access: none but the position. Stream: ``[inputs seen, inputs since, upstream state]``, the upstream
        state between two batches.
    Resume: over a stream, and only when the state was saved between an error and the rest of its batch, that batch's
        inputs so far are read again: at most ``batch_size - 1`` samples and the failures between them.
    """

    source: Dataset
    batch_size: int
    drop_last: bool = False
    collate_fn: Callable[[list[Any]], Any] | None = None
    kind = "batch"

    def __post_init__(self) -> None:
        require_dataset(self.source, "batch")
        require_int(self.batch_size, "batch_size", 1, "batch")
        if self.collate_fn is not None:
            require_callable(self.collate_fn, "batch: collate_fn")

    @property
    def batch_rows(self) -> int | None:
        """The batch size."""
        return int(self.batch_size)

    def _length(self) -> int | None:
        length = self.source.length()
        if length is None:
            return None
        return length // self.batch_size if self.drop_last else -(-length // self.batch_size)

    def spec_fields(self) -> dict[str, State]:
        """Size, and what is not the default."""
        fields: dict[str, State] = {"batch_size": int(self.batch_size)}
        if self.drop_last:
            fields["drop_last"] = True
        if self.collate_fn is not None and self.collate_fn is not collate:
            fields["collate_fn"] = callable_name(self.collate_fn)
        return fields

    def full_lanes(self, num_lanes: int, block: int) -> tuple[int, str]:
        """As the input, seen in blocks of whole batches."""
        if self.random_access:
            return super().full_lanes(num_lanes, block)
        return self.source.full_lanes(num_lanes, block * self.batch_size)

    def _rows(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows:
        size, length = int(self.batch_size), self.source.length()
        starts = positions * size
        counts = np.full(len(positions), size, dtype=np.int64)
        if length is not None:
            counts = np.minimum(counts, length - starts)
        ends = np.cumsum(counts)
        which = np.repeat(np.arange(len(positions), dtype=np.int64), counts)
        inside = np.arange(int(ends[-1]), dtype=np.int64) + np.repeat(starts - ends + counts, counts)
        rows = at.input.rows(inside, pick(keys, which), pick(passes, which))
        if rows.sizes is None and not any(type(sample) is Hole for sample in rows.samples):
            bounds = [0, *ends.tolist()]
            out = []
            for first, last in zip(bounds, bounds[1:]):
                batch = self._collate(at, rows.samples[first:last])
                if type(batch) is Hole:
                    return self._slow(at, rows, bounds)
                out.append(batch)
            return Rows(out, rows.origins, counts)
        return self._slow(at, rows, [0, *ends.tolist()])

    def _slow(self, at: Place, rows: Rows, bounds: list[int]) -> Rows:
        """With failures, or samples made of several rows."""
        items = rows.items()
        samples, origins = [], []
        for first, last in zip(bounds, bounds[1:]):
            errors: list[Failure] = []
            good: list[Item] = []
            for sample, origin in items[first:last]:
                if type(sample) is Hole:
                    errors.extend(sample.errors)
                    if sample.rest is MISSING:
                        continue
                    sample = sample.rest
                good.append((sample, origin))
            batch = self._collate(at, [sample for sample, _ in good]) if good else MISSING
            if type(batch) is Hole:
                errors.extend(batch.errors)
                batch, good = MISSING, []
            samples.append(Hole(tuple(errors), batch) if errors else batch)
            origins.append(join_origins(good))
        sizes = np.array([len(origin) for origin in origins], dtype=np.int64)
        return Rows(samples, np.concatenate(origins), sizes)

    def _collate(self, at: Place, samples: list[Any]) -> Any:
        """The batch, or a `Hole` when it cannot be made."""
        fn = self.collate_fn or collate
        try:
            batch = fn(samples)
            if batch is None:
                raise TypeError("the collate function returned None; it returns the batch")
        except Exception as raised:
            error: Exception = raised
            if isinstance(raised, StopIteration):
                error = RuntimeError(f"the collate function raised StopIteration({raised})")
            return Hole((Failure(at.path, None, describe_callable(fn), error),))
        return batch

    def _iterate(self, at: Place, lane: Lane, key: int, pass_: int) -> Iterator:
        return _BatchIterator(self, at, lane, key, pass_)


class _BatchIterator(Iterator):
    def __init__(self, node: Batch, at: Place, lane: Lane, key: int, pass_: int) -> None:
        self.node, self.at, self.lane, self.pass_ = node, at, lane, pass_
        self.source = at.input.iterate(lane.widen(int(node.batch_size)), key, pass_)
        self.held: list[Item] = []
        self.number, self.since = 0, 0
        self.start: State = None  # the upstream state between two batches, once it was asked for

    def _next(self) -> Item:
        size = self.node.batch_size
        while len(self.held) < size:
            if self.since == 0 and self.start is None:
                self.start = self.source.snapshot()
            try:
                item = next(self.source)
            except StopIteration:
                return self._last()
            self.number += 1
            self.since += 1
            if type(item[0]) is Hole:
                if not self.held:
                    self.since, self.start = 0, None
                return item
            self.held.append(item)
        return self._emit()

    def _emit(self) -> Item:
        held, self.held = self.held, []
        self.since, self.start = 0, None
        origins = join_origins(held)
        if self.at.trail is not None:
            self.at.trail.rows(origins)
        return self.node._collate(self.at, [sample for sample, _ in held]), origins

    def _last(self) -> Item:
        """What is left at the end of the lane."""
        if not self.held:
            raise StopIteration
        if not self.node.drop_last:
            return self._emit()
        for source in join_origins(self.held)[:, 0].tolist():
            self.number += 1  # one mark each
            self.lane.ledger.dropped("dropped", self.at.path, source, self.pass_, self.number)
        self.held, self.since, self.start = [], 0, None
        raise StopIteration

    def _state(self) -> State:
        if not self.held:
            if self.start is None:
                self.start = self.source.snapshot()
            return [self.number, 0, self.start]
        return [self.number, self.since, self.start]

    def _load(self, state: State) -> None:
        number, since, self.start = state
        self.source.load(self.start)
        self.held, self.number, self.since = [], number, since
        for _ in range(since):
            try:
                item = next(self.source)
            except StopIteration:
                raise ReplayDiverged(
                    f"{self.at.path}: the input ended before the {since} inputs of the batch in progress were read again; "
                    f"has the data changed since the checkpoint was saved?"
                ) from None
            if type(item[0]) is not Hole:
                self.held.append(item)


# ---------------------------------------------------------------------------------------------------------------------
# Making a batch of a list of samples
# ---------------------------------------------------------------------------------------------------------------------


def collate(samples: list[Any]) -> Any:
    """A batch by torch's rules: dicts and tuples by element, numbers and arrays stacked, strings in a list.

    The result is that of ``torch.utils.data.default_collate``; arrays are copied once (samples are read-only views), and
    what cannot be stacked gets an error that says what to do. One column need not be of one length: ``seq_lens``, as `pack`
    makes it, is filled up with zeros to [batch, most].

    Raises:
        ValueError: If samples differ in shape.

    >>> collate([{"x": 1, "name": "a"}, {"x": 2, "name": "b"}])
    {'x': tensor([1, 2]), 'name': ['a', 'b']}
    """
    return _collate(samples, "")


def _collate(samples: Sequence[Any], where: str) -> Any:
    first = samples[0]
    kind = type(first)
    if kind is np.ndarray and first.dtype.kind in "biufc":
        return _stack(samples, where)
    if kind is str or kind is bytes:
        return samples
    if isinstance(first, Mapping):
        _same_keys(samples, where)
        columns = {key: _collate_column(key, [sample[key] for sample in samples], where) for key in first}
        return columns if kind is dict else _like(first, columns)
    if any(sample is None for sample in samples):
        raise ValueError(
            f"{_place(where)} is None in {sum(sample is None for sample in samples)} of {len(samples)} samples, and a batch "
            f"of None has no meaning. Fill or filter missing values before .batch, or give .batch a collate_fn"
        )
    if isinstance(first, (tuple, list)):
        if any(not isinstance(sample, (tuple, list)) or len(sample) != len(first) for sample in samples):
            raise _ragged(samples, where)
        elements = [_collate(column, f"{where}[{number}]") for number, column in enumerate(zip(*samples))]
        if hasattr(first, "_fields"):
            return kind(*elements)
        return elements  # torch makes a list of a tuple too
    if isinstance(first, torch.Tensor) and len({sample.shape for sample in samples}) > 1:
        raise _ragged(samples, where)
    try:
        return default_collate(list(samples))
    except Exception as error:
        raise ValueError(
            f"{_place(where)} cannot be put into a batch: torch's default_collate says {type(error).__name__}: {error}. "
            f"Convert such values with .map, or give .batch a collate_fn"
        ) from error


def _collate_column(key: Any, column: list[Any], where: str) -> Any:
    """One key of dicts. The ``seq_lens`` of packed rows, which have no one length, are filled up with zeros."""
    inner = f"{where}[{key!r}]"
    if key == "seq_lens" and len({np.shape(value) for value in column}) > 1 and all(map(_is_sequence, column)):
        return _pad_column(column, 0, 1, _place(inner))[0]
    return _collate(column, inner)


def _stack(samples: Sequence[Any], where: str) -> torch.Tensor:
    """Arrays of one shape, copied once. Mixed dtypes are promoted by torch's rules."""
    if any(sample is None for sample in samples) or len({np.shape(sample) for sample in samples}) > 1:
        raise _ragged(samples, where)
    if len({sample.dtype for sample in samples}) > 1:
        return torch.stack([torch.from_numpy(np.array(sample)) for sample in samples])
    return torch.from_numpy(np.stack(samples))


def _like(first: Any, columns: dict[Any, Any]) -> Any:
    """The columns in a mapping of the samples' own type, where that can be made, as torch does."""
    try:
        clone = copy.copy(first)
        clone.update(columns)
    except (TypeError, AttributeError):
        return columns
    return clone


def _same_keys(samples: Sequence[Any], where: str) -> None:
    keys = samples[0].keys()
    for number, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or not keys <= sample.keys():
            found = sorted(map(str, sample)) if isinstance(sample, Mapping) else type(sample).__name__
            raise ValueError(
                f"samples of a batch have different keys{' at ' + _place(where) if where else ''}: expected "
                f"{sorted(map(str, keys))}, found {found} in sample {number}; make them alike with .map before .batch"
            )


def _place(where: str) -> str:
    return f"sample{where}"


def _ragged(samples: Sequence[Any], where: str) -> ValueError:
    missing = sum(sample is None for sample in samples)
    if missing:
        return ValueError(
            f"{_place(where)} is None in {missing} of {len(samples)} samples, and a batch of None has no meaning. Fill or "
            f"filter missing values before .batch, or give .batch a collate_fn"
        )
    shapes = [tuple(s.shape) if hasattr(s, "shape") else (len(s),) for s in samples if hasattr(s, "__len__")]
    distinct = sorted(set(shapes))
    shown = ", ".join(map(str, distinct[:4])) + (", ..." if len(distinct) > 4 else "")
    return ValueError(
        f"samples of a batch differ in shape{' at ' + _place(where) if where else ''}, so they cannot be stacked: {shown}. "
        f"Pad them with .batch(n, collate_fn=midstream.pad), cut them to one length with .map, or give .batch your own "
        f"collate_fn."
    )


def pad(samples: list[Any] | None = None, *, value: float | Mapping[str, float] = 0, multiple: int = 1) -> Any:
    """A collate function that pads sequences to the longest in the batch, or on to a multiple.

    Args:
        samples: The batch: dicts whose one- or more-dimensional numeric columns (arrays, tensors, lists of numbers) are
            padded along their first dimension, or such sequences themselves. Left out, a collate function with the
            other arguments is returned: ``collate_fn=midstream.pad(multiple=8)``.
        value: What to fill with, for all columns or by name (others get 0).
        multiple: The padded length is the smallest multiple of this that holds the longest.

    Returns:
        For dicts, a dict: every padded column as a tensor [batch, length, ...] of its own dtype, its lengths as
        ``<column>_lengths`` (int64, [batch]), and all other columns as `collate` makes them. For bare sequences the pair
        (tensor, lengths).

    >>> batch = pad([{"ids": [1, 2, 3]}, {"ids": [4]}], multiple=4)
    >>> batch["ids"]
    tensor([[1, 2, 3, 0],
            [4, 0, 0, 0]])
    >>> batch["ids_lengths"]
    tensor([3, 1])
    """
    require_int(multiple, "multiple", 1, "pad")
    if samples is None:
        return functools.partial(pad, value=value, multiple=multiple)
    if not isinstance(samples[0], Mapping):
        fill = value if not isinstance(value, Mapping) else 0
        return _pad_column(samples, fill, multiple, "a sample")
    batch: dict[str, Any] = {}
    _same_keys(samples, "")
    unknown = sorted(set(map(str, value)) - set(map(str, samples[0]))) if isinstance(value, Mapping) else []
    if unknown:
        raise ValueError(
            f"pad: there is no column {unknown[0]!r} to fill; expected some of {sorted(map(str, samples[0]))}"
        )
    for key in samples[0]:
        column = [sample[key] for sample in samples]
        if all(_is_sequence(item) for item in column):
            fill = value.get(key, 0) if isinstance(value, Mapping) else value
            batch[key], batch[f"{key}_lengths"] = _pad_column(column, fill, multiple, _place(f"[{key!r}]"))
        else:
            batch[key] = _collate(column, f"[{key!r}]")
    return batch


def _is_sequence(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and value.dtype.kind in "biufc"
    if isinstance(value, torch.Tensor):
        return value.ndim > 0
    return isinstance(value, (list, tuple)) and all(isinstance(item, (int, float, np.number)) for item in value)


def _pad_column(column: Sequence[Any], value: float, multiple: int, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    if not all(_is_sequence(item) for item in column):
        kinds = sorted({type(item).__name__ for item in column})
        raise TypeError(
            f"pad: {where} is not a sequence of numbers in every sample; found {', '.join(kinds)}. Pad dicts of sequences or "
            f"bare sequences; bring other samples into that form with .map"
        )
    if all(isinstance(item, torch.Tensor) for item in column):
        return _pad_tensors(column, value, multiple, where)
    arrays = [np.asarray(item) for item in column]
    filled = [array for array in arrays if array.size] or arrays
    tails = {array.shape[1:] for array in filled}
    if len(tails) > 1:
        raise ValueError(
            f"pad: {where} differs beyond its first dimension, which is the one that is padded; found shapes "
            f"{', '.join(map(str, sorted({array.shape for array in filled})[:4]))}"
        )
    dtype = np.result_type(*{array.dtype for array in filled})
    _check_fill(
        value, np.array(value).astype(dtype).item() if np.isfinite(value) or dtype.kind == "f" else None, dtype, where
    )
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    longest = -(-int(lengths.max()) // multiple) * multiple
    out = np.full((len(arrays), longest, *tails.pop()), value, dtype=dtype)
    for index, array in enumerate(arrays):
        if len(array):
            out[index, : len(array)] = array
    return torch.from_numpy(out), torch.from_numpy(lengths)


def _pad_tensors(column: Sequence[Any], value: float, multiple: int, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`_pad_column` for tensors, whose dtypes numpy need not have."""
    filled = [item for item in column if item.numel()] or list(column)
    if len({(item.shape[1:], item.dtype) for item in filled}) > 1:
        raise ValueError(
            f"pad: {where} differs beyond its first dimension, which is the one that is padded; found "
            f"{', '.join(sorted({f'{tuple(item.shape)} {item.dtype}' for item in filled})[:4])}"
        )
    lengths = torch.tensor([len(item) for item in column], dtype=torch.int64)
    longest = -(-int(lengths.max()) // multiple) * multiple
    if not filled[0].is_floating_point():
        _check_fill(value, int(value) if np.isfinite(value) else None, filled[0].dtype, where)
    out = torch.full((len(column), longest, *filled[0].shape[1:]), value, dtype=filled[0].dtype)
    for index, item in enumerate(column):
        if len(item):
            out[index, : len(item)] = item
    return out, lengths


def _check_fill(value: float, stored: Any, dtype: Any, where: str) -> None:
    """Refuse a fill value that the column cannot hold."""
    if stored is None or (stored != value and value == value and not isinstance(stored, float)):
        raise ValueError(f"pad: {where} holds {dtype}, which cannot hold the value {value}; give value={{column: ...}}")
