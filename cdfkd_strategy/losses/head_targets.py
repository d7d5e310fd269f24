"""Which teacher distribution each header of the student should imitate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.models.head_fusion import fuse
from cdfkd_strategy.precision import full


def mean_logits(teachers: Tensor, weights: Tensor) -> Tensor:
    """The class-weighted mean of logits, ``sum_k w[k, c] T_k[c]``: with uniform weights DFED's target (ACM MM 2021), the plain mean.

    For losses on logits, where `fuse`'s log-probabilities would be another scale. Softmax of it is what `fuse` gives if the
    weights are the same for all classes; logits of teachers that differ by a constant are told apart otherwise.

    Args:
        teachers: logits ``[K, B, C]``.
        weights: ``[K, C]``, columns that sum to 1.

    Returns:
        Logits ``[B, C]``.
    """
    return torch.einsum("kbc,kc->bc", full(teachers), weights.to(full(teachers).dtype))


def head_targets(teachers: Tensor, weights: Tensor, heads: int, ensemble: Callable[[Tensor, Tensor], Tensor] = fuse) -> Tensor:
    """Teacher k for header k, or the ensemble for a student with one header.

    With one teacher both are the same distribution.

    Args:
        teachers: logits ``[K, B, C]``.
        weights: ``[K, C]``, for ``ensemble``.
        heads: headers of the student.
        ensemble: from logits and weights to ``[B, C]``: `fuse`, or `mean_logits` for losses on logits.

    Returns:
        ``[heads, B, C]``: logits, or for one header of several teachers what ``ensemble`` gives (log-probabilities).

    Raises:
        ArchitectureError: ``heads`` is neither K nor 1.
    """
    if heads == len(teachers):
        return teachers
    if heads == 1:
        return ensemble(teachers, weights)[None]
    accepted = f"{len(teachers)} (one per teacher) or 1 (the ensemble)"
    raise ArchitectureError(f"a student with {heads} headers for {len(teachers)} teachers; accepted: {accepted}")
