"""W3: the mix, packed on the fly to 2,048 tokens, in batches of 8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interface import PACK, ROWS_PACKED, SEQ_LEN, Contestant, Work
from measure import Options, attempt, rate

from questions import throughput

NAME, TITLE, KIND, SETS, ROUNDS = "W3", "Mix and pack to 2,048 tokens", PACK, ("mix",), 3
TEXT = (
    "The mix of W2, joined and cut to rows of 2,048 int64 tokens, in batches of 8. Million tokens a second. midstream also makes "
    "labels, positions and piece lengths, Grain positions and segment ids; the others make the ids alone."
)
MODES = {"0 workers": 0, "2 workers": 2}
LEFT_OUT = ("midstream-stream",)
UNIT, SCALE = "million tokens a second", 1e6


def measure(contestant: Contestant, options: Options) -> dict[str, Any]:
    """The rate in each mode."""
    folders = options.folders("mix")
    most = int(options.rows("mix") * 296 * 0.6) // SEQ_LEN
    modes = {}
    for mode, workers in MODES.items():
        if workers in contestant.workers:
            work = Work(PACK, folders, "flat", workers, start=contestant.starts[0])
            modes[mode] = attempt(lambda work=work: _tokens(contestant, work, options, most))  # type: ignore[misc]
    return {"modes": modes}


class _Shape:
    """Every batch is 8 rows of 2,048 int64 tokens."""

    def check(self, batch: Any) -> None:
        tokens = batch["input_ids"] if isinstance(batch, dict) else batch
        if tuple(tokens.shape) != (ROWS_PACKED, SEQ_LEN):
            raise ValueError(f"a batch of shape {tuple(tokens.shape)}")


def _tokens(contestant: Contestant, work: Work, options: Options, most: int) -> dict[str, Any]:
    result = rate(contestant, work, options, most=most, warm_up=3, truth=_Shape())
    return result | {"per_second": result["per_second"] * SEQ_LEN}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    return throughput.report(rows, tuple(MODES), UNIT, SCALE)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars."""
    throughput.bars(
        rows, tuple(MODES), UNIT, SCALE, "W3: mix, packed on the fly to 2,048 tokens", path
    )
