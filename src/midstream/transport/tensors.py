"""A pickler that keeps the bytes of tensors and arrays apart."""

from __future__ import annotations

import copyreg
import io
import pickle
from multiprocessing import reduction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

NUMPYS = {
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float32,
    torch.float64,
}

_MARK = pickle.PickleBuffer(bytearray(1))


class Pickler(pickle.Pickler):
    """Keeps the bytes of tensors and arrays apart."""

    def __init__(self, file: io.BytesIO, parts: list[npt.NDArray[np.uint8]]) -> None:
        super().__init__(file, protocol=5, buffer_callback=_out_of_band)
        self.dispatch_table = table = copyreg.dispatch_table.copy()
        table.update(_others())
        table[torch.Tensor] = lambda tensor: _reduce_tensor(tensor, parts)
        table[np.ndarray] = lambda array: _reduce_array(array, parts)


_torch_sends = {
    kind
    for kind in reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    if kind.__module__.split(".")[0] == "torch"
}
"""By files: not here. What others registered (pipes, say) goes as they want it."""

_known: tuple[dict[Any, Any], dict[Any, Any]] = {}, {}


def _others() -> dict[Any, Any]:
    """What others registered, which are few; found again only where something has changed."""
    global _known
    extra = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    if _known[0] != extra:
        _known = dict(extra), {kind: extra[kind] for kind in extra.keys() - _torch_sends}
    return _known[1]


def _out_of_band(buffer: pickle.PickleBuffer) -> bool:
    return buffer is not _MARK  # others (of array subclasses, say) stay in the pickle


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
        parts.append(_bytes_of(tensor.numpy()) if tensor.dtype in NUMPYS else _storage(tensor))
        return _tensor, (_MARK, tensor.dtype, shape)
    repeated = [size > 1 and step == 0 for size, step in zip(shape, tensor.stride())]
    if any(repeated):  # expanded: its bytes are there once
        tensor = tensor[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
    if not _is_dense(tensor):  # channels_last is, say
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
    """Whether its elements fill a piece of memory, each once."""
    expected = 1
    for step, size in sorted(
        (step, size) for step, size in zip(tensor.stride(), tensor.shape) if size > 1
    ):
        if step != expected:
            return False
        expected *= size
    return True


def _storage(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a dense tensor, in the order of its memory."""
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
