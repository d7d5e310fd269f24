"""Checkpoints without pickle: nested state as safetensors (tensors) and JSON (structure), written beside and renamed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from cdfkd_strategy.errors import CheckpointError

STATE_FILE = "state.json"
"""In the run directory of a run with Flower, whose first file it is: where the run stands."""

LEFTOVERS = ".*.tmp"
"""Names of files that a process which died was writing; they never become anything."""

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_INT_KEYS = "__int_keys__"


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on the disk too, so that a machine that loses its power keeps a renaming; nothing where that is not supported."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of strict JSON (a NaN is an error), keys in their given order."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as one safetensors file, atomically; the same tensors always give the same bytes.

    Give ``metadata`` one key at most: safetensors writes several in any order.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, metadata)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; restore it, or start a new run directory") from error


def load_metadata(path: Path) -> dict[str, str]:
    """What `save_tensors` was given as ``metadata``.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; restore it, or start a new run directory") from error


def _split(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of a nested value; tensors go to ``tensors`` and leave their name behind."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _split(item, tensors) for key, item in value.items()}
        return {_INT_KEYS: [[int(key), _split(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_split(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_split(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"__float__": repr(value)}
    raise CheckpointError(f"cannot store a {type(value).__name__} in a checkpoint; accepted: tensors, numbers, strings, lists and mappings")


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _INT_KEYS in value:
            return {key: _join(item, tensors) for key, item in value[_INT_KEYS]}
        if _TUPLE in value:
            return tuple(_join(item, tensors) for item in value[_TUPLE])
        if "__float__" in value:
            return float(value["__float__"])
        return {key: _join(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value


def save_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write a nested state to ``directory/state.safetensors`` and ``state.json``.

    The new checkpoint is written beside the old one and takes its name; the old one stays as ``<directory>.previous``,
    so that at every moment one of the two is whole. The disk holds two checkpoints at most, since that older one goes first.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh, previous = _sibling(directory, "new"), _sibling(directory, "previous")
    shutil.rmtree(fresh, ignore_errors=True)
    if directory.exists():
        shutil.rmtree(previous, ignore_errors=True)
    fresh.mkdir()
    tensors: dict[str, Tensor] = {}
    tree = _split(state, tensors)
    save_tensors(fresh / "state.safetensors", tensors)
    write_json(fresh / "state.json", tree)
    if directory.exists():
        directory.rename(previous)
    fresh.rename(directory)
    sync_directory(directory.parent)


def load_state(directory: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; falls back to the previous checkpoint if the process died between two renames.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    for candidate in (directory, _sibling(directory, "previous")):
        if (candidate / "state.json").exists():
            tensors = load_tensors(candidate / "state.safetensors")
            try:
                tree = json.loads((candidate / "state.json").read_text(encoding="utf-8"))
                return dict(_join(tree, tensors))
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{candidate}/state.json is broken ({error}); start a new run directory") from error
    raise CheckpointError(f"no checkpoint in {directory}; start without resuming")


def has_state(directory: Path) -> bool:
    """Is there a checkpoint that `load_state` would read?"""
    return any((candidate / "state.json").exists() for candidate in (directory, _sibling(directory, "previous")))


def drop_state(directory: Path) -> None:
    """Remove a checkpoint, and what `save_state` keeps beside it."""
    for path in (directory, _sibling(directory, "new"), _sibling(directory, "previous")):
        shutil.rmtree(path, ignore_errors=True)


def _sibling(directory: Path, suffix: str) -> Path:
    return directory.with_name(f"{directory.name}.{suffix}")
