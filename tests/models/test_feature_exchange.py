"""Feature exchange: which channels come from where, and images made of features again."""

from __future__ import annotations

import pytest
import torch

from cdfkd_strategy import seeding
from cdfkd_strategy.models.feature_exchange import exchange_channels, exchange_points, from_features, with_features
from cdfkd_strategy.models.generators import Generator, GeneratorConfig, build_generator
from cdfkd_strategy.types import ImageSpec


def generator(side: int) -> Generator:
    with seeding.seeded_scope("exchange"):
        return build_generator(ImageSpec(3, side, side, 10), GeneratorConfig(latent_dim=6, width=0.1, output="sigmoid"))


@pytest.mark.parametrize(("channels", "own"), [(6, 3), (7, 3), (1, 0)])
def test_half_the_channels_stay_and_the_others_come_from_the_mirrored_place(channels: int, own: int) -> None:
    features = torch.arange(5 * channels).float().view(5, channels, 1, 1).expand(-1, -1, 2, 3)
    found = exchange_channels(features, torch.Generator().manual_seed(0))
    kept = []
    for b in range(5):
        mine = {c for c in range(channels) if torch.equal(found[b, c], features[b, c])}
        theirs = {c for c in range(channels) if torch.equal(found[b, c], features[4 - b, c])}
        assert mine | theirs == set(range(channels))
        assert len(mine) == (channels if b == 2 else own), "the one in the middle has itself as its partner"
        kept.append(frozenset(mine))
    if channels > 5:
        assert len(set(kept)) > 2, "every image has a choice of its own"


@pytest.mark.parametrize(("side", "sizes"), [(8, [2, 4, 8]), (64, [4, 8, 16, 32, 64])])
def test_features_of_every_point_give_the_images_again(side: int, sizes: list[int]) -> None:
    net, z = generator(side).eval(), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    points = exchange_points(net)
    images, features = with_features(net, z, points)
    torch.testing.assert_close(images, net(z))
    assert [here.shape[-1] for here in features] == sizes
    for point, here in zip(points, features, strict=True):
        torch.testing.assert_close(from_features(net, here, point), images)


def test_train_mode_moves_batch_norm_once() -> None:
    net, other, z = generator(8).train(), generator(8).train(), torch.randn(4, 6)
    with_features(net, z, exchange_points(net))
    other(z)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value)
