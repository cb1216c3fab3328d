"""W2: three data sets mixed 0.7 / 0.2 / 0.1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interface import MIX, Contestant, Work
from measure import Options, Truth, attempt, rate, take_ids
from prepare import FAR

from questions import throughput

NAME, TITLE, KIND, SETS, ROUNDS = "W2", "Mix of three", MIX, ("mix",), 3
TEXT = (
    "Three data sets of such documents, each shuffled, mixed 0.7 / 0.2 / 0.1, in batches of 32. Thousand documents a second; "
    "shares are of 2,000 documents."
)
MODES = {
    "0 workers, list": (0, "list"),
    "2 workers, padded": (2, "padded"),
    "2 workers, flat": (2, "flat"),
}
LEFT_OUT = ("midstream-stream",)
UNIT, SCALE = "thousand documents a second", 1e3


def _shares(iterator: Any) -> dict[str, Any]:
    try:
        counts = Counter(number // FAR for number in take_ids(iterator, 2000))
    except StopIteration:
        return {}
    return {"shares": [round(counts[part] / 2000, 3) for part in range(3)]}


def measure(contestant: Contestant, options: Options) -> dict[str, Any]:
    """The rate in each mode."""
    folders = options.folders("mix")
    truth = Truth(folders)
    most = int(options.rows("mix") * 0.6)
    modes = {}
    for mode, (workers, shape) in MODES.items():
        if workers in contestant.workers:
            work = Work(MIX, folders, shape, workers, start=contestant.starts[0])
            modes[mode] = attempt(
                lambda work=work: rate(
                    contestant, work, options, most=most, truth=truth, after=_shares
                )  # type: ignore[misc]
            )
    return {"modes": modes}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    return throughput.report(rows, tuple(MODES), UNIT, SCALE)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars."""
    throughput.bars(
        rows, tuple(MODES), UNIT, SCALE, "W2: three data sets mixed 0.7 / 0.2 / 0.1", path
    )
