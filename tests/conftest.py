"""Shared by all tests."""

from __future__ import annotations

import multiprocessing
import os

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every CI run, so that it can be repeated; new ones on each run by hand, which
# is where they are sought. How long an example takes says more of the machine than of the code:
# nothing fails for it.
patient = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("hand", **patient)
settings.register_profile("ci", derandomize=True, **patient)
settings.load_profile("ci" if os.environ.get("CI") else "hand")

# What the processes of a fork server need, imported there once.
multiprocessing.set_forkserver_preload(
    ["midstream", "datasets", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def _private_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MIDSTREAM_CACHE"] = str(tmp_path_factory.mktemp("midstream-cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("hf-cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"
