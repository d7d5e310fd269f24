"""Who holds which training samples: iid, Dirichlet label skew, few classes per client, one domain per client, all by everyone, or images of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdfkd_strategy.config import require
from cdfkd_strategy.data.splits import Indices
from cdfkd_strategy.errors import ConfigError, DataError
from cdfkd_strategy.registry import Registry
from cdfkd_strategy.seeding import numpy_rng

MAX_DRAWS = 1000
"""How often a random partition is redrawn before it is an error."""

OWN = "own"
"""Not a partition: the clients have images of their own, and nothing is dealt."""

REPLICATED = "replicated"
"""The partitioner that deals every sample to everyone."""


@dataclass(frozen=True)
class PartitionConfig:
    """How the training samples are dealt to the clients.

    Args:
        name: a name in `PARTITIONERS`; or "own" in a deployment whose clients have images of their own, so that nothing is dealt.
        alpha: ``dirichlet``: concentration; small is skewed (0.1), large is even (100).
        min_samples: the least number of samples that any client may get.
        classes_per_client: ``pathological``: classes that each client holds.

    Raises:
        ConfigError: a value is outside what is accepted.
    """

    name: str = "dirichlet"
    alpha: float = 0.5
    min_samples: int = 10
    classes_per_client: int = 2

    def __post_init__(self) -> None:
        require(self, "data.partition", "alpha", above=0)
        require(self, "data.partition", "min_samples", "classes_per_client", least=1)


@dataclass(frozen=True)
class PartitionTask:
    """What a partitioner is given: labels ``[N]`` of classes 0..C-1, the number of clients, domains ``[N]`` or None."""

    labels: NDArray[np.int64]
    clients: int
    num_classes: int
    config: PartitionConfig
    domains: NDArray[np.int64] | None = None


Partitioner = Callable[[PartitionTask, np.random.Generator], list[Indices]]
"""Gives one index array per client; together they hold every sample once (``replicated``: each of them does)."""

PARTITIONERS: Registry[Partitioner] = Registry("partitioner")


def partition_indices(
    labels: NDArray[np.int64],
    clients: int,
    config: PartitionConfig,
    seed: int,
    *,
    num_classes: int,
    domains: NDArray[np.int64] | None = None,
) -> list[Indices]:
    """Deal the training samples to the clients; each sample goes to exactly one of them, or with ``replicated`` to all.

    Args:
        labels: ``[N]``, classes 0..C-1.
        clients: number of clients, at least 1.
        config: which partitioner, and its parameters.
        seed: of the run; the same seed gives the same partition on every machine.
        num_classes: ``C``.
        domains: ``[N]``, needed by ``domain``.

    Returns:
        One sorted index array per client.

    Raises:
        UnknownNameError: no such partitioner.
        DataError: the samples cannot be dealt as asked, or not at all.
    """
    if config.name == OWN:
        raise DataError(
            f"data.partition.name is {OWN!r}: every client has images of its own, so there is nothing to deal; give the client its images "
            f"(data-path in its node's configuration), or choose a partition: {', '.join(sorted(PARTITIONERS))}"
        )
    partitioner = PARTITIONERS[config.name]
    if clients < 1:
        raise ConfigError(f"{clients} clients; accepted: at least 1")
    if config.name != REPLICATED and clients * config.min_samples > len(labels):
        raise DataError(
            f"{clients} clients with at least {config.min_samples} samples each need {clients * config.min_samples}, "
            f"but there are {len(labels)}; lower clients.count or partition.min_samples, or raise data.train_size"
        )
    parts = partitioner(PartitionTask(labels, clients, num_classes, config, domains), numpy_rng("partition", seed))
    smallest = min(len(part) for part in parts)
    if smallest < config.min_samples:
        raise DataError(
            f"partition {config.name!r} leaves a client with {smallest} samples; accepted: at least "
            f"partition.min_samples = {config.min_samples}; lower it or clients.count"
        )
    return [np.sort(part) for part in parts]


def label_counts(labels: NDArray[np.int64], parts: Sequence[Indices], num_classes: int) -> NDArray[np.int64]:
    """Samples per client and class, ``[K, C]``."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts]).astype(np.int64)


@PARTITIONERS.register("iid")
def iid(task: PartitionTask, rng: np.random.Generator) -> list[Indices]:
    """Shuffle and cut into equal parts (sizes differ by at most 1)."""
    return [np.asarray(part) for part in np.array_split(rng.permutation(len(task.labels)), task.clients)]


@PARTITIONERS.register(REPLICATED)
def replicated(task: PartitionTask, rng: np.random.Generator) -> list[Indices]:  # noqa: ARG001 - one signature for all
    """Every client holds every sample, as the teachers of the papers without clients do."""
    return [np.arange(len(task.labels)) for _ in range(task.clients)]


@PARTITIONERS.register("dirichlet")
def dirichlet(task: PartitionTask, rng: np.random.Generator) -> list[Indices]:
    """Cut every class by its own draw from Dir(alpha) over clients; redraw until every client has ``min_samples``.

    Raises:
        DataError: none of `MAX_DRAWS` draws gives every client enough samples.
    """
    members = [np.flatnonzero(task.labels == label) for label in range(task.num_classes)]
    for _ in range(MAX_DRAWS):
        shares: list[list[Indices]] = [[] for _ in range(task.clients)]
        for indices in members:
            cuts = np.cumsum(rng.dirichlet(np.full(task.clients, task.config.alpha)))[:-1]
            pieces = np.split(rng.permutation(indices), np.floor(cuts * len(indices)).astype(np.int64))
            for share, piece in zip(shares, pieces, strict=True):
                share.append(piece)
        parts = [np.concatenate(share) for share in shares]
        if min(len(part) for part in parts) >= task.config.min_samples:
            return parts
    raise DataError(
        f"{MAX_DRAWS} draws from Dirichlet({task.config.alpha}) over {task.clients} clients and {len(task.labels)} samples never gave every "
        f"client {task.config.min_samples} samples; raise partition.alpha or data.train_size, or lower clients.count or partition.min_samples"
    )


@PARTITIONERS.register("pathological")
def pathological(task: PartitionTask, rng: np.random.Generator) -> list[Indices]:
    """Give every client ``classes_per_client`` classes, every class to some client; holders of a class share it equally.

    Raises:
        DataError: too many classes per client, or too few to use every class.
    """
    each, classes = task.config.classes_per_client, task.num_classes
    if each > classes or each * task.clients < classes:
        raise DataError(
            f"{task.clients} clients with {each} classes each cannot hold {classes} classes; accepted for "
            f"partition.classes_per_client: {-(-classes // task.clients)}..{classes}"
        )
    order = rng.permutation(classes)
    # Consecutive runs of one cyclic order: a client's classes are distinct, and holders per class differ by at most 1.
    held = [set(order[np.arange(client * each, (client + 1) * each) % classes].tolist()) for client in range(task.clients)]
    shares: list[list[Indices]] = [[] for _ in range(task.clients)]
    for label in range(classes):
        holders = [client for client in range(task.clients) if label in held[client]]
        pieces = np.array_split(rng.permutation(np.flatnonzero(task.labels == label)), len(holders))
        for client, piece in zip(holders, pieces, strict=True):
            shares[client].append(piece)
    return [np.concatenate(share) for share in shares]


@PARTITIONERS.register("domain")
def domain(task: PartitionTask, rng: np.random.Generator) -> list[Indices]:
    """Every client sees one domain; with more clients than domains, each further client goes where a client holds most.

    Clients are numbered domain by domain, in the order of the domains.

    Raises:
        DataError: the set has no domains, or more of them than there are clients.
    """
    if task.domains is None:
        raise DataError("partition 'domain' needs a data set with domains (domain_train); choose another data set or partitioner")
    names, sizes = np.unique(task.domains, return_counts=True)
    if task.clients < len(names):
        raise DataError(f"{len(names)} domains cannot be dealt to {task.clients} clients; accepted: at least one client per domain")
    holders = np.ones(len(names), np.int64)
    for _ in range(task.clients - len(names)):
        holders[np.argmax(sizes / holders)] += 1
    parts: list[Indices] = []
    for name, count in zip(names, holders, strict=True):
        parts += np.array_split(rng.permutation(np.flatnonzero(task.domains == name)), int(count))
    return parts
