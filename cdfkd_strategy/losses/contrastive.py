"""Can an image be told from all others by what teachers see of it? InfoNCE as in CMI (https://arxiv.org/abs/2105.08584, eq. 7), and its head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy.precision import full, in_full


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """``-ln( exp(q_i k_i / t) / sum_j exp(q_i k_j / t) )`` of every query, in nats (van den Oord et al., arXiv:1807.03748).

    Args:
        queries: ``[N, D]``, of unit length.
        keys: the same shape; key i belongs to query i, and all others are its negatives.
        temperature: t.

    Returns:
        ``[N]``.
    """
    with in_full(queries):
        similarities = full(queries) @ full(keys).T / temperature
        return F.cross_entropy(similarities, torch.arange(len(queries), device=queries.device), reduction="none")


class ContrastiveHead(nn.Module):
    """Linear, ReLU, linear, to unit length: features ``[N, D_in]`` to ``[N, D_out]`` in float32.

    Args:
        inputs: ``D_in``, also the hidden width.
        outputs: ``D_out``.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Features ``[N, D_in]`` to points on the unit sphere ``[N, D_out]``."""
        return F.normalize(full(self.layers(features)), dim=1)
