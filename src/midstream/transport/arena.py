"""Slots of anonymous shared memory, in which batches leave their workers."""

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

_STRIDE = 1 << 40  # bytes between two slots; the file is sparse, so they cost nothing

_GRAIN = 64 << 10  # slots grow by multiples of this many bytes


class Arena:
    """The slots of all workers of one loader.

    They lie in one anonymous file that the main process and all workers have open. Byte ``i`` of
    the file is 1 while slot ``i`` is in use: the worker sets it, the main process clears it.

    Args:
        num_workers: Number of worker processes.
        slots: Slots of each worker.

    Attributes:
        token: Names the arena in all its processes.
        used: The bytes that say which slots are in use.

    Raises:
        OSError: If the system has no anonymous shared files.
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
        # A fork inherits the arena; it is pickled only for new interpreters.
        if get_spawning_popen() is None:
            raise TypeError(
                "the shared memory of a loader travels only to a worker that is being started"
            )
        return _attach, (reduction.DupFd(self.fd), self.num_workers, self.slots, self.token)

    def leave(self) -> None:
        """Closes the file and unmaps the memory, in a process that no longer needs it."""
        if self._close.detach() is not None:
            os.close(self.fd)
        for memory in (self.used, *(memory for memory, _ in self._maps.values())):
            with contextlib.suppress(BufferError):
                memory.close()

    def memory(self, slot: int, size: int, *, reserve: bool = False) -> mmap.mmap:
        """Maps at least ``size`` bytes of a slot into this process.

        Args:
            slot: Number of the slot.
            size: Bytes that are needed.
            reserve: Allocate the pages now, and a quarter more, for later batches.

        Raises:
            OSError: If the machine has no memory left.
        """
        mapped = self._maps.get(slot)
        if mapped is None or mapped[1] < size:
            with self._lock:
                start = _STRIDE * (slot + 1)
                length = size if not reserve else -(-(size + size // 4) // _GRAIN) * _GRAIN
                length = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
                if reserve and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self.fd, start, length)
                mapped = self._maps[slot] = mmap.mmap(self.fd, length, offset=start), length
        return mapped[0]


def anonymous_file(size: int) -> int:
    """Opens a file in memory that has no name, and returns its descriptor.

    Raises:
        OSError: If the system has no such files.
    """
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
"""By token: the arenas of the loaders of this process."""


class _Lease(np.ndarray[Any, Any]):
    """A slot's bytes in the main process. Marks the slot as free when it is deleted.

    Every tensor or array that is a view of the slot keeps the lease alive.
    """

    used: mmap.mmap | None
    slot: int
    pid: int

    def __array_finalize__(self, other: Any) -> None:
        self.used = None

    def __del__(self) -> None:
        # A forked process has a copy of the lease, which must not free the slot.
        if self.used is not None and self.pid == os.getpid():
            with contextlib.suppress(ValueError):
                self.used[self.slot] = 0


def lease_slot(memory: mmap.mmap, size: int, used: mmap.mmap, slot: int) -> _Lease:
    """The first ``size`` bytes of a slot, as an array that frees the slot when it is deleted."""
    lease: _Lease = np.frombuffer(memory, np.uint8, size).view(_Lease)
    lease.slot, lease.pid, lease.used = slot, os.getpid(), used
    return lease
