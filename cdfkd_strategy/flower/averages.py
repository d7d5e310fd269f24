"""What the strategy averages over clients: the metrics that they report."""

from __future__ import annotations

import logging
import math

from flwr.app import MetricRecord, RecordDict

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
