"""A directory that one process works in: two would overwrite each other's files. The lock goes with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdfkd_strategy.errors import CheckpointError

_HELD: dict[Path, int] = {}
"""Directories that this process works in, and the open handles that carry their locks."""


def hold(path: Path) -> None:
    """Lock an existing directory until the process ends; nothing happens if this process has it already.

    Raises:
        CheckpointError: another process works in it.
    """
    if path.resolve() in _HELD:
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise CheckpointError(f"another process works in the directory {path}; wait until it is done, stop it, or choose another directory") from error
    except OSError:  # a file system that knows no locks
        os.close(handle)
        return
    _HELD[path.resolve()] = handle


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Make the directory, and `hold` it inside the block.

    Raises:
        CheckpointError: another process works in it.
    """
    path.mkdir(parents=True, exist_ok=True)
    before = path.resolve() in _HELD
    hold(path)
    try:
        yield
    finally:
        if not before and (handle := _HELD.pop(path.resolve(), None)) is not None:
            os.close(handle)
