"""Predictions over a test set, and their accuracy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cdfkd_strategy.types import ImageSpec


@torch.no_grad()
def predict(forward: Callable[[Tensor], Tensor], pixels: Tensor, image: ImageSpec, *, device: str = "cpu", batch_size: int = 500) -> Tensor:
    """Run ``forward`` over a test set in batches.

    Args:
        forward: normalised images ``[B, channels, H, W]`` to ``[..., B, C]`` (``[B, C]`` or ``[K, B, C]``).
        pixels: uint8 ``[N, channels, H, W]``, values 0..255.
        image: how pixels are normalised.
        device: where ``forward`` computes.
        batch_size: images per call.

    Returns:
        ``[..., N, C]`` on the CPU.
    """
    outputs = []
    for chunk in pixels.split(batch_size):
        outputs.append(forward(image.normalise(chunk.to(device).float() / 255)).cpu())
    return torch.cat(outputs, dim=-2)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of ``logits [N, C]`` whose argmax is the label ``[N]``."""
    return float((logits.argmax(-1).cpu() == labels.cpu()).double().mean())
