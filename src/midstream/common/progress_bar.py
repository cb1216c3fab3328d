"""with_progress_bar: a tqdm bar for loops that take longer than a second."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from torch.utils.data import get_worker_info

__all__ = ["with_progress_bar"]

T = TypeVar("T")

_AFTER_S = 1.0
_OFF_VALUES = ("", "0", "false", "no", "off")


def with_progress_bar(items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
    """Yield the items; after one second, show a progress bar on standard error until they end.

    The bar is tqdm's. It is shown only at a terminal or in a notebook, in the main process, on the
    first rank, and unless ``TQDM_DISABLE`` is set or `datasets.disable_progress_bars` was called.

    Args:
        items: The items to iterate over; the work is done while they are iterated.
        text: Label beside the bar.
        total: Number of items; None: ``len(items)``, where they have a length.

    >>> [name.upper() for name in with_progress_bar(["a", "b"], "shouting")]
    ['A', 'B']
    """
    begin, done = time.perf_counter(), 0
    bar: Any = None
    wanted = _is_wanted()
    try:
        for item in items:
            yield item
            done += 1
            if bar is not None:
                bar.update()
            elif wanted and time.perf_counter() - begin > _AFTER_S:
                if total is None and isinstance(items, Sized):
                    total = len(items)
                bar = _open_bar(text, total)
                bar.n = done
                bar.start_t -= time.perf_counter() - begin
                bar.refresh()
    finally:
        if bar is not None:
            bar.close()


def _open_bar(text: str, total: int | None) -> Any:
    # Imported on first use: the import takes a while, and tqdm creates a lock shared by processes.
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no monitor thread, which would outlive the bar

    return Bar(
        desc=text,
        total=total,
        file=sys.stderr,
        delay=_AFTER_S,
        leave=False,
        disable=False,
        dynamic_ncols=True,
    )


def _is_wanted() -> bool:
    if (
        get_worker_info() is not None
        or multiprocessing.parent_process() is not None
        or _is_set("RANK")
    ):
        return False
    if _is_set("TQDM_DISABLE") or _is_set("HF_DATASETS_DISABLE_PROGRESS_BARS"):
        return False
    datasets = sys.modules.get("datasets")  # if it is not imported, its bars are not disabled
    if datasets is not None and datasets.are_progress_bars_disabled():
        return False
    return _in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in _OFF_VALUES


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
