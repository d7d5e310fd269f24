"""Freed memory stays with the process while it distils: a training step asks for the same large tensors again and again.

glibc gives large blocks back to the operating system as soon as they are freed, and the next step pays for every page
anew. With small networks that is up to half of a step (`simulations/LOG.md`).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

# <malloc.h>. The kept values are the largest that the int of mallopt takes usefully. Once they are set, glibc no longer adapts its thresholds, so the
# others are what it would have come to: the most that it keeps of a process with large blocks. Its first ones would make every block of 128 KB slow.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT = {M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
KEPT_BEFORE_2_35 = {**KEPT, M_MMAP_THRESHOLD: 2**25}
"""Older ones of glibc take no threshold above this."""
ORDINARY = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26, M_TOP_PAD: 2**17}

_depth = 0


@functools.lru_cache(maxsize=1)
def _glibc() -> Any:
    """The C library, if it is one with these settings."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


def _apply(*alternatives: dict[int, int]) -> None:
    """The first whose threshold is taken. The others without it would be worse than nothing: glibc would stay with the threshold that it has."""
    library = _glibc()
    for settings in alternatives:
        (first, value), *others = settings.items()
        if library.mallopt(first, value):
            for name, other in others:
                library.mallopt(name, other)
            return
    logger.info("this C library keeps no freed memory: it refuses a threshold of %d", value)


@contextmanager
def kept() -> Iterator[None]:
    """Keep what is freed inside the block, up to its peak, for the next allocation; give it back at the end. Does nothing without glibc."""
    global _depth  # noqa: PLW0603 - the setting is the process's
    if _glibc() is None:
        yield
        return
    _depth += 1
    if _depth == 1:
        _apply(KEPT, KEPT_BEFORE_2_35)
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _apply(ORDINARY)
            _glibc().malloc_trim(0)
