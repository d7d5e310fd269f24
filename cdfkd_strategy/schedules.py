"""Learning-rate factors as a function of where a run is: nothing to save, nothing to step, the same after a resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch.optim import Optimizer

ScheduleName = Literal["multistep", "cosine", "constant"]


def multistep(epoch: int, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """``gamma`` to the number of milestones (epochs, from 0) that ``epoch`` has reached, as torch's MultiStepLR."""
    return gamma ** sum(epoch >= milestone for milestone in milestones)


def cosine(step: int, steps: int) -> float:
    """From 1 at step 0 down to 0 at step ``steps``, along half a cosine (arXiv:1608.03983, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def factor(schedule: ScheduleName, epoch: int, iteration: int, *, epochs: int, iterations: int, milestones: Sequence[int]) -> float:
    """The factor of a schedule by name: `multistep` in epochs, `cosine` per iteration over the whole run, or 1.

    Args:
        schedule: its name.
        epoch: from 0, of ``epochs``.
        iteration: from 0, of the ``iterations`` in an epoch.
        epochs: of the run.
        iterations: per epoch.
        milestones: epochs, for "multistep".
    """
    if schedule == "multistep":
        return multistep(epoch, milestones)
    return cosine(epoch * iterations + iteration, epochs * iterations) if schedule == "cosine" else 1.0


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group of an optimiser this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
