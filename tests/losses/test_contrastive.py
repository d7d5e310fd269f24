"""InfoNCE: by hand, against a plain loop, and what it can and cannot tell apart; the head."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from cdfkd_strategy.losses.contrastive import ContrastiveHead, info_nce


def test_hand_computed() -> None:
    # two orthogonal points, each its own key, temperature 1/2: -ln( e^2 / (e^2 + e^0) )
    points = torch.eye(2)
    expected = math.log(1 + math.exp(-2))
    assert info_nce(points, points, 0.5).tolist() == pytest.approx([expected, expected])
    assert info_nce(points, points.flip(0), 0.5).tolist() == pytest.approx([expected + 2, expected + 2])


def test_equals_a_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    queries, keys = (F.normalize(torch.randn(5, 4, generator=rng), dim=1) for _ in range(2))
    for i, found in enumerate(info_nce(queries, keys, 0.2).tolist()):
        scores = [math.exp(sum(a * b for a, b in zip(queries[i].tolist(), key, strict=True)) / 0.2) for key in keys.tolist()]
        assert found == pytest.approx(-math.log(scores[i] / sum(scores)), rel=1e-5)


def test_images_that_look_alike_cost_the_logarithm_of_their_number() -> None:
    same = F.normalize(torch.ones(8, 3), dim=1)
    torch.testing.assert_close(info_nce(same, same, 0.1), torch.full((8,), math.log(8)))


def test_gradcheck() -> None:
    rng = torch.Generator().manual_seed(1)
    queries, keys = (torch.randn(4, 3, generator=rng, dtype=torch.double).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, 0.3), (queries, keys))


def test_the_head_is_written_out() -> None:
    torch.manual_seed(0)
    head, features = ContrastiveHead(5, 3), torch.randn(4, 5)
    first, _, last = head.layers
    hidden = (features @ first.weight.T + first.bias).clamp_min(0)
    out = hidden @ last.weight.T + last.bias
    assert first.weight.shape == (5, 5)
    torch.testing.assert_close(head(features), out / (out**2).sum(1, keepdim=True).sqrt())
