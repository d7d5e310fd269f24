"""Should a synthetic batch look certain one by one, and balanced as a whole? (DAFL, arXiv:1904.01186)"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

DIGITS_PER_NAT = 1 / math.log(10)
"""An entropy with log10, as in the code of several authors, is the one in nats times this."""


def one_hot_cross_entropy(logits: Tensor) -> Tensor:
    """Cross entropy of logits ``[..., C]`` with their own argmax, in nats: small when every prediction is certain."""
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, flat.argmax(-1))


def negative_class_entropy(logits: Tensor) -> Tensor:
    """``sum_c pbar_c ln pbar_c`` of the batch-mean probabilities, in nats: ``-ln C`` when the batch is perfectly balanced.

    Args:
        logits: logits or log-probabilities ``[B, C]`` or ``[K, B, C]``; with K, the mean over the K entropies.

    The mean is taken in log space, so that a class which never occurs gives 0 and not NaN.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    log_mean = log_probabilities.logsumexp(dim=-2) - math.log(logits.shape[-2])
    return (log_mean.exp() * log_mean).sum(-1).mean()


def image_entropy(logits: Tensor) -> Tensor:
    """``E_x H(p_x)``, the mean entropy of single predictions of logits ``[..., C]``, in nats: 0 when every one is certain.

    The instance categorical entropy of DFQ (arXiv:2005.04136). Computed from log-probabilities: a class that underflows counts 0, and is not NaN.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
