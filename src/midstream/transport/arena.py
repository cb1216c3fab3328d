"""Slots of anonymous shared memory, in which batches leave a worker."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np

_STRIDE = 1 << 40  # between two slots, in an address space that costs nothing

_GRAIN = 64 << 10


class Arena:
    """The slots of all workers of one loader: an anonymous file that main process and workers hold.

    Byte ``i`` of its beginning says whether slot i is in use: the worker sets it, the main process
    clears it.

    Args:
        num_workers: How many processes write.
        slots: For each.

    Raises:
        OSError: If the system gives no such file.
    """

    def __init__(self, num_workers: int, slots: int) -> None:
        self.num_workers, self.slots = num_workers, slots
        self.token = os.urandom(8)
        self._open(anonymous_file(_STRIDE * (num_workers * slots + 1)))
        open_arenas[self.token] = self

    def _open(self, fd: int) -> None:
        self.fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        self.used = mmap.mmap(
            fd, mmap.PAGESIZE * (1 + self.num_workers * self.slots // mmap.PAGESIZE)
        )
        self._maps: dict[int, tuple[mmap.mmap, int]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        # Only while a worker is started; a fork inherits it.
        if get_spawning_popen() is None:
            raise TypeError(
                "the shared memory of a loader travels only to a worker that is being started"
            )
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


def anonymous_file(size: int) -> int:
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


open_arenas: weakref.WeakValueDictionary[bytes, Arena] = weakref.WeakValueDictionary()
"""Of the loaders of this process."""


class _Lease(np.ndarray[Any, Any]):
    """A slot's bytes; everything that looks into them holds it. Clears the slot when it goes."""

    used: mmap.mmap | None
    slot: int
    pid: int

    def __array_finalize__(self, other: Any) -> None:
        self.used = None

    def __del__(self) -> None:
        if (
            self.used is not None and self.pid == os.getpid()
        ):  # a fork has its own copy of this, but not a say
            with contextlib.suppress(ValueError):
                self.used[self.slot] = 0


def lease_slot(memory: mmap.mmap, size: int, used: mmap.mmap, slot: int) -> _Lease:
    lease: _Lease = np.frombuffer(memory, np.uint8, size).view(_Lease)
    lease.slot, lease.pid, lease.used = slot, os.getpid(), used
    return lease
