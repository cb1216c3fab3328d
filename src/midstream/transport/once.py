"""Pickles a pipeline once for all spawned workers."""

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
    """A value that is pickled once for all workers that start as new interpreters.

    Its large buffers (Arrow tables, numpy arrays) lie in one anonymous file, which every worker
    maps. Values that only multiprocessing can send, such as locks and pipes, cannot be pickled
    once; then the value is pickled for each worker, as usual.

    Args:
        value: Any value that can be pickled.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self._packed: tuple[bytes, list[int], int] | None = None
        self._pickles_once = True

    def __reduce__(self) -> Any:
        if self._pickles_once and self._packed is None and get_spawning_popen() is not None:
            try:
                self._packed = self._write()
            except Exception:
                self._pickles_once = False
        if self._packed is None or get_spawning_popen() is None:
            return Once, (self.value,)
        header, spans, fd = self._packed
        return _unpack_once, (header, spans, reduction.DupFd(fd) if fd >= 0 else None)

    def _write(self) -> tuple[bytes, list[int], int]:
        """The pickle, the (start, size) of each buffer, flattened, and the file, or -1 for none."""
        buffers: list[pickle.PickleBuffer] = []
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol=5, buffer_callback=buffers.append)
        extra = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        pickler.dispatch_table = {**copyreg.dispatch_table, **dict.fromkeys(extra, _refuse)}
        pickler.dump(self.value)
        spans: list[int] = []
        end = 0
        for buffer in buffers:
            size = buffer.raw().nbytes
            spans += end, size
            end += -(-size // ALIGN) * ALIGN
        if not end:
            return file.getvalue(), spans, -1
        fd = anonymous_file(end)
        weakref.finalize(self, os.close, fd)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, end)
        with mmap.mmap(fd, end) as memory:
            for index, buffer in enumerate(buffers):
                memory[spans[2 * index] : spans[2 * index] + spans[2 * index + 1]] = buffer.raw()
        return file.getvalue(), spans, fd


def _refuse(value: Any) -> Any:
    raise TypeError("only multiprocessing can pickle this value, for one worker at a time")


def _unpack_once(header: bytes, spans: list[int], dup: Any) -> Once:
    pairs = list(zip(spans[::2], spans[1::2]))
    if dup is None:
        return Once(pickle.loads(header, buffers=[bytearray(size) for _, size in pairs]))
    fd = dup.detach()
    try:
        # A private mapping: no other worker sees what this one writes to its data.
        memory = memoryview(mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE))
    finally:
        os.close(fd)
    return Once(
        pickle.loads(header, buffers=[memory[start : start + size] for start, size in pairs])
    )
