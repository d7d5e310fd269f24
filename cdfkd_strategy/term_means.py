"""Means of the terms of an epoch's steps, read from the device once."""

from __future__ import annotations

import torch
from torch import Tensor

from cdfkd_strategy.types import LossTerms, Metrics


class TermMeans:
    """Adds up named terms step by step; a term's mean is over the steps that had it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, terms: LossTerms, prefix: str = "") -> None:
        """The terms of one step, without their graphs, under ``prefix + name``."""
        for term, value in terms.items():
            name, value = prefix + term, value.detach()  # noqa: PLW2901
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> Metrics:
        """The means so far, by name, as numbers: waits for the device."""
        sums = torch.stack(list(self._sums.values())).tolist()
        return {name: total / count for (name, count), total in zip(self._counts.items(), sums, strict=True)}
