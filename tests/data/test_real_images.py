"""The image files of the folder that CDFKD_DATA names: what comes out is what their description says."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from cdfkd_strategy.data.client_share import client_share
from cdfkd_strategy.data.datasets import DataConfig, load_data
from cdfkd_strategy.data.partition import PartitionConfig

pytestmark = pytest.mark.real_data


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def test_fashion_mnist() -> None:
    data = load_data(DataConfig(name="fashion_mnist"), seed=0)
    assert digest(data.x_train.numpy()) == "2e487a6c89124f78"
    assert digest(data.x_test.numpy()) == "c867c93ff9536059"
    assert digest(data.y_train.numpy().astype(np.int16)) == "99f131a491cb5380"
    assert data.y_test[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert data.class_names[9] == "Ankle boot"
    pixels = data.x_train.float() / 255
    assert float(pixels.mean()) == pytest.approx(data.image.mean[0], abs=1e-4)
    assert float(pixels.std()) == pytest.approx(data.image.std[0], abs=1e-4)


def test_pacs_goes_to_clients_by_domain() -> None:
    config = DataConfig(name="pacs_32", partition=PartitionConfig(name="domain"))
    data = load_data(config, seed=0)
    assert digest(data.x_train.numpy().transpose(0, 2, 3, 1)) == "489bae472508aa4d"
    assert len(data.domain_names) == 4
    assert data.image.shape == (3, 32, 32)
    shares = [client_share(data, config, 4, client, seed=0) for client in range(4)]
    assert sum(len(share.x_train) + len(share.x_test) for share in shares) == len(data.x_train) == 7993
