"""Attention transfer: constants worked out by hand, a NumPy twin of the paper's formula, pairing by resolution, and dead maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cdfkd_strategy.losses.attention import attention_loss, nearest_stage

REDUCTIONS = ("mean", "sum", "norm")


def unit(maps: np.ndarray) -> np.ndarray:
    """``Q / ||Q||_2`` of one image ``[channels, H, W]``."""
    flat = (maps**2).mean(0).ravel()
    return flat / np.sqrt((flat**2).sum())


def twin(student: list[Tensor], teacher: list[Tensor], reduction: str) -> float:
    total = 0.0
    for one, other in zip(student, teacher, strict=True):
        values = []
        for mine, theirs in zip(one.double().numpy(), other.double().numpy(), strict=True):
            difference = unit(mine) - unit(theirs)
            squares = [float(value) ** 2 for value in difference]
            values.append({"mean": sum(squares) / len(squares), "sum": sum(squares), "norm": math.sqrt(sum(squares))}[reduction])
        total += sum(values) / len(values)
    return total


def stages(seed: int, shapes: list[tuple[int, int, int]], batch: int = 3) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=rng) for shape in shapes]


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 0.4), ("sum", 0.8), ("norm", math.sqrt(0.8))])
def test_hand_computed(reduction: str, expected: float) -> None:
    # Q of the student: ((3^2 + 1^2) / 2, (0 + 0) / 2) = (5, 0) -> (1, 0); of the teacher: (3, 4) -> (0.6, 0.8); d = (0.4, -0.8), d^2 sums to 0.8
    student = torch.tensor([[[[3.0, 0.0]], [[1.0, 0.0]]]])
    teacher = torch.tensor([[[[math.sqrt(3.0), 2.0]]]])
    assert float(attention_loss([student], [[teacher]], reduction)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_the_twin_and_channels_may_differ(reduction: str) -> None:
    student, teacher = stages(0, [(4, 8, 6), (8, 4, 3)]), stages(1, [(5, 8, 6), (3, 4, 3)])
    assert float(attention_loss(student, [teacher], reduction)) == pytest.approx(twin(student, teacher, reduction), rel=1e-5)


def test_the_mean_is_over_the_teachers_that_have_maps() -> None:
    student = stages(0, [(4, 6, 6)])
    teachers = [stages(seed, [(4, 6, 6)]) for seed in (1, 2)]
    expected = sum(twin(student, teacher, "mean") for teacher in teachers) / 2
    assert float(attention_loss(student, [teachers[0], (), teachers[1]])) == pytest.approx(expected, rel=1e-5)
    assert float(attention_loss(student, [(), ()])) == 0


def test_other_resolutions_are_paired_with_the_nearest_and_pooled_to_the_smaller() -> None:
    student, teacher = stages(0, [(2, 8, 8), (2, 4, 4), (2, 2, 2)]), stages(1, [(3, 8, 8), (3, 2, 4)])

    def pooled(maps: Tensor) -> Tensor:
        """4 x 4 to 2 x 4, of squares: the root gives the squares back."""
        squares = maps.square().mean(1, keepdim=True)
        return ((squares[:, :, 0::2] + squares[:, :, 1::2]) / 2).sqrt()

    def thinned(maps: Tensor) -> Tensor:
        """2 x 4 to 2 x 2."""
        squares = maps.square().mean(1, keepdim=True)
        return ((squares[..., 0::2] + squares[..., 1::2]) / 2).sqrt()

    expected = twin([student[0], pooled(student[1]), student[2]], [teacher[0], teacher[1], thinned(teacher[1])], "mean")
    assert float(attention_loss(student, [teacher])) == pytest.approx(expected, rel=1e-5)


def test_nearest_is_by_ratio_and_the_first_of_two() -> None:
    assert nearest_stage((16, 16), [(32, 32), (16, 16), (8, 8)]) == 1
    assert nearest_stage((4, 4), [(32, 32), (16, 16), (8, 8)]) == 2
    assert nearest_stage((16, 16), [(32, 32), (8, 8)]) == 0  # twice and half
    assert nearest_stage((14, 14), [(28, 28), (10, 10)]) == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients(reduction: str) -> None:
    student, teacher = (torch.randn(2, 3, 4, 4, dtype=torch.double, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda maps: attention_loss([maps], [[teacher[..., :2, :]]], reduction), student.requires_grad_())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dead_maps_equal_maps_and_half_precision_are_finite(reduction: str) -> None:
    for value in (0.0, 1.0):
        student = torch.full((2, 3, 4, 4), value, requires_grad=True)
        attention_loss([student], [[torch.ones(2, 3, 4, 4)]], reduction).backward()
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()
    loss = attention_loss([torch.full((1, 2, 2, 2), 300.0, dtype=torch.float16)], [[torch.ones(1, 2, 2, 2)]], reduction)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(0, abs=1e-6)
