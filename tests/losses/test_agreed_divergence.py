"""The divergence where student and teacher decide alike: by hand, against a loop, and without a gradient elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from cdfkd_strategy.losses.agreed_divergence import agreed_divergence


def test_hand_computed() -> None:
    # image 0: T = (3/4, 1/4), S = (2/3, 1/3) agree; image 1: T = (3/4, 1/4), S = (1/3, 2/3) do not
    teacher = torch.tensor([[[3.0, 1.0], [3.0, 1.0]]]).log()
    student = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]).log()
    expected = (0.75 * math.log(9 / 8) + 0.25 * math.log(3 / 4)) / 2
    assert agreed_divergence(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_equals_a_loop_over_headers_and_images() -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 8, 4, generator=rng), torch.randn(3, 8, 4, generator=rng)
    total, agreeing = 0.0, 0
    for k in range(3):
        for b in range(8):
            s, t = student[k, b].tolist(), teacher[k, b].tolist()
            if s.index(max(s)) != t.index(max(t)):
                continue
            agreeing += 1
            q, p = ([math.exp(value) / sum(map(math.exp, row)) for value in row] for row in (s, t))
            total += sum(p[c] * math.log(p[c] / q[c]) for c in range(4))
    assert 0 < agreeing < 24
    assert agreed_divergence(student, teacher).item() == pytest.approx(total / 24, rel=1e-5)


def test_no_gradient_where_they_disagree() -> None:
    student = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]).requires_grad_()
    agreed_divergence(student, torch.tensor([[[3.0, 1.0], [3.0, 1.0]]])).backward()
    assert student.grad is not None
    assert student.grad.abs().sum(-1).gt(0).tolist() == [[True, False]]
