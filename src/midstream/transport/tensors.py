"""A pickler that writes the bytes of tensors and arrays beside the pickle, not into it."""

from __future__ import annotations

import copyreg
import io
import pickle
from multiprocessing import reduction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import register_pytree_node

NUMPY_DTYPES = {
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float32,
    torch.float64,
}
"""Dtypes for which ``tensor.numpy()`` works."""

_MARK = pickle.PickleBuffer(bytearray(1))
"""Stands in the pickle for the bytes of a tensor or array; mark n is for part n."""


class SplitTensors(list[torch.Tensor]):
    """Tensors that were cut from one, so that they lie side by side; `Pickler` sends them as one.

    Exists in worker processes only. In the main process a plain list arrives.
    """

    __slots__ = ()


# torch's tree functions know containers by their exact type.
register_pytree_node(
    SplitTensors, lambda tensors: (list(tensors), None), lambda tensors, _: list(tensors)
)


class Pickler(pickle.Pickler):
    """Pickles a value without the bytes of its tensors and arrays.

    Args:
        file: Where the pickle is written.
        parts: The bytes are appended to this list, one array for each tensor or array.
    """

    def __init__(self, file: io.BytesIO, parts: list[npt.NDArray[np.uint8]]) -> None:
        super().__init__(file, protocol=5, buffer_callback=_out_of_band)
        self.dispatch_table = table = copyreg.dispatch_table.copy()
        table.update(_foreign_reducers())
        table[SplitTensors] = _reduce_split
        table[torch.Tensor] = lambda tensor: _reduce_tensor(tensor, parts)
        table[np.ndarray] = lambda array: _reduce_array(array, parts)


_torch_sends = {
    kind
    for kind in reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    if kind.__module__.split(".")[0] == "torch"
}
"""Types for which torch registers reducers with multiprocessing that send memory by files.

They are not used here. Reducers of others (for pipes, for example) are.
"""

_cached: tuple[dict[Any, Any], dict[Any, Any]] = {}, {}


def _foreign_reducers() -> dict[Any, Any]:
    """Reducers that others than torch registered with multiprocessing, cached until they change."""
    global _cached
    extra = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    if _cached[0] != extra:
        _cached = dict(extra), {kind: extra[kind] for kind in extra.keys() - _torch_sends}
    return _cached[1]


def _out_of_band(buffer: pickle.PickleBuffer) -> bool:
    return buffer is not _MARK  # other buffers, as of array subclasses, stay in the pickle


def _bytes_of(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def _reduce_array(array: npt.NDArray[Any], parts: list[npt.NDArray[np.uint8]]) -> Any:
    dtype = array.dtype
    if dtype.hasobject or dtype.names is not None or not array.size or not dtype.itemsize:
        return array.__reduce_ex__(4)
    if array.flags.c_contiguous:
        order = "C"
    elif array.flags.f_contiguous:
        order, array = "F", array.T
    else:
        order, array = "C", np.ascontiguousarray(array)
    shape = array.shape if order == "C" else array.shape[::-1]
    parts.append(_bytes_of(array))
    return _array, (_MARK, dtype.str if dtype.kind not in "MmV" else dtype, shape, order)


def _array(part: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> npt.NDArray[Any]:
    return np.frombuffer(part, dtype).reshape(shape, order=order)


def _reduce_tensor(tensor: torch.Tensor, parts: list[npt.NDArray[np.uint8]]) -> Any:
    if (
        tensor.layout is not torch.strided
        or tensor.device.type != "cpu"
        or tensor.requires_grad
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
        or not tensor.numel()
        or tensor.__dict__
    ):
        return tensor.__reduce_ex__(4)  # type: ignore[no-untyped-call]
    shape: Any = tuple(tensor.shape)
    if tensor.is_contiguous():
        parts.append(
            _bytes_of(tensor.numpy()) if tensor.dtype in NUMPY_DTYPES else _storage(tensor)
        )
        return _tensor, (_MARK, tensor.dtype, shape)
    repeated = [size > 1 and step == 0 for size, step in zip(shape, tensor.stride())]
    if any(repeated):  # an expanded tensor: its bytes are sent once
        tensor = tensor[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
    if not _is_dense(tensor):  # channels_last is dense
        tensor = tensor.contiguous()
    small = tuple(tensor.shape)
    parts.append(_storage(tensor))
    return _strided, (
        _MARK,
        tensor.dtype,
        small,
        tensor.stride(),
        None if shape == small else shape,
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each element once."""
    expected = 1
    for step, size in sorted(
        (step, size) for step, size in zip(tensor.stride(), tensor.shape) if size > 1
    ):
        if step != expected:
            return False
        expected *= size
    return True


def _storage(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a dense tensor, in memory order."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy()


def _tensor(part: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.frombuffer(part, dtype=dtype)
    return flat if len(shape) == 1 else flat.view(shape)


def _strided(
    part: Any,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    wide: tuple[int, ...] | None,
) -> torch.Tensor:
    tensor = torch.frombuffer(part, dtype=dtype).as_strided(shape, stride)
    return tensor if wide is None else tensor.expand(wide)


def cut(whole: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """Cuts a tensor along its first dimension into tensors that share its memory."""
    # "Unsafe" concerns only pieces that overlap. With it, each piece is a tensor of its own to
    # autograd, not one of several views.
    return list(whole.unsafe_split_with_sizes(lengths))


def _reduce_split(tensors: SplitTensors) -> Any:
    return _whole_and_lengths(tensors) or (list, (), None, iter(tensors))


def _whole_and_lengths(tensors: SplitTensors) -> Any:
    """How to pickle the list as one tensor that is cut; None if somebody changed it.

    Tensors that lie side by side where the pieces lay have their values, whoever made them.
    """
    first = tensors[0] if tensors else None
    if type(first) is not torch.Tensor or first.layout is not torch.strided:
        return None
    dtype, size, start = first.dtype, first.element_size(), first.storage_offset()
    if dtype not in NUMPY_DTYPES:
        return None
    storage = first.untyped_storage()
    begin = address = storage.data_ptr() + start * size
    lengths: list[int] = []
    for tensor in tensors:
        if (
            type(tensor) is not torch.Tensor
            or tensor.dtype is not dtype
            or tensor.layout is not torch.strided
            or tensor.requires_grad
            or tensor.__dict__
        ):
            return None
        shape = tensor.shape
        if len(shape) != 1 or not tensor.is_contiguous():
            return None
        length = shape[0]
        if length and tensor.data_ptr() != address:
            return None
        lengths.append(length)
        address += length * size
    if address > storage.data_ptr() + storage.nbytes():
        return None
    total = (address - begin) // size
    return cut, (first.as_strided((total,), (1,), start), lengths)
