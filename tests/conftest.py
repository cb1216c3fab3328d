"""Shared by all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# The same examples in every CI run, so that it can be repeated; new ones on each run by hand, which is where they are sought.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def _private_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MIDSTREAM_CACHE"] = str(tmp_path_factory.mktemp("midstream-cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("hf-cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"
