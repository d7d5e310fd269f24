"""One client's share of the training set, or a set of its own, with its own test part."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdfkd_strategy.data.datasets import DataConfig
from cdfkd_strategy.data.image_data import ImageData
from cdfkd_strategy.data.partition import label_counts, partition_indices
from cdfkd_strategy.data.splits import Indices, Split
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.seeding import numpy_rng

ALWAYS_TESTED = 10
"""A share of at least so many samples holds out one or more, if anything is to be held out at all."""


class ClientShare(NamedTuple):
    """What one client has: uint8 pixels ``[n, channels, H, W]`` and int64 labels ``[n]``, to train on and to test on."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def client_share(data: ImageData, config: DataConfig, clients: int, partition_id: int, seed: int) -> ClientShare:
    """The share of client ``partition_id``; its local test part is held out of the training samples.

    Args:
        data: the whole set.
        config: partition and ``local_test`` fraction.
        clients: ``K``.
        partition_id: 0..K-1.
        seed: of the run; ``config.seed`` goes before it.

    Raises:
        ConfigError: no such client.
        DataError: the samples cannot be dealt as configured.
    """
    if not 0 <= partition_id < clients:
        raise ConfigError(f"partition id {partition_id}; accepted: 0..{clients - 1} for {clients} clients")
    seed = config.seed_in(seed)
    train, test = _hold_out(_parts(data, config, clients, seed)[partition_id], config.local_test, seed, partition_id)
    rows, held = torch.from_numpy(train), torch.from_numpy(test)
    return ClientShare(data.x_train[rows], data.y_train[rows], data.x_train[held], data.y_train[held])


def own_share(data: ImageData, config: DataConfig, partition_id: int, seed: int) -> ClientShare:
    """All of a client's own set: it trains on the training images and tests on the test images.

    Where there are no test images, the ``local_test`` fraction of the training images is held out, as in `client_share`.

    Args:
        data: the client's own set.
        config: ``local_test``.
        partition_id: of the client.
        seed: of the run.
    """
    if len(data.x_test):
        return ClientShare(data.x_train, data.y_train, data.x_test, data.y_test)
    train, test = _hold_out(np.arange(len(data.y_train)), config.local_test, config.seed_in(seed), partition_id)
    rows, held = torch.from_numpy(train), torch.from_numpy(test)
    return ClientShare(data.x_train[rows], data.y_train[rows], data.x_train[held], data.y_train[held])


def train_label_counts(data: ImageData, config: DataConfig, clients: int, seed: int) -> NDArray[np.int64]:
    """How many samples of each class every client trains on, ``[K, C]``, local test parts excluded: the oracle."""
    seed = config.seed_in(seed)
    parts = _parts(data, config, clients, seed)
    trained = [_hold_out(part, config.local_test, seed, client).train for client, part in enumerate(parts)]
    return label_counts(data.y_train.numpy(), trained, data.image.num_classes)


def all_training_rows(data: ImageData, config: DataConfig, clients: int, seed: int) -> Tensor:
    """The rows ``[n]`` of the training set that some client trains on, local test parts excluded, in ascending order."""
    seed = config.seed_in(seed)
    parts = _parts(data, config, clients, seed)
    trained = [_hold_out(part, config.local_test, seed, client).train for client, part in enumerate(parts)]
    return torch.from_numpy(np.unique(np.concatenate(trained)))


def _parts(data: ImageData, config: DataConfig, clients: int, seed: int) -> list[Indices]:
    domains = None if data.domain_train is None else data.domain_train.numpy()
    return partition_indices(data.y_train.numpy(), clients, config.partition, seed, num_classes=data.image.num_classes, domains=domains)


def _hold_out(part: Indices, fraction: float, seed: int, partition_id: int) -> Split:
    count = round(len(part) * fraction)
    if fraction > 0 and len(part) >= ALWAYS_TESTED:
        count = max(count, 1)
    order = numpy_rng("local_test", seed, partition_id).permutation(part)
    count = min(count, len(part) - 1)
    return Split(np.sort(order[count:]), np.sort(order[:count]))
