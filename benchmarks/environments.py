"""Where contestants run. A peer whose pins conflict with ours has an environment of its own, made under the cache folder.

"main" is the environment that runs the benchmarks (``pip install '.[bench]'``). torch comes first
in each, so that one build is chosen for everything after it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCH = "torch==2.13.0"
PACKAGES: dict[str, tuple[str, ...]] = {
    "grain": (
        "grain==0.2.18",
        "pyarrow==26.0.1",
        "numpy==2.4.6",
        "cloudpickle==3.1.3",
        "pillow==13.0.0",
    ),
    "webdataset": ("webdataset==1.0.2", "numpy==2.4.6", "pillow==13.0.0"),
    "litdata": ("litdata==0.2.76", "numpy==2.4.6", "pillow==13.0.0"),
    "mosaic": ("mosaicml-streaming==0.13.0", "numpy==2.1.3", "pillow==13.0.0"),
}


def python_of(environment: str, cache: Path) -> str:
    """The interpreter of an environment."""
    if environment == "main":
        return sys.executable
    return str(cache / "environments" / environment / "bin" / "python")


def make(environment: str, cache: Path, pip_arguments: Sequence[str] = ()) -> None:
    """Make an environment, if it is not there yet.

    Raises:
        RuntimeError: If it cannot be made; with what pip said last.
    """
    if environment == "main":
        return
    folder = cache / "environments" / environment
    wanted = "\n".join((TORCH, *PACKAGES[environment]))
    made = folder / "made.txt"
    if made.exists() and made.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    python = python_of(environment, cache)
    steps = [[sys.executable, "-m", "venv", str(folder)]]
    for packages in ((TORCH,), (TORCH, *PACKAGES[environment])):
        steps.append(
            [
                python,
                "-m",
                "pip",
                "install",
                "-q",
                "--disable-pip-version-check",
                *pip_arguments,
                *packages,
            ]
        )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, timeout=1200)
        if done.returncode:
            raise RuntimeError(
                f"environment {environment!r} could not be made: {done.stderr.strip().splitlines()[-1:]}"
            )
    made.write_text(wanted)
