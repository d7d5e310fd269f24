from __future__ import annotations

import numpy as np
import pytest

from cdfkd_strategy.data import partition
from cdfkd_strategy.data.partition import PARTITIONERS, REPLICATED, PartitionConfig, label_counts, partition_indices
from cdfkd_strategy.errors import ConfigError, DataError, UnknownNameError

CLASSES = 10
LABELS = np.random.default_rng(0).integers(0, CLASSES, 1000)
DOMAINS = np.repeat([0, 1, 2], [700, 200, 100])


def deal(name: str, clients: int = 5, seed: int = 0, labels: np.ndarray = LABELS, **choices: float) -> list[np.ndarray]:
    config = PartitionConfig(name=name, **choices)  # type: ignore[arg-type]
    return partition_indices(labels, clients, config, seed, num_classes=CLASSES, domains=DOMAINS[: len(labels)])


DEALT = [name for name in PARTITIONERS if name != REPLICATED]


@pytest.mark.parametrize("name", DEALT)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_sample_belongs_to_exactly_one_client(name: str, seed: int) -> None:
    owners = [0] * len(LABELS)
    for part in deal(name, seed=seed):
        assert list(part) == sorted(part)
        for index in part:
            owners[index] += 1
    assert owners == [1] * len(LABELS)


@pytest.mark.parametrize("name", DEALT)
def test_the_seed_decides(name: str) -> None:
    first, again, other = deal(name), deal(name), deal(name, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_replicated_gives_everyone_everything() -> None:
    parts = deal(REPLICATED, clients=150)
    assert len(parts) == 150, "more clients than there are samples for, if these were dealt"
    assert all(np.array_equal(part, np.arange(len(LABELS))) for part in parts)


@pytest.mark.parametrize("name", DEALT)
def test_a_class_without_samples_is_no_obstacle(name: str) -> None:
    labels = np.where(LABELS == 3, 4, LABELS)
    parts = deal(name, labels=labels)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert label_counts(labels, parts, CLASSES)[:, 3].tolist() == [0] * 5


def test_one_client_gets_everything() -> None:
    assert np.array_equal(deal("dirichlet", clients=1)[0], np.arange(len(LABELS)))


def test_iid_parts_are_even() -> None:
    assert sorted(len(part) for part in deal("iid", clients=7)) == [142, 143, 143, 143, 143, 143, 143]


def test_alpha_goes_from_one_client_per_class_to_even() -> None:
    even = label_counts(LABELS, deal("dirichlet", alpha=1e6), CLASSES)
    assert np.all(np.abs(even - np.bincount(LABELS) / 5) < 3)
    skewed = label_counts(LABELS, deal("dirichlet", alpha=0.05), CLASSES)
    assert np.median(skewed.max(axis=0) / skewed.sum(axis=0)) > 0.85


def test_dirichlet_is_redrawn_until_everybody_has_enough() -> None:
    for seed in range(10):
        assert min(len(part) for part in deal("dirichlet", seed=seed, alpha=0.1, min_samples=60)) >= 60
    assert min(len(part) for seed in range(10) for part in deal("dirichlet", seed=seed, alpha=0.1, min_samples=1)) < 60


def test_dirichlet_gives_up_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "MAX_DRAWS", 5)
    with pytest.raises(DataError, match=r"5 draws .* raise partition\.alpha"):
        deal("dirichlet", clients=20, alpha=0.01, min_samples=50)


@pytest.mark.parametrize(("clients", "each"), [(5, 2), (5, 3), (4, 10), (10, 1), (7, 2), (3, 7)])
def test_pathological_uses_every_class_and_gives_each_client_its_number(clients: int, each: int) -> None:
    counts = label_counts(LABELS, deal("pathological", clients=clients, classes_per_client=each), CLASSES)
    assert (counts > 0).sum(axis=1).tolist() == [each] * clients
    holders = (counts > 0).sum(axis=0)
    assert holders.min() >= 1
    assert holders.max() - holders.min() <= 1
    for column in counts.T:  # holders share a class equally
        assert np.ptp(column[column > 0]) <= 1


@pytest.mark.parametrize(("clients", "each"), [(4, 2), (4, 11)])
def test_pathological_says_which_numbers_work(clients: int, each: int) -> None:
    with pytest.raises(DataError, match=r"3\.\.10"):
        deal("pathological", clients=clients, classes_per_client=each)


def test_domain_clients_see_one_domain_each_and_large_domains_are_shared() -> None:
    parts = deal("domain", clients=6)
    assert [set(DOMAINS[part].tolist()) for part in parts] == [{0}, {0}, {0}, {0}, {1}, {2}]
    assert [len(part) for part in parts] == [175, 175, 175, 175, 200, 100]


def test_domain_needs_domains_and_enough_clients() -> None:
    with pytest.raises(DataError, match="at least one client per domain"):
        deal("domain", clients=2)
    with pytest.raises(DataError, match="domain_train"):
        partition_indices(LABELS, 5, PartitionConfig(name="domain"), 0, num_classes=CLASSES)


def test_too_few_samples_is_an_error_before_and_after_dealing() -> None:
    with pytest.raises(DataError, match=r"need 1010, .* there are 1000"):
        deal("iid", clients=101)
    with pytest.raises(DataError, match="leaves a client with 100 samples"):
        deal("domain", clients=3, min_samples=101)


def test_bad_settings_say_what_is_accepted() -> None:
    with pytest.raises(UnknownNameError, match="dirichlet, domain, iid, pathological"):
        deal("shards")
    for bad in ({"alpha": 0.0}, {"alpha": float("nan")}, {"min_samples": 0}, {"classes_per_client": 0}):
        with pytest.raises(ConfigError, match="accepted"):
            PartitionConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 clients"):
        deal("iid", clients=0)


def test_label_counts_by_hand() -> None:
    assert label_counts(np.array([0, 1, 1, 2]), [np.array([0, 1]), np.array([2, 3])], 4).tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
