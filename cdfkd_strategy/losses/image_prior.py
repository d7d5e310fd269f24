"""What images look like before any teacher is asked: smooth and bounded (DeepInversion, https://arxiv.org/abs/1912.08795, eq. 2), and the jitter."""

from __future__ import annotations

import torch
from torch import Tensor


def _neighbour_differences(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differences to the neighbours on the right, below, below left and below right of ``[B, channels, H, W]``."""
    return (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., 1:, 1:] - images[..., :-1, :-1],
    )


def total_variation(images: Tensor) -> Tensor:
    """The sum over four directions of the L2 norm of neighbour differences, one norm for the *whole batch* each.

    As in the authors' code: because of the norm over the batch, the gradient of one image shrinks as ``1 / sqrt(B)``,
    so that the published weights belong to the published batch size.

    Args:
        images: ``[B, channels, H, W]``, at least 2 x 2 pixels.
    """
    return torch.stack([torch.linalg.vector_norm(difference) for difference in _neighbour_differences(images)]).sum()


def image_norm(images: Tensor) -> Tensor:
    """The mean over the batch of the L2 norm of an image ``[B, channels, H, W]`` (the authors' ImageNet code)."""
    norms: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norms.mean()


def jitter(images: Tensor, limit: int, rng: torch.Generator) -> Tensor:
    """Roll the whole batch by one random offset, up to ``limit`` pixels per axis either way; what leaves on one side enters on the other.

    Args:
        images: ``[B, channels, H, W]``.
        limit: pixels; 0 draws nothing and gives the images back.
        rng: a CPU generator.
    """
    if limit == 0:
        return images
    down, right = torch.randint(-limit, limit + 1, (2,), generator=rng).tolist()
    return images.roll((down, right), dims=(2, 3))
