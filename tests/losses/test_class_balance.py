"""Class balance against hand-computed constants and a brute-force twin."""

from __future__ import annotations

import math

import pytest
import torch

from cdfkd_strategy.losses.class_balance import DIGITS_PER_NAT, image_entropy, negative_class_entropy, one_hot_cross_entropy


def test_a_balanced_batch_has_the_smallest_value() -> None:
    certain = torch.eye(4) * 1000
    assert negative_class_entropy(certain).item() == pytest.approx(-math.log(4), rel=1e-6)
    one_class = torch.zeros(4, 4)
    one_class[:, 0] = 1000
    assert negative_class_entropy(one_class).item() == pytest.approx(0.0, abs=1e-6)


def test_negative_class_entropy_against_a_loop() -> None:
    logits = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for k in range(3):
        mean = torch.exp(logits[k]) / torch.exp(logits[k]).sum(1, keepdim=True)
        for share in mean.mean(0).tolist():
            total += share * math.log(share)
    assert negative_class_entropy(logits).item() == pytest.approx(total / 3, rel=1e-5)


def test_negative_class_entropy_has_finite_gradients_where_a_class_never_occurs() -> None:
    logits = torch.tensor([[0.0, -2000.0], [0.0, -2000.0]], requires_grad=True)
    negative_class_entropy(logits).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_one_hot_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(7.0)]])
    assert one_hot_cross_entropy(logits).item() == pytest.approx(-(math.log(3 / 4) + math.log(7 / 8)) / 2, rel=1e-6)


def test_the_entropy_of_single_predictions_by_hand_and_against_a_loop() -> None:
    assert image_entropy(torch.zeros(3, 4)).item() == pytest.approx(math.log(4), rel=1e-6)
    assert DIGITS_PER_NAT * image_entropy(torch.zeros(3, 10)).item() == pytest.approx(1.0, rel=1e-6)  # log10, as in some authors' code
    assert image_entropy(torch.eye(4) * 1000).item() == 0.0
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for row in logits.flatten(0, 1):
        for share in (torch.exp(row) / torch.exp(row).sum()).tolist():
            total -= share * math.log(share)
    assert image_entropy(logits).item() == pytest.approx(total / 6, rel=1e-5)


def test_the_entropy_of_single_predictions_has_finite_gradients_where_a_class_underflows() -> None:
    logits = torch.tensor([[0.0, -2000.0]], requires_grad=True)
    image_entropy(logits).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_gradcheck() -> None:
    logits = torch.randn(4, 3, dtype=torch.double, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(one_hot_cross_entropy, (logits,))
