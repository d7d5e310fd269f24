from __future__ import annotations

import pytest
import torch
from torch import nn

from cdfkd_strategy import seeding
from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.feature_layer import feature_layer, replay
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(3, 32, 32, 7)


def build(name: str) -> nn.Module:
    with seeding.seeded_scope("feature layer test"):
        return build_classifier(name, IMAGE).eval()


@pytest.mark.parametrize(
    ("arch", "fc2", "classes"),
    [("lenet", (120, 84), (84, 7)), ("lenet_bn", (120, 84), (84, 7)), ("vgg11", (4096, 4096), (4096, 7)), ("mobilenet_v3_small", (576, 1024), (1024, 7)),
     ("small_cnn", (128, 7), (128, 7)), ("resnet18", (512, 7), (512, 7))],
)  # fmt: skip
def test_the_layer_before_the_classifier_or_the_classifier_itself(arch: str, fc2: tuple[int, int], classes: tuple[int, int]) -> None:
    with torch.device("meta"):
        net = build_classifier(arch, IMAGE)
    for name, expected in (("fc2", fc2), ("classes", classes)):
        layer = feature_layer(net, 7, name)  # type: ignore[arg-type]
        assert (layer.in_features, layer.out_features) == expected


def test_a_linear_layer_that_does_not_lead_to_the_classifier_is_not_taken() -> None:
    gate, classifier = nn.Linear(4, 4), nn.Linear(8, 7)
    assert feature_layer(nn.Sequential(gate, classifier), 7) is classifier
    with pytest.raises(ArchitectureError, match="no linear layer that gives 7 classes"):
        feature_layer(nn.Sequential(nn.Conv2d(3, 7, 1), gate), 7)


@pytest.mark.parametrize("arch", ["lenet", "lenet_bn"])
def test_what_follows_the_layer_acts_on_what_it_is_given(arch: str) -> None:
    net = build(arch)
    for part in net.modules():  # statistics that are not those of a fresh layer
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    given = torch.randn(5, 84, generator=torch.Generator().manual_seed(1))
    expected = net.classifier(torch.relu(net.hidden[4](given)))
    assert torch.equal(replay(net, feature_layer(net, 7), given, IMAGE), expected)
    images = torch.randn(5, *IMAGE.shape)
    assert not torch.equal(net(images), expected), "the network is as it was"


def test_the_classifiers_own_outputs_are_the_logits() -> None:
    net, given = build("small_cnn"), torch.randn(3, 7)
    assert torch.equal(replay(net, feature_layer(net, 7), given, IMAGE), given)
