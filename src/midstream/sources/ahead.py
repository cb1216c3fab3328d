"""What costs time to read, kept in bounded memory and read ahead of its need by one thread."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

WORTH_S = 0.02
"""Reading ahead starts where a read takes at least this long. Below it the reads of a whole window of 16 row groups hide
in a few training steps, and a thread that competes for the interpreter costs about what it gains."""

_ENOUGH = 16  # numbers that wait to be read: as many as a shuffle's window has blocks
_IDLE = 8  # times as many calls as there are things kept: shuffled, one in use is idle that long once in e**8
_JOIN_S = 5.0


class Ahead(Generic[T]):
    """Things by number: the ones used last are kept, and those that will be needed next are read in the background.

    Args:
        read: Reads one, and tells its size in bytes. Called by whoever asks, and by the thread: by several at once.
        limit: Bytes to keep. At least one thing is kept, however large.

    What is kept or waits to be asked for takes at most ``limit`` bytes and two things more (one that waits, one being
    read). For what waits, room is made by things that nobody used for long, never by those in use.

    A read that fails in the background is as if it had not been tried: whoever asks for that thing reads it again, and
    gets the error then and there; nobody hears of things that are not asked for.

    The thread lives while there is something to read and room for it, refers to this object only between two reads, and
    is waited for when the object goes and when the interpreter ends. A forked process must make its own object
    (`Dataset._handle` does); a copy that it inherits does nothing by itself.
    """

    def __init__(self, read: Callable[[int], tuple[T, int]], limit: Callable[[], int]) -> None:
        self.read, self.limit = read, limit
        self.kept: OrderedDict[int, tuple[T, int]] = OrderedDict()  # the one used last is the last
        self.num_bytes = 0  # of what is kept
        self.used: dict[int, int] = {}  # the call that used each of them last
        self.calls = 0
        self.cost = 0.0  # seconds that a read takes lately
        self.size = 0  # bytes of what was read last
        self.wanted: OrderedDict[int, None] = OrderedDict()
        self.reading: set[int] = set()
        self.waiting: OrderedDict[int, tuple[T, int]] = OrderedDict()
        self.waiting_bytes = 0
        self.changed = threading.Condition()
        self.thread = _Thread()
        weakref.finalize(self, self.thread.end)

    @property
    def hungry(self) -> bool:
        """Whether it is worth telling what comes next."""
        return self.cost >= WORTH_S and len(self.wanted) < _ENOUGH

    def at_hand_first(self, numbers: list[int]) -> list[int]:
        """The same numbers, those at hand first: otherwise a new one could push out one that is needed next."""
        with self.changed:
            return sorted(
                numbers, key=lambda n: 0 if n in self.kept else 1 if n in self.waiting else 3 if n in self.reading else 2
            )

    def get(self, number: int, dropped: Callable[[int], None]) -> tuple[T, bool]:
        """A thing, and whether it came just now; ``dropped`` hears which ones are kept no longer."""
        with self.changed:
            self.calls += 1
            self.wanted.pop(number, None)
            while number in self.reading and number not in self.kept:
                self.changed.wait()
            if number in self.kept:
                self.kept.move_to_end(number)
                self.used[number] = self.calls
                return self.kept[number][0], False
            if number in self.waiting:
                thing, size = self.waiting.pop(number)
                self.waiting_bytes -= size
                self._keep(number, thing, size, dropped)
                return thing, True
            self.reading.add(number)
        try:
            thing, size, cost = self._timed(number)
        except BaseException:
            with self.changed:
                self.reading.discard(number)
                self.changed.notify_all()
            raise
        with self.changed:
            self.reading.discard(number)
            self.changed.notify_all()
            self._measured(size, cost)
            self._keep(number, thing, size, dropped)
        return thing, True
