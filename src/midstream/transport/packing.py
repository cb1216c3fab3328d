"""Packs a batch in its worker process: `pack`, and `empty` and `split` for collate functions.

A batch is any nesting of dicts, lists, tuples, dataclasses, strings, numbers, tensors and numpy
arrays. It is pickled without the bytes of its tensors and arrays, which travel beside the pickle as
one buffer:

    smaller than `INLINE`    the buffer goes through the queue, with the pickle
    larger                   the buffer is written into a slot: shared memory of this worker

The main process makes tensors and arrays that are views of the slot, of the same dtypes and shapes,
writable, without copying. A slot is written again only after the last of these views is gone. When
views of all of a worker's slots are alive (``list(loader)``), a batch goes through the queue,
however large it is; a worker never waits for a slot.

    memory     A slot takes as much memory as the largest batch it carried, and up to a quarter
               more; an unused slot takes none. A worker has ``prefetch_factor + 4`` slots for
               batches of a MB or more, and up to eight times as many for smaller ones, which travel
               in bundles (`midstream.transport.bundles`).
    leaks      None are possible. The memory is one anonymous file (memfd): it has no name in
               /dev/shm, is not limited by the size of /dev/shm, and is freed with the last process
               that holds it, however that process ended.
    no memory  The pages of a slot are reserved before they are written. A full machine is therefore
               an error that is caught here, not a SIGBUS. The batch then goes through the queue,
               and the loader warns once.

Values that are not plain tensors or arrays (sparse tensors, parameters, masked arrays) are pickled
whole. Nothing travels as a file, of which torch needs one per tensor. A value that cannot be
pickled raises when its batch is packed. Tensors that were views of one storage arrive as copies. A
process that the main process forks while it holds views of a slot may see their values change.

A list of tensors that `split` cut from one tensor travels as that one tensor.

`empty` gives an array that lies in the slot in which the next batch will leave, so a large batch is
not copied again. `pad`, `flat` and `ragged` use it.
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
from midstream.transport.tensors import Pickler, SplitTensors, cut

INLINE = 16 << 10
"""Bytes of tensors and arrays; a batch of as many or more travels in a slot."""

DIRECT = 128 << 10
"""Bytes of an array; `empty` places arrays of as many or more in the slot. Smaller ones are copied
in less time.
"""

ALIGN = 64
"""Tensors and arrays begin at multiples of this many bytes."""


class SlotWriter:
    """Writes a worker's batches into its slots of an arena.

    While a batch is made, `empty` and `pack` choose one slot for it: a free slot, of which neither
    the main process nor code in this worker holds a view.

    Attributes:
        thread: The thread that makes batches; arrays of other threads are not placed in slots.
        notice: A warning for the loader, or "".
    """

    def __init__(self, arena: Arena, worker: int) -> None:
        self.arena, self.thread = arena, threading.get_ident()
        self.notice = ""
        self._warned = False
        self._slots = range(worker * arena.slots, (worker + 1) * arena.slots)
        # By slot: the arrays that `empty` placed there, which code in this worker may still hold.
        self._placed: dict[int, list[weakref.ref[Any]]] = {}
        self._slot = -1  # the chosen slot, or -1
        self._size = 0  # bytes that `empty` has given away of it
        self._mappings: list[tuple[int, int]] = []  # (address, size) of the slot in this process

    def _choose_slot(self) -> bool:
        """Chooses a free slot, if none is chosen yet. Returns False if there is none."""
        if self._slot < 0:
            used, placed = self.arena.used, self._placed
            for slot in self._slots:  # the lowest free one, so that few slots take memory
                if not used[slot]:
                    if held := placed.get(slot):
                        held[:] = [each for each in held if each() is not None]
                        if held:
                            continue
                    self._slot = slot
                    return True
            return False
        return True

    def _memory(self, size: int) -> mmap.mmap | None:
        """At least ``size`` bytes of the chosen slot; None when the machine has no memory left."""
        try:
            return self.arena.memory(self._slot, size, reserve=True)
        except (OSError, ValueError) as error:
            if not self._warned:
                self._warned = True
                self.notice = (
                    f"no shared memory for a batch of {size:,} bytes ({error}), so batches go"
                    " through a pipe, which is slower. Raise the memory limit of the job, or use"
                    " fewer workers or a smaller prefetch_factor."
                )
            return None

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
        """An uninitialised array in the slot; None if it is small, or there is no slot."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if size < DIRECT or dtype.hasobject or not self._choose_slot():
            return None
        memory = self._memory(self._size + size)
        if memory is None:
            return None
        base: npt.NDArray[Any] = np.frombuffer(memory, np.uint8, size, self._size).view(_SlotBytes)
        address = base.ctypes.data - self._size
        if not self._mappings or self._mappings[-1][0] != address:
            self._mappings.append((address, len(memory)))
        self._size += -(-size // ALIGN) * ALIGN
        self._placed.setdefault(self._slot, []).append(weakref.ref(base))
        return np.frombuffer(memoryview(base), dtype).reshape(shape)  # type: ignore[arg-type]

    def write(self, header: bytes, parts: list[npt.NDArray[np.uint8]]) -> Parcel | None:
        """Writes ``parts`` into the slot; None when they are small, or there is no slot."""
        spans: list[int] = []
        placed = False
        total = self._size
        for part in parts:
            start = self._start_of(part)
            placed = placed or start >= 0
            if start < 0:
                start, total = total, total + -(-part.size // ALIGN) * ALIGN
            spans += start, part.size
        if (total < INLINE and not placed) or not self._choose_slot():
            return None
        memory = self._memory(total)
        if memory is None:
            return None
        whole: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        for index, part in enumerate(parts):
            start = spans[2 * index]
            if start >= self._size:  # arrays of `empty` lie below it
                whole[start : start + part.size] = part
        self.arena.used[self._slot] = 1
        return Parcel(header, spans, total, (self.arena.token, self._slot), "")

    def _start_of(self, part: npt.NDArray[np.uint8]) -> int:
        """Where in the slot a part already lies, or -1."""
        if self._mappings:
            address = part.ctypes.data
            for base, length in self._mappings:
                if base <= address < base + length:
                    return address - base
        return -1

    def finish(self) -> None:
        """Ends the batch: the next one chooses a slot anew."""
        self._slot, self._size, self._mappings = -1, 0, []


class _SlotBytes(np.ndarray[Any, Any]):
    """Bytes of a slot that `empty` gave away. They are in use as long as this object is alive."""


_writer: SlotWriter | None = None
"""The writer of this process, set by `use_arena` in a worker process.

None in the main process, also when readers are threads: there `empty` and `split` are ordinary.
A global, because `empty` and `split` are called deep inside collate functions.
"""


def use_arena(arena: Arena, worker: int) -> None:
    """Makes this process a worker that packs its batches into its slots of ``arena``."""
    global _writer
    if _writer is None or _writer.arena is not arena:
        _writer = SlotWriter(arena, worker)
        # A fork inherits the arenas of other loaders. Their memory must not live as long as this
        # process. (Slots of which the parent held views at the fork stay mapped here.)
        for other in list(open_arenas.values()):
            if other is not arena:
                other.leave()


def pack(value: Any) -> Parcel:
    """Packs a value for its way to the main process.

    Raises:
        Exception: Whatever pickling the value raised.
    """
    parts: list[npt.NDArray[np.uint8]] = []
    file = io.BytesIO()
    writer = _writer
    try:
        Pickler(file, parts).dump(value)
        header = file.getvalue()
        parcel = writer.write(header, parts) if writer is not None else None
        if parcel is None:
            spans: list[int] = []
            pieces: list[Any] = []
            end = 0
            for part in parts:
                spans += end, part.size
                pieces += part, bytes(-part.size % ALIGN)
                end += part.size + -part.size % ALIGN
            parcel = Parcel(header, spans, b"".join(pieces), None, "")
        if writer is not None:
            parcel.notice, writer.notice = writer.notice, ""
        return parcel
    finally:
        if writer is not None:
            writer.finish()


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An uninitialised array, like ``np.empty``; in a worker, a large one lies in shared memory.

    A batch that holds such an array leaves the worker without another copy, provided it is the next
    one to be packed. The array may be kept and written to for any time: its slot is not used again
    before the array is gone.

    Args:
        shape: Shape of the array.
        dtype: Type of its elements.
    """
    kind = np.dtype(dtype)
    writer = _writer
    if writer is not None and writer.thread == threading.get_ident():
        array = writer.empty(shape, kind)
        if array is not None:
            return array
    return np.empty(shape, kind)


def split(whole: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """Cuts a tensor along its first dimension; the pieces leave a worker as one tensor.

    Args:
        whole: Shape [total, ...].
        lengths: Lengths of the pieces; their sum is ``total``.
    """
    pieces = cut(whole, lengths)
    writer = _writer
    if writer is not None and writer.thread == threading.get_ident():
        return SplitTensors(pieces)
    return pieces
