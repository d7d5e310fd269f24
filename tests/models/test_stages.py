"""The probe: which maps become stages, and that looking changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.stages import find_stages, with_stages
from cdfkd_strategy.types import ImageSpec

COLOUR = ImageSpec(3, 32, 32, 10)


def trunk_of(name: str, image: ImageSpec):
    with torch.device("meta"):
        return find_stages(build_classifier(name, image), image)


@pytest.mark.parametrize(
    ("name", "px", "channels", "sizes"),
    [
        ("resnet18", 32, (64, 128, 256, 512), (32, 16, 8, 4)),
        ("resnet34", 224, (64, 128, 256, 512), (56, 28, 14, 7)),
        ("wrn16_1", 32, (16, 32, 64), (32, 16, 8)),
        ("wrn40_2", 32, (32, 64, 128), (32, 16, 8)),
        ("small_cnn", 8, (32, 64, 128), (8, 4, 2)),
        ("small_cnn", 28, (32, 64, 128), (28, 14, 7)),
        ("lenet", 28, (6, 16), (28, 10)),
        ("resnet50", 64, (256, 512, 1024, 2048), (16, 8, 4, 2)),
        ("vgg11_bn", 32, (128, 256, 512, 512), (16, 8, 4, 2)),
    ],
)
def test_stage_shapes(name, px, channels, sizes):
    trunk = trunk_of(name, ImageSpec(3, px, px, 10))
    assert trunk.channels == channels
    assert trunk.sizes == tuple((size, size) for size in sizes)


def test_squeeze_excite_maps_are_not_stages():
    trunk = trunk_of("efficientnet_b0", ImageSpec(3, 64, 64, 10))
    assert trunk.sizes == ((16, 16), (8, 8), (4, 4), (2, 2))
    assert trunk.channels[-1] == 1280


def test_resnet_stages_are_the_outputs_of_its_layers_bit_for_bit():
    model = build_classifier("resnet18", COLOUR)
    x = torch.randn(2, 3, 32, 32)
    maps = find_stages(model, COLOUR).eval()(x)
    u = F.relu(model.bn1(model.conv1(x)))
    for layer, here in zip((model.layer1, model.layer2, model.layer3, model.layer4), maps, strict=True):
        u = layer(u)
        assert torch.equal(u, here)


def test_wide_resnet_stages_are_the_additions_before_the_next_normalisation():
    model = build_classifier("wrn16_1", COLOUR)
    x = torch.randn(2, 3, 32, 32)
    trunk = find_stages(model, COLOUR).eval()
    u = model.stem(x)
    for index, block in enumerate(model.blocks):
        u = block(u)
        if index % 2:
            assert torch.equal(u, trunk(x)[index // 2])
    assert u.min() < 0, "pre-activation maps are not rectified"
    assert not any(name.startswith("net.norm") for name in trunk.state_dict())


def test_the_trunk_owns_nothing_of_the_backbones_classifier():
    for name in ("resnet18", "wrn16_1", "mobilenet_v2"):
        trunk = trunk_of(name, COLOUR)
        assert not any(isinstance(part, nn.Linear) for part in trunk.modules())
    assert all(parameter.requires_grad for parameter in trunk.parameters())


def test_every_trunk_parameter_takes_part():
    model = build_classifier("mobilenet_v3_small", COLOUR)
    trunk = find_stages(model, COLOUR)
    sum(here.square().mean() for here in trunk(torch.randn(2, 3, 32, 32))).backward()
    assert all(parameter.grad is not None for parameter in trunk.parameters())


def test_max_stages_keeps_the_deepest():
    model = build_classifier("resnet8", COLOUR)
    assert find_stages(model, COLOUR, max_stages=2).sizes == ((16, 16), (8, 8))


def test_probing_changes_neither_statistics_nor_modes_nor_random_state():
    model = build_classifier("efficientnet_b0", COLOUR)
    model.features[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    state = torch.random.get_rng_state()
    find_stages(model, COLOUR)
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == [part.training for part in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_copies_of_a_trunk_keep_the_modes_of_its_parts():
    model = build_classifier("resnet8", COLOUR)
    model.stages.eval()
    trunk = find_stages(model, COLOUR)
    modes = {name: part.training for name, part in trunk.named_modules()}
    assert set(modes.values()) == {True, False}
    assert not modes["net.stages"]
    copied = copy.deepcopy(trunk)
    assert modes == {name: part.training for name, part in copied.named_modules()}
    x = torch.randn(2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(trunk.eval()(x), copied.eval()(x), strict=True))


def test_the_trunk_follows_train_and_eval_mode():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout2d(0.5))
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(self.body(x).mean((2, 3)), training=self.training))

    trunk = find_stages(Dropping(), COLOUR)
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(trunk(x)[0], trunk(x)[0])
    norm = trunk.get_submodule("net.body.1")
    assert int(norm.num_batches_tracked) == 2
    trunk.eval()
    assert torch.equal(trunk(x)[0], trunk(x)[0])
    assert int(norm.num_batches_tracked) == 2


def test_a_skip_from_the_input_to_the_end_falls_back_to_the_last_maps():
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
            self.head = nn.Linear(6 + 3, 10)

        def forward(self, x: Tensor) -> Tensor:
            deep = F.relu(self.second(F.relu(self.first(x))))
            return self.head(torch.cat([deep.mean((2, 3)), x.mean((2, 3))], 1))

    trunk = find_stages(Skipping(), COLOUR)
    assert (trunk.channels, trunk.sizes) == ((4, 6), ((32, 32), (16, 16)))


def test_average_pooling_to_one_pixel_begins_the_classifier():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.AvgPool2d(32), nn.Flatten(), nn.Linear(5, 10))
    assert find_stages(model, COLOUR).sizes == ((32, 32),)


class BranchingOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


class BranchingOnMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(F.dropout(self.conv(x), 0.5, self.training)).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (BranchingOnValues(), "torch.fx cannot trace it"),
        (BranchingOnMode(), r"self\.training is read in forward"),
        (nn.Sequential(nn.Conv2d(3, 4, 40), nn.Flatten()), r"cannot take images of 3x32x32"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), "has no feature maps"),
    ],
)
def test_backbones_that_do_not_fit_are_clear_errors(model, message):
    with pytest.raises(ArchitectureError, match=message):
        find_stages(model, COLOUR)
    assert all(part.training for part in model.modules()), "an error left the model in another mode"


@pytest.mark.parametrize("name", ["small_cnn", "lenet_bn", "resnet8", "wrn16_1", "mobilenet_v2", "efficientnet_b0"])
def test_a_staged_classifier_gives_its_output_and_the_trunks_maps_bit_for_bit(name):
    model = build_classifier(name, COLOUR).eval()
    x = torch.randn(2, 3, 32, 32)
    trunk, staged = find_stages(model, COLOUR), with_stages(model, COLOUR)
    output, maps = staged(x)
    assert torch.equal(output, model(x))
    assert len(maps) == len(trunk.channels)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(maps, trunk(x), strict=True))
    assert staged.shapes == tuple((width, *size) for width, size in zip(trunk.channels, trunk.sizes, strict=True))
    assert not model.training


def test_a_staged_classifier_shares_its_modules_and_lets_gradients_through():
    model = build_classifier("resnet8", COLOUR).eval()
    staged = with_stages(model, COLOUR)
    assert staged.net.get_submodule("stages.0.conv1") is model.stages[0].conv1
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    _, maps = staged(x)
    assert torch.allclose(maps[-1].mean((2, 3)), seen[0], atol=1e-6)
    (gradient,) = torch.autograd.grad(maps[0].square().sum(), x)
    assert gradient.abs().sum() > 0


class DropsBeforeItsClassifier(nn.Module):
    def __init__(self, *, other_maps: bool = False) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.other = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)
        self.other_maps = other_maps

    def forward(self, x: Tensor) -> Tensor:
        maps = self.other(x) if self.training and self.other_maps else self.body(x)
        return self.head(F.dropout(maps.mean((2, 3)), training=self.training))


def test_a_staged_classifier_computes_what_the_classifiers_mode_computes():
    model, x = DropsBeforeItsClassifier(), torch.randn(4, 3, 32, 32)
    training, evaluating = with_stages(model.train(), COLOUR), with_stages(model.eval(), COLOUR)
    assert not torch.equal(training(x)[0], training(x)[0]), "functional dropout is lost"
    assert torch.equal(evaluating(x)[0], model(x))
    assert torch.equal(training(x)[1][0], evaluating(x)[1][0])


def test_a_network_with_other_maps_in_train_mode_is_a_clear_error():
    model = DropsBeforeItsClassifier(other_maps=True)
    with pytest.raises(ArchitectureError, match="other stages in train mode"):
        with_stages(model.train(), COLOUR)
    assert with_stages(model.eval(), COLOUR).shapes == ((8, 32, 32),)
