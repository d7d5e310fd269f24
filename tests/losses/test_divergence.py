"""Divergences against hand-computed constants and brute-force twins."""

from __future__ import annotations

import math

import pytest
import torch

from cdfkd_strategy.losses.divergence import feature_l1, kl_divergence, logit_l1, mean_logit_l1

K, B, C, D = 3, 4, 5, 6


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(K, B, C, generator=rng, dtype=torch.double), torch.randn(K, B, C, generator=rng, dtype=torch.double)


def test_logit_l1_is_the_mean_over_heads_of_the_mean_absolute_difference(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits
    total = 0.0
    for k in range(K):
        inner = 0.0
        for b in range(B):
            for c in range(C):
                inner += abs(student[k, b, c].item() - teacher[k, b, c].item())
        total += inner / (B * C)
    assert logit_l1(student, teacher).item() == pytest.approx(total / K, rel=1e-12)


def test_mean_logit_l1_averages_heads_before_the_difference(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits
    total = 0.0
    for b in range(B):
        for c in range(C):
            mine = sum(student[k, b, c].item() for k in range(K)) / K
            theirs = sum(teacher[k, b, c].item() for k in range(K)) / K
            total += abs(mine - theirs)
    assert mean_logit_l1(student, teacher).item() == pytest.approx(total / (B * C), rel=1e-12)
    opposite = torch.tensor([[[1.0]], [[-1.0]]])
    assert mean_logit_l1(opposite, torch.zeros(2, 1, 1)).item() == 0.0
    assert logit_l1(opposite, torch.zeros(2, 1, 1)).item() == 1.0


def test_feature_l1_sums_over_dimensions_and_averages_over_batch_and_teachers() -> None:
    rng = torch.Generator().manual_seed(1)
    student = torch.randn(K, B, D, generator=rng, dtype=torch.double)
    teacher = [torch.randn(B, D, generator=rng, dtype=torch.double), None, torch.randn(B, D, generator=rng, dtype=torch.double)]
    total = 0.0
    for k, features in enumerate(teacher):
        if features is not None:
            total += sum(abs(student[k, b, d].item() - features[b, d].item()) for b in range(B) for d in range(D)) / B
    assert feature_l1(student, teacher).item() == pytest.approx(total / K, rel=1e-12)


def test_feature_l1_leaves_out_other_widths() -> None:
    assert feature_l1(torch.ones(1, 2, 3), [torch.zeros(2, 4)]).item() == 0.0


def test_kl_by_hand() -> None:
    teacher = torch.tensor([[math.log(0.75), math.log(0.25)]])
    student = torch.tensor([[math.log(0.5), math.log(0.5)]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_kl_against_torch_with_temperature(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits[0].float(), logits[1].float()
    expected = 0.0
    for k in range(K):
        expected += 16 * torch.nn.KLDivLoss(reduction="batchmean")(torch.log(torch.softmax(student[k] / 4, 1)), torch.softmax(teacher[k] / 4, 1)).item()
    assert kl_divergence(student, teacher, temperature=4.0).item() == pytest.approx(expected / K, rel=1e-5)


def test_kl_survives_probabilities_that_underflow() -> None:
    far = torch.tensor([[0.0, -2000.0]], requires_grad=True)
    value = kl_divergence(far, torch.tensor([[0.0, -1000.0]]))
    value.backward()
    assert math.isfinite(value.item())
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()
