"""How far the student is from the teachers: L1 on logits, L1 on features, and Kullback-Leibler divergences. Half precision is raised to float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cdfkd_strategy.precision import full


def logit_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of logits, over every dimension: for ``[K, B, C]`` it is ``(1/K) sum_k mean|S_k - T_k|``.

    The discrepancy of DFAD (arXiv:1912.11006) and the adversarial term of CDFKD-MFS (arXiv:2205.11845).
    """
    return (full(student) - full(teacher)).abs().mean()


def mean_logit_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean|avg_k S_k - avg_k T_k|`` of logits ``[K, B, C]``: CDFKD-MFS's ensemble term, which knows no weights."""
    return (full(student).mean(0) - full(teacher).mean(0)).abs().mean()


def feature_l1(student: Tensor, teacher: Sequence[Tensor | None]) -> Tensor:
    """``(1/K) sum_k E_batch ||f_k^S - f_k^T||_1``: a sum over feature dimensions, a mean over the batch and the teachers.

    Args:
        student: ``[K, B, D]``.
        teacher: K tensors ``[B, D]``; teachers that are None or of another width are left out of the sum.
    """
    pairs = [(full(mine), full(theirs)) for mine, theirs in zip(student, teacher, strict=True) if theirs is not None and theirs.shape == mine.shape]
    terms = [(mine - theirs).abs().sum(-1).mean() for mine, theirs in pairs]
    return torch.stack(terms).sum() / student.shape[0] if terms else student.new_zeros(())


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, summed over classes, mean over everything else, in nats.

    Args:
        student: logits or log-probabilities ``[..., B, C]``.
        teacher: the same shape.
        temperature: T; the factor ``T^2`` keeps the gradient's size (Hinton et al., arXiv:1503.02531).
    """
    mine = F.log_softmax(full(student) / temperature, dim=-1)
    theirs = F.log_softmax(full(teacher) / temperature, dim=-1)
    return temperature**2 * (theirs.exp() * (theirs - mine)).sum(-1).mean()
