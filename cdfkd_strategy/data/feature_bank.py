"""A bounded memory of what networks saw in earlier batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cdfkd_strategy.errors import CheckpointError, ConfigError


class FeatureBank:
    """A ring of float32 rows on the CPU: when it is full, the oldest ones give way.

    Args:
        capacity: rows kept at most.
        width: numbers per row.

    Raises:
        ConfigError: the capacity is not positive.
    """

    def __init__(self, capacity: int, width: int) -> None:
        if capacity < 1:
            raise ConfigError(f"feature bank capacity is {capacity}; accepted: at least 1")
        self.capacity = capacity
        self._rows = torch.empty(0, width)
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: Tensor) -> None:
        """Store ``rows [N, width]``, from any device."""
        kept = rows.detach().float().cpu()[-self.capacity :]
        free = self.capacity - len(self)
        self._rows = torch.cat([self._rows, kept[:free]])
        rest = kept[free:]
        self._rows[(self._next + torch.arange(len(rest))) % self.capacity] = rest
        self._next = (self._next + len(rest)) % self.capacity

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """``count`` different random rows ``[count, width]``, or all if there are no more."""
        return self._rows[torch.randperm(len(self), generator=rng)[:count]]

    def state_dict(self) -> dict[str, Any]:
        """Everything the bank holds."""
        return {"rows": self._rows.clone(), "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: it belongs to a bank of other features, or to a larger one.
        """
        rows = state["rows"]
        if rows.shape[1:] != self._rows.shape[1:] or len(rows) > self.capacity:
            raise CheckpointError(f"the stored bank is {list(rows.shape)}; accepted: at most {self.capacity} rows of {self._rows.shape[1]} numbers")
        self._rows, self._next = rows.clone(), int(state["next"])
