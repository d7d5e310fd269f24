"""Which distribution a header imitates: its own teacher, or the fused ensemble."""

from __future__ import annotations

import math

import pytest
import torch

from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.losses.head_targets import head_targets, mean_logits


def test_a_header_per_teacher_gets_its_teacher() -> None:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head_targets(logits, torch.full((3, 5), 1 / 3), 3), logits)


def test_one_header_gets_the_weighted_ensemble() -> None:
    # Two teachers are certain by 2:1 and 1:2; weights 1 and 0 for class 0, 0 and 1 for class 1: scores ln(2/3) and ln(2/3), so 1/2 each.
    logits = torch.tensor([[[math.log(2.0), 0.0]], [[0.0, math.log(2.0)]]])
    target = head_targets(logits, torch.eye(2), 1)
    assert target.shape == (1, 1, 2)
    torch.testing.assert_close(target.exp(), torch.tensor([[[0.5, 0.5]]]))


def test_one_teacher_and_one_header_is_the_paper() -> None:
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head_targets(logits, torch.ones(1, 5), 1).softmax(-1), logits.softmax(-1))


def test_another_number_of_headers_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match=r"2 headers for 3 teachers; accepted: 3 .* or 1"):
        head_targets(torch.zeros(3, 4, 5), torch.full((3, 5), 1 / 3), 2)


def test_the_mean_of_logits_against_a_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(3, 4, 5, generator=rng), torch.rand(3, 5, generator=rng)
    found = mean_logits(logits, weights)
    for b in range(4):
        for c in range(5):
            assert found[b, c].item() == pytest.approx(sum((weights[k, c] * logits[k, b, c]).item() for k in range(3)), rel=1e-5)
    torch.testing.assert_close(mean_logits(logits, torch.full((3, 5), 1 / 3)), logits.mean(0))
    assert torch.equal(head_targets(logits, weights, 1, mean_logits)[0], found)
    assert torch.equal(head_targets(logits, weights, 3, mean_logits), logits)
