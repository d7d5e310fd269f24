"""What the strategy averages over clients: reported metrics, and the parameters of attention over headers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from flwr.app import MetricRecord, RecordDict

from cdfkd_strategy.flower.payload import AttentionFit
from cdfkd_strategy.models.head_fusion import HeadAttention

logger = logging.getLogger("flwr")


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The weighted mean of every metric over the replies that report it.

    Like Flower's own, but replies need not report the same metrics, and values that are not finite are left out.

    Args:
        contents: replies, each with one MetricRecord.
        weighted_by_key: the metric whose value is the weight; it is not averaged.
    """
    sums: dict[str, list[float]] = {}
    weights: dict[str, float] = {}
    for content in contents:
        for record in content.metric_records.values():
            weight = float(record.get(weighted_by_key, 1.0))  # type: ignore[arg-type]
            for name, value in record.items():
                values = value if isinstance(value, list) else [value]
                if name == weighted_by_key or not all(math.isfinite(item) for item in values):
                    continue
                before = sums.setdefault(name, [0.0] * len(values))
                if len(before) == len(values):
                    sums[name] = [old + weight * item for old, item in zip(before, values, strict=True)]
                    weights[name] = weights.get(name, 0.0) + weight
    lists = {name for content in contents for record in content.metric_records.values() for name, value in record.items() if isinstance(value, list)}
    means = {name: [item / weights[name] for item in values] for name, values in sums.items() if weights.get(name)}
    return MetricRecord({name: values if name in lists else values[0] for name, values in sorted(means.items())})


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
