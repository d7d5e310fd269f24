"""Classifiers by name: small nets for 8 to 64 px, the paper's ResNets and WideResNets, and torchvision's families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models.resnet import BasicBlock, ResNet

from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.models.modes import evaluating
from cdfkd_strategy.registry import Registry
from cdfkd_strategy.types import ImageSpec

CIFAR_STEM_UP_TO = 64
"""The larger side, in pixels, up to which resnet18 and resnet34 keep the resolution in their stem (3x3, stride 1, no pooling)."""

TORCHVISION_FAMILIES = ("resnet", "resnext", "wide_resnet", "vgg", "mobilenet_", "efficientnet_", "regnet_")


@dataclass(frozen=True)
class Architecture:
    """One classifier: how it is built, and whether the paper's multi-header student is defined on it.

    Args:
        name: what a configuration or a client says.
        build: image spec -> network ``[B, channels, H, W] -> [B, C]`` that ends in an ``nn.Linear``.
        paper_layout: a backbone of CDFKD-MFS: its stages enter the headers at full width.
    """

    name: str
    build: Callable[[ImageSpec], nn.Module]
    paper_layout: bool = False


ARCHITECTURES: Registry[Architecture] = Registry("architecture")


def build_classifier(name: str, image: ImageSpec) -> nn.Module:
    """Build a classifier by name; weights are drawn from torch's global random state (see `seeding.seeded_scope`).

    Raises:
        UnknownNameError: nobody registered this name.
        ArchitectureError: the architecture cannot take images of this size.
    """
    model = ARCHITECTURES[name].build(image)
    try:
        shape = _output_shape(model, image)
    except RuntimeError as error:
        raise ArchitectureError(
            f"architecture {name!r} cannot take {image.height}x{image.width} px images ({error}); "
            "choose larger images (data.image_size) or another architecture"
        ) from error
    if shape != (2, image.num_classes):
        raise ArchitectureError(f"architecture {name!r} gives {list(shape)} for 2 images; accepted: [B, C] = [2, {image.num_classes}]")
    return model


def _output_shape(model: nn.Module, image: ImageSpec) -> tuple[int, ...]:
    """The output's shape for two images, computed from shapes alone (meta device): no arithmetic, no random numbers."""
    state = {name: value.to("meta") for name, value in model.state_dict().items()}
    with torch.no_grad(), evaluating(model):
        output: Tensor = functional_call(model, state, torch.zeros(2, *image.shape, device="meta"))
    return tuple(output.shape)


def final_linear(model: nn.Module, num_classes: int | None = None) -> nn.Linear | None:
    """The last ``nn.Linear`` in module order; its input is what this project calls the features.

    Args:
        model: a classifier.
        num_classes: what it must give; a network may have linear layers and no linear classifier.

    Returns:
        The layer, or None if there is none or it gives something else.
    """
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    return layers[-1] if layers and num_classes in (None, layers[-1].out_features) else None


# -- small nets ------------------------------------------------------------------------------------------------


def _small_cnn(image: ImageSpec, norm: Callable[[int], nn.Module]) -> nn.Module:
    """Three 3x3 convolutions (32, 64, 128 channels) with normalisation and ReLU, two poolings, global pooling."""
    layers: list[nn.Module] = []
    before = image.channels
    for width in (32, 64, 128):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), norm(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if width < 128 else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        before = width
    return nn.Sequential(*layers, nn.Linear(128, image.num_classes))


HALF_LENET = (3, 8, 60, 42)
"""Half of every width of LeNet-5."""


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling; padding follows the image, so that 8 px work and 28 and 32 px are the classical net.

    Args:
        image: input and classes.
        batch_norm: normalise after every convolution and hidden linear layer.
        widths: channels of the two convolutions, units of the two hidden layers; `HALF_LENET` is the half-size student of the literature.
    """

    def __init__(self, image: ImageSpec, batch_norm: bool = False, widths: tuple[int, int, int, int] = (6, 16, 120, 84)) -> None:
        super().__init__()
        one, two, three, four = widths
        side = min(image.height, image.width)
        first = 0 if side >= 32 else 2
        second = 0 if (side - 4 + 2 * first) // 2 >= 10 else 2
        height, width = (((size - 4 + 2 * first) // 2 - 4 + 2 * second) // 2 for size in (image.height, image.width))
        norm2d: Callable[[int], nn.Module] = nn.BatchNorm2d if batch_norm else lambda _: nn.Identity()
        norm1d: Callable[[int], nn.Module] = nn.BatchNorm1d if batch_norm else lambda _: nn.Identity()
        self.features = nn.Sequential(
            nn.Conv2d(image.channels, one, 5, padding=first), norm2d(one), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(one, two, 5, padding=second), norm2d(two), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.hidden = nn.Sequential(
            nn.Linear(two * height * width, three), norm1d(three), nn.ReLU(inplace=True),
            nn.Linear(three, four), norm1d(four), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.classifier = nn.Linear(four, image.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, channels, H, W]`` to logits ``[B, C]``."""
        logits: Tensor = self.classifier(self.hidden(self.features(x).flatten(1)))
        return logits


ALEXNET = (48, 128, 192, 192, 128)
"""Channels of AlexNet's convolutions on one of the two processors that it was divided between."""


class AlexNet(nn.Module):
    """AlexNet for small images (Krizhevsky et al. 2012): five convolutions, overlapping pooling after the first, second and fifth, three linear layers.

    The data-free literature has an AlexNet for CIFAR and one of half its width. Their widths are a *reconstruction*: `ALEXNET`, kernels of 5, 5, 3, 3 and
    3 px that keep the resolution, and hidden layers of 512 and 256 units; neither normalisation nor dropout.

    Args:
        image: input and classes.
        parts: 2 halves every width.
    """

    def __init__(self, image: ImageSpec, parts: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = image.channels
        for index, channels in enumerate(ALEXNET):
            kernel = 5 if index < 2 else 3
            layers += [nn.Conv2d(before, channels // parts, kernel, padding=kernel // 2), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(3, stride=2, padding=1)] if index in (0, 1, 4) else []
            before = channels // parts
        self.features = nn.Sequential(*layers)
        positions = -(-image.height // 8) * -(-image.width // 8)
        self.hidden = nn.Sequential(
            nn.Linear(before * positions, 512 // parts), nn.ReLU(inplace=True), nn.Linear(512 // parts, 256 // parts), nn.ReLU(inplace=True)
        )  # fmt: skip
        self.classifier = nn.Linear(256 // parts, image.num_classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, channels, H, W]`` to logits ``[B, C]``."""
        logits: Tensor = self.classifier(self.hidden(self.features(x).flatten(1)))
        return logits


# -- residual nets ---------------------------------------------------------------------------------------------


def _he_init(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


class ResNet8(nn.Module):
    """CIFAR-style ResNet-8 (He et al. 2016, n = 1): 16, 32 and 64 channels, one basic block each; 1x1 projections."""

    def __init__(self, image: ImageSpec) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(image.channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(BasicBlock(16, 16), self._halving(16), self._halving(32))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64, image.num_classes)
        _he_init(self)

    @staticmethod
    def _halving(width: int) -> nn.Module:
        shortcut = nn.Sequential(nn.Conv2d(width, 2 * width, 1, stride=2, bias=False), nn.BatchNorm2d(2 * width))
        block: nn.Module = BasicBlock(width, 2 * width, stride=2, downsample=shortcut)
        return block

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, channels, H, W]`` to logits ``[B, C]``."""
        logits: Tensor = self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))
        return logits


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice beside a shortcut; where the shape changes, the shortcut is a 1x1 convolution of the first activation."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None if before == width else nn.Conv2d(before, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, before, H, W]`` to ``[B, width, H/stride, W/stride]``, not activated."""
        active = F.relu(self.norm1(x))
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-factor (Zagoruyko and Komodakis 2016): three pre-activation stages of (depth - 4) / 6 blocks, no dropout."""

    def __init__(self, image: ImageSpec, depth: int, factor: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image.channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        before = 16
        for stage in range(3):
            width = 16 * factor * 2**stage
            for block in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(before, width, stride=2 if stage and not block else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(before)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before, image.num_classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, channels, H, W]`` to logits ``[B, C]``."""
        logits: Tensor = self.classifier(self.pool(F.relu(self.norm(self.blocks(self.stem(x))))).flatten(1))
        return logits


def _resnet(image: ImageSpec, blocks: list[int]) -> nn.Module:
    """ResNet-18/34 with the stem that fits the image: 3x3 without pooling up to `CIFAR_STEM_UP_TO` px, else 7x7 with pooling.

    Convolutions are drawn as torchvision draws them (He et al., fan-out). The authors of CDFKD-MFS do so for large images only, and leave those of
    the 3x3 stem's networks to torch, which draws them 2 to 5 times smaller.
    """
    model: nn.Module = ResNet(BasicBlock, blocks, num_classes=image.num_classes)
    if max(image.height, image.width) > CIFAR_STEM_UP_TO:
        return _take_channels(model, image.channels)
    model.conv1 = nn.Conv2d(image.channels, 64, 3, padding=1, bias=False)
    _he_init(model.conv1)
    model.maxpool = nn.Identity()
    return model


# -- torchvision -----------------------------------------------------------------------------------------------


def _take_channels(model: nn.Module, channels: int) -> nn.Module:
    """Let the first convolution take ``channels`` channels: it keeps the first ones of its freshly drawn kernels."""
    first = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    if first.in_channels != channels:
        first.weight = nn.Parameter(first.weight.detach()[:, :channels].clone())
        first.in_channels = channels
    return model


def _from_torchvision(image: ImageSpec, name: str) -> nn.Module:
    return _take_channels(torchvision.models.get_model(name, weights=None, num_classes=image.num_classes), image.channels)


def _group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(8, width)


def _register() -> None:
    own: dict[str, Callable[[ImageSpec], nn.Module]] = {
        "small_cnn": partial(_small_cnn, norm=nn.BatchNorm2d),
        "small_cnn_gn": partial(_small_cnn, norm=_group_norm),
        "lenet": LeNet,
        "lenet_bn": partial(LeNet, batch_norm=True),
        "lenet_half": partial(LeNet, widths=HALF_LENET),
        "lenet_half_bn": partial(LeNet, batch_norm=True, widths=HALF_LENET),
        "alexnet_cifar": AlexNet,
        "alexnet_cifar_half": partial(AlexNet, parts=2),
        "resnet8": ResNet8,
    }
    paper: dict[str, Callable[[ImageSpec], nn.Module]] = {
        "wrn16_1": partial(WideResNet, depth=16, factor=1),
        "wrn16_2": partial(WideResNet, depth=16, factor=2),
        "wrn40_2": partial(WideResNet, depth=40, factor=2),
        "resnet18": partial(_resnet, blocks=[2, 2, 2, 2]),
        "resnet34": partial(_resnet, blocks=[3, 4, 6, 3]),
    }
    for name, build in own.items():
        ARCHITECTURES.add(name, Architecture(name, build))
    for name, build in paper.items():
        ARCHITECTURES.add(name, Architecture(name, build, paper_layout=True))
    for name in torchvision.models.list_models(module=torchvision.models):
        if name.startswith(TORCHVISION_FAMILIES) and name not in ARCHITECTURES:
            ARCHITECTURES.add(name, Architecture(name, partial(_from_torchvision, name=name)))


_register()
