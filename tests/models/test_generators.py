"""Generators: golden counts, a reference written with functional calls, sizes, and sampling that leaves no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator, sample_images
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.types import ImageSpec


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def norm(x: Tensor, layer: nn.Module | None, eps: float) -> Tensor:
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    x = (x - mean) / (variance + eps).sqrt()
    return x if layer is None else x * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@pytest.mark.parametrize(("px", "parameters"), [(32, 2_329_091), (128, 11_243_203), (224, 28_612_291)])
def test_parameters_are_those_of_the_authors_generators(px, parameters):
    with torch.device("meta"):
        generator = build_generator(ImageSpec(3, px, px, 10))
    assert count(generator) == parameters
    assert generator.latent_dim == 256


@pytest.mark.parametrize(("own", "eps"), [(None, 0.8), (1e-5, 1e-5), (0.3, 0.3)])
def test_the_small_generator_equals_functional_calls_written_by_hand(own, eps):
    torch.manual_seed(0)
    generator = build_generator(ImageSpec(3, 12, 8, 10), GeneratorConfig(latent_dim=5, width=0.25, batch_norm_eps=own)).double().train()
    parts = list(generator.body)
    norms = [part for part in parts if isinstance(part, nn.BatchNorm2d)]
    convs = [part for part in parts if isinstance(part, nn.Conv2d)]
    for part in norms[:-1]:
        nn.init.uniform_(part.weight, 0.5, 1.5)
        nn.init.uniform_(part.bias, -0.5, 0.5)
    z = torch.randn(6, 5, dtype=torch.double)
    x = (z @ generator.project.weight.T + generator.project.bias).reshape(6, 32, 3, 2)
    x = norm(x, norms[0], 1e-5)
    x = F.leaky_relu(norm(F.conv2d(doubled(x), convs[0].weight, convs[0].bias, padding=1), norms[1], eps), 0.2)
    x = F.leaky_relu(norm(F.conv2d(doubled(x), convs[1].weight, convs[1].bias, padding=1), norms[2], eps), 0.2)
    x = norm(torch.tanh(F.conv2d(x, convs[2].weight, convs[2].bias, padding=1)), None, 1e-5)
    torch.testing.assert_close(generator(z), x)


@pytest.mark.parametrize(("final_norm", "own", "eps"), [(False, None, 1e-5), (True, None, 1e-5), (True, 0.3, 0.3)])
def test_the_large_generator_equals_functional_calls_written_by_hand(final_norm, own, eps):
    torch.manual_seed(0)
    config = GeneratorConfig(latent_dim=4, width=1 / 32, final_norm=final_norm, batch_norm_eps=own)
    generator = build_generator(ImageSpec(1, 64, 80, 10), config).double().train()
    state = generator.state_dict()
    kernels = [value for key, value in state.items() if key.startswith("body") and value.dim() == 4]
    assert [kernel.shape[:2] for kernel in kernels] == [(16, 8), (8, 4), (4, 2), (2, 2), (1, 2)]
    norms = [part for part in generator.body if isinstance(part, nn.BatchNorm2d)]
    z = torch.randn(3, 4, dtype=torch.double)
    x = norm((z @ generator.project.weight.T + generator.project.bias).reshape(3, 16, 4, 5), norms[0], 1e-5)
    for kernel, layer in zip(kernels[:4], norms[1:5], strict=True):
        x = F.leaky_relu(norm(F.conv_transpose2d(x, kernel, stride=2, padding=1), layer, eps), 0.2)
    x = torch.tanh(F.conv2d(x, kernels[4], generator.body[-2 if not final_norm else -3].bias, padding=1))
    torch.testing.assert_close(generator(z), norm(x, None, 1e-5) if final_norm else x)


@pytest.mark.parametrize("px", [8, 64])
def test_an_affine_norm_replaces_the_tanh(px):
    torch.manual_seed(0)
    image, sizes = ImageSpec(3, px, px, 10), {"latent_dim": 4, "width": 1 / 32}
    plain = build_generator(image, GeneratorConfig(**sizes, final_norm=False)).double().train()
    affine = build_generator(image, GeneratorConfig(**sizes, output="affine_norm")).double().train()
    assert count(affine) == count(plain) + 2 * 3
    last = affine.body[-1]
    assert isinstance(last, nn.BatchNorm2d)
    affine.project.load_state_dict(plain.project.state_dict())
    affine.body[:-1].load_state_dict(plain.body[:-1].state_dict())
    nn.init.uniform_(last.weight, 0.5, 1.5)
    nn.init.uniform_(last.bias, -0.5, 0.5)
    z = torch.randn(6, 4, dtype=torch.double)
    torch.testing.assert_close(affine(z), norm(torch.atanh(plain(z)), last, 1e-5))
    with pytest.raises(ConfigError, match=r"affine_norm.*final_norm is False"):
        GeneratorConfig(output="affine_norm", final_norm=False)


@pytest.mark.parametrize("px", [8, 64])
def test_a_sigmoid_gives_pixels_that_are_normalised(px):
    torch.manual_seed(0)
    image, sizes = ImageSpec(3, px, px, 10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)), {"latent_dim": 4, "width": 1 / 32}
    plain = build_generator(image, GeneratorConfig(**sizes, final_norm=False)).double().train()
    sigmoid = build_generator(image, GeneratorConfig(**sizes, output="sigmoid")).double().train()
    sigmoid.load_state_dict(plain.state_dict())
    z = torch.randn(6, 4, dtype=torch.double)
    pixels = 1 / (1 + torch.exp(-torch.atanh(plain(z))))
    for channel, (mean, std) in enumerate(zip(image.mean, image.std, strict=True)):
        torch.testing.assert_close(sigmoid(z)[:, channel], (pixels[:, channel] - mean) / std)
    with pytest.raises(ConfigError, match=r"sigmoid.*final_norm is True"):
        GeneratorConfig(output="sigmoid", final_norm=True)


@pytest.mark.parametrize(
    ("channels", "height", "width", "final"),
    [(1, 8, 8, True), (1, 28, 28, True), (3, 32, 32, True), (3, 48, 32, True), (3, 64, 64, False), (3, 128, 128, False), (1, 224, 224, True)],
)
def test_sizes_and_final_norm_are_the_papers(channels, height, width, final):
    image = ImageSpec(channels, height, width, 10)
    generator = build_generator(image, GeneratorConfig(latent_dim=8, width=1 / 64))
    images = generator(torch.randn(4, 8))
    assert images.shape == (4, *image.shape)
    assert isinstance(generator.body[-1], nn.BatchNorm2d) == final
    if final:
        torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(channels), atol=1e-4, rtol=0)
    else:
        assert images.abs().max() <= 1


@pytest.mark.parametrize(("px", "final_norm"), [(32, False), (128, True)])
def test_final_norm_can_be_chosen(px, final_norm):
    with torch.device("meta"):
        generator = build_generator(ImageSpec(3, px, px, 10), GeneratorConfig(final_norm=final_norm))
    assert isinstance(generator.body[-1], nn.BatchNorm2d) == final_norm


@pytest.mark.parametrize(("height", "width", "factor"), [(30, 32, 4), (9, 9, 4), (84, 84, 16), (100, 64, 16)])
def test_other_sizes_are_a_clear_error(height, width, factor):
    with pytest.raises(ArchitectureError, match=rf"no generator for {height}x{width} px; accepted: both sides multiples of {factor}"):
        build_generator(ImageSpec(3, height, width, 10))


def test_config_values_that_are_not_accepted_say_so():
    with pytest.raises(ConfigError, match="latent_dim is 0"):
        GeneratorConfig(latent_dim=0)
    with pytest.raises(ConfigError, match=r"width is 0\.0"):
        GeneratorConfig(width=0.0)


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_no_trace(training):
    generator = build_generator(ImageSpec(1, 8, 8, 10), GeneratorConfig(latent_dim=6, width=0.1)).train(training)
    generator(torch.randn(4, 6)).sum().backward()
    generator.body[0].eval()
    modes = [part.training for part in generator.modules()]
    state = {key: value.clone() for key, value in generator.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in generator.parameters()]
    random_state = torch.random.get_rng_state()
    images = sample_images(generator, 5, torch.Generator().manual_seed(1), Runtime())
    assert images.shape == (5, 1, 8, 8)
    assert not images.requires_grad
    assert torch.is_grad_enabled()
    assert modes == [part.training for part in generator.modules()]
    assert all(torch.equal(state[key], value) for key, value in generator.state_dict().items())
    assert all(torch.equal(a, parameter.grad) for a, parameter in zip(gradients, generator.parameters(), strict=True))
    assert torch.equal(random_state, torch.random.get_rng_state())


def test_sampling_is_in_train_mode_and_comes_from_the_given_generator():
    generator = build_generator(ImageSpec(1, 8, 8, 10), GeneratorConfig(latent_dim=6, width=0.1)).eval()
    draws = [sample_images(generator, 7, torch.Generator().manual_seed(seed), Runtime()) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.testing.assert_close(draws[0].mean(), torch.tensor(0.0), atol=1e-4, rtol=0)


def test_sampling_restores_the_statistics_after_an_error():
    generator = build_generator(ImageSpec(1, 8, 8, 10), GeneratorConfig(latent_dim=6, width=0.1))
    generator.body[-2].register_forward_hook(lambda *_: 1 / 0)
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        sample_images(generator, 5, torch.Generator(), Runtime())
    assert all(torch.equal(before[key], value) for key, value in generator.state_dict().items())
