"""Every notebook runs from top to bottom, and what is committed is what it printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the kernel's own libraries
    pytest.mark.filterwarnings("ignore::UserWarning:jupyter_client.*"),
]


def text_of(cell: Any) -> list[str]:
    """What a cell printed, without what varies from machine to machine."""
    outputs = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.get("outputs", [])
    ]
    return [re.sub(r"0x[0-9a-f]+|/\S+:\d+", "", text) for text in outputs]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_prints_what_is_committed(path: Path) -> None:
    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(fresh, timeout=180, kernel_name="python3").execute()
    for number, (old, new) in enumerate(zip(committed.cells, fresh.cells, strict=True)):
        assert text_of(new) == text_of(old), (
            f"cell {number}: run the notebook again and commit its outputs"
        )
        if new.cell_type == "code" and new.source.rstrip().endswith(
            ("samples", "loader.progress()")
        ):
            assert any("text/html" in output.get("data", {}) for output in new.outputs)
