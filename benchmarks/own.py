"""What the programs without peers share: rounds in turn, where results go, and the table in
README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from run import CACHE, machine  # noqa: E402

Rows = Sequence[Mapping[str, Any]]


def in_turn(work: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of some rounds of each; all take turns, so that what else the machine does meets
    all alike.
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, measure in work.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


def main(
    name: str,
    doc: str,
    measure: Callable[[argparse.Namespace], Rows],
    report: Callable[[Rows], str],
    kept: str = "",
) -> None:
    """Measure, write ``results/NAME.json`` and the table in README.md; with ``--quick`` only print."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="less work; nothing is written but the file asked for"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    if kept:
        parser.add_argument("--cache", type=Path, default=CACHE, help=kept)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    begun = time.strftime("%Y-%m-%d")
    rows = measure(arguments)
    text = report(rows)
    print(text)
    target = arguments.json or (None if arguments.quick else HERE / "results" / f"{name}.json")
    if target is not None:
        found = {"begun": begun, "machine": machine(), "quick": arguments.quick, "rows": rows}
        target.write_text(json.dumps(found, indent=1) + "\n")
    if not arguments.quick and arguments.json is None:
        one = machine()
        put(
            HERE / "README.md",
            name,
            f"{text}\n\n{begun}, {one['cores']} cores ({one['processor']}), Python {one['python']}.",
        )


def put(page: Path, name: str, text: str) -> None:
    """Write a text between its marks in a page."""
    first, last = f"<!-- {name}: written by {name}.py -->", f"<!-- end of {name} -->"
    before, found, rest = page.read_text().partition(first)
    if not found:
        raise ValueError(f"{page} has no mark {first}")
    page.write_text(f"{before}{first}\n\n{text}\n\n{last}{rest.partition(last)[2]}")
