"""Pictures to uint8 arrays of one size, one picture in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cdfkd_strategy.errors import DataError


def read_picture(path: Path) -> Image.Image:
    """Decode one image file.

    Raises:
        DataError: the file is missing, not an image, too large for Pillow, or has more than 8 bits per channel, of which 8 would have to be chosen.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            found = picture.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode the image {path}: {error}; repair, shrink or remove it") from error
    if found.mode.startswith(("I", "F")):  # Pillow would cut all values above 255 off
        raise DataError(f"the image {path} has the mode {found.mode}; accepted: 8 bits per channel, so scale its values to 0..255 first")
    return found


def write_pictures(target: Path, pictures: Iterable[Image.Image], count: int, *, size: int | None, grey: bool = False) -> None:
    """Fill the ``.npy`` file ``target`` with uint8 ``[count, channels, H, W]``.

    Args:
        target: a new file, written through a memory map.
        pictures: ``count`` of them, decoded as they are taken.
        count: number of pictures.
        size: square side in pixels: the centre square is cut out and resized (bicubic); None keeps the first one's size.
        grey: one channel instead of three.

    Raises:
        DataError: without ``size``, a picture differs in size from the first one.
    """
    images = None
    for index, picture in enumerate(pictures):
        plain = picture.convert("L" if grey else "RGB")
        if size is not None and plain.size != (size, size):
            plain = ImageOps.fit(plain, (size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(plain)
        pixels = pixels[None] if grey else pixels.transpose(2, 0, 1)
        if images is None:
            images = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=(count, *pixels.shape))
        if pixels.shape != images.shape[1:]:
            raise DataError(f"pictures of different sizes: {images.shape[2:]} and {pixels.shape[1:]} (H, W); set data.image_size")
        images[index] = pixels
    if images is None:
        raise DataError("there are no pictures to decode")
    images.flush()


def resize_pixels(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Cut out the centre square and resize it, antialiased; ``[N, channels, H, W]`` to ``[N, channels, size, size]``."""
    height, width = pixels.shape[2:]
    if (height, width) == (size, size):
        return pixels
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    resized = np.empty((*pixels.shape[:2], size, size), np.uint8)
    for start in range(0, len(pixels), 1000):
        square = torch.from_numpy(pixels[start : start + 1000, :, top : top + side, left : left + side].astype(np.float32))
        scaled = F.interpolate(square, (size, size), mode="bilinear", antialias=True, align_corners=False)
        resized[start : start + 1000] = scaled.round().clamp(0, 255).to(torch.uint8).numpy()
    return resized
