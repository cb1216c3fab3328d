"""Shows the progress of a check on one line: after a second, and removed at the end."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Ticker"]


class Ticker:
    """A line on standard error that shows which check runs.

    Args:
        shown: Whether to show it; None: if standard error is a terminal.
    """

    def __init__(self, shown: bool | None = None) -> None:
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._start = self._last = time.perf_counter()
        self._title, self._batches, self._wrote = "", 0, 0
        self._live: Any = None

    def show(self, title: str) -> None:
        """Shows the title of the check that begins."""
        self._title = title
        self._draw()

    def tick(self) -> None:
        """Counts another batch."""
        self._batches += 1
        if self._shown and time.perf_counter() - self._last > 0.2:
            self._draw()

    def _draw(self) -> None:
        now = time.perf_counter()
        if not self._shown or now - self._start < 1.0:
            return
        self._last = now
        text = f"{self._title}: {self._batches:,} batches read, {now - self._start:.0f} s"
        if self._live is None:
            try:
                from rich.console import Console
                from rich.status import Status
            except ImportError:
                self._live = False
            else:
                self._live = Status(text, console=Console(stderr=True, highlight=False))
                self._live.start()
        if self._live:
            self._live.update(text)
        else:
            line = text[:100]
            sys.stderr.write("\r" + line.ljust(self._wrote))
            sys.stderr.flush()
            self._wrote = len(line)

    def __enter__(self) -> Ticker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        elif self._wrote:
            sys.stderr.write("\r" + " " * self._wrote + "\r")
            sys.stderr.flush()
