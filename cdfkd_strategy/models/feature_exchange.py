"""Channel-wise feature exchange inside a generator: half the channels of one image's hidden features, the other half of another's (SpaceshipNet)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cdfkd_strategy.models.generators import Generator
from cdfkd_strategy.precision import full


def exchange_points(generator: Generator) -> tuple[int, ...]:
    """After how many layers of a generator's body features can be exchanged: its first BatchNorm, and every activation."""
    return tuple(count for count, part in enumerate(generator.body.children(), 1) if count == 1 or isinstance(part, nn.LeakyReLU))


def with_features(generator: Generator, z: Tensor, points: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The images of ``z [B, Z]``, and the features ``[B, channels, H, W]`` after so many layers of the body."""
    here = generator.project(z).view(-1, *generator.start)
    features = []
    for count, part in enumerate(generator.body.children(), 1):
        here = part(here)
        if count in points:
            features.append(here)
    return full(here), tuple(features)


def from_features(generator: Generator, features: Tensor, point: int) -> Tensor:
    """The images that the body makes of the features that it has after ``point`` layers."""
    for part in list(generator.body.children())[point:]:
        features = part(features)
    return full(features)


def exchange_channels(features: Tensor, rng: torch.Generator) -> Tensor:
    """Image i keeps ``channels // 2`` of its channels and takes the others from image ``B - 1 - i``; every image has a choice of its own.

    Args:
        features: ``[B, channels, H, W]``.
        rng: a CPU generator.
    """
    count, channels = features.shape[:2]
    kept = torch.rand(count, channels, generator=rng).argsort(1) < channels // 2
    return torch.where(kept[:, :, None, None].to(features.device, non_blocking=True), features, features.flip(0))
