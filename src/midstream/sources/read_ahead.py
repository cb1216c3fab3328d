"""Caches values that are slow to read, and reads the next ones ahead in a thread."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")

SLOW_READ_S = 0.02
"""Values are read ahead only if a read takes at least this many seconds. Faster reads of a whole
window of 16 row groups take no longer than a few training steps. There a thread, which competes
for the interpreter, costs about as much as it gains."""

_MAX_WANTED = 16  # hints kept: a shuffle's window has as many blocks
# Calls per kept value after which an unused one counts as idle. Of n values in use at random, one
# stays unused for 8 n calls once in e**8 times.
_IDLE_CALLS = 8
_JOIN_S = 5.0


class _Prefetched(NamedTuple):
    """A value read ahead that was not asked for so far.

    Attributes:
        value: The value.
        size: Bytes.
        due: It should be asked for before this many values were added to the cache; after that it
            was read in vain and may be dropped.
    """

    value: Any
    size: int
    due: int


class ReadAheadCache(Generic[T]):
    """Caches values by number, and reads those that will be needed next in the background.

    Args:
        read: Reads the value with a number, and returns it with its size in bytes. Called by the
            thread that asks for a value and by the background thread, also by both at once.
        limit: Returns how many bytes to cache. At least one value is cached, however large it is.

    Cached and prefetched values take at most ``limit`` bytes, and two values more: one prefetched,
    and one that is being read. Prefetched values replace cached ones that are idle, never those in
    use.

    If a read fails in the background, nothing happens. Whoever asks for that value reads it again
    and gets the error from that read. An error of a value that is never asked for is not reported.

    The thread lives while there is something to read and room for it. Between two reads it holds no
    reference to this object. It is joined when this object is deleted and when the interpreter
    exits. A forked process opens an object of its own (see `Node._handle`); the copy that it
    inherits does nothing.
    """

    def __init__(self, read: Callable[[int], tuple[T, int]], limit: Callable[[], int]) -> None:
        self.read, self.limit = read, limit
        # Values with their sizes in bytes, the most recently used one last.
        self.kept: OrderedDict[int, tuple[T, int]] = OrderedDict()
        self.num_bytes = 0  # of the values in ``kept``
        self.last_used: dict[int, int] = {}  # for each of them the call that used it last
        self.calls = 0  # of `get`
        self.num_added = 0  # values ever added to ``kept``
        self.read_s = 0.0  # seconds that a read takes: a moving average
        self.last_size = 0  # bytes of the value that was read last
        self.wanted: OrderedDict[int, None] = OrderedDict()  # hints, the next one first
        self.reading: set[int] = set()
        self.prefetched: OrderedDict[int, _Prefetched] = OrderedDict()
        self.prefetched_bytes = 0
        self.changed = threading.Condition()  # guards all attributes
        self.thread = _Thread()
        weakref.finalize(self, self.thread.end)

    @property
    def wants_hints(self) -> bool:
        """Whether reads are slow and few hints are left."""
        return self.read_s >= SLOW_READ_S and len(self.wanted) < _MAX_WANTED

    def cached_first(self, numbers: list[int]) -> list[int]:
        """Sort numbers by how soon their values are available: those in memory come first.

        In another order a new value could displace one that is needed right after it.
        """

        def order(number: int) -> int:
            if number in self.kept:
                return 0
            if number in self.prefetched:
                return 1
            return 3 if number in self.reading else 2

        with self.changed:
            return sorted(numbers, key=order)

    def get(self, number: int, dropped: Callable[[int], None]) -> tuple[T, bool]:
        """Return a value, and whether it is new in the cache.

        Args:
            number: Of the value.
            dropped: Called with the number of each value that leaves the cache.
        """
        try:
            with self.changed:
                self.calls += 1
                was_hinted = number in self.wanted or number in self.reading
                self.wanted.pop(number, None)
                while number in self.reading:
                    self.changed.wait()
                if number in self.kept:
                    self.kept.move_to_end(number)
                    self.last_used[number] = self.calls
                    self._start()
                    return self.kept[number][0], False
                prefetched = self.prefetched.pop(number, None)
                if prefetched is not None:
                    self.prefetched_bytes -= prefetched.size
                    self._keep(number, prefetched.value, prefetched.size, dropped)
                    return prefetched.value, True
                if not was_hinted:
                    self.wanted.clear()  # the reader has moved elsewhere: old hints are worthless
                self.reading.add(number)
            value, size, seconds = _timed(self.read, number)
            with self.changed:
                self._end_read(number, size, seconds)
                self._keep(number, value, size, dropped)
        except BaseException:
            # Also on KeyboardInterrupt, at any line: the next call must not wait for this read.
            self._end_read(number)
            raise
        return value, True

    def hint(self, numbers: Iterable[int]) -> None:
        """Prefetch hint: these values will probably be asked for next, in this order."""
        if self.calls and self.read_s < SLOW_READ_S:
            return
        with self.changed:
            for number in numbers:
                if (
                    number not in self.kept
                    and number not in self.prefetched
                    and number not in self.reading
                ):
                    self.wanted[number] = None
            self._start()

    def _keep(self, number: int, value: T, size: int, dropped: Callable[[int], None]) -> None:
        """Add a value to the cache, and drop others until all are within the limit."""
        self.num_added += 1
        self.kept[number], self.last_used[number] = (value, size), self.calls
        self.num_bytes += size
        while self.num_bytes > self.limit() and len(self.kept) > 1:
            dropped(self._drop_oldest())
        while len(self.prefetched) > 1 and self.num_bytes + self.prefetched_bytes > self.limit():
            self.prefetched_bytes -= self.prefetched.popitem()[1].size  # the one needed last
        self._start()

    def _drop_oldest(self) -> int:
        number, (_, size) = self.kept.popitem(last=False)
        del self.last_used[number]
        self.num_bytes -= size
        return number

    def _end_read(self, number: int, size: int = 0, seconds: float = 0.0) -> None:
        """Mark a read as over; ``seconds`` is 0 if it failed."""
        with self.changed:
            self.reading.discard(number)
            self.changed.notify_all()
            if seconds:
                self.last_size = size
                self.read_s = (self.read_s + seconds) / 2 if self.read_s else seconds

    # -- the thread ------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the thread if it has something to do."""
        if (
            not self.wanted
            or self.read_s < SLOW_READ_S
            or self.thread.running is not None
            or self.thread.ended
        ):
            return
        if self._make_room():
            thread = threading.Thread(
                target=_read_wanted,
                args=(weakref.ref(self), self.thread, self.read),
                name="midstream-ahead",
                daemon=True,
            )
            # If the system allows no more threads, each value is read when it is needed.
            with contextlib.suppress(RuntimeError):
                thread.start()
                self.thread.running = thread

    def _make_room(self) -> bool:
        """Drop prefetched values that are overdue, and cached ones that are idle.

        Returns:
            Whether one more value may be read ahead.
        """
        limit = self.limit() - self.last_size
        while self.prefetched and next(iter(self.prefetched.values())).due < self.num_added:
            self.prefetched_bytes -= self.prefetched.popitem(last=False)[1].size
        while self.num_bytes + self.prefetched_bytes > limit and len(self.kept) > 1:
            unused_for = self.calls - self.last_used[next(iter(self.kept))]
            if unused_for <= _IDLE_CALLS * len(self.kept):
                break
            self._drop_oldest()
        return self.num_bytes + self.prefetched_bytes <= limit or not self.prefetched

    def next_wanted(self) -> int | None:
        """The number that the thread reads next; None ends the thread."""
        with self.changed:
            if not self.wanted or self.read_s < SLOW_READ_S or not self._make_room():
                self.thread.running = None
                return None
            number, _ = self.wanted.popitem(last=False)
            self.reading.add(number)
            return number

    def add_prefetched(self, number: int, found: tuple[T, int, float] | None) -> None:
        """Take the result of `_timed` from the thread; None if the read failed."""
        with self.changed:
            if found is None:
                self._end_read(number)
                return
            value, size, seconds = found
            self._end_read(number, size, seconds)
            due = self.num_added + len(self.prefetched) + 2 * _MAX_WANTED
            self.prefetched[number] = _Prefetched(value, size, due)
            self.prefetched_bytes += size


class _Thread:
    """The thread of a `ReadAheadCache`, if one runs.

    It is a separate object, so that the cache can be deleted while the thread reads.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.running: threading.Thread | None = None
        self.ended = False

    def end(self) -> None:
        """End the thread after the read in progress, and wait for it.

        It must not run C code while the interpreter exits.
        """
        self.ended = True
        thread = self.running
        if (
            thread is not None
            and self.pid == os.getpid()
            and thread is not threading.current_thread()
        ):
            thread.join(_JOIN_S)


def _timed(read: Callable[[int], tuple[T, int]], number: int) -> tuple[T, int, float]:
    """Read a value: the value, its size in bytes, and the seconds that it took."""
    start = time.perf_counter()
    value, size = read(number)
    return value, size, time.perf_counter() - start


def _read_wanted(
    owner: weakref.ref[ReadAheadCache[T]], state: _Thread, read: Callable[[int], tuple[T, int]]
) -> None:
    """Read one wanted value after the other: the thread's function."""
    while not state.ended:
        cache = owner()
        number = cache.next_wanted() if cache is not None else None
        del cache
        if number is None:
            return
        found = None
        with contextlib.suppress(BaseException):
            found = _timed(read, number)
        cache = owner()
        if cache is None:
            return
        cache.add_prefetched(number, found)
        del cache, found
