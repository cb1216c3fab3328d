"""A pipeline that is pickled once for all spawned workers."""

from __future__ import annotations

import copyreg
import io
import mmap
import os
import pickle
import weakref
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

from midstream.transport.arena import anonymous_file
from midstream.transport.packing import ALIGN


class Once:
    """A value that is pickled once for all workers that are started as new interpreters.

    Its large buffers (Arrow tables, numpy arrays) lie in an anonymous file, and every worker looks
    into that one. What only multiprocessing can send, each worker with its own files, goes as it
    always did.
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
            at += -(-size // ALIGN) * ALIGN
        if not at:
            return file.getvalue(), spans, -1
        fd = anonymous_file(at)
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
    return Once(
        pickle.loads(header, buffers=[memory[start : start + size] for start, size in pairs])
    )
