"""A packed batch, and opening it in the main process."""

from __future__ import annotations

import pickle
from typing import Any

from torch.utils.data._utils import pin_memory

from midstream.transport.arena import lease_slot, open_arenas


class Parcel:
    """A packed value, on its way or arrived.

    Attributes:
        notice: What the loader should warn of, or "".
    """

    __slots__ = ("_body", "_header", "_opened", "_route", "_spans", "notice")

    def __init__(
        self,
        header: bytes,
        spans: list[int],
        body: Any,
        route: tuple[bytes, int] | None,
        notice: str,
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
        return pickle.loads(
            self._header, buffers=[view[start : start + size] for start, size in zip(spans, spans)]
        )

    def pin_memory(self) -> Parcel:
        """The same in pinned memory: what torch's thread calls. The slot is free after it."""
        self._opened = (pin_memory.pin_memory(self.open()),)  # type: ignore[no-untyped-call]
        return self


def _arrive(
    header: bytes, spans: list[int], body: Any, route: tuple[bytes, int] | None, notice: str
) -> Parcel:
    """In the main process: hold the slot from now on, so that a parcel that nobody opens gives it
    back too.
    """
    if route is not None:
        token, slot = route
        arena = open_arenas[token]
        body = lease_slot(arena.room(slot, body), body, arena.used, slot)
    return Parcel(header, spans, body, route, notice)
