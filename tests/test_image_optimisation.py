from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cdfkd_strategy.image_optimisation import clipped, optimise_pixels, stretched

START = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
GOAL = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 - 1


def test_pixels_move_as_adam_moves_them_and_stay_pixels() -> None:
    """Adam written out, with the bound after every step; the terms are those that the last step saw."""
    x, m, v = START.double(), torch.zeros(START.shape).double(), torch.zeros(START.shape).double()
    last = 0.0
    for step in range(1, 6):
        last = float(((x - GOAL) ** 2).sum() + x.sum())
        gradient = 2 * (x - GOAL) + 1
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x - 0.2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)) ** 0.5 + 1e-8)
        x = x.clamp(0, 1)
    before = START.clone()

    def loss(pixels: Tensor) -> Mapping[str, Tensor]:
        return {"near": ((pixels - GOAL) ** 2).sum(), "dark": pixels.sum()}

    found, terms = optimise_pixels(START, loss, steps=5, lr=0.2, bounded=clipped)
    torch.testing.assert_close(found, x.float(), rtol=1e-4, atol=1e-5)
    assert abs(float(sum(terms.values())) - last) < 1e-2
    assert torch.equal(START, before)
    assert not found.requires_grad
    assert (found == 0).any()
    assert (found == 1).any()


def test_a_batch_is_stretched_as_a_whole() -> None:
    found = stretched(torch.tensor([[-1.0, 1.0], [0.0, 3.0]]))
    assert torch.equal(found, torch.tensor([[0.0, 0.5], [0.25, 1.0]]))
    assert torch.equal(stretched(torch.full((2, 2), 0.3)), torch.zeros(2, 2))
