"""Seeded class-stratified splits and subsets of label arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdfkd_strategy.errors import DataError

Indices = NDArray[np.int64]


class Split(NamedTuple):
    """Two sorted, disjoint index arrays that together are all samples."""

    train: Indices
    test: Indices


def stratified_split(labels: NDArray[np.int64], test_fraction: float, rng: np.random.Generator) -> Split:
    """Take ``test_fraction`` of every class as test; a class with at least two samples is in both parts.

    Args:
        labels: ``[N]``.
        test_fraction: between 0 and 1.
        rng: randomness of the split.
    """
    test = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(len(members) * test_fraction)
        test.append(members[: min(max(count, 1), len(members) - 1)])
    chosen = np.sort(np.concatenate(test)) if test else np.empty(0, np.int64)
    return Split(np.setdiff1d(np.arange(len(labels)), chosen), chosen)


def stratified_subset(labels: NDArray[np.int64], size: int, rng: np.random.Generator) -> Indices:
    """``size`` sorted indices whose class shares are those of all samples, by largest remainder.

    Args:
        labels: ``[N]``.
        size: samples to keep, 1..N.
        rng: which samples of a class, and which of equal remainders.

    Raises:
        DataError: ``size`` is not in 1..N.
    """
    if not 1 <= size <= len(labels):
        raise DataError(f"a subset of {size} samples was asked for; accepted: 1..{len(labels)}, the size of the set")
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (size / len(labels))
    take = np.floor(exact).astype(np.int64)
    ties = rng.permutation(len(classes))
    order = ties[np.argsort(-(exact - take)[ties], kind="stable")]
    take[order[: size - int(take.sum())]] += 1
    members = [rng.permutation(np.flatnonzero(labels == label))[:count] for label, count in zip(classes, take, strict=True)]
    return np.sort(np.concatenate(members))
