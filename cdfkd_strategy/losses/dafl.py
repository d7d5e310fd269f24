"""What DAFL's generator minimises (https://arxiv.org/abs/1904.01186): images that a teacher is sure of, that excite it, and that cover all classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cdfkd_strategy.errors import NeedsError
from cdfkd_strategy.losses.class_balance import negative_class_entropy, one_hot_cross_entropy
from cdfkd_strategy.precision import full
from cdfkd_strategy.types import LossTerms, TeacherOutputs


def activation_loss(features: Sequence[Tensor | None]) -> Tensor:
    """``-(1/K) sum_k mean|f_k|``: real images excite a teacher's features more than noise does.

    The mean runs over the batch and the features, as in the authors' code.

    Args:
        features: per teacher ``[B, D_k]`` (`TeacherOutputs.features`), or None for a teacher without features. Those
            teachers are left out, and the mean is over the others.

    Raises:
        NeedsError: no teacher has features.
    """
    sizes = [full(mine).abs().mean() for mine in features if mine is not None]
    if not sizes:
        raise NeedsError("an activation loss for teachers without features before a last linear layer; choose other teachers")
    return -torch.stack(sizes).mean()


def dafl_terms(teachers: TeacherOutputs, one_hot_weight: float, entropy_weight: float, activation_weight: float) -> LossTerms:
    """The weighted terms ``oh CE(T, argmax T)``, ``ie sum_c pbar_c ln pbar_c`` and ``-a mean|f|``, each a mean over the K teachers.

    With one teacher it is DAFL's loss without its distillation term, which has no gradient at the generator; with several
    it is that of CDFKD (ICME 2021).

    Args:
        teachers: logits ``[K, B, C]`` and features of the generated images.
        one_hot_weight: oh.
        entropy_weight: ie, for an entropy in nats.
        activation_weight: a.

    Raises:
        NeedsError: no teacher has features.
    """
    return {
        "one_hot": one_hot_weight * one_hot_cross_entropy(teachers.logits),
        "entropy": entropy_weight * negative_class_entropy(teachers.logits),
        "activation": activation_weight * activation_loss(teachers.features),
    }
