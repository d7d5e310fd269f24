"""Some teachers per step: with m of K, the cost of a step does not grow with the number of clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cdfkd_strategy.errors import ConfigError


class TeacherDraw:
    """Draws m of K teachers, step by step.

    Half of them (rounded up) come in turn, from a fresh random order of all in every cycle, so that none is forgotten. The
    others are drawn by what they know: a class at random, then a teacher of it with probability ``w[k, c]``.

    Args:
        weights: ``[K, C]``, columns sum to 1.
        count: m, at least 1; K or more is all, every time.

    Raises:
        ConfigError: fewer than one teacher per step.
    """

    def __init__(self, weights: Tensor, count: int) -> None:
        if count < 1:
            raise ConfigError(f"{count} teachers per step; accepted: at least 1")
        self.weights = weights.detach().cpu().float()
        self.count = min(count, len(weights))
        self.in_turn = (self.count + 1) // 2
        self._waiting: Tensor = torch.empty(0, dtype=torch.long)

    @property
    def at_latest(self) -> int:
        """Within so many steps every teacher takes part at least once."""
        cycle = -(-len(self.weights) // self.in_turn)
        return 1 if self.count == len(self.weights) else 2 * cycle - 1

    def next(self, rng: torch.Generator) -> list[int]:
        """The teachers of the next step, in ascending order, no one twice.

        Args:
            rng: a CPU generator; not used if all take part.
        """
        teachers = len(self.weights)
        if self.count == teachers:
            return list(range(teachers))
        if not len(self._waiting):
            self._waiting = torch.randperm(teachers, generator=rng)
        chosen = set(self._waiting[: self.in_turn].tolist())
        self._waiting = self._waiting[self.in_turn :]
        if more := self.count - len(chosen):
            chances = self.weights.mean(1).clamp_min(torch.finfo(torch.float32).tiny)  # a class at random, then a teacher of it
            chances[list(chosen)] = 0
            chosen |= set(torch.multinomial(chances, more, generator=rng).tolist())
        return sorted(chosen)

    def state_dict(self) -> dict[str, Any]:
        """Who still waits for a turn."""
        return {"waiting": self._waiting.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._waiting = state["waiting"].clone()
