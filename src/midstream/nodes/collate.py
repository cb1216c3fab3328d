"""Collate functions: `collate` (torch's default), `pad`, `flat` and `ragged`.

Each works on a list of samples and, with the same result, on the `Columns` of a table. From columns
no sample is made, and the table's values are copied once, into the batch. `column_form` gives the
form of a collate function that takes columns.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import default_collate

from midstream.common.validation import require_int
from midstream.pipeline.columns import Column, Columns, whole_block
from midstream.transport.packing import empty, split

__all__ = ["collate", "column_form", "flat", "pad", "ragged"]


def collate(samples: list[Any]) -> Any:
    """Collates samples by torch's rules; the default of `Dataset.batch` and of `DataLoader`.

    Gives the result of ``torch.utils.data.default_collate``: dicts and tuples are collated by
    element, numbers become a tensor [batch], arrays and tensors of shape [...] a tensor
    [batch, ...] of their dtype, strings a list. Python's ints become int64, its floats float64.
    Arrays are copied once.

    One column may differ in length: ``seq_lens`` of packed rows is padded with zeros to
    [batch, most documents in a row].

    Args:
        samples: The samples of one batch, all of one structure.

    Raises:
        ValueError: If samples differ in shape or in keys, or a value cannot be put into a tensor.

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
        _require_same_keys(samples, where)
        columns = {
            key: _collate_column(key, [sample[key] for sample in samples], where) for key in first
        }
        return columns if kind is dict else _in_mapping_of(first, columns)
    if any(sample is None for sample in samples):
        raise ValueError(
            f"{_name(where)} is None in {sum(sample is None for sample in samples)} of"
            f" {len(samples)} samples, and a batch of None has no meaning. Fill or filter missing"
            " values before .batch, or give .batch a collate_fn"
        )
    if isinstance(first, (tuple, list)):
        if any(
            not isinstance(sample, (tuple, list)) or len(sample) != len(first) for sample in samples
        ):
            raise _shape_error(samples, where)
        elements = [
            _collate(column, f"{where}[{number}]") for number, column in enumerate(zip(*samples))
        ]
        if hasattr(first, "_fields"):
            return kind(*elements)
        return elements  # torch makes a list of a tuple too
    if isinstance(first, torch.Tensor) and len({sample.shape for sample in samples}) > 1:
        raise _shape_error(samples, where)
    try:
        if (
            kind is torch.Tensor
            and first.layout == torch.strided
            and all(type(sample) is kind for sample in samples)
        ):
            return torch.stack(
                list(samples)
            )  # in a worker torch's would make a file in /dev/shm for each batch
        return default_collate(list(samples))
    except Exception as error:
        raise ValueError(
            f"{_name(where)} cannot be put into a batch: torch's default_collate says"
            f" {type(error).__name__}: {error}. Convert such values with .map, or give .batch a"
            " collate_fn"
        ) from error


def _collate_column(key: Any, column: list[Any], where: str) -> Any:
    """Collates one key of dicts. ``seq_lens`` of different lengths are padded with zeros."""
    inner = f"{where}[{key!r}]"
    if (
        key == "seq_lens"
        and len({np.shape(value) for value in column}) > 1
        and all(map(_is_sequence, column))
    ):
        kinds = {
            value.dtype if type(value) is np.ndarray and value.ndim == 1 else None
            for value in column
        }
        return _pad_column(
            Column(column, kinds.pop() if len(kinds) == 1 else None), 0, 1, _name(inner)
        )[0]
    return _collate(column, inner)


def _stack(samples: Sequence[Any], where: str) -> torch.Tensor:
    """Stacks arrays of one shape. Different dtypes are promoted by torch's rules."""
    if (whole := whole_block(samples)) is not None:
        return torch.from_numpy(whole)  # rows that pack made at once need no copy
    if (
        any(sample is None for sample in samples)
        or len({np.shape(sample) for sample in samples}) > 1
    ):
        raise _shape_error(samples, where)
    if len({sample.dtype for sample in samples}) > 1:
        return torch.stack([torch.from_numpy(np.array(sample)) for sample in samples])
    return torch.from_numpy(np.stack(samples))


def _in_mapping_of(first: Any, columns: dict[Any, Any]) -> Any:
    """The columns in a mapping of the type of ``first``, as torch does; a dict if that fails."""
    try:
        clone = copy.copy(first)
        clone.update(columns)
    except (TypeError, AttributeError):
        return columns
    return clone


def _require_same_keys(samples: Sequence[Any], where: str) -> None:
    keys = samples[0].keys()
    for number, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or not keys <= sample.keys():
            found = (
                sorted(map(str, sample)) if isinstance(sample, Mapping) else type(sample).__name__
            )
            raise ValueError(
                "samples of a batch have different"
                f" keys{' at ' + _name(where) if where else ''}: expected"
                f" {sorted(map(str, keys))}, found {found} in sample {number}; make them alike with"
                " .map before .batch"
            )


def _name(where: str) -> str:
    """A sample, or an element of it, in words: ``where`` is a path such as "['ids'][0]"."""
    return f"sample{where}"


def _shape_error(samples: Sequence[Any], where: str) -> ValueError:
    missing = sum(sample is None for sample in samples)
    if missing:
        return ValueError(
            f"{_name(where)} is None in {missing} of {len(samples)} samples, and a batch of None"
            " has no meaning. Fill or filter missing values before .batch, or give .batch a"
            " collate_fn"
        )
    shapes = [
        tuple(s.shape) if hasattr(s, "shape") else (len(s),)
        for s in samples
        if hasattr(s, "__len__")
    ]
    distinct = sorted(set(shapes))
    shown = ", ".join(map(str, distinct[:4])) + (", ..." if len(distinct) > 4 else "")
    return ValueError(
        f"samples of a batch differ in shape{' at ' + _name(where) if where else ''}, so they"
        f" cannot be stacked: {shown}. Pad them with .batch(n, collate_fn=midstream.pad), cut them"
        " to one length with .map, or give .batch your own collate_fn."
    )


# -------------------------------------------------------------------------------------------------
# Samples of different lengths
# -------------------------------------------------------------------------------------------------


def pad(
    samples: list[Any] | None = None, *, value: float | Mapping[str, float] = 0, multiple: int = 1
) -> Any:
    """Collates sequences by padding them to the longest in the batch.

    Args:
        samples: The samples of one batch: dicts, or sequences of numbers. A sequence is an array or
            tensor of shape [length, ...], or a list of numbers; it is padded along its first
            dimension. Without ``samples``, returns a collate function with the other arguments:
            ``collate_fn=midstream.pad(multiple=8)``.
        value: The padding: one number for all columns, or a dict by column (others get 0).
        multiple: Rounds the padded length up to a multiple of this.

    Returns:
        For dicts, a dict: for every column of sequences the padded tensor [batch, length, ...], of
        the column's dtype, and ``<column>_lengths`` (int64, [batch]); all other columns as
        `collate` makes them. For bare sequences the pair ``(tensor, lengths)``.

    Raises:
        TypeError: If a bare sample is not a sequence of numbers.
        ValueError: If sequences differ beyond their first dimension, ``value`` names an unknown
            column, or a column's dtype cannot hold its value.

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
        return _pad_column(Column(samples), fill, multiple, "a sample")
    return _pad_columns(_columns(samples), value=value, multiple=multiple)


def _pad_columns(
    columns: Columns, *, value: float | Mapping[str, float] = 0, multiple: int = 1
) -> dict[str, Any]:
    require_int(multiple, "multiple", 1, "pad")
    unknown = (
        sorted(set(map(str, value)) - set(map(str, columns.names)))
        if isinstance(value, Mapping)
        else []
    )
    if unknown:
        raise ValueError(
            f"pad: there is no column {unknown[0]!r} to fill; expected some of"
            f" {sorted(map(str, columns.names))}"
        )

    def padded(key: str, column: Column, where: str) -> Iterable[tuple[str, Any]]:
        fill = value.get(key, 0) if isinstance(value, Mapping) else value
        tensor, lengths = _pad_column(column, fill, multiple, where)
        return (key, tensor), (f"{key}_lengths", lengths)

    return _collate_sequences(columns, padded)


def flat(samples: list[Any] | None = None, *, cu_seqlens: bool = False) -> Any:
    """Joins sequences end to end, without padding, as variable-length attention takes them.

    Args:
        samples: The samples of one batch, as for `pad`. Without ``samples``, returns a collate
            function with the other argument: ``collate_fn=midstream.flat(cu_seqlens=True)``.
        cu_seqlens: Also return cumulative lengths, as flash attention takes them.

    Returns:
        For dicts, a dict: for every column of sequences one tensor [total, ...], of the column's
        dtype, and ``<column>_lengths`` (int64, [batch]); with ``cu_seqlens`` also
        ``<column>_cu_seqlens`` (int32, [batch + 1]: 0, then where each sequence ends); all other
        columns as `collate` makes them. For bare sequences the tuple ``(tensor, lengths)`` or
        ``(tensor, lengths, cu_seqlens)``.

    Raises:
        TypeError: If a bare sample is not a sequence of numbers.
        ValueError: If sequences differ beyond their first dimension.

    >>> batch = flat([{"ids": [1, 2, 3]}, {"ids": [4]}], cu_seqlens=True)
    >>> batch["ids"], batch["ids_lengths"], batch["ids_cu_seqlens"]
    (tensor([1, 2, 3, 4]), tensor([3, 1]), tensor([0, 3, 4], dtype=torch.int32))
    """
    if samples is None:
        return functools.partial(flat, cu_seqlens=cu_seqlens)
    if isinstance(samples[0], Mapping):
        return _flat_columns(_columns(samples), cu_seqlens=cu_seqlens)
    tensor, lengths = _flat_column(Column(samples), "flat", "a sample")
    return (tensor, lengths, _cumulative(lengths)) if cu_seqlens else (tensor, lengths)


def _flat_columns(columns: Columns, *, cu_seqlens: bool = False) -> dict[str, Any]:
    def joined(key: str, column: Column, where: str) -> Iterable[tuple[str, Any]]:
        tensor, lengths = _flat_column(column, "flat", where)
        yield key, tensor
        yield f"{key}_lengths", lengths
        if cu_seqlens:
            yield f"{key}_cu_seqlens", _cumulative(lengths)

    return _collate_sequences(columns, joined)


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    """0, then where each sequence ends: int32, shape [batch + 1]."""
    out = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=out[1:])
    return out


def ragged(samples: list[Any]) -> Any:
    """Collates sequences into a list with one tensor for each sequence.

    The tensors of a batch share one piece of memory, so they are quick to make. A tensor that is
    kept keeps the memory of the whole batch; keep ``tensor.clone()`` instead.

    Args:
        samples: The samples of one batch, as for `pad`.

    Returns:
        For dicts, a dict: every column of sequences as a list of tensors [length, ...], all of the
        column's dtype; all other columns as `collate` makes them. For bare sequences such a list.

    Raises:
        TypeError: If a bare sample is not a sequence of numbers.
        ValueError: If sequences differ beyond their first dimension.

    >>> ragged([{"ids": [1, 2, 3], "n": 0}, {"ids": [4], "n": 1}])
    {'ids': [tensor([1, 2, 3]), tensor([4])], 'n': tensor([0, 1])}
    """
    if isinstance(samples[0], Mapping):
        return _ragged_columns(_columns(samples))
    return _ragged_column(Column(samples), "a sample")


def _ragged_columns(columns: Columns) -> dict[str, Any]:
    return _collate_sequences(
        columns, lambda key, column, where: [(key, _ragged_column(column, where))]
    )


def _ragged_column(column: Column, where: str) -> list[torch.Tensor]:
    tensor, lengths = _flat_column(column, "ragged", where)
    return split(tensor, lengths.tolist())


def _columns(samples: Sequence[Mapping[str, Any]]) -> Columns:
    """Turns dicts with the same keys into columns."""
    _require_same_keys(samples, "")
    names = list(samples[0])
    return Columns(
        names, [Column([sample[key] for sample in samples]) for key in names], len(samples)
    )


def _collate_sequences(
    columns: Columns, sequences: Callable[[str, Column, str], Iterable[tuple[str, Any]]]
) -> dict[str, Any]:
    """Makes a batch of columns.

    Args:
        columns: The samples.
        sequences: Makes the entries of the batch for one column of sequences, given its key, the
            column, and its name for errors. Other columns are collated by torch's rules.
    """
    batch: dict[str, Any] = {}
    for key, column in zip(columns.names, columns.columns):
        if column.dtype is not None or (
            column.array is None and all(map(_is_sequence, column.values))
        ):
            batch.update(sequences(key, column, f"sample[{key!r}]"))
        elif column.array is not None:
            batch[key] = _numbers(column)
        else:
            batch[key] = _collate(column.values, f"[{key!r}]")
    return batch


def _is_sequence(value: Any) -> bool:
    """Whether a value is an array, tensor or list of numbers with at least one dimension."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and value.dtype.kind in "biufc"
    if isinstance(value, torch.Tensor):
        return value.ndim > 0
    return isinstance(value, (list, tuple)) and all(
        isinstance(item, (int, float, np.number)) for item in value
    )


def _pad_column(
    column: Column, value: float, multiple: int, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if column.dtype is None and all(isinstance(item, torch.Tensor) for item in column.values):
        return _pad_tensors(column.values, value, multiple, where)
    arrays, tail, dtype = _arrays(column, "pad", where)
    if type(value) is not int or not _any_holds(value, dtype):
        stored = (
            np.array(value).astype(dtype).item()
            if np.isfinite(value) or dtype.kind == "f"
            else None
        )
        _check_fill(value, stored, dtype, where)
    sizes = list(map(len, arrays))
    longest = -(-max(sizes) // multiple) * multiple
    shape = (len(arrays), longest, *tail)
    out = empty(shape, dtype)
    out[...] = value
    # Written through one flat view: a view for each row takes longer.
    joined, start = out.reshape(len(arrays) * longest, *tail), 0
    for size, array in zip(sizes, arrays):
        if size:
            joined[start : start + size] = array
        start += longest
    return torch.from_numpy(out), _int64(sizes)


def _any_holds(value: int, dtype: np.dtype[Any]) -> bool:
    """Whether any dtype of this kind holds the value, so that there is nothing to check."""
    return dtype.kind in "iuf" and 0 <= value < 128


def _flat_column(column: Column, verb: str, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    if column.dtype is None and all(isinstance(item, torch.Tensor) for item in column.values):
        tensors = column.values
        filled = [item for item in tensors if item.numel()] or tensors[:1]
        if len({(item.shape[1:], item.dtype) for item in filled}) > 1:
            raise _tail_error(
                verb, where, sorted({f"{tuple(item.shape)} {item.dtype}" for item in filled})
            )
        return torch.cat(filled), _int64(list(map(len, tensors)))
    arrays, tail, dtype = _arrays(column, verb, where)
    sizes = list(map(len, arrays))
    out = empty((sum(sizes), *tail), dtype)
    if out.size:
        # Without empty values: an empty list is float64, an empty array may differ in shape.
        np.concatenate(
            [array for array in arrays if array.size] if column.dtype is None else arrays, out=out
        )
    return torch.from_numpy(out), _int64(sizes)


def _int64(values: list[int]) -> torch.Tensor:
    """Equals ``torch.tensor(values)``, which takes three times as long."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _arrays(
    column: Column, verb: str, where: str
) -> tuple[list[npt.NDArray[Any]], tuple[int, ...], np.dtype[Any]]:
    """The sequences as arrays, their shape beyond the first dimension, their common dtype."""
    if column.dtype is not None:
        return column.values, (), column.dtype
    if not all(_is_sequence(item) for item in column.values):
        kinds = sorted({type(item).__name__ for item in column.values})
        what = {"pad": "Pad", "flat": "Join"}.get(verb, "Give")
        raise TypeError(
            f"{verb}: {where} is not a sequence of numbers in every sample; found"
            f" {', '.join(kinds)}. {what} dicts of sequences or bare sequences; bring other samples"
            " into that form with .map"
        )
    arrays = [np.asarray(item) for item in column.values]
    filled = [array for array in arrays if array.size] or arrays
    tails = {array.shape[1:] for array in filled}
    if len(tails) > 1:
        raise _tail_error(
            verb, where, [f"shape {shape}" for shape in sorted({array.shape for array in filled})]
        )
    return arrays, tails.pop(), np.result_type(*{array.dtype for array in filled})


def _tail_error(verb: str, where: str, found: list[str]) -> ValueError:
    return ValueError(
        f"{verb}: {where} differs beyond its first dimension, which is the one that "
        f"{'is padded' if verb == 'pad' else 'may differ'}; found {', '.join(found[:4])}"
    )


def _pad_tensors(
    column: Sequence[Any], value: float, multiple: int, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_pad_column` for tensors, whose dtype numpy may not have."""
    filled = [item for item in column if item.numel()] or list(column)
    if len({(item.shape[1:], item.dtype) for item in filled}) > 1:
        raise _tail_error(
            "pad", where, sorted({f"{tuple(item.shape)} {item.dtype}" for item in filled})
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
    """Raises if a dtype cannot hold the padding; ``stored`` is the padding in that dtype."""
    if stored is None or (stored != value and value == value and not isinstance(stored, float)):
        raise ValueError(
            f"pad: {where} holds {dtype}, which cannot hold the value {value}; give value={{column:"
            " ...}"
        )


# -------------------------------------------------------------------------------------------------
# Batches made from columns
# -------------------------------------------------------------------------------------------------


def _collate_columns(columns: Columns) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for key, column in zip(columns.names, columns.columns):
        if column.array is not None:
            batch[key] = _numbers(column)
        elif column.dtype is not None and len(set(map(len, column.values))) == 1:
            batch[key] = torch.from_numpy(np.stack(column.values))
        else:
            batch[key] = _collate_column(key, column.values, "")
    return batch


def _numbers(column: Column) -> torch.Tensor:
    """A column of numbers as torch makes tensors of Python's numbers: int64, float64 or bool."""
    array = column.array
    assert array is not None
    if array.dtype == np.uint64 and array.max() >> np.uint64(63):
        return _collate(column.values, "")  # type: ignore[no-any-return]  # raises torch's error
    return torch.from_numpy(
        array.astype({"b": np.bool_, "f": np.float64}.get(array.dtype.kind, np.int64))
    )


_COLUMN_FORMS: dict[Any, Callable[..., Any]] = {
    collate: _collate_columns,
    pad: _pad_columns,
    flat: _flat_columns,
    ragged: _ragged_columns,
}


def column_form(fn: Callable[..., Any]) -> Callable[[Columns], Any] | None:
    """The form of a collate function that takes `Columns`, or None if ``fn`` has none.

    Args:
        fn: `collate`, `pad`, `flat` or `ragged`, also with arguments. User functions have no such
            form.
    """
    keywords: dict[str, Any] = {}
    key: Any = fn
    if isinstance(key, functools.partial) and not key.args and "samples" not in key.keywords:
        key, keywords = key.func, key.keywords
    try:
        form = _COLUMN_FORMS.get(key)
    except TypeError:  # a callable that cannot be hashed
        return None
    return functools.partial(form, **keywords) if form is not None and keywords else form
