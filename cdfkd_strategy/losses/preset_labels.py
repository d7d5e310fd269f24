"""Do the teachers see the classes that synthetic images were made for? (DeepInversion, https://arxiv.org/abs/1912.08795, eq. 1)"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cdfkd_strategy.precision import full


def label_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """``mean_b sum_k w[k, y_b] CE(T_k(x_b), y_b)``, in nats: a teacher answers for the classes it knows.

    Columns of w sum to 1, so that uniform weights give the plain mean over teachers.

    Args:
        logits: of the teachers, ``[K, B, C]``.
        labels: the preset classes ``[B]``.
        weights: ``[K, C]``.
    """
    chosen = F.log_softmax(full(logits), dim=-1).gather(-1, labels.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)
    return -(weights[:, labels] * chosen).sum(0).mean()
