"""Do student and teacher still disagree about an image? The term of adaptive DeepInversion (https://arxiv.org/abs/1912.08795)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cdfkd_strategy.precision import full


def jensen_shannon(first: Tensor, second: Tensor, temperature: float = 1.0) -> Tensor:
    """``(KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``, in nats: 0 for equal distributions, ``ln 2`` for disjoint ones.

    Args:
        first: logits or log-probabilities ``[..., B, C]``; p is their softmax at the temperature.
        second: the same shape; q.
        temperature: divides both.

    Returns:
        A scalar: summed over classes, the mean over everything else.
    """
    p, q = (F.log_softmax(full(logits) / temperature, dim=-1) for logits in (first, second))
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)).mean() / 2


def competition_loss(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """``1 - JS(T, S)``: small for images that the student does not understand as the teacher does.

    Differs from the authors' code, which swaps the arguments of both divergences and clamps probabilities to [0.01, 0.99], so that
    it has no gradient where a network is certain; the temperature is the code's.

    Args:
        student: logits ``[heads, B, C]``.
        teacher: the same shape.
        temperature: of both.
    """
    return 1 - jensen_shannon(student, teacher, temperature)
