"""Randomness: a `torch.Generator` derived from named parts, and a seeded scope for code that uses the global one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and on their order, the same on every machine and Python version."""
    digest = hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A `torch.Generator` on ``device``, seeded from ``parts``."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


def numpy_rng(*parts: int | str) -> np.random.Generator:
    """A NumPy generator, seeded from ``parts``."""
    return np.random.default_rng(derive_seed(*parts))


@contextmanager
def seeded_scope(*parts: int | str) -> Iterator[None]:
    """Seed torch's global generators inside the block (weight init, dropout, augmentation) and restore them afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(*parts))
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with ``count`` intra-op CPU threads: sums are split by thread, so bits depend on the count."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
