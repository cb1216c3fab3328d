"""How a batch leaves its worker process: as one buffer and a small header.

A batch is any nesting of dicts, lists, tuples, dataclasses, strings, numbers, tensors and numpy arrays. It is pickled, and
the bytes of its tensors and arrays go beside the pickle, one after the other:

    smaller than `INLINE`    with the header, through the queue
    larger                   into a slot of the worker's, in shared memory; the header says which

The main process makes tensors and arrays that look into the slot: same dtypes and shapes, writable, nothing copied. The slot
is written again only after the last of them is gone. When a worker's slots are all looked at (``list(loader)``), the batch
goes through the queue however large: nobody ever waits for a slot.

    memory     a slot is as large as the largest batch it carried (up to a quarter more), and one that no batch needed yet
               takes none; batches of a MB or more travel alone, and a worker has ``prefetch_factor + 4`` of them at once;
               smaller ones travel in bundles (`midstream.transport.bundles`), for which there are up to eight times as many slots
    leaks      none is possible: the memory is one anonymous file (memfd), which has no name in /dev/shm, is not limited by
               its size, and is gone with the last process that holds it, however that ended
    no memory  a slot's pages are reserved before they are written, so that a full machine is an error that is caught
               here and not a SIGBUS: then the batch goes through the queue, and the loader warns once

What is no plain tensor or array (a sparse tensor, a parameter, a masked array) is pickled whole; nothing goes by files, of
which torch needs one for each tensor. What cannot be pickled is an error at its turn. Slots know of the main process alone: a
process that it forks while it looks into one may see it change. Tensors that were views of one storage arrive as copies.

A list of tensors that were cut from one (`split`) travels as that one, unless somebody changed it.

Large batches are written straight into the slot: `empty` gives an array that lies there, where there is a slot being filled,
and an ordinary one elsewhere. Nothing has to be told about it afterwards. `pad`, `flat` and `ragged` make theirs so.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import mmap
import os
import pickle
import threading
import weakref
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data._utils import pin_memory

__all__ = ["DIRECT", "INLINE", "Arena", "Once", "Parcel", "begin", "empty", "pack", "split"]

INLINE = 16 << 10
"""Bytes of tensors and arrays from which on a batch goes by a slot."""

DIRECT = 128 << 10
"""Bytes of an array from which on it is worth to be made in the slot: smaller ones are copied in less time."""

_ALIGN = 64
_STRIDE = 1 << 40  # between two slots, in an address space that costs nothing
_GRAIN = 64 << 10

_NUMPYS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float32, torch.float64}

_FEW = 16  # of a longer list nobody looks at the elements, to find what was split

_MARK = pickle.PickleBuffer(bytearray(1))


class Arena:
    """The slots of all workers of one loader: an anonymous file that main process and workers hold.

    Byte ``i`` of its beginning says whether slot i is in use: the worker sets it, the main process clears it.

    Args:
        num_workers: How many processes write.
        slots: For each.

    Raises:
        OSError: If the system gives no such file.
    """

    def __init__(self, num_workers: int, slots: int) -> None:
        self.num_workers, self.slots = num_workers, slots
        self.token = os.urandom(8)
        self._open(_anonymous_file(_STRIDE * (num_workers * slots + 1)))
        _arenas[self.token] = self

    def _open(self, fd: int) -> None:
        self.fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        self.used = mmap.mmap(fd, mmap.PAGESIZE * (1 + self.num_workers * self.slots // mmap.PAGESIZE))
        self._maps: dict[int, tuple[mmap.mmap, int]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        # Only while a worker is started; a fork inherits it.
        if get_spawning_popen() is None:
            raise TypeError("the shared memory of a loader travels only to a worker that is being started")
        return _attach, (reduction.DupFd(self.fd), self.num_workers, self.slots, self.token)

    def leave(self) -> None:
        """Let go of the memory, in a process that needs it no more."""
        if self._close.detach() is not None:
            os.close(self.fd)
        for memory in (self.used, *(memory for memory, _ in self._maps.values())):
            with contextlib.suppress(BufferError):
                memory.close()

    def room(self, slot: int, size: int, *, reserve: bool = False) -> mmap.mmap:
        """The slot's memory, at least so many bytes of it.

        Raises:
            OSError: If there is none.
        """
        there = self._maps.get(slot)
        if there is None or there[1] < size:
            with self._lock:
                start = _STRIDE * (slot + 1)
                length = size if not reserve else -(-(size + size // 4) // _GRAIN) * _GRAIN
                length = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
                if reserve and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self.fd, start, length)
                there = self._maps[slot] = mmap.mmap(self.fd, length, offset=start), length
        return there[0]


def _anonymous_file(size: int) -> int:
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no anonymous shared files")
    fd = os.memfd_create("midstream")
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _attach(dup: Any, num_workers: int, slots: int, token: bytes) -> Arena:
    arena = Arena.__new__(Arena)
    arena.num_workers, arena.slots, arena.token = num_workers, slots, token
    arena._open(dup.detach())
    return arena


_arenas: weakref.WeakValueDictionary[bytes, Arena] = weakref.WeakValueDictionary()
"""Of the loaders of this process."""


class _Lease(np.ndarray[Any, Any]):
    """A slot's bytes; everything that looks into them holds it. Clears the slot when it goes."""

    used: mmap.mmap | None
    slot: int
    pid: int

    def __array_finalize__(self, other: Any) -> None:
        self.used = None

    def __del__(self) -> None:
        if self.used is not None and self.pid == os.getpid():  # a fork has its own copy of this, but not a say
            with contextlib.suppress(ValueError):
                self.used[self.slot] = 0


def _lease(memory: mmap.mmap, size: int, used: mmap.mmap, slot: int) -> _Lease:
    lease: _Lease = np.frombuffer(memory, np.uint8, size).view(_Lease)
    lease.slot, lease.pid, lease.used = slot, os.getpid(), used
    return lease


class Parcel:
    """A packed value, on its way or arrived.

    Attributes:
        notice: What the loader should warn of, or "".
    """

    __slots__ = ("_body", "_header", "_opened", "_route", "_spans", "notice")

    def __init__(
        self, header: bytes, spans: list[int], body: Any, route: tuple[bytes, int] | None, notice: str
    ) -> None:
        self._header, self._spans, self._body, self._route = header, spans, body, route
        self.notice = notice
        self._opened: tuple[Any] | None = None

    def __reduce__(self) -> Any:
        return _arrive, (self._header, self._spans, self._body, self._route, self.notice)

    @property
    def size(self) -> int:
        """Bytes of tensors and arrays."""
        return self._body if isinstance(self._body, int) else len(self._body)

    def open(self) -> Any:
        """The value. To be called once."""
        if self._opened is not None:
            return self._opened[0]
        body, spans, self._body = self._body, iter(self._spans), None
        view = memoryview(bytearray(body) if self._route is None else body)
        return pickle.loads(self._header, buffers=[view[start : start + size] for start, size in zip(spans, spans)])

    def pin_memory(self) -> Parcel:
        """The same in pinned memory: what torch's thread calls. The slot is free after it."""
        self._opened = (pin_memory.pin_memory(self.open()),)  # type: ignore[no-untyped-call]
        return self


def _arrive(header: bytes, spans: list[int], body: Any, route: tuple[bytes, int] | None, notice: str) -> Parcel:
    """In the main process: hold the slot from now on, so that a parcel that nobody opens gives it back too."""
    if route is not None:
        token, slot = route
        arena = _arenas[token]
        body = _lease(arena.room(slot, body), body, arena.used, slot)
    return Parcel(header, spans, body, route, notice)


class Once:
    """A value that is pickled once for all workers that are started as new interpreters.

    Its large buffers (Arrow tables, numpy arrays) lie in an anonymous file, and every worker looks into that one. What only
    multiprocessing can send, each worker with its own files, goes as it always did.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self._packed: tuple[bytes, list[int], int] | None = None
        self._plain = True

    def __reduce__(self) -> Any:
        if self._plain and self._packed is None and get_spawning_popen() is not None:
            try:
                self._packed = self._write()
            except Exception:
                self._plain = False
        if self._packed is None or get_spawning_popen() is None:
            return Once, (self.value,)
        header, spans, fd = self._packed
        return _unpack_once, (header, spans, reduction.DupFd(fd) if fd >= 0 else None)

    def _write(self) -> tuple[bytes, list[int], int]:
        buffers: list[pickle.PickleBuffer] = []
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol=5, buffer_callback=buffers.append)
        extra = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        pickler.dispatch_table = {**copyreg.dispatch_table, **dict.fromkeys(extra, _refuse)}
        pickler.dump(self.value)
        spans: list[int] = []
        at = 0
        for buffer in buffers:
            size = buffer.raw().nbytes
            spans += at, size
            at += -(-size // _ALIGN) * _ALIGN
        if not at:
            return file.getvalue(), spans, -1
        fd = _anonymous_file(at)
        weakref.finalize(self, os.close, fd)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, at)
        with mmap.mmap(fd, at) as memory:
            for index, buffer in enumerate(buffers):
                memory[spans[2 * index] : spans[2 * index] + spans[2 * index + 1]] = buffer.raw()
        return file.getvalue(), spans, fd


def _refuse(value: Any) -> Any:
    raise TypeError("for multiprocessing alone")


def _unpack_once(header: bytes, spans: list[int], dup: Any) -> Once:
    pairs = list(zip(spans[::2], spans[1::2]))
    if dup is None:
        return Once(pickle.loads(header, buffers=[bytearray(size) for _, size in pairs]))
    fd = dup.detach()
    try:
        # Private: what one worker writes to its data no other sees.
        memory = memoryview(mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE))
    finally:
        os.close(fd)
    return Once(pickle.loads(header, buffers=[memory[start : start + size] for start, size in pairs]))


# -- packing ---------------------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
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
        parts.append(_bytes_of(tensor.numpy()) if tensor.dtype in _NUMPYS else _storage(tensor))
        return _tensor, (_MARK, tensor.dtype, shape)
    repeated = [size > 1 and step == 0 for size, step in zip(shape, tensor.stride())]
    if any(repeated):  # expanded: its bytes are there once
        tensor = tensor[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
    if not _is_dense(tensor):  # channels_last is, say
        tensor = tensor.contiguous()
    small = tuple(tensor.shape)
    parts.append(_storage(tensor))
    return _strided, (_MARK, tensor.dtype, small, tensor.stride(), None if shape == small else shape)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a piece of memory, each once."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape) if size > 1):
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
    part: Any, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], wide: tuple[int, ...] | None
) -> torch.Tensor:
    tensor = torch.frombuffer(part, dtype=dtype).as_strided(shape, stride)
    return tensor if wide is None else tensor.expand(wide)


class _Filling:
    """A worker's slot while its batch is made: one that the main process does not look into, nor anyone here."""

    def __init__(self, arena: Arena, worker: int) -> None:
        self.arena = arena
        self.slots = range(worker * arena.slots, (worker + 1) * arena.slots)
        self.mine: dict[int, list[weakref.ref[Any]]] = {}  # arrays here that lie in a slot
        self.slot = -1
        self.at = 0
        self.places: list[tuple[int, int]] = []  # (address, size) of each mapping of the slot, in this turn
        self.thread = threading.get_ident()
        self.notice = ""
        self.told = False
        self.split: dict[int, _Cut] = {}  # by the id of the first piece

    def take(self) -> bool:
        """Choose a slot, unless one is chosen."""
        if self.slot < 0:
            used, mine = self.arena.used, self.mine
            for slot in self.slots:  # always the lowest, so that as few as possible take memory
                if not used[slot]:
                    if held := mine.get(slot):
                        held[:] = [each for each in held if each() is not None]
                        if held:
                            continue
                    self.slot = slot
                    return True
            return False
        return True

    def room(self, size: int) -> mmap.mmap | None:
        """The chosen slot, at least so large; None when there is no memory for it."""
        try:
            memory = self.arena.room(self.slot, size, reserve=True)
        except (OSError, ValueError) as error:
            if not self.told:
                self.told = True
                self.notice = (
                    f"no shared memory for a batch of {size:,} bytes ({error}), so batches go through a pipe, which is slower. "
                    f"Raise the memory limit of the job, or use fewer workers or a smaller prefetch_factor."
                )
            return None
        return memory

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if size < DIRECT or dtype.hasobject or not self.take():
            return None
        memory = self.room(self.at + size)
        if memory is None:
            return None
        base: npt.NDArray[Any] = np.frombuffer(memory, np.uint8, size, self.at).view(_Held)
        address = base.ctypes.data - self.at
        if not self.places or self.places[-1][0] != address:
            self.places.append((address, len(memory)))
        self.at += -(-size // _ALIGN) * _ALIGN
        self.mine.setdefault(self.slot, []).append(weakref.ref(base))
        return np.frombuffer(memoryview(base), dtype).reshape(shape)  # type: ignore[arg-type]

    def pack(self, header: bytes, parts: list[npt.NDArray[np.uint8]]) -> Parcel | None:
        """The parts in a slot; None when they are small, or there is none."""
        spans: list[int] = []
        here = False
        total = self.at
        for part in parts:
            start = self._start_of(part)
            here = here or start >= 0
            if start < 0:
                start, total = total, total + -(-part.size // _ALIGN) * _ALIGN
            spans += start, part.size
        if (total < INLINE and not here) or not self.take():
            return None
        memory = self.room(total)
        if memory is None:
            return None
        whole: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        for index, part in enumerate(parts):
            start = spans[2 * index]
            if start >= self.at:
                whole[start : start + part.size] = part
        self.arena.used[self.slot] = 1
        return Parcel(header, spans, total, (self.arena.token, self.slot), "")

    def _start_of(self, part: npt.NDArray[np.uint8]) -> int:
        """Where in the slot a part lies already, or -1."""
        if self.places:
            address = part.ctypes.data
            for base, length in self.places:
                if base <= address < base + length:
                    return address - base
        return -1

    def close(self) -> None:
        """The turn is over."""
        self.slot, self.at, self.places = -1, 0, []
        self.split.clear()


class _Held(np.ndarray[Any, Any]):
    """Bytes of a slot that code in the worker may still write to."""


_filling: _Filling | None = None


def begin(arena: Arena, worker: int) -> None:
    """From now on this process is a worker that packs into its slots of ``arena``."""
    global _filling
    if _filling is None or _filling.arena is not arena:
        _filling = _Filling(arena, worker)
        # What a fork inherited: the memory of other loaders must not live as long as this. (Slots that the parent looked into
        # just then stay mapped here.)
        for other in list(_arenas.values()):
            if other is not arena:
                other.leave()


def pack(value: Any) -> Parcel:
    """Make a value ready for the way to the main process.

    Raises:
        Exception: Whatever pickling it raised.
    """
    parts: list[npt.NDArray[np.uint8]] = []
    file = io.BytesIO()
    filling = _filling
    try:
        if filling is not None and filling.split:
            value = _folded(value, filling.split, {})
        _Pickler(file, parts).dump(value)
        header = file.getvalue()
        parcel = filling.pack(header, parts) if filling is not None else None
        if parcel is None:
            spans: list[int] = []
            pieces: list[Any] = []
            at = 0
            for part in parts:
                spans += at, part.size
                pieces += part, bytes(-part.size % _ALIGN)
                at += part.size + -part.size % _ALIGN
            parcel = Parcel(header, spans, b"".join(pieces), None, "")
        if filling is not None:
            parcel.notice, filling.notice = filling.notice, ""
        return parcel
    finally:
        if filling is not None:
            filling.close()


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An uninitialised array; in a worker it lies where the batch in the making will leave from, so it is not copied again.

    For whoever forms batches: such an array may be kept and written to as long as anyone likes (its slot is not used again
    meanwhile), so it is right anywhere, and saves the copy when it is part of the batch of the turn it was made in.

    Args:
        shape: Of the array.
        dtype: Of its elements.
    """
    kind = np.dtype(dtype)
    filling = _filling
    if filling is not None and filling.thread == threading.get_ident():
        array = filling.empty(shape, kind)
        if array is not None:
            return array
    return np.empty(shape, kind)


def split(whole: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """A tensor cut along its first dimension, as many tensors that leave a worker as one."""
    pieces = _pieces(whole, lengths)
    filling = _filling
    if (
        filling is not None
        and len(pieces) > 1
        and whole.dtype in _NUMPYS
        and whole.ndim == 1
        and filling.thread == threading.get_ident()
    ):
        known, key = filling.split, id(pieces[0])
        # Nothing is kept alive here: a filter may drop any number of batches before a turn ends.
        known[key] = weakref.ref(pieces[0], lambda _: known.pop(key, None)), whole.dtype, lengths
    return pieces


class _Whole:
    """In a list's place: what its tensors were cut from."""

    __slots__ = ("lengths", "whole")

    def __init__(self, whole: torch.Tensor, lengths: list[int]) -> None:
        self.whole, self.lengths = whole, lengths

    def __reduce__(self) -> Any:
        return _pieces, (self.whole, self.lengths)


def _pieces(whole: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    # "Unsafe" are only two parts of the same rows: here each is a tensor of its own to autograd, not one of several views.
    return list(whole.unsafe_split_with_sizes(lengths))


_Cut = tuple["weakref.ref[torch.Tensor]", torch.dtype, list[int]]
"""The first piece, and of what dtype and lengths all are."""


def _folded(value: Any, known: dict[int, _Cut], seen: dict[int, Any], depth: int = 6) -> Any:
    """The value, with lists that `split` made, and nobody has changed, as one tensor each.

    What is there twice stays one: ``seen`` is what came of each dict and list so far, by id.
    """
    kind = type(value)
    if kind is tuple and depth:
        return tuple([_folded(each, known, seen, depth - 1) for each in value])
    if (kind is not dict and kind is not list) or not value:
        return value
    again = seen.get(id(value))
    if again is not None:
        return again
    new: Any = value
    if kind is dict:
        if depth:
            new = seen[id(value)] = {}
            for key, each in value.items():
                new[key] = _folded(each, known, seen, depth - 1)
    elif (found := known.get(id(value[0]))) is not None:
        new = _joined(value, found)
    elif depth and len(value) <= _FEW:
        new = seen[id(value)] = []
        new.extend([_folded(each, known, seen, depth - 1) for each in value])
    seen[id(value)] = new
    return new


def _joined(value: list[Any], found: _Cut) -> Any:
    """The list as one tensor, if its tensors lie side by side still; else the list."""
    first, dtype, lengths = found[0](), found[1], found[2]
    if first is None or first is not value[0] or len(value) != len(lengths) or first.dtype is not dtype:
        return value
    # What lies where the pieces lay is what they are, whoever made these tensors.
    storage, start, size = first.untyped_storage(), first.storage_offset(), first.element_size()
    if (start + sum(lengths)) * size > storage.nbytes():
        return value
    address = storage.data_ptr() + start * size
    for tensor, length in zip(value, lengths):
        if type(tensor) is not torch.Tensor or tensor.dtype is not dtype or tensor.requires_grad or tensor.__dict__:
            return value
        if (length and tensor.data_ptr() != address) or tensor.shape != (length,) or not tensor.is_contiguous():
            return value
        address += length * size
    return _Whole(first.as_strided((sum(lengths),), (1,), start), lengths)
