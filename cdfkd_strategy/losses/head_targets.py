"""Which teacher distribution each header of the student should imitate."""

from __future__ import annotations

from torch import Tensor

from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.models.head_fusion import fuse


def head_targets(teachers: Tensor, weights: Tensor, heads: int) -> Tensor:
    """Teacher k for header k, or the fused ensemble for a student with one header.

    With one teacher both are the same distribution.

    Args:
        teachers: logits ``[K, B, C]``.
        weights: ``[K, C]``, for `fuse`.
        heads: headers of the student.

    Returns:
        ``[heads, B, C]``: logits, or log-probabilities for one header of several teachers.

    Raises:
        ArchitectureError: ``heads`` is neither K nor 1.
    """
    if heads == len(teachers):
        return teachers
    if heads == 1:
        return fuse(teachers, weights)[None]
    accepted = f"{len(teachers)} (one per teacher) or 1 (the fused ensemble)"
    raise ArchitectureError(f"a student with {heads} headers for {len(teachers)} teachers; accepted: {accepted}")
