"""A packed batch, opened in the main process."""

from __future__ import annotations

import pickle
from typing import Any

from torch.utils.data._utils import pin_memory

from midstream.transport.arena import lease_slot, open_arenas


class Parcel:
    """A packed value, on its way to the main process or arrived there.

    Args:
        header: The pickle.
        spans: Where in the buffer the bytes of each tensor and array are: start, size, start, size,
            and so on.
        body: The buffer, when it travels through the queue; for a slot its size, and after arrival
            the slot's bytes.
        slot: ``(token of the arena, number of the slot)``, or None.
        notice: A warning for the loader, or "".
    """

    __slots__ = ("_body", "_header", "_opened", "_slot", "_spans", "notice")

    def __init__(
        self,
        header: bytes,
        spans: list[int],
        body: Any,
        slot: tuple[bytes, int] | None,
        notice: str,
    ) -> None:
        self._header, self._spans, self._body, self._slot = header, spans, body, slot
        self.notice = notice
        self._opened: tuple[Any] | None = None

    def __reduce__(self) -> Any:
        return _arrive, (self._header, self._spans, self._body, self._slot, self.notice)

    @property
    def size(self) -> int:
        """Total bytes of tensors and arrays."""
        return self._body if isinstance(self._body, int) else len(self._body)

    def open(self) -> Any:
        """Unpickles the value. Call it once."""
        if self._opened is not None:
            return self._opened[0]
        body, spans, self._body = self._body, iter(self._spans), None
        view = memoryview(bytearray(body) if self._slot is None else body)
        return pickle.loads(
            self._header, buffers=[view[start : start + size] for start, size in zip(spans, spans)]
        )

    def pin_memory(self) -> Parcel:
        """Opens the value and copies it to pinned memory, which frees the slot.

        Called by torch's pin-memory thread.
        """
        self._opened = (pin_memory.pin_memory(self.open()),)  # type: ignore[no-untyped-call]
        return self


def _arrive(
    header: bytes, spans: list[int], body: Any, slot: tuple[bytes, int] | None, notice: str
) -> Parcel:
    """Unpickles a parcel in the main process.

    Leases the slot at once, so that also a parcel that is never opened frees it.
    """
    if slot is not None:
        token, number = slot
        arena = open_arenas[token]
        body = lease_slot(arena.memory(number, body), body, arena.used, number)
    return Parcel(header, spans, body, slot, notice)
