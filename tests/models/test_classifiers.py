"""Classifiers: the golden counts of methods.md section 9, the classical LeNet, sizes, channels, and clear errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cdfkd_strategy.errors import ArchitectureError, UnknownNameError
from cdfkd_strategy.models.classifiers import ARCHITECTURES, build_classifier, final_linear
from cdfkd_strategy.seeding import seeded_scope
from cdfkd_strategy.types import ImageSpec

SMALL = ("small_cnn", "small_cnn_gn", "lenet", "lenet_bn", "lenet_half", "lenet_half_bn", "alexnet_cifar_half", "resnet8", "wrn16_1")


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("name", "px", "at_10", "at_100", "norms"),
    [
        ("resnet18", 32, 11_173_962, 11_220_132, 20),
        ("resnet34", 32, 21_282_122, 21_328_292, 36),
        ("resnet18", 128, 11_181_642, 11_227_812, 20),
        ("resnet34", 224, 21_289_802, 21_335_972, 36),
        ("wrn16_1", 32, 175_066, 180_916, 13),
        ("wrn16_2", 32, 691_674, 703_284, 13),
        ("wrn40_2", 32, 2_243_546, 2_255_156, 37),
    ],
)
def test_parameters_and_batch_norm_layers_are_those_of_the_authors_teachers(name, px, at_10, at_100, norms):
    with torch.device("meta"):
        small, large = (build_classifier(name, ImageSpec(3, px, px, classes)) for classes in (10, 100))
    assert (count(small), count(large)) == (at_10, at_100)
    assert sum(isinstance(part, nn.BatchNorm2d) for part in small.modules()) == norms


@pytest.mark.parametrize(("channels", "px", "parameters"), [(1, 28, 61_706), (3, 32, 62_006)])
def test_lenet_is_the_classical_net_at_28_and_32_pixels(channels, px, parameters):
    assert count(build_classifier("lenet", ImageSpec(channels, px, px, 10))) == parameters


def test_half_lenet_has_half_of_every_width():
    # conv 3 of 5x5 on 1, conv 8 of 5x5 on 3, fc 200-60, 60-42, 42-10, each with its bias
    parameters = (25 + 1) * 3 + (75 + 1) * 8 + (200 + 1) * 60 + (60 + 1) * 42 + (42 + 1) * 10
    assert parameters == 15_738
    assert count(build_classifier("lenet_half", ImageSpec(1, 28, 28, 10))) == parameters
    assert count(build_classifier("lenet_half_bn", ImageSpec(1, 28, 28, 10))) == parameters + 2 * (3 + 8 + 60 + 42)


@pytest.mark.parametrize(
    ("name", "channels", "hidden"), [("alexnet_cifar", (48, 128, 192, 192, 128), (512, 256)), ("alexnet_cifar_half", (24, 64, 96, 96, 64), (256, 128))]
)
def test_alexnet_and_its_half_are_five_convolutions_and_three_linear_layers(name, channels, hidden):
    model = build_classifier(name, ImageSpec(3, 32, 32, 10))
    kernels, before = (5, 5, 3, 3, 3), (3, *channels[:-1])
    parameters = sum((k * k * i + 1) * o for k, i, o in zip(kernels, before, channels, strict=True))
    positions = 4 * 4  # 32 px, halved three times
    parameters += (channels[-1] * positions + 1) * hidden[0] + (hidden[0] + 1) * hidden[1] + (hidden[1] + 1) * 10
    assert parameters == {"alexnet_cifar": 2_115_018, "alexnet_cifar_half": 530_666}[name]
    assert count(model) == parameters
    assert final_linear(model).in_features == hidden[1], "the layer before is FC-2"


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (1, 28, 28), (3, 32, 24), (3, 64, 64)])
def test_small_nets_train_from_8_to_64_pixels(name, channels, height, width):
    image = ImageSpec(channels, height, width, 3)
    model = build_classifier(name, image)
    logits = model(torch.randn(2, *image.shape))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_small_cnn_features_can_be_drawn_from_its_last_batch_norm():
    model = build_classifier("small_cnn", ImageSpec(1, 28, 28, 10))
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms[-1].num_features == final_linear(model).in_features == 128
    other = build_classifier("small_cnn_gn", ImageSpec(1, 28, 28, 10))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in other.modules())
    assert count(other) == count(model)


def test_lenet_bn_ends_in_a_batch_norm_as_wide_as_its_features():
    model = build_classifier("lenet_bn", ImageSpec(3, 32, 32, 10))
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert [part.num_features for part in norms] == [6, 16, 120, 84]
    assert final_linear(model).in_features == 84


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf"])
def test_torchvision_families_by_name_with_one_channel(name):
    image = ImageSpec(1, 32, 32, 7)
    model = build_classifier(name, image).eval()
    first = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    assert first.in_channels == 1
    assert first.weight.shape[1] == 1
    assert final_linear(model).out_features == 7
    assert model(torch.randn(2, *image.shape)).shape == (2, 7)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_name_belongs_to_a_known_family(name):
    assert ARCHITECTURES[name].name == name
    assert ARCHITECTURES[name].paper_layout == (name in {"resnet18", "resnet34", "wrn16_1", "wrn16_2", "wrn40_2"})


def test_weights_come_from_the_global_random_state_only():
    image = ImageSpec(3, 16, 16, 4)
    states = []
    for _ in range(2):
        with seeded_scope("test", 1):
            states.append(build_classifier("resnet8", image).state_dict())
            following = torch.rand(1)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    with seeded_scope("test", 1):
        ARCHITECTURES["resnet8"].build(image)
        assert torch.equal(following, torch.rand(1)), "the size check drew random numbers"


def test_a_built_classifier_is_in_train_mode_with_fresh_statistics():
    model = build_classifier("small_cnn", ImageSpec(1, 8, 8, 4))
    assert all(part.training for part in model.modules())
    assert all(int(part.num_batches_tracked) == 0 for part in model.modules() if isinstance(part, nn.BatchNorm2d))


def test_images_that_are_too_small_are_a_clear_error():
    with torch.device("meta"), pytest.raises(ArchitectureError, match=r"'vgg11' cannot take 16x16 px .* choose larger images"):
        build_classifier("vgg11", ImageSpec(3, 16, 16, 10))


def test_an_unknown_name_lists_the_accepted_ones():
    with pytest.raises(UnknownNameError, match=r"unknown architecture 'resnet9'; accepted: .*small_cnn"):
        build_classifier("resnet9", ImageSpec(3, 32, 32, 10))


def test_final_linear_of_a_net_without_one_is_none():
    assert final_linear(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten())) is None


def test_final_linear_is_the_classifier_or_none():
    squeeze = nn.Sequential(nn.Linear(1, 3), nn.Flatten())
    assert final_linear(squeeze).out_features == 3
    assert final_linear(squeeze, 3) is not None
    assert final_linear(squeeze, 4) is None
