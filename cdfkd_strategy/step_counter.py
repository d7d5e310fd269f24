"""How many optimiser steps a method makes, counted from outside, so that methods of any structure are counted alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

STUDENT_STEPS, GENERATOR_STEPS = "steps/student", "steps/generator"


class StepCounter:
    """Counts the steps of all optimisers while a block runs: of the student, and of whatever else is optimised for the images.

    A step belongs to the student if one of the optimiser's parameters does. The others are those of a generator, of latent
    codes, or of the images themselves, and are all called generator steps.

    Args:
        student: the network that is distilled into.
    """

    def __init__(self, student: nn.Module) -> None:
        self._student = student

    @contextmanager
    def counting(self) -> Iterator[dict[str, float]]:
        """The mapping that is given is filled in at the end of the block."""
        counts = {STUDENT_STEPS: 0.0, GENERATOR_STEPS: 0.0}
        own = {id(parameter) for parameter in self._student.parameters()}

        def count(optimizer: Optimizer, args: Any, kwargs: Mapping[str, Any]) -> None:  # noqa: ARG001 - torch's signature
            mine = any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
            counts[STUDENT_STEPS if mine else GENERATOR_STEPS] += 1

        handle = register_optimizer_step_post_hook(count)
        try:
            yield counts
        finally:
            handle.remove()
