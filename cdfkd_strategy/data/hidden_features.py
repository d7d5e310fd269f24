"""A bounded memory of a generator's hidden features, from which it can make images again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cdfkd_strategy.data.feature_bank import FeatureBank


class HiddenFeatures:
    """The features of some layers, in float32 on the CPU: when there are as many images as it holds, the oldest ones give way.

    Args:
        capacity: images kept at most.
        shapes: ``(channels, H, W)`` of every layer.

    Raises:
        ConfigError: the capacity is not positive.
    """

    def __init__(self, capacity: int, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = tuple(shapes)
        self._banks = tuple(FeatureBank(capacity, math.prod(shape)) for shape in shapes)

    def __len__(self) -> int:
        return len(self._banks[0])

    def add(self, features: Sequence[Tensor]) -> None:
        """Store the features of a batch, per layer ``[B, channels, H, W]``, from any device."""
        for bank, here in zip(self._banks, features, strict=True):
            bank.add(here.flatten(1))

    def draw(self, layer: int, count: int, rng: torch.Generator) -> Tensor:
        """``count`` random images' features of one layer ``[count, channels, H, W]``; they repeat if there are not enough of them."""
        rows = self._banks[layer].draw(count, rng)
        return rows[torch.arange(count) % len(rows)].view(count, *self.shapes[layer])

    def state_dict(self) -> dict[str, Any]:
        """Everything that is held, by layer."""
        return {str(layer): bank.state_dict() for layer, bank in enumerate(self._banks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: it belongs to other features, or to a larger memory.
        """
        for layer, bank in enumerate(self._banks):
            bank.load_state_dict(state[str(layer)])
