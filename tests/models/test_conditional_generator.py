"""The conditional generator: one map more than the plain one, written by hand, and a class that reaches every pixel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdfkd_strategy.models.conditional_generator import build_conditional_generator
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.types import ImageSpec


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def norm(x: Tensor, layer: nn.Module | None, eps: float) -> Tensor:
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    x = (x - mean) / (variance + eps).sqrt()
    return x if layer is None else x * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize(("px", "first", "kernel"), [(32, 8 * 8, 128 * 9), (128, 8 * 8, 256 * 16)])
def test_it_is_the_plain_generator_with_one_map_more(px, first, kernel):
    """C weights and a bias per pixel of the map, a scale and a shift in the first BatchNorm, and one input channel of the first convolution."""
    image = ImageSpec(3, px, px, 10)
    with torch.device("meta"):
        more = count(build_conditional_generator(image)) - count(build_generator(image))
    assert more == (10 + 1) * first + 2 + kernel


def test_the_small_one_equals_functional_calls_written_by_hand():
    torch.manual_seed(0)
    generator = build_conditional_generator(ImageSpec(3, 12, 8, 4), GeneratorConfig(latent_dim=5, width=1 / 16)).double().train()
    state, norms = generator.state_dict(), [part for part in generator.body if isinstance(part, nn.BatchNorm2d)]
    convs = [part for part in generator.body if isinstance(part, nn.Conv2d)]
    z, labels = torch.randn(6, 5, dtype=torch.double), torch.tensor([0, 3, 1, 1, 2, 0])
    x = (z @ state["project.weight"].T + state["project.bias"]).reshape(6, 8, 3, 2)
    y = torch.stack([state["condition.weight"][:, label] + state["condition.bias"] for label in labels]).reshape(6, 1, 3, 2)
    x = norm(torch.cat([x, y], 1), norms[0], 1e-5)
    for conv, layer in zip(convs[:2], norms[1:3], strict=True):
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = F.leaky_relu(norm(F.conv2d(x, conv.weight, conv.bias, padding=1), layer, 0.8), 0.2)
    x = norm(torch.tanh(F.conv2d(x, convs[2].weight, convs[2].bias, padding=1)), None, 1e-5)
    torch.testing.assert_close(generator(z, labels), x)


@pytest.mark.parametrize("px", [8, 64])
def test_the_class_changes_every_part_of_an_image(px):
    torch.manual_seed(0)
    image = ImageSpec(1, px, px, 3)
    generator = build_conditional_generator(image, GeneratorConfig(latent_dim=4, width=1 / 16)).eval()
    one, other = (generator(torch.ones(2, 4), torch.tensor([0, label])) for label in (1, 2))
    assert one.shape == (2, *image.shape)
    assert torch.equal(one[0], other[0])
    assert (F.avg_pool2d((one[1] - other[1]).abs(), px // 4) > 0).all()


def test_the_class_gets_a_gradient_and_half_precision_is_raised():
    generator = build_conditional_generator(ImageSpec(1, 8, 8, 3), GeneratorConfig(latent_dim=4, width=1 / 16))
    with torch.autocast("cpu", torch.bfloat16):
        images = generator(torch.randn(6, 4), torch.arange(6) % 3)
    assert images.dtype == torch.float32
    images.square().mean().backward()
    assert generator.condition.weight.grad.abs().sum() > 0
