"""W1: one data set, read once in shuffled order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interface import SHUFFLED, Contestant, Work
from measure import Options, Truth, attempt, rate

from questions import throughput

NAME, TITLE, KIND, SETS, ROUNDS = "W1", "Shuffled read", SHUFFLED, ("tokens",), 3
TEXT = (
    "One data set of tokenized documents (int32, mean length about 300) read in shuffled order, in batches of 32. Thousand "
    "documents a second."
)
MODES = {
    "0 workers, list": (0, "list"),
    "0 workers, flat": (0, "flat"),
    "2 workers, list": (2, "list"),
    "2 workers, padded": (2, "padded"),
    "2 workers, flat": (2, "flat"),
}
ONLY: tuple[str, ...] | None = None
LEFT_OUT = ("midstream-stream",)
UNIT, SCALE = "thousand documents a second", 1e3


def measure(contestant: Contestant, options: Options) -> dict[str, Any]:
    """The rate in each mode."""
    folders = options.folders("tokens")
    truth = Truth(folders)
    most = int(options.rows("tokens") * 0.8)
    modes = {}
    for mode, (workers, shape) in MODES.items():
        if workers in contestant.workers:
            work = Work(SHUFFLED, folders, shape, workers, start=contestant.starts[0])
            modes[mode] = attempt(
                lambda work=work: rate(contestant, work, options, most=most, truth=truth)
            )  # type: ignore[misc]
    return {"modes": modes}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    return throughput.report(rows, tuple(MODES), UNIT, SCALE)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars."""
    throughput.bars(rows, tuple(MODES), UNIT, SCALE, "W1: one data set in shuffled order", path)
