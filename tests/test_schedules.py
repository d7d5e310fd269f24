"""Learning-rate factors against torch's own schedulers."""

from __future__ import annotations

import warnings

import pytest
import torch

from cdfkd_strategy.schedules import cosine, factor, multistep, set_rate


def test_multistep_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], 0.1)
    for epoch in range(8):
        assert multistep(epoch, (3, 5)) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_cosine_is_torchs_and_ends_at_zero() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(11):
        assert cosine(step, 10) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        with warnings.catch_warnings():
            reference.step()
    assert cosine(10, 10) == 0.0
    assert cosine(12, 10) == 0.0


def test_set_rate_reaches_every_group() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]}, {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 3.0}], lr=1.0)
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_factor_finds_a_schedule_by_name() -> None:
    """Two epochs of two iterations, worked out by hand."""
    steps = [(0, 0), (0, 1), (1, 0), (1, 1)]
    half = 0.5 * 2**-0.5
    expected = {"multistep": [1, 1, 0.1, 0.1], "cosine": [1, 0.5 + half, 0.5, 0.5 - half], "constant": [1, 1, 1, 1]}
    for name, values in expected.items():
        assert [factor(name, *step, epochs=2, iterations=2, milestones=(1,)) for step in steps] == pytest.approx(values)  # type: ignore[arg-type]
