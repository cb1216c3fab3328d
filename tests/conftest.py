"""Shared by all tests: options, markers, and caches of their own."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import (
    HealthCheck,
    is_hypothesis_test,  # type: ignore[attr-defined,unused-ignore]
    settings,
)

from tests.cases import CASES, CORE

# How long an example takes says more of the machine than of the code: nothing fails for it.
patient = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("same", derandomize=True, **patient)
settings.register_profile("explore", **patient)
settings.load_profile("same")

TRAINERS = Path(__file__).parent / "trainers"
EXAMPLES_OF_CORE = 10  # of a hypothesis test, with ``-m core``

# What the processes of a fork server need, imported there once.
multiprocessing.set_forkserver_preload(
    ["midstream", "datasets", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--explore",
        action="store_true",
        help="hypothesis tries new examples; without it every run tries the same ones",
    )


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("explore" if config.getoption("--explore") else "same")


def starts_processes(item: pytest.Item) -> bool:
    """Whether a test is marked so, or its parameters ask for workers."""
    parameters = getattr(item, "callspec", None)
    workers = parameters.params.get("workers") if parameters is not None else None
    return item.get_closest_marker("processes") is not None or bool(workers)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Trainers are not in the inner loop: importing them alone takes seconds."""
    return True if config.option.markexpr == "core" and collection_path == TRAINERS else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark rows of cases.py as `matrix` but for a few, and what is left for the inner loop as
    `core`.
    """
    for item in items:
        parameters = getattr(item, "callspec", None)
        row = parameters.params.get("row") if parameters is not None else None
        if row in CASES and row not in CORE:
            item.add_marker("matrix")
        elif starts_processes(item):
            item.add_marker("processes")
        others = any(item.get_closest_marker(name) for name in ("matrix", "slow", "processes"))
        if not others and TRAINERS not in item.path.parents:
            item.add_marker("core")
    if config.option.markexpr == "core":
        for item in items:
            test = getattr(item, "obj", None)
            if test is not None and is_hypothesis_test(test):
                given = getattr(test, "_hypothesis_internal_use_settings", settings())
                few = min(given.max_examples, EXAMPLES_OF_CORE)
                test._hypothesis_internal_use_settings = settings(given, max_examples=few)


@pytest.fixture(autouse=True, scope="session")
def _private_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MIDSTREAM_CACHE"] = str(tmp_path_factory.mktemp("midstream-cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("hf-cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"
