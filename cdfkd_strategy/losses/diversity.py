"""Do different images stay different? The inter-sample diversity of RDSKD (https://arxiv.org/abs/2011.03749)."""

from __future__ import annotations

import torch
from torch import Tensor

from cdfkd_strategy import parallel

SMALLEST_DISTANCE = 1e-12
"""Image distances below this count as this: two equal half-batches (a fully collapsed generator) would divide 0 by 0."""


def diversity_loss(images: Tensor, probabilities: Tensor, epsilon: float = 1e-20) -> Tensor:
    """``1 / (||x_2 - x_1||_F / ||p_2 - p_1||_F + epsilon)`` between the two halves of a batch; small when images differ more than their classes.

    The norms run over a whole half-batch, so that the loss is one scalar and not a mean over pairs, as in the authors'
    code. It is computed as ``dp / (dx + epsilon dp)``, the same number: the quotient ``dx / dp`` is infinite, and its
    gradient NaN, as soon as both halves are classified alike.

    Args:
        images: ``[B, ...]``; the halves are the first and the last ``B // 2`` images, a middle one is left out.
        probabilities: of the same images, ``[B, C]`` or ``[K, B, C]``; with K, the mean of the K losses.
        epsilon: the authors' 1e-20.

    Returns:
        A scalar, at least 0.
    """
    images, probabilities = parallel.whole(images), parallel.whole(probabilities, -2)
    half = images.shape[0] // 2
    between_images = torch.linalg.vector_norm(images[-half:] - images[:half])
    between_classes = torch.linalg.vector_norm(probabilities[..., -half:, :] - probabilities[..., :half, :], dim=(-2, -1))
    losses: Tensor = between_classes / (between_images + epsilon * between_classes).clamp_min(SMALLEST_DISTANCE)
    return losses.mean()
