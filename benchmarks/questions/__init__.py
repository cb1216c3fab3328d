"""The questions, one file each: what is asked, of whom, how it is measured, and how the answers are shown.

A question is a module with NAME, TITLE, TEXT, SETS (data sets it reads), KIND, ROUNDS,
`contestants()`, `measure(contestant, options)`, which runs in the contestant's environment, and
`report(rows)` and `plot(rows, path)`, which run in ours.
"""

from __future__ import annotations

import importlib
from typing import Any

MODULES = {
    "W1": "w1_shuffled",
    "W2": "w2_mix",
    "W3": "w3_pack",
    "W4": "w4_resume",
    "W5": "w5_snapshots",
    "W6": "w6_start",
    "W7": "w7_remote",
    "W8": "w8_images",
    "M": "memory",
}


def load(name: str) -> Any:
    """The module of a question."""
    return importlib.import_module(f"questions.{MODULES[name]}")
