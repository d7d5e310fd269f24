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


WARM_UP = 0.15
"""The share of a one-cycle schedule in which the rate rises."""

RATE_AT_START, LOWEST_MOMENTUM = 0.04, 0.85
"""Of one cycle: the first rate over the highest (torch's 1 / 25), and the momentum at the highest rate."""


def one_cycle(step: int, steps: int, *, highest_momentum: float) -> tuple[float, float]:
    """The factor of the rate and the momentum of the one-cycle policy (arXiv:1708.07120), both along half a cosine, as torch's OneCycleLR.

    The rate rises from `RATE_AT_START` to 1 during `WARM_UP` and then falls to 0; the momentum falls from its highest value to
    `LOWEST_MOMENTUM` (never above the highest), and rises again.

    Args:
        step: from 0.
        steps: of the whole schedule.
        highest_momentum: at both ends.
    """
    warm, lowest = max(1.0, WARM_UP * steps - 1), min(LOWEST_MOMENTUM, highest_momentum)
    if step < warm:
        share = 0.5 * (1 - math.cos(math.pi * step / warm))
        return RATE_AT_START + (1 - RATE_AT_START) * share, highest_momentum + (lowest - highest_momentum) * share
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, steps - 1 - warm))))
    return share, highest_momentum + (lowest - highest_momentum) * share


def set_momentum(optimizer: Optimizer, momentum: float) -> None:
    """Give every parameter group of SGD this momentum, or of Adam this first beta."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        else:
            group["momentum"] = momentum


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group of an optimiser this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
