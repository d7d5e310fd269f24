from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from cdfkd_strategy.data.client_share import client_share, own_share, train_label_counts
from cdfkd_strategy.data.datasets import DataConfig
from cdfkd_strategy.data.image_data import ImageData
from cdfkd_strategy.data.partition import PartitionConfig
from cdfkd_strategy.errors import ConfigError, DataError
from cdfkd_strategy.types import ImageSpec

CLIENTS = 4


def numbered(count: int = 400) -> ImageData:
    """Every image carries its own number in its first pixels, so that it can be recognised."""
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count) % 256
    images[:, 0, 0, 1] = torch.arange(count) // 256
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 5, count))
    return ImageData(images, labels, images[:5], labels[:5], tuple("abcde"), ImageSpec(1, 8, 8, 5), domain_train=torch.arange(count) * 4 // count)


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0].int() + 256 * images[:, 0, 0, 1].int()).tolist()


@pytest.mark.parametrize("name", ["iid", "dirichlet", "pathological", "domain"])
def test_shares_and_their_local_tests_hold_every_image_once(name: str) -> None:
    data, config = numbered(), DataConfig(partition=PartitionConfig(name=name, classes_per_client=2))
    seen: Counter[int] = Counter()
    for client in range(CLIENTS):
        share = client_share(data, config, CLIENTS, client, seed=0)
        seen.update(numbers(share.x_train) + numbers(share.x_test))
        for images, labels in ((share.x_train, share.y_train), (share.x_test, share.y_test)):
            assert torch.equal(labels, data.y_train[numbers(images)])
        total = len(share.x_train) + len(share.x_test)
        assert abs(len(share.x_test) - total * 0.1) <= 0.5
    assert seen == Counter(range(400))


def test_the_local_test_is_seeded_and_not_simply_the_first_images() -> None:
    data, config = numbered(), DataConfig(partition=PartitionConfig(name="iid"))
    first, again = (client_share(data, config, CLIENTS, 1, seed=0) for _ in range(2))
    assert numbers(first.x_test) == numbers(again.x_test)
    everything = sorted(numbers(first.x_train) + numbers(first.x_test))
    assert numbers(first.x_test) not in (everything[: len(first.x_test)], everything[-len(first.x_test) :])


@pytest.mark.parametrize(("size", "fraction", "held"), [(40, 0.0, 0), (40, 0.01, 1), (8, 0.01, 0), (8, 0.25, 2), (40, 0.99, 39), (1, 0.9, 0)])
def test_how_many_are_held_out(size: int, fraction: float, held: int) -> None:
    config = DataConfig(partition=PartitionConfig(name="iid", min_samples=1), local_test=fraction)
    share = client_share(numbered(size), config, 1, 0, seed=0)
    assert (len(share.x_train), len(share.x_test)) == (size - held, held)
    assert share.x_test.shape[1:] == (1, 8, 8)


def test_the_oracle_counts_what_is_trained_on() -> None:
    data, config = numbered(), DataConfig(partition=PartitionConfig(alpha=0.3))
    counts = train_label_counts(data, config, CLIENTS, seed=3)
    for client in range(CLIENTS):
        labels = client_share(data, config, CLIENTS, client, seed=3).y_train.tolist()
        assert counts[client].tolist() == [labels.count(label) for label in range(5)]


@pytest.mark.parametrize("client", [-1, 4])
def test_a_client_that_does_not_exist(client: int) -> None:
    with pytest.raises(ConfigError, match=r"accepted: 0\.\.3"):
        client_share(numbered(), DataConfig(), CLIENTS, client, seed=0)


def test_an_own_set_is_taken_whole() -> None:
    data, config = numbered(40), DataConfig(local_test=0.25)
    share = own_share(data, config, 7, seed=0)
    assert numbers(share.x_train) == list(range(40))
    assert torch.equal(share.y_test, data.y_test)
    without = dataclasses.replace(data, x_test=data.x_test[:0], y_test=data.y_test[:0])
    share = own_share(without, config, 7, seed=0)
    assert (len(share.x_train), len(share.x_test)) == (30, 10)
    assert sorted(numbers(share.x_train) + numbers(share.x_test)) == list(range(40))
    assert torch.equal(share.y_train, data.y_train[numbers(share.x_train)])


def test_nothing_is_dealt_to_clients_with_their_own_images() -> None:
    with pytest.raises(DataError, match=r"every client has images of its own, so there is nothing to deal; .*data-path.*dirichlet"):
        client_share(numbered(), DataConfig(partition=PartitionConfig(name="own")), CLIENTS, 0, seed=0)
