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


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group of an optimiser this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
