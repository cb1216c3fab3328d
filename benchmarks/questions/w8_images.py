"""W8: pictures, where the user's function dominates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from interface import IMAGES, Contestant, Work
from measure import Options, attempt, rate

from questions import throughput

NAME, TITLE, KIND, SETS, ROUNDS = "W8", "Images", IMAGES, ("images",), 2
TEXT = (
    "JPEG files of 512 x 384 decoded, cropped and scaled to 224 x 224 by Pillow in the user's function, batches of 16 as uint8 "
    "tensors. Images a second. The limit is the bare function in a loop; with 2 workers, in two processes that send nothing."
)
MODES = {"0 workers": 0, "2 workers": 2}
LEFT_OUT = ("midstream-stream", "nodes-views")
UNIT, SCALE = "images a second", 1.0


def measure(contestant: Contestant, options: Options) -> dict[str, Any]:
    """The rate in each mode."""
    folders = options.folders("images")
    options = replace(options, seconds=options.seconds * 2)
    modes = {}
    for mode, workers in MODES.items():
        if workers in contestant.workers or contestant.limit:
            work = Work(IMAGES, folders, "flat", workers, 16, start=contestant.starts[0])
            rows = options.rows("images")
            how = (
                {"most": rows - 160, "warm_up": 4}
                if rows > 400
                else {"most": rows - 48, "warm_up": 1}
            )
            modes[mode] = attempt(lambda work=work, how=how: rate(contestant, work, options, **how))  # type: ignore[misc]
    return {"modes": modes}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    return throughput.report(rows, tuple(MODES), UNIT, SCALE)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars."""
    throughput.bars(
        rows, tuple(MODES), UNIT, SCALE, "W8: images decoded by the user's function", path
    )
