"""How a batch leaves its worker process: as one buffer and a small header.

A batch is any nesting of dicts, lists, tuples, dataclasses, strings, numbers, tensors and numpy
arrays. It is pickled, and the bytes of its tensors and arrays go beside the pickle, one after the
other:

    smaller than `INLINE`    with the header, through the queue
    larger                   into a slot of the worker's, in shared memory; the header says which

The main process makes tensors and arrays that look into the slot: same dtypes and shapes, writable,
nothing copied. The slot is written again only after the last of them is gone. When a worker's slots
are all looked at (``list(loader)``), the batch goes through the queue however large: nobody ever
waits for a slot.

    memory     a slot is as large as the largest batch it carried (up to a quarter more), and one that no batch needed yet
               takes none; batches of a MB or more travel alone, and a worker has ``prefetch_factor
               + 4`` of them at once; smaller ones travel in bundles
               (`midstream.transport.bundles`), for which there are up to eight times as many slots
    leaks      none is possible: the memory is one anonymous file (memfd), which has no name in /dev/shm, is not limited by
               its size, and is gone with the last process that holds it, however that ended
    no memory  a slot's pages are reserved before they are written, so that a full machine is an error that is caught
               here and not a SIGBUS: then the batch goes through the queue, and the loader warns
               once

What is no plain tensor or array (a sparse tensor, a parameter, a masked array) is pickled whole;
nothing goes by files, of which torch needs one for each tensor. What cannot be pickled is an error
at its turn. Slots know of the main process alone: a process that it forks while it looks into one
may see it change. Tensors that were views of one storage arrive as copies.

A list of tensors that were cut from one (`split`) travels as that one, unless somebody changed it.

Large batches are written straight into the slot: `empty` gives an array that lies there, where
there is a slot being filled, and an ordinary one elsewhere. Nothing has to be told about it
afterwards. `pad`, `flat` and `ragged` make theirs so.
"""

from __future__ import annotations

import io
import mmap
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from midstream.transport.arena import Arena, open_arenas
from midstream.transport.parcel import Parcel
from midstream.transport.tensors import NUMPYS, Pickler

INLINE = 16 << 10
"""Bytes of tensors and arrays from which on a batch goes by a slot."""

DIRECT = 128 << 10
"""Bytes of an array from which on it is worth to be made in the slot: smaller ones are copied in
less time.
"""

ALIGN = 64

_FEW = 16  # of a longer list nobody looks at the elements, to find what was split


class _Filling:
    """A worker's slot while its batch is made: one that the main process does not look into, nor
    anyone here.
    """

    def __init__(self, arena: Arena, worker: int) -> None:
        self.arena = arena
        self.slots = range(worker * arena.slots, (worker + 1) * arena.slots)
        self.mine: dict[int, list[weakref.ref[Any]]] = {}  # arrays here that lie in a slot
        self.slot = -1
        self.at = 0
        self.places: list[
            tuple[int, int]
        ] = []  # (address, size) of each mapping of the slot, in this turn
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
                    f"no shared memory for a batch of {size:,} bytes ({error}), so batches go"
                    " through a pipe, which is slower. Raise the memory limit of the job, or use"
                    " fewer workers or a smaller prefetch_factor."
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
        self.at += -(-size // ALIGN) * ALIGN
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
                start, total = total, total + -(-part.size // ALIGN) * ALIGN
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
        # What a fork inherited: the memory of other loaders must not live as long as this. (Slots
        # that the parent looked into just then stay mapped here.)
        for other in list(open_arenas.values()):
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
        Pickler(file, parts).dump(value)
        header = file.getvalue()
        parcel = filling.pack(header, parts) if filling is not None else None
        if parcel is None:
            spans: list[int] = []
            pieces: list[Any] = []
            at = 0
            for part in parts:
                spans += at, part.size
                pieces += part, bytes(-part.size % ALIGN)
                at += part.size + -part.size % ALIGN
            parcel = Parcel(header, spans, b"".join(pieces), None, "")
        if filling is not None:
            parcel.notice, filling.notice = filling.notice, ""
        return parcel
    finally:
        if filling is not None:
            filling.close()


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An uninitialised array; in a worker it lies where the batch in the making will leave from, so it is not copied again.

    For whoever forms batches: such an array may be kept and written to as long as anyone likes (its
    slot is not used again meanwhile), so it is right anywhere, and saves the copy when it is part
    of the batch of the turn it was made in.

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
        and whole.dtype in NUMPYS
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
    # "Unsafe" are only two parts of the same rows: here each is a tensor of its own to autograd,
    # not one of several views.
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
    if (
        first is None
        or first is not value[0]
        or len(value) != len(lengths)
        or first.dtype is not dtype
    ):
        return value
    # What lies where the pieces lay is what they are, whoever made these tensors.
    storage, start, size = first.untyped_storage(), first.storage_offset(), first.element_size()
    if (start + sum(lengths)) * size > storage.nbytes():
        return value
    address = storage.data_ptr() + start * size
    for tensor, length in zip(value, lengths):
        if (
            type(tensor) is not torch.Tensor
            or tensor.dtype is not dtype
            or tensor.requires_grad
            or tensor.__dict__
        ):
            return value
        if (
            (length and tensor.data_ptr() != address)
            or tensor.shape != (length,)
            or not tensor.is_contiguous()
        ):
            return value
        address += length * size
    return _Whole(first.as_strided((sum(lengths),), (1,), start), lengths)
