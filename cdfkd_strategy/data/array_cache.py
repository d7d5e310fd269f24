"""Decoded images on disk, shared by all processes of the machine: built once, atomically, then memory-mapped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cdfkd_strategy.data.image_data import ImageArrays
from cdfkd_strategy.errors import DataError

LAYOUT = "1"
"""Part of every key: raise it when what is stored changes."""

_ARRAYS = ("x_train", "y_train", "x_test", "y_test", "domain_train")


def cache_dir() -> Path:
    """``$CDFKD_CACHE``, or ``~/.cache/cdfkd``."""
    return Path(os.environ.get("CDFKD_CACHE") or "~/.cache/cdfkd").expanduser()


def cached_arrays(name: str, key: str, build: Callable[[Path], None]) -> ImageArrays:
    """Arrays of the cache folder for ``key``; the first caller builds it while others wait for it.

    Args:
        name: readable start of the folder's name.
        key: everything the content depends on.
        build: fills an empty folder, through `store` or file by file.

    Raises:
        DataError: the cache folder cannot be written, or an entry is broken.
    """
    digest = hashlib.sha256(f"{LAYOUT}|{key}".encode()).hexdigest()[:24]
    folder = cache_dir() / f"{name}-{digest}"
    if not folder.is_dir():
        try:
            cache_dir().mkdir(parents=True, exist_ok=True)
            with _lock(cache_dir() / f".{folder.name}.lock"):
                if not folder.is_dir():
                    _build(folder, build)
        except OSError as error:
            raise DataError(f"cannot keep decoded images in {cache_dir()}: {error}; set CDFKD_CACHE to a writable folder with enough space") from error
    return _open(folder)


def store(folder: Path, arrays: ImageArrays) -> None:
    """Write all arrays and names into a folder that `cached_arrays` handed to ``build``."""
    for name in _ARRAYS:
        array = getattr(arrays, name)
        if array is not None:
            np.save(folder / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
    store_names(folder, arrays.class_names, arrays.domain_names)


def store_names(folder: Path, class_names: tuple[str, ...], domain_names: tuple[str, ...] = ()) -> None:
    """Write the names beside arrays that were written one by one."""
    text = json.dumps({"class_names": class_names, "domain_names": domain_names})
    (folder / "names.json").write_text(text, encoding="utf-8")


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # left by a process that died; the lock is ours
    fresh.mkdir()
    try:
        build(fresh)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _open(folder: Path) -> ImageArrays:
    """Copy-on-write maps: the pages are shared between processes, and nobody can change the file."""
    try:
        names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="c" if name.startswith("x_") else None, allow_pickle=False)
            for name in _ARRAYS
            if name != "domain_train" or (folder / "domain_train.npy").exists()
        }
        return ImageArrays(**arrays, class_names=tuple(names["class_names"]), domain_names=tuple(names["domain_names"]))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"the decoded images in {folder} are broken ({error}); delete that folder and run again") from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
