"""Inter-sample diversity of RDSKD: constants worked out by hand, a brute-force twin, gradients, and the numerical corners."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cdfkd_strategy.losses.diversity import diversity_loss


def twin(images: Tensor, probabilities: Tensor) -> float:
    """The paper's quotient in plain Python, one teacher, over every pixel of every pair."""
    half = len(images) // 2
    x, p = images.flatten(1).tolist(), probabilities.tolist()
    pairs = range(half)
    dx = math.sqrt(sum((second - first) ** 2 for i in pairs for first, second in zip(x[i], x[half + i], strict=True)))
    dp = math.sqrt(sum((second - first) ** 2 for i in pairs for first, second in zip(p[i], p[half + i], strict=True)))
    return 1.0 / (dx / dp + 1e-20)


def test_hand_computed() -> None:
    # dx = ||(3, 4)|| = 5 and dp = ||(1, 0) - (0, 1)|| = sqrt(2): the loss is 1 / (5 / sqrt(2)) = sqrt(2) / 5
    images = torch.tensor([[[[0.0, 0.0]]], [[[3.0, 4.0]]]])
    probabilities = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert float(diversity_loss(images, probabilities)) == pytest.approx(math.sqrt(2) / 5, rel=1e-6)


def test_one_norm_over_the_half_batch_and_not_a_mean_of_pairs() -> None:
    # pairs (x0, x2) and (x1, x3): dx = sqrt(6^2 + 8^2) = 10, dp = sqrt(2 + 0) = sqrt(2); the mean of pairs would be sqrt(2) / 12
    images = torch.tensor([0.0, 0.0, 6.0, 8.0]).view(4, 1, 1, 1)
    probabilities = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.5, 0.5]])
    assert float(diversity_loss(images, probabilities)) == pytest.approx(math.sqrt(2) / 10, rel=1e-6)


@pytest.mark.parametrize("batch", [2, 6, 8])
def test_equals_the_twin(batch: int) -> None:
    rng = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, 4, 5, generator=rng)
    logits = torch.randn(batch, 7, generator=rng)
    assert float(diversity_loss(images, logits.softmax(-1))) == pytest.approx(twin(images, logits.softmax(-1)), rel=1e-5)


def test_several_teachers_are_averaged() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(6, 1, 3, 3, generator=rng)
    probabilities = torch.randn(3, 6, 4, generator=rng).softmax(-1)
    expected = sum(twin(images, one) for one in probabilities) / 3
    assert float(diversity_loss(images, probabilities)) == pytest.approx(expected, rel=1e-5)


def test_an_odd_batch_leaves_the_middle_image_out() -> None:
    rng = torch.Generator().manual_seed(1)
    images, probabilities = torch.randn(5, 1, 2, 2, generator=rng), torch.rand(5, 3, generator=rng)
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(diversity_loss(images, probabilities), diversity_loss(images[kept], probabilities[kept]))


def test_gradcheck() -> None:
    rng = torch.Generator().manual_seed(2)
    images = torch.randn(4, 1, 2, 2, generator=rng, dtype=torch.float64).requires_grad_()
    mixer = torch.randn(2, 4, 3, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: diversity_loss(x, (x.flatten(1) @ mixer).softmax(-1)), (images,))


@pytest.mark.parametrize("collapsed", ["classes", "images and classes"])
def test_collapse_gives_zero_and_no_nan(collapsed: str) -> None:
    images = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    if collapsed == "images and classes":
        images = images[:1].repeat(4, 1, 1, 1)
    images.requires_grad_()
    probabilities = images.flatten(1).sum(1, keepdim=True) * torch.zeros(1, 3) + 1 / 3
    loss = diversity_loss(images, probabilities)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.isfinite(images.grad).all()
