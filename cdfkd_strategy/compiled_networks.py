"""Networks compiled by torch, in place, where a compiler is to be had.

Off by default: compiling takes half a minute or more per network and start, and what it saves on a CPU is little (`simulations/LOG.md`). A run of
hours may gain by it; on a GPU it has not been measured.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

BACKEND = "inductor"


@functools.lru_cache(maxsize=4)
def can_compile(device: str) -> bool:
    """Does torch compile for this device here? Without a C++ compiler it does not, which is said once."""
    try:
        torch.compile(_probe, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler and its environment may raise: the plain path is there
        words = (str(error).strip().splitlines() or [""])[0]
        logger.warning("engine.compile: torch cannot compile here, networks are computed as they are (%s: %s)", type(error).__name__, words)
        return False
    return True


def _probe(values: Tensor) -> Tensor:
    return values.relu() + 1


@contextmanager
def compiled(modules: Sequence[nn.Module], device: str) -> Iterator[None]:
    """Let modules compute compiled inside the block, if that is possible; names in state dicts and shared parts stay as they are.

    The first call of each in every mode compiles it. Copies made inside the block are not compiled.
    """
    chosen = list(modules) if can_compile(device) else []
    for module in chosen:
        module.compile(backend=BACKEND)
    try:
        yield
    finally:
        for module in chosen:
            module._compiled_call_impl = None  # torch has no way back
