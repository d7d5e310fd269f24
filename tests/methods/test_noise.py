"""The lower bound: loss, images and schedule against a plain reference."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from cdfkd_strategy import seeding
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.methods.kd import KDConfig
from cdfkd_strategy.methods.noise import Noise, NoiseConfig
from cdfkd_strategy.runtime import Runtime
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "noise test"


def build(count: int, heads: int, weights: torch.Tensor | None = None, **changes: Any) -> Noise:
    config = dataclasses.replace(NoiseConfig.toy(), **changes)
    runtime = Runtime(channels_last=False, threads=1)
    return Noise(trained_ensemble(count, weights), tiny_student(heads), config, image=DIGITS, rng=seeding.generator(SEED), runtime=runtime)


@pytest.mark.parametrize("heads", [3, 1])
def test_every_epoch_equals_a_plain_reference(heads: int) -> None:
    """New standard normal images in every step, SGD at the rate of its epoch, T = 4."""
    weights = torch.rand(3, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    distiller = build(3, heads, weights, temperature=4.0, epochs=2, iterations=4, student_milestones=(1,))
    student, rng = copy.deepcopy(distiller.student).train(), seeding.generator(SEED)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    assert distiller.num_epochs == 2
    for epoch, rate in enumerate((0.1, 0.01)):
        optimizer.param_groups[0]["lr"] = rate
        total = 0.0
        for _ in range(4):
            x = torch.randn(32, 1, 8, 8, generator=rng)
            logits, loss = student(x).logits, 0.0
            targets = [net(x) for net in distiller.teachers.nets]
            if heads == 1:
                targets = [sum(share * torch.log(torch.softmax(target, dim=1)) for share, target in zip(weights / weights.sum(0), targets, strict=True))]
            for k, target in enumerate(targets):
                p, q = torch.softmax(torch.log_softmax(target, dim=1) / 4, dim=1), torch.softmax(logits[k] / 4, dim=1)
                loss = loss + 16 * (p * torch.log(p / q)).sum(dim=1).mean() / heads
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        assert distiller.run_epoch(epoch)["student/kl"] == pytest.approx(total / 4, rel=1e-3)
        assert distiller.student_optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_both_bounds_have_the_same_schedule() -> None:
    assert {**dataclasses.asdict(NoiseConfig()), "augment": "auto"} == dataclasses.asdict(KDConfig()), "there is nothing to move in noise"
    assert Noise.needs.disclosed() == ()


@pytest.mark.parametrize("change", [{"epochs": 0}, {"iterations": 0}, {"batch_size": 1}, {"temperature": 0.0}])
def test_settings_that_cannot_work_are_errors(change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        dataclasses.replace(NoiseConfig(), **change)
