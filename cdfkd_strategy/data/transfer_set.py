"""Synthetic images on disk: one safetensors file of bytes that says where they come from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdfkd_strategy.checkpoint import load_metadata, load_tensors, save_tensors
from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.errors import CheckpointError, ConfigError, DataError
from cdfkd_strategy.types import ImageSpec

FILE_NAME = "transfer_set.safetensors"
PIXELS, DESCRIPTION = "pixels", "transfer_set"
ACCEPTED = "accepted: what `cdfkd distill --save-transfer-set` wrote"


@dataclass(frozen=True)
class Origin:
    """Where a transfer set comes from.

    Args:
        image: what the teachers took.
        method: the name of the method that made it.
        seed: of that run.
        teachers: the SHA-256 of every teacher's weights.
    """

    image: ImageSpec
    method: str
    seed: int
    teachers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TransferSet:
    """Images ``pixels [N, channels, H, W]``, uint8, and their origin."""

    pixels: Tensor
    origin: Origin


def save_transfer_set(path: Path, images: TransferSet) -> None:
    """Write a transfer set, atomically."""
    save_tensors(path, {PIXELS: images.pixels}, {DESCRIPTION: json.dumps(to_dict(images.origin))})


def load_transfer_set(path: Path, image: ImageSpec) -> TransferSet:
    """Read a transfer set.

    Args:
        path: the file.
        image: what the teachers take that will see it: its shape and classes must be those of the set. Another normalisation is no
            hindrance, since pixels are stored without it.

    Raises:
        DataError: the file is missing, broken, no transfer set, or of other images; the message is one line.
    """
    description, tensors = _read(path)
    try:
        origin = bind(Origin, json.loads(description), DESCRIPTION)
    except (ConfigError, ValueError) as error:
        raise DataError(f"{path} is not a transfer set of this version: its description is malformed ({error}); {ACCEPTED}") from error
    pixels = tensors[PIXELS]
    if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != origin.image.shape or not len(pixels):
        accepted = f"at least one image, uint8 [N, {', '.join(map(str, origin.image.shape))}]"
        raise DataError(f"the transfer set {path} holds {pixels.dtype} {list(pixels.shape)}; accepted: {accepted}")
    if (origin.image.shape, origin.image.num_classes) != (image.shape, image.num_classes):
        raise DataError(
            f"the transfer set {path} has images of {origin.image.shape} (channels, height, width) and {origin.image.num_classes} classes; "
            f"accepted by these teachers: {image.shape} and {image.num_classes} classes"
        )
    return TransferSet(pixels, origin)


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """Description and tensors of a file that has both."""
    try:
        metadata, tensors = load_metadata(path), load_tensors(path)
    except CheckpointError as error:
        reason = " ".join(str(error.__cause__).split())
        raise DataError(f"cannot read the transfer set {path} ({reason}); {ACCEPTED}") from error
    if DESCRIPTION not in metadata or set(tensors) != {PIXELS}:
        raise DataError(f"{path} is not a transfer set: it holds {', '.join(sorted(tensors)) or 'nothing'}, or has no description; {ACCEPTED}")
    return metadata[DESCRIPTION], tensors
