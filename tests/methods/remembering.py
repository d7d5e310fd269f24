"""A test-only method that trains nothing and remembers what it was given."""

from __future__ import annotations

from dataclasses import dataclass

from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.types import Extras, Metrics


@dataclass(frozen=True)
class Nothing:
    """No settings."""


class Remembering(Distiller):
    """One epoch; ``seen`` has the extras of every one that was run, by any of its kind: clear it first."""

    name = "remembering"
    Config = Nothing
    seen: list[Extras] = []  # noqa: RUF012 - shared on purpose

    @property
    def num_epochs(self) -> int:
        return 1

    def run_epoch(self, epoch: int) -> Metrics:
        Remembering.seen.append(self.extras)
        return {"epoch": float(epoch)}
