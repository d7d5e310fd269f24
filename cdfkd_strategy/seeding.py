"""Randomness: a `torch.Generator` derived from named parts, a seeded scope for code that uses the global one, and scopes for what else moves bits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


CUBLAS_VARIABLE, CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""What cuBLAS needs in the environment for reproducible matrix products (its documentation names this value)."""


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Run the block with torch's deterministic CUDA kernels and without cuDNN's contest of kernels, and restore the settings afterwards.

    An operation without a deterministic kernel warns, by name, and is computed all the same; it stays an error for callers
    who made it one (``torch.use_deterministic_algorithms(True)``). Nothing changes for the CPU's own results, which are
    deterministic for a given number of `threads`.
    """
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    benchmark, deterministic, fill, variable = cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory, os.environ.get(CUBLAS_VARIABLE)
    enabled, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)
        cudnn.benchmark, cudnn.deterministic = False, True
        memory.fill_uninitialized_memory = enabled and fill  # a debugging aid that costs a write per allocation
        torch.use_deterministic_algorithms(True, warn_only=warn_only or not enabled)
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory = benchmark, deterministic, fill
        if variable is None:
            os.environ.pop(CUBLAS_VARIABLE, None)
