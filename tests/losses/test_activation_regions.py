"""Regions by gradients: the paper's formula in a plain loop, the class activation map that they become, pooling, and what is constant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cdfkd_strategy.losses.activation_regions import activation_regions, class_activation_difference, multi_scale_difference, region_difference

CLASSES = torch.tensor([2, 0, 1])


def two_stages() -> tuple[Tensor, Tensor, Tensor, nn.Linear]:
    """Two maps of three images, the second computed from the first, and logits of three classes after a mean over the positions."""
    rng = torch.Generator().manual_seed(0)
    fine = torch.randn(3, 2, 4, 4, generator=rng, dtype=torch.float64).requires_grad_()
    kernel, weight = torch.randn(5, 2, 2, 2, generator=rng, dtype=torch.float64), torch.randn(3, 5, generator=rng, dtype=torch.float64)
    deep = torch.nn.functional.conv2d(fine, kernel, stride=2).relu()
    linear = nn.Linear(5, 3).double()
    linear.weight.data.copy_(weight)
    return fine, deep, linear(deep.mean(dim=(2, 3))), linear


def test_every_region_is_the_map_weighted_by_mean_derivatives() -> None:
    """The derivatives are central differences of a net that is run again, one entry of the map at a time."""
    fine, _, logits, linear = two_stages()
    rng = torch.Generator().manual_seed(0)
    torch.randn(3, 2, 4, 4, generator=rng, dtype=torch.float64)
    kernel = torch.randn(5, 2, 2, 2, generator=rng, dtype=torch.float64)

    def logit(image: Tensor, label: int) -> float:
        return linear(torch.nn.functional.conv2d(image[None], kernel, stride=2).relu().mean(dim=(2, 3)))[0, label].item()

    (found,) = activation_regions(logits, CLASSES, [fine])
    for b, label in enumerate(CLASSES.tolist()):
        expected = np.zeros((4, 4))
        for c in range(2):
            slopes = []
            for i in range(4):
                for j in range(4):
                    step = torch.zeros(2, 4, 4, dtype=torch.float64)
                    step[c, i, j] = 1e-6
                    slopes.append((logit(fine[b].detach() + step, label) - logit(fine[b].detach() - step, label)) / 2e-6)
            expected += np.mean(slopes) * fine[b, c].detach().numpy()
        np.testing.assert_allclose(found[b].detach().numpy(), expected, rtol=1e-5, atol=1e-8)


def test_after_a_mean_over_positions_it_is_the_class_activation_map() -> None:
    _, deep, logits, linear = two_stages()
    (region,) = activation_regions(logits, CLASSES, [deep])
    for b, label in enumerate(CLASSES.tolist()):
        expected = sum(linear.weight[label, c] * deep[b, c] for c in range(5))
        torch.testing.assert_close(4 * region[b], expected)
    ours, theirs = [torch.zeros(3, 4, 4), region], [torch.ones(3, 4, 4), torch.zeros(3, 2, 2).double()]
    expected = torch.stack([(16 * region[b] ** 2).sum() / 4 for b in range(3)])
    torch.testing.assert_close(class_activation_difference(ours, theirs), expected)


def test_gradients_pass_through_the_maps_and_not_through_the_weights_of_the_channels() -> None:
    fine, deep, logits, linear = two_stages()
    regions = activation_regions(logits, CLASSES, [deep])
    assert torch.autograd.grad(regions[0].sum(), [linear.weight], retain_graph=True, allow_unused=True) == (None,)
    (moved,) = torch.autograd.grad(regions[0].sum(), [deep], retain_graph=True)
    torch.testing.assert_close(moved, (linear.weight[CLASSES] / 4)[:, :, None, None].expand_as(deep))
    logits.sum().backward()  # the graph is still there
    assert fine.grad is not None


@pytest.mark.parametrize("other", [(4, 4), (2, 2), (8, 4)])
def test_differences_of_other_sizes_are_those_of_means_over_blocks(other: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(1)
    mine, theirs = torch.randn(3, 4, 4, generator=rng), torch.randn(3, *other, generator=rng)
    height, width = min(4, other[0]), min(4, other[1])

    def pooled(maps: Tensor) -> np.ndarray:
        tall, wide = maps.shape[1] // height, maps.shape[2] // width
        return maps.double().numpy().reshape(3, height, tall, width, wide).mean((2, 4))

    expected = ((pooled(mine) - pooled(theirs)) ** 2).mean((1, 2))
    np.testing.assert_allclose(region_difference(mine, theirs).numpy(), expected, rtol=1e-5)


def test_scales_are_summed_with_the_nearest_stage_of_the_teacher() -> None:
    rng = torch.Generator().manual_seed(2)
    mine = [torch.randn(2, 8, 8, generator=rng), torch.randn(2, 2, 2, generator=rng)]
    theirs = [torch.randn(2, 16, 16, generator=rng), torch.randn(2, 8, 8, generator=rng), torch.randn(2, 2, 2, generator=rng)]
    expected = [sum(float(((one[b] - other[b]) ** 2).mean()) for one, other in zip(mine, theirs[1:], strict=True)) for b in range(2)]
    assert multi_scale_difference(mine, theirs).tolist() == pytest.approx(expected, rel=1e-5)
