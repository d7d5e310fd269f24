"""Image priors of DeepInversion: constants worked out by hand, brute-force twins, gradients; and the jitter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cdfkd_strategy.losses.image_prior import image_norm, jitter, total_variation


def total_variation_twin(images: Tensor) -> float:
    """Four norms, pixel by pixel: every pair of neighbours is visited by its offset (down, right)."""
    batch, channels, height, width = images.shape
    result = 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = 0.0
        for b in range(batch):
            for c in range(channels):
                for i in range(height):
                    for j in range(width):
                        if 0 <= i + down < height and 0 <= j + right < width:
                            squares += float(images[b, c, i + down, j + right] - images[b, c, i, j]) ** 2
        result += math.sqrt(squares)
    return result


def test_total_variation_by_hand() -> None:
    # [[0, 1], [2, 4]]: right (1, 2) -> sqrt 5; below (2, 3) -> sqrt 13; below left 2 - 1 = 1; below right 4 - 0 = 4
    images = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    assert float(total_variation(images)) == pytest.approx(math.sqrt(5) + math.sqrt(13) + 1 + 4, rel=1e-6)


def test_total_variation_of_a_constant_is_zero() -> None:
    assert float(total_variation(torch.full((2, 3, 4, 4), 0.7))) == 0.0


def test_total_variation_is_one_norm_over_the_batch() -> None:
    image = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    assert float(total_variation(image.repeat(9, 1, 1, 1))) == pytest.approx(3 * float(total_variation(image)), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (3, 2, 4, 5), (2, 3, 5, 3)])
def test_total_variation_equals_the_twin(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert float(total_variation(images)) == pytest.approx(total_variation_twin(images), rel=1e-5)


def test_image_norm_by_hand() -> None:
    # norms 5 and 13
    images = torch.tensor([[3.0, 4.0], [5.0, 12.0]]).view(2, 1, 1, 2)
    assert float(image_norm(images)) == pytest.approx(9.0)


def test_image_norm_equals_the_twin() -> None:
    images = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(1))
    expected = sum(math.sqrt(sum(value**2 for value in image.flatten().tolist())) for image in images) / 4
    assert float(image_norm(images)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [total_variation, image_norm])
def test_gradcheck(loss: object) -> None:
    images = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(loss, (images,))


@pytest.mark.parametrize("loss", [total_variation, image_norm])
def test_gradient_of_black_images_is_finite(loss: object) -> None:
    images = torch.zeros(2, 1, 3, 3, requires_grad=True)
    loss(images).backward()  # type: ignore[operator]
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_jitter_rolls_the_batch_within_its_limit() -> None:
    images = torch.arange(2 * 5 * 5, dtype=torch.float32).view(2, 1, 5, 5)
    rng = torch.Generator().manual_seed(3)
    seen = set()
    for _ in range(200):
        moved = jitter(images, 1, rng)
        offsets = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if torch.equal(moved, images.roll((down, right), (2, 3)))]
        assert len(offsets) == 1
        seen.update(offsets)
    assert len(seen) == 9


def test_jitter_zero_draws_nothing() -> None:
    images = torch.randn(2, 1, 4, 4)
    rng = torch.Generator().manual_seed(4)
    before = rng.get_state()
    assert jitter(images, 0, rng) is images
    assert torch.equal(rng.get_state(), before)


def test_jitter_passes_gradients() -> None:
    images = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: jitter(x, 2, torch.Generator().manual_seed(6)), (images,))
