"""Should a synthetic batch look certain one by one, and balanced as a whole? (DAFL, arXiv:1904.01186)"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from cdfkd_strategy import parallel
from cdfkd_strategy.precision import full


def one_hot_cross_entropy(logits: Tensor) -> Tensor:
    """Cross entropy of logits ``[..., C]`` with their own argmax, in nats: small when every prediction is certain."""
    flat = logits.reshape(-1, logits.shape[-1])
    return parallel.batch_mean(F.cross_entropy(flat, flat.argmax(-1)))


def negative_class_entropy(logits: Tensor) -> Tensor:
    """``sum_c pbar_c ln pbar_c`` of the batch-mean probabilities, in nats: ``-ln C`` when the batch is perfectly balanced.

    Args:
        logits: logits or log-probabilities ``[B, C]`` or ``[K, B, C]``; with K, the mean over the K entropies.

    The mean is taken in log space, so that a class which never occurs gives 0 and not NaN.
    """
    log_probabilities = F.log_softmax(full(logits), dim=-1)
    log_mean = log_probabilities.logsumexp(dim=-2) - math.log(logits.shape[-2])
    if parallel.is_split():
        log_mean = parallel.everyone(log_mean).logsumexp(dim=0) - math.log(parallel.size())
    return (log_mean.exp() * log_mean).sum(-1).mean()
