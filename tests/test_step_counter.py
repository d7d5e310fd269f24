"""Optimiser steps, counted from outside the method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cdfkd_strategy.engine import distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.methods import get_method
from cdfkd_strategy.step_counter import GENERATOR_STEPS, STUDENT_STEPS, StepCounter
from tests.methods.trained_teachers import tiny_student, trained_ensemble


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def test_a_step_is_the_students_if_one_of_its_parameters_is() -> None:
    student, other, images = nn.Linear(2, 2), nn.Linear(2, 2), torch.zeros(3, requires_grad=True)
    optimizers = {
        "student": torch.optim.SGD([student.bias], lr=0.1),
        "both": torch.optim.Adam([*other.parameters(), *student.parameters()]),
        "other": torch.optim.Adam(other.parameters()),
        "images": torch.optim.Adam([images]),
    }
    counter = StepCounter(student)
    step(optimizers["student"])  # before: not counted
    with counter.counting() as counts:
        for name, times in (("student", 3), ("both", 1), ("other", 4), ("images", 2)):
            for _ in range(times):
                step(optimizers[name])
    step(optimizers["other"])  # after: not counted
    assert counts == {STUDENT_STEPS: 4.0, GENERATOR_STEPS: 6.0}
    with counter.counting() as again:
        pass
    assert again == {STUDENT_STEPS: 0.0, GENERATOR_STEPS: 0.0}


EXPECTED = {
    "cdfkd_mfs": ([12.0, 12.0], [4.0, 4.0]),  # 4 iterations of 3 student steps and 1 generator step
    "rdskd": ([0.0, 0.0, 4.0, 4.0], [4.0, 4.0, 0.0, 0.0]),  # generator first, then student
    "deep_inversion": ([0.0, 0.0, 6.0, 6.0], [6.0, 6.0, 0.0, 0.0]),  # the images are optimised, then the student
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_history_has_the_steps_of_every_epoch_across_a_restart(name: str, tmp_path: Path) -> None:
    def run(seconds: float | None) -> list[dict[str, float]]:
        engine = EngineConfig(device="cpu", threads=1, precision="float32", watch_images=0, progress=False, max_seconds=seconds)
        config = get_method(name).Config.toy()
        return distill(trained_ensemble(1), tiny_student(1), name, config=config, out=tmp_path, engine=engine, resume=True).history

    assert len(run(0.0)) == 1
    history = run(None)
    assert ([row[STUDENT_STEPS] for row in history], [row[GENERATOR_STEPS] for row in history]) == EXPECTED[name]
