"""DAFL's generator loss against a NumPy twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cdfkd_strategy.errors import NeedsError
from cdfkd_strategy.losses.class_balance import DIGITS_PER_NAT
from cdfkd_strategy.losses.dafl import activation_loss, dafl_terms
from cdfkd_strategy.types import TeacherOutputs


def test_the_terms_against_numpy() -> None:
    rng = np.random.default_rng(0)
    logits, features = rng.normal(size=(3, 7, 5)) * 2, [rng.normal(size=(7, width)) for width in (4, 6, 2)]
    one_hot, entropy, activation = [], [], []
    for mine, feature in zip(logits, features, strict=True):
        p = np.exp(mine) / np.exp(mine).sum(1, keepdims=True)
        one_hot.append(np.mean([-np.log(row[np.argmax(row)]) for row in p]))
        mean = p.mean(0)
        entropy.append(np.sum(mean * np.log10(mean)))  # log10, as in the authors' code
        activation.append(-np.abs(feature).sum() / feature.size)
    outputs = TeacherOutputs(torch.tensor(logits), tuple(torch.tensor(feature) for feature in features), (None, None, None))
    terms = dafl_terms(outputs, 0.5, 20 * DIGITS_PER_NAT, 0.1)
    expected = {"one_hot": 0.5 * np.mean(one_hot), "entropy": 20 * np.mean(entropy), "activation": 0.1 * np.mean(activation)}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_teachers_without_features_are_left_out_and_none_is_an_error() -> None:
    assert activation_loss([torch.tensor([[1.0, -3.0]]), None]).item() == -2.0
    with pytest.raises(NeedsError, match="without features"):
        activation_loss([None, None])


def test_half_precision_is_raised() -> None:
    assert activation_loss([torch.ones(2, 3, dtype=torch.bfloat16)]).dtype == torch.float32


def test_gradcheck_in_double() -> None:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(4, 3, dtype=torch.double, generator=rng, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: activation_loss([given, 2 * given]), (features,))
