"""Learning-rate factors against torch's own schedulers."""

from __future__ import annotations

import warnings

import pytest
import torch

from cdfkd_strategy.schedules import cosine, multistep, set_rate


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
