from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cdfkd_strategy.losses.competition import competition_loss, jensen_shannon


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_jensen_shannon_equals_a_plain_loop() -> None:
    first, second = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    total = 0.0
    for p, q in zip(softmax(first.numpy() / 3).reshape(-1, 7), softmax(second.numpy() / 3).reshape(-1, 7), strict=True):
        middle = (p + q) / 2
        total += sum(a * math.log(a / m) / 2 + b * math.log(b / m) / 2 for a, b, m in zip(p, q, middle, strict=True))
    assert float(jensen_shannon(first, second, 3.0)) == pytest.approx(total / 15, rel=1e-12)  # in float64, as it came
    assert float(competition_loss(first, second)) == pytest.approx(1 - total / 15, rel=1e-5)  # the code's temperature is the default


def test_it_is_zero_for_equal_and_ln_2_for_disjoint_distributions() -> None:
    certain = torch.tensor([[[1e4, 0.0, 0.0]]])
    assert float(jensen_shannon(certain, certain + 5.0)) == 0.0
    assert float(jensen_shannon(certain, certain.roll(1, -1))) == pytest.approx(math.log(2))
    assert float(jensen_shannon(certain.bfloat16(), certain.roll(1, -1))) == pytest.approx(math.log(2))


def test_it_is_symmetric_and_has_gradients_to_both_sides() -> None:
    first, second = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1)).requires_grad_().unbind()
    mine, theirs = torch.autograd.grad(competition_loss(first, second), (first, second))
    with torch.no_grad():
        assert float(jensen_shannon(first, second)) == pytest.approx(float(jensen_shannon(second, first)))
        assert float(competition_loss(first - 10 * mine, second)) < float(competition_loss(first, second))
        assert float(competition_loss(first, second - 10 * theirs)) < float(competition_loss(first, second))
