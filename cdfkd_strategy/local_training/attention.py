"""Attention over the student's headers (CDFKD, ICME 2021), fitted by every client on some of its own images, and averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cdfkd_strategy import seeding
from cdfkd_strategy.data.client_share import ClientShare
from cdfkd_strategy.models.head_fusion import HeadAttention, fit_head_attention
from cdfkd_strategy.types import ImageSpec


@dataclass(frozen=True)
class AttentionFit:
    """The parameters of attention over headers that one client fitted: ``weight`` has C numbers."""

    weight: tuple[float, ...]
    bias: float
    num_examples: int


def fit_attention(
    student: nn.Module,
    share: ClientShare,
    *,
    image: ImageSpec,
    samples: int,
    seed: int,
    partition_id: int,
    round: int,  # noqa: A002 - the field's word
) -> AttentionFit | None:
    """Fit the shared Linear(C, 1) on up to ``samples`` of a client's training images; None if there are none.

    Args:
        student: gives `StudentOutputs` of several headers; left as it was found.
        share: the client's images.
        image: what the student takes.
        samples: images at most, a seeded choice.
        seed: of the run.
        partition_id: the client.
        round: from 1.
    """
    parts = ("attention", seed, partition_id, round)
    chosen = seeding.numpy_rng(*parts).permutation(len(share.x_train))[:samples]
    if not len(chosen):
        return None
    rows, device = torch.from_numpy(chosen), next(student.parameters()).device
    with seeding.threads(1):  # as a client computes it, wherever it is computed
        images = image.normalise(share.x_train[rows].to(device).float() / 255)
        fitted = fit_head_attention(student, images, share.y_train[rows].to(device), rng=seeding.generator(*parts))
    return AttentionFit(tuple(fitted.score.weight.double().flatten().tolist()), float(fitted.score.bias), len(chosen))


def mean_attention(fits: Sequence[AttentionFit], num_classes: int) -> HeadAttention | None:
    """The average of the clients' attention parameters, weighted by their samples; None if nobody sent any."""
    total = sum(fit.num_examples for fit in fits)
    if not total:
        return None
    weight = torch.zeros(num_classes, dtype=torch.float64)
    bias = 0.0
    for fit in fits:
        weight += torch.tensor(fit.weight, dtype=torch.float64) * (fit.num_examples / total)
        bias += fit.bias * (fit.num_examples / total)
    return attention_from({"weight": weight.tolist(), "bias": bias})


def attention_from(parameters: Mapping[str, object]) -> HeadAttention:
    """The module with these ``weight`` (C numbers) and ``bias``."""
    weight = torch.tensor(parameters["weight"], dtype=torch.float64)
    attention = HeadAttention(len(weight))
    with torch.no_grad():
        attention.score.weight.copy_(weight[None])
        attention.score.bias.fill_(float(parameters["bias"]))  # type: ignore[arg-type]
    return attention.requires_grad_(False).eval()


def attention_parameters(attention: HeadAttention) -> dict[str, object]:
    """The inverse of `attention_from`: plain values."""
    return {"weight": attention.score.weight.detach().double().flatten().tolist(), "bias": float(attention.score.bias.detach())}
