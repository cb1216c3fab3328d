"""The contestants, one file a library. importing one imports no library, for they are not all
installed everywhere.
"""

from __future__ import annotations

import importlib

from interface import Contestant

MODULES = (
    "limit",
    "midstream",
    "torch_loaders",
    "nodes",
    "grain",
    "mosaic",
    "litdata",
    "webdataset",
)
"""Each has a list of its contestants, ALL."""


def everyone() -> dict[str, Contestant]:
    """Name -> contestant, in the order of the tables."""
    found: dict[str, Contestant] = {}
    for module in MODULES:
        for kind in importlib.import_module(f"contestants.{module}").ALL:
            found[kind.name] = kind()
    return found
