"""What all tests share: one CPU thread, no network from Flower, and real images only where they are named."""

from __future__ import annotations

import os
from pathlib import Path

# One thread in the processes that tests start as well, and none that spins while it waits: the tests share the cores with each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import cdfkd_strategy.flower  # noqa: F401 - its first act keeps Flower and Ray from phoning anybody

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `real_data` tests unless CDFKD_DATA names the folder of the image files, and `gpu` tests where torch sees no CUDA device."""
    missing = {"real_data": not os.environ.get("CDFKD_DATA"), "gpu": not torch.cuda.is_available()}
    wanting = [item for item in items if any(lacks and item.get_closest_marker(name) for name, lacks in missing.items())]
    if wanting:
        config.hook.pytest_deselected(items=wanting)
        items[:] = [item for item in items if item not in wanting]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY
