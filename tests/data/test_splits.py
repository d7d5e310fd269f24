from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cdfkd_strategy.data.splits import stratified_split, stratified_subset
from cdfkd_strategy.errors import DataError

LABELS = np.array([0] * 50 + [1] * 25 + [2] * 10 + [3] * 2 + [4])


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_a_split_holds_every_sample_once_and_every_class_on_both_sides() -> None:
    train, test = stratified_split(LABELS, 0.2, rng())
    assert sorted([*train, *test]) == list(range(len(LABELS)))
    assert list(train) == sorted(train)
    assert list(test) == sorted(test)
    assert Counter(LABELS[test].tolist()) == {0: 10, 1: 5, 2: 2, 3: 1}  # a class of one sample stays in training
    assert not np.array_equal(test, stratified_split(LABELS, 0.2, np.random.default_rng(4)).test)


@pytest.mark.parametrize("size", [1, 2, 7, 44, 87, 88])
def test_a_subset_keeps_the_class_shares(size: int) -> None:
    chosen = stratified_subset(LABELS, size, rng())
    assert len(chosen) == len(set(chosen.tolist())) == size
    assert list(chosen) == sorted(chosen)
    for label, count in Counter(LABELS.tolist()).items():
        assert abs(np.sum(LABELS[chosen] == label) - size * count / len(LABELS)) < 1


@pytest.mark.parametrize("size", [0, 89])
def test_an_impossible_subset_says_what_is_possible(size: int) -> None:
    with pytest.raises(DataError, match=r"1\.\.88"):
        stratified_subset(LABELS, size, rng())
