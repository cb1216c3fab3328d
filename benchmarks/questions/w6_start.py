"""W6: from nothing opened to the first batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import show
from contestants import everyone
from interface import SHUFFLED, Contestant, Work
from measure import Options, attempt

from questions import throughput

NAME, TITLE, KIND, SETS, ROUNDS = "W6", "Start-up", SHUFFLED, ("tokens",), 2
TEXT = (
    "Milliseconds from nothing opened (imports done) to the first batch of W1, flat. Started early:"
    " the workers were started three seconds before, while a model would load; the time is that of"
    " the first batch after that."
)
LEFT_OUT = ("limit", "limit-rows", "nodes-views", "midstream-stream")
MODES = ("0 workers", "2 workers, fork", "2 workers, spawn", "2 workers, spawn, started early")


def measure(contestant: Contestant, options: Options) -> dict[str, Any]:
    """Each way to start."""
    folders = options.folders("tokens")
    modes = {}
    attempt(
        lambda: _first(contestant, Work(SHUFFLED, folders))
    )  # imports, and files into the cache
    if 0 in contestant.workers:
        modes[MODES[0]] = attempt(lambda: _first(contestant, Work(SHUFFLED, folders)))
    starts = contestant.starts if options.scale != "tiny" else contestant.starts[:1]
    for start in starts:
        if 2 in contestant.workers:
            work = Work(SHUFFLED, folders, workers=2, start=start)
            modes[f"2 workers, {start}"] = attempt(lambda work=work: _first(contestant, work))  # type: ignore[misc]
    if contestant.ours and "spawn" in starts:
        work = Work(SHUFFLED, folders, workers=2, start="spawn")
        modes[MODES[3]] = attempt(lambda: _first(contestant, work, early=True))
    return {"modes": modes}


def _first(contestant: Contestant, work: Work, *, early: bool = False) -> dict[str, Any]:
    """Seconds to the first batch; with ``early`` from when the model is loaded, which takes three."""
    begin = time.perf_counter()
    reader = contestant.open(work)
    try:
        if early:
            reader.loader.start()
            time.sleep(3)
            begin = time.perf_counter()
        iterator = iter(reader)
        next(iterator)
        took = time.perf_counter() - begin
        del iterator
    finally:
        reader.close()
    return {"seconds": took}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    found = throughput.medians(rows, MODES, "seconds")
    known = everyone()
    names = [name for name in known if name in found]
    lines = [
        [show.bold(known[n].title, known[n].ours), *(found[n][mode].text(1e-3) for mode in MODES)]
        for n in names
    ]
    said = show.sentences(found, MODES[:3], known, 1e-3, less=True)
    return show.table(["milliseconds to the first batch", *MODES], lines) + "\n\n" + said


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars."""
    found = throughput.medians(rows, MODES, "seconds")
    show.bars(
        found,
        MODES[:3],
        everyone(),
        "milliseconds",
        1e-3,
        "W6: to the first batch",
        path,
        less=True,
    )
