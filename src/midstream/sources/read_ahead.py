"""What costs time to read, kept in bounded memory and read ahead of its need by one thread."""

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

WORTH_S = 0.02
"""Reading ahead starts where a read takes at least this long. Below it a whole window of 16 row groups is read in the time
of a few training steps, and a thread that competes for the interpreter costs about what it
gains."""

_ENOUGH = 16  # numbers that wait to be read: as many as a shuffle's window has blocks
_IDLE = 8  # calls for each thing kept: of n in use at random, one stays unused for 8 n calls once in e**8 times
_JOIN_S = 5.0


class _Waits(NamedTuple):
    """Something read ahead that nobody has asked for so far; ``due``: the count of things kept by
    which one should have.
    """

    thing: Any
    size: int
    due: int


class Ahead(Generic[T]):
    """Things by number: the ones used last are kept, and those that will be needed next are read in the background.

    Args:
        read: Reads one, and tells its size in bytes. Called by whoever asks, and by the thread: by
            several at once.
        limit: Bytes to keep. At least one thing is kept, however large.

    What is kept and what waits to be asked for take at most ``limit`` bytes, and two things more:
    one that waits, one being read. Room for what waits is made by what nobody used for long, never
    by what is in use.

    A read that fails in the background is as if it had not been tried: whoever asks for that thing
    reads it again and gets the error then and there, and nobody hears of things that are not asked
    for.

    The thread lives while there is something to read and room for it. Between two reads it lets go
    of this object; it is waited for when the object goes, and when the interpreter ends. A forked
    process makes an object of its own (`Dataset._handle` sees to it); the copy it inherits does
    nothing by itself.
    """

    def __init__(self, read: Callable[[int], tuple[T, int]], limit: Callable[[], int]) -> None:
        self.read, self.limit = read, limit
        self.kept: OrderedDict[int, tuple[T, int]] = (
            OrderedDict()
        )  # with their sizes; the one used last is the last
        self.num_bytes = 0  # of these
        self.used: dict[int, int] = {}  # the call that used each of them last
        self.calls = self.arrived = (
            0  # how often something was asked for; how often it had to be brought
        )
        self.cost = 0.0  # seconds that a read takes, lately
        self.size = 0  # bytes of what was read last
        self.wanted: OrderedDict[int, None] = OrderedDict()
        self.reading: set[int] = set()
        self.waiting: OrderedDict[int, _Waits] = OrderedDict()
        self.waiting_bytes = 0
        self.changed = threading.Condition()  # guards all of these
        self.thread = _Thread()
        weakref.finalize(self, self.thread.end)

    @property
    def hungry(self) -> bool:
        """Whether to tell what comes next."""
        return self.cost >= WORTH_S and len(self.wanted) < _ENOUGH

    def at_hand_first(self, numbers: list[int]) -> list[int]:
        """The same numbers, those at hand first: otherwise a new one could push out one that is
        needed next.
        """

        def order(number: int) -> int:
            return (
                0
                if number in self.kept
                else 1
                if number in self.waiting
                else 3
                if number in self.reading
                else 2
            )

        with self.changed:
            return sorted(numbers, key=order)

    def get(self, number: int, dropped: Callable[[int], None]) -> tuple[T, bool]:
        """A thing, and whether it was brought just now; ``dropped`` hears which ones are kept no
        longer.
        """
        try:
            with self.changed:
                self.calls += 1
                foreseen = number in self.wanted or number in self.reading
                self.wanted.pop(number, None)
                while number in self.reading:
                    self.changed.wait()
                if number in self.kept:
                    self.kept.move_to_end(number)
                    self.used[number] = self.calls
                    self._start()
                    return self.kept[number][0], False
                waits = self.waiting.pop(number, None)
                if waits is not None:
                    self.waiting_bytes -= waits.size
                    self._keep(number, waits.thing, waits.size, dropped)
                    return waits.thing, True
                if not foreseen:
                    self.wanted.clear()  # someone went elsewhere
                self.reading.add(number)
            thing, size, cost = _timed(self.read, number)
            with self.changed:
                self._done(number, size, cost)
                self._keep(number, thing, size, dropped)
        except (
            BaseException
        ):  # Ctrl-C too, at any place: who asks again must not wait for a read that is over
            self._done(number)
            raise
        return thing, True

    def want(self, numbers: Iterable[int]) -> None:
        """These will be asked for next, in this order. Only a hint."""
        if self.calls and self.cost < WORTH_S:
            return
        with self.changed:
            for number in numbers:
                if (
                    number not in self.kept
                    and number not in self.waiting
                    and number not in self.reading
                ):
                    self.wanted[number] = None
            self._start()

    def _keep(self, number: int, thing: T, size: int, dropped: Callable[[int], None]) -> None:
        self.arrived += 1
        self.kept[number], self.used[number] = (thing, size), self.calls
        self.num_bytes += size
        while self.num_bytes > self.limit() and len(self.kept) > 1:
            dropped(self._drop_oldest())
        while len(self.waiting) > 1 and self.num_bytes + self.waiting_bytes > self.limit():
            self.waiting_bytes -= self.waiting.popitem()[1].size  # the one needed last
        self._start()

    def _drop_oldest(self) -> int:
        number, (_, size) = self.kept.popitem(last=False)
        del self.used[number]
        self.num_bytes -= size
        return number

    def _done(self, number: int, size: int = 0, cost: float = 0.0) -> None:
        with self.changed:
            self.reading.discard(number)
            self.changed.notify_all()
            if cost:
                self.size, self.cost = size, (self.cost + cost) / 2 if self.cost else cost

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the thread where there is something for it to do."""
        if (
            not self.wanted
            or self.cost < WORTH_S
            or self.thread.running is not None
            or self.thread.ended
        ):
            return
        if self._room():
            thread = threading.Thread(
                target=_read_on,
                args=(weakref.ref(self), self.thread, self.read),
                name="midstream-ahead",
                daemon=True,
            )
            with contextlib.suppress(
                RuntimeError
            ):  # none is to be had: then everything is read when it is needed
                thread.start()
                self.thread.running = thread

    def _room(self) -> bool:
        """Whether one more may be read ahead. Makes room of what nobody used for long, or did not
        ask for after all.
        """
        limit = self.limit() - self.size
        while self.waiting and next(iter(self.waiting.values())).due < self.arrived:
            self.waiting_bytes -= self.waiting.popitem(last=False)[1].size
        while self.num_bytes + self.waiting_bytes > limit and len(self.kept) > 1:
            if self.calls - self.used[next(iter(self.kept))] <= _IDLE * len(self.kept):
                break
            self._drop_oldest()
        return self.num_bytes + self.waiting_bytes <= limit or not self.waiting

    def next_wanted(self) -> int | None:
        """What the thread reads next; None ends it."""
        with self.changed:
            if not self.wanted or self.cost < WORTH_S or not self._room():
                self.thread.running = None
                return None
            number, _ = self.wanted.popitem(last=False)
            self.reading.add(number)
            return number

    def came(self, number: int, found: tuple[T, int, float] | None) -> None:
        """What the thread read, or None where it failed."""
        with self.changed:
            if found is None:
                self._done(number)
                return
            thing, size, cost = found
            self._done(number, size, cost)
            self.waiting[number] = _Waits(
                thing, size, self.arrived + len(self.waiting) + 2 * _ENOUGH
            )
            self.waiting_bytes += size


class _Thread:
    """The thread of an `Ahead`, if it runs; apart from it, so that it can go while the thread
    reads.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.running: threading.Thread | None = None
        self.ended = False

    def end(self) -> None:
        """Let it end after the read in progress, and wait for that: it must not be in C code when
        the interpreter goes.
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
    start = time.perf_counter()
    thing, size = read(number)
    return thing, size, time.perf_counter() - start


def _read_on(
    owner: weakref.ref[Ahead[T]], state: _Thread, read: Callable[[int], tuple[T, int]]
) -> None:
    while not state.ended:
        ahead = owner()
        number = ahead.next_wanted() if ahead is not None else None
        del ahead
        if number is None:
            return
        found = None
        with contextlib.suppress(BaseException):
            found = _timed(read, number)
        ahead = owner()
        if ahead is None:
            return
        ahead.came(number, found)
        del ahead, found
