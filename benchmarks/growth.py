"""Measures how cost grows: microseconds for one batch against sources, lanes, workers, buffer sizes
and position.

    python benchmarks/growth.py [--quick] [--json FILE] [--plot FILE] [--only NAME ...]

Two figures: one batch of 8 samples pulled from the loader, whose state is kept for every batch (the
median over blocks of batches, best of some rounds; of processor time, with workers of wall time),
and ``state_dict()``, which writes that state out and so grows with what there is to write. Data
takes no memory and no time, so nothing but the pipeline is measured. The figures go to
``benchmarks/results/growth.json`` and ``growth.png`` unless an option says otherwise
(needs matplotlib: the extra ``bench``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import midstream as ms
from midstream.common.plain_state import encode, seal
from midstream.dataset import Dataset

warnings.filterwarnings("ignore", message=".*set_vital.*|.*worker processes in total.*")

RESULTS = Path(__file__).parent / "results"
ROWS = 1 << 14
BATCH = 8


def yes(sample: Any) -> bool:
    return True


class Numbers:
    """Rows that cost next to nothing and take no memory: the number of a row."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> int:
        return row


def mix(sources: int, stream: bool, rows: int = ROWS) -> Dataset:
    parts: dict[str, Dataset] = {}
    for number in range(sources):
        part = ms.from_dataset(Numbers(rows), name=f"s{number:03d}").shuffle(number)
        parts[f"s{number:03d}"] = part.filter(yes) if stream else part
    return (ms.interleave(parts) if sources > 1 else next(iter(parts.values()))).repeat()


def loader(ds: Dataset, **options: Any) -> ms.DataLoader:
    return ms.DataLoader(ds, batch_size=BATCH, **options)


Make = Callable[[], ms.DataLoader]

QUESTIONS: dict[str, tuple[str, list[int], Callable[[int, bool], ms.DataLoader]]] = {
    "sources": ("sources mixed", [1, 3, 10, 30, 100, 400], lambda n, s: loader(mix(n, s))),
    "lanes": ("lanes", [1, 4, 16, 64, 256, 1024], lambda n, s: loader(mix(3, s), lanes=n)),
    "workers": ("worker processes", [0, 1, 2, 4, 8], lambda n, s: loader(mix(3, s), num_workers=n)),
    "buffer": (
        "buffer_size of a stream shuffle",
        [10, 100, 1000, 10_000, 100_000],
        lambda n, s: loader(mix(3, True, 1 << 20).shuffle(1, buffer_size=n), lanes=8),
    ),
    "window": (
        "window of pack(mode='fit')",
        [16, 64, 256, 1024],
        lambda n, s: loader(mix(3, True).map(document).pack(256, mode="fit", window=n), lanes=8),
    ),
    "position": (
        "batches before",
        [10, 1000, 100_000, 10_000_000, 1_000_000_000],
        lambda n, s: placed(n),
    ),
}
BOTH = ("sources", "lanes", "workers")


def document(sample: int) -> dict[str, Any]:
    return {"input_ids": np.full(8 + sample % 100, 7, dtype=np.int32)}


def placed(batches: int) -> ms.DataLoader:
    """A loader resumed after so many batches, from a state that is made by hand."""
    made = loader(mix(3, False), lanes=1)
    next(iter(made))
    state = made.state_dict()
    state["batches"] = state["steps_done"] = batches
    lane = json.loads(state["lanes"]["0000"])
    del lane["crc"]
    lane["at"] = [0, batches, batches, *lane["at"][3:]]
    state["lanes"]["0000"] = seal(encode(lane))
    made.load_state_dict(state)
    return made


def measure(make: Make, batches: int, rounds: int) -> dict[str, float]:
    """Microseconds for a batch and for ``state_dict()``, milliseconds to the first batch, bytes of
    the state.
    """
    steps, states, firsts = [], [], []
    size = 0
    for _ in range(rounds):
        made = make()
        start = time.perf_counter()
        iterator = iter(made)
        next(iterator)
        firsts.append((time.perf_counter() - start) * 1e3)
        # Every lane has opened its sources, and chunks have grown to what they will be.
        for _ in itertools.islice(iterator, max(256, batches // 2, 4 * (made.lanes or 48))):
            pass
        # With no workers all is done in this process, so its own time is it, whatever else the
        # machine does.
        clock = time.perf_counter if made.num_workers else time.process_time
        blocks = []
        for _ in range(8):
            start = clock()
            for _ in itertools.islice(iterator, batches // 8):
                pass
            blocks.append((clock() - start) / (batches // 8) * 1e6)
        steps.append(statistics.median(blocks))
        start = time.process_time()
        for _ in range(32):
            state = made.state_dict()
        states.append((time.process_time() - start) / 32 * 1e6)
        size = len(json.dumps({key: value for key, value in state.items() if key != "spec"}))
        del iterator
        made.close()
    return {
        "step µs": round(min(steps), 1),
        "state_dict µs": round(min(states), 1),
        "first batch ms": round(min(firsts), 1),
        "bytes": size,
    }


def run(names: list[str], batches: int, rounds: int) -> list[dict[str, Any]]:
    found = []
    for name in names:
        label, values, make = QUESTIONS[name]
        for stream in (False, True) if name in BOTH else (name != "position",):
            for value in values:
                row = {
                    "question": name,
                    "label": label,
                    "access": "stream" if stream else "random access",
                    "value": value,
                }
                row |= measure(
                    lambda make=make, value=value, stream=stream: make(value, stream),
                    batches,
                    rounds,
                )  # type: ignore[misc]
                found.append(row)
                print(
                    f"{name:10} {row['access']:14} {value:>13,}  "
                    + "  ".join(f"{k} {row[k]:>8}" for k in list(row)[4:])
                )
    return found


def plot(rows: list[dict[str, Any]], path: Path, machine: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in QUESTIONS if any(row["question"] == name for row in rows)]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    colours = {"random access": "tab:blue", "stream": "tab:orange"}
    for axis, name in zip(axes.flat, names):
        here = [row for row in rows if row["question"] == name]
        for access in dict.fromkeys(row["access"] for row in here):
            values = [row["value"] for row in here if row["access"] == access]
            for kind, style in (("step µs", "o-"), ("state_dict µs", "s:")):
                figures = [row[kind] for row in here if row["access"] == access]
                axis.plot(
                    values,
                    figures,
                    style,
                    color=colours[access],
                    label=f"{access}: {kind[:-3]}",
                    markersize=4,
                )
        if name == "workers":
            axis.set_xticks([row["value"] for row in here])
        else:
            axis.set_xscale("log")
        axis.set_xlabel(here[0]["label"])
        axis.set_ylabel("µs a batch")
        axis.set_yscale("log")
        axis.set_ylim(5, 50_000)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    figure.suptitle(
        f"What a batch of {BATCH} costs, and writing the state out ({machine})", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer batches, one round")
    parser.add_argument("--json", type=Path, default=RESULTS / "growth.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "growth.png")
    parser.add_argument("--only", nargs="*", default=list(QUESTIONS), choices=list(QUESTIONS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(options.only, 400 if options.quick else 2000, 1 if options.quick else 3)
    machine = (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"machine": machine, "rows": rows}, indent=1, ensure_ascii=False) + "\n"
    )
    plot(rows, options.plot, machine)


if __name__ == "__main__":
    main()
