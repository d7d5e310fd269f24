"""Random views of synthetic images: shifted, mirrored, zoomed in. Differentiable in the images, and drawn from a CPU generator.

What torchvision and kornia do with their own global random numbers is done here with the caller's. A view is one linear map
per axis, applied as a matrix product: the same bits on every run, forwards and backwards, on CUDA too (the gradients of
grid sampling are not).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.precision import full, in_full
from cdfkd_strategy.types import ImageSpec

AugmentName = Literal["auto", "crop_flip", "crop", "none"]
"""What `RandomViews` does; "auto" is "crop_flip" for colour images and "crop" for grey ones, which may be digits: a mirrored 2 is no 2."""


class RandomViews:
    """Views of batches, every image with random numbers of its own.

    Args:
        image: shape and normalisation; outside an image it is black.
        augment: which of shifting and mirroring takes part. With "none" every view is the image itself.
        padding: pixels by which `crop` shifts at most, either way; None is an eighth of the shorter side, which is 4 of 32.
        rng: a CPU generator.

    Raises:
        ConfigError: the padding is negative.
    """

    def __init__(self, image: ImageSpec, augment: AugmentName, padding: int | None, rng: torch.Generator) -> None:
        padding = min(image.height, image.width) // 8 if padding is None else padding
        if padding < 0:
            raise ConfigError(f"padding is {padding}; accepted: 0 or more pixels")
        self.augment = augment if augment != "auto" else "crop_flip" if image.channels == 3 else "crop"
        self.padding = padding
        self.rng = rng
        self._size = (image.height, image.width)
        self._black = image.normalise(torch.zeros(1, image.channels, 1, 1))

    def crop(self, images: Tensor) -> Tensor:
        """Shifted by up to ``padding`` pixels per axis, and mirrored or not: a crop of the padded image ``[B, channels, H, W]``."""
        if self.augment == "none":
            return images
        starts = torch.randint(-self.padding, self.padding + 1, (2, len(images), 1), generator=self.rng)
        down, right = (start + torch.arange(size) for start, size in zip(starts, self._size, strict=True))
        return self._view(images, down.float(), self._mirrored(right.float()))

    def zoom(self, images: Tensor, least_area: float) -> Tensor:
        """A part of at least this share of the area, of a side ratio of 3:4 to 4:3, enlarged to the full size, and mirrored or not.

        Torchvision's ``RandomResizedCrop`` (bilinear), except that a part which does not fit is cut to the image's size instead of drawn again.
        """
        if self.augment == "none":
            return images
        draws = torch.rand(4, len(images), 1, generator=self.rng)
        area = least_area + (1 - least_area) * draws[0]
        ratio = torch.exp((2 * draws[1] - 1) * math.log(4 / 3))
        axes = []
        for size, share, place in zip(self._size, ((area / ratio).sqrt(), (area * ratio).sqrt()), draws[2:], strict=True):
            length = (share * size).clamp(1, size)
            start = place * (size - length)
            axes.append((start + (torch.arange(size) + 0.5) * length / size - 0.5).clamp(0, size - 1))
        return self._view(images, axes[0], self._mirrored(axes[1]))

    def _mirrored(self, right: Tensor) -> Tensor:
        if self.augment != "crop_flip":
            return right
        return torch.where(torch.rand(len(right), 1, generator=self.rng) < 0.5, right.flip(1), right)

    def _view(self, images: Tensor, down: Tensor, right: Tensor) -> Tensor:
        """Read images at ``down [B, H]`` and ``right [B, W]``, in pixels, bilinearly; black outside."""
        pixels = full(images)
        rows, columns = (_hats(places, size).to(pixels, non_blocking=True) for places, size in zip((down, right), self._size, strict=True))
        black = self._black.to(pixels, non_blocking=True)
        with in_full(pixels):
            return rows[:, None] @ (pixels - black) @ columns[:, None].transpose(2, 3) + black


def _hats(places: Tensor, size: int) -> Tensor:
    """Bilinear weights ``[B, n, size]`` of pixels 0..size-1 at ``places [B, n]``: nothing beyond a pixel's distance from the image."""
    return (1 - (places[..., None] - torch.arange(size)).abs()).clamp_min(0)
