"""Cross entropy with preset labels: by hand, and against a plain loop over teachers and images."""

from __future__ import annotations

import math

import pytest
import torch

from cdfkd_strategy.losses.preset_labels import label_cross_entropy


def test_hand_computed() -> None:
    # one teacher, p(y) = 3/4 and 1/2: the mean of ln(4/3) and ln 2
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0]]])
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert label_cross_entropy(logits, torch.tensor([0, 1]), torch.ones(1, 2)).item() == pytest.approx(expected)


def test_equals_a_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(3, 6, 4, generator=rng), torch.rand(3, 4, generator=rng)
    weights, labels = weights / weights.sum(0), torch.tensor([0, 3, 1, 1, 2, 0])
    expected = 0.0
    for b, y in enumerate(labels.tolist()):
        for k in range(3):
            row = logits[k, b].tolist()
            expected -= float(weights[k, y]) * (row[y] - math.log(sum(math.exp(value) for value in row))) / 6
    assert label_cross_entropy(logits, labels, weights).item() == pytest.approx(expected, rel=1e-5)


def test_a_teacher_that_does_not_know_a_class_is_not_asked_about_it() -> None:
    logits = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    label_cross_entropy(logits, torch.tensor([0, 0, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])).backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(-1).gt(0).tolist() == [[True, True, False], [False, False, True]]
