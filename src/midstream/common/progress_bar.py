"""A progress bar over whatever takes longer than a second."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from torch.utils.data import get_worker_info

__all__ = ["watched"]

T = TypeVar("T")

_AFTER_S = 1.0
_OFF = ("", "0", "false", "no", "off")


def watched(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items; from the second second on, a bar on standard error says how far they are, and goes when they end.

    Args:
        items: What is looked through; anything that takes long happens while they are iterated.
        what: What is done, in words; read beside the bar.
        total: How many there are; None: ``len(items)``, where they have one.

    The bar is tqdm's. It is there only where someone looks: at a terminal or in a notebook, in the
    main process, on the first rank; and not where ``TQDM_DISABLE`` is set or
    `datasets.disable_progress_bars` was called.

    >>> [name.upper() for name in watched(["a", "b"], "shouting")]
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
                bar = _open(
                    what, len(items) if total is None and isinstance(items, Sized) else total
                )
                bar.n = done
                bar.start_t -= time.perf_counter() - begin
                bar.refresh()
    finally:
        if bar is not None:
            bar.close()


def _open(what: str, total: int | None) -> Any:
    # Not before it is shown: the import takes a while, and tqdm makes a lock shared by processes.
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread that outlives it

    return Bar(
        desc=what,
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
    datasets = sys.modules.get("datasets")  # who has not imported it has not switched its bars off
    if datasets is not None and datasets.are_progress_bars_disabled():
        return False
    return _in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in _OFF


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
