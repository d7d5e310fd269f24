"""Images that are themselves what is optimised: Adam on pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cdfkd_strategy.types import LossTerms


def optimise_pixels(
    pixels: Tensor, image_loss: Callable[[Tensor], LossTerms], *, steps: int, lr: float, bounded: Callable[[Tensor], Tensor]
) -> tuple[Tensor, LossTerms]:
    """Minimise the sum of a loss's terms over the pixels of a batch.

    Args:
        pixels: where to start, ``[B, channels, H, W]`` on the device, in [0, 1] but for `free` ones; unchanged.
        image_loss: pixels to named terms.
        steps: of Adam, default betas; at least 1.
        lr: its rate.
        bounded: brings pixels back to [0, 1], after every step: `clipped` or `stretched`; or leaves them: `free`.

    Returns:
        The pixels after the last step, and the terms before it.
    """
    pixels = pixels.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=lr)
    terms: LossTerms = {}
    for _ in range(steps):
        terms = image_loss(pixels)
        (pixels.grad,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), pixels)
        optimizer.step()
        with torch.no_grad():
            pixels.copy_(bounded(pixels))
    return pixels.detach(), {name: value.detach() for name, value in terms.items()}


def free(pixels: Tensor) -> Tensor:
    """The pixels themselves."""
    return pixels


def decay(pixels: Tensor, weight: float) -> Tensor:
    """``weight/2 sum x^2`` per image ``x`` of ``[B, channels, H, W]``, their mean: what holds free pixels."""
    return 0.5 * weight * pixels.square().sum((1, 2, 3)).mean()


def clipped(pixels: Tensor) -> Tensor:
    """Values outside [0, 1] become the nearest inside."""
    return pixels.clamp(0, 1)


def stretched(pixels: Tensor) -> Tensor:
    """The whole batch, shifted and scaled so that its smallest value is 0 and its largest 1."""
    low, high = pixels.aminmax()
    return (pixels - low) / (high - low).clamp_min(torch.finfo(pixels.dtype).tiny)
