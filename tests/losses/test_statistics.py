"""BatchNorm distances against numbers worked out by hand and an independently written NumPy twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cdfkd_strategy.errors import NeedsError
from cdfkd_strategy.losses.statistics import AveragedStatistics, batch_norm_distance, batch_norm_loss, batch_norm_shift, shift_kl


def test_a_hand_computed_distance() -> None:
    norm = nn.BatchNorm2d(2)  # running mean 0, running variance 1
    # channel 0: values 0, 2 -> mean 1, biased variance 1; channel 1: values 3, 7 -> mean 5, biased variance 4
    images = torch.tensor([[[[0.0]], [[3.0]]], [[[2.0]], [[7.0]]]])
    expected = (1**2 + 5**2) ** 0.5 + (0**2 + 3**2) ** 0.5
    assert batch_norm_distance(norm, images).item() == pytest.approx(expected, rel=1e-6)


def test_against_numpy_on_random_batches() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(1.5, 2.0, size=(6, 5, 4, 3))
    norm = nn.BatchNorm2d(5)
    mean, variance = rng.normal(size=5), rng.uniform(0.5, 2, size=5)
    norm.running_mean, norm.running_var = torch.tensor(mean).float(), torch.tensor(variance).float()
    columns = values.transpose(1, 0, 2, 3).reshape(5, -1)
    expected = np.sqrt(((columns.mean(1) - mean) ** 2).sum()) + np.sqrt(((columns.var(1) - variance) ** 2).sum())
    assert batch_norm_distance(norm, torch.tensor(values)).item() == pytest.approx(expected, rel=1e-5)


def batch_norm_kl(norm: nn.BatchNorm2d, images: torch.Tensor) -> torch.Tensor:
    return shift_kl(norm, batch_norm_shift(norm, images))


def test_the_kl_of_gaussians_against_numerical_integration() -> None:
    """The definition, on a fine grid: the integral of p ln(p / q), channel by channel."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 1.5, size=(6, 3, 4, 2))
    norm = nn.BatchNorm2d(3, eps=0.0)
    mean, variance = rng.normal(size=3), rng.uniform(0.5, 2, size=3)
    norm.running_mean, norm.running_var = torch.tensor(mean), torch.tensor(variance)
    grid = np.linspace(-30, 30, 200_001)
    expected = 0.0
    for channel in range(3):
        column = values[:, channel].ravel()
        p = np.exp(-((grid - column.mean()) ** 2) / (2 * column.var())) / np.sqrt(2 * np.pi * column.var())
        q = np.exp(-((grid - mean[channel]) ** 2) / (2 * variance[channel])) / np.sqrt(2 * np.pi * variance[channel])
        inside = p > 1e-30  # the rest is nothing, and q underflows there
        expected += (p[inside] * np.log(p[inside] / q[inside])).sum() * (grid[1] - grid[0])
    for layout in (torch.contiguous_format, torch.channels_last):
        assert batch_norm_kl(norm, torch.tensor(values).contiguous(memory_format=layout)).item() == pytest.approx(expected, rel=1e-6)


def test_the_kl_is_0_for_the_remembered_statistics_and_finite_for_a_constant_channel() -> None:
    norm = nn.BatchNorm2d(1)
    assert batch_norm_kl(norm, torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)).item() == pytest.approx(0.0, abs=1e-6)
    norm.running_var = torch.zeros(1)
    images = torch.zeros(2, 1, 2, 2, requires_grad=True)
    batch_norm_kl(norm, images).backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_both_memory_layouts_give_the_same_distance_and_gradient(offset: float) -> None:
    rng = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(5)
    norm.running_mean = torch.randn(5, generator=rng) + offset
    values = torch.randn(16, 5, 6, 4, generator=rng) * 2 + offset
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        images = values.contiguous(memory_format=layout).requires_grad_()
        distance = batch_norm_distance(norm, images)
        found.append((distance.detach(), torch.autograd.grad(distance, images)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_the_loss_weights_the_first_layer_and_averages_over_teachers_with_batch_norm() -> None:
    bn = (torch.tensor([1.0, 2.0, 3.0]), None, torch.tensor([10.0]))
    assert batch_norm_loss(bn).item() == pytest.approx(((5 * 1 + 2 + 3) + 5 * 10) / 2)
    assert batch_norm_loss(bn, first_layer_weight=1.0).item() == pytest.approx(((1 + 2 + 3) + 10) / 2)


def test_teachers_without_batch_norm_are_an_error() -> None:
    with pytest.raises(NeedsError, match="set its weight to 0"):
        batch_norm_loss((None, None))


def test_gradcheck_in_double() -> None:
    norm = nn.BatchNorm2d(3).double()
    images = torch.randn(4, 3, 2, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for layout in (torch.contiguous_format, torch.channels_last):
        values = images.contiguous(memory_format=layout).requires_grad_()
        assert torch.autograd.gradcheck(lambda given: batch_norm_distance(norm, given), (values,))
        assert torch.autograd.gradcheck(lambda given: batch_norm_kl(norm, given), (values,))


def test_half_precision_is_raised() -> None:
    assert batch_norm_distance(nn.BatchNorm2d(2), torch.ones(2, 2, 1, 1, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_of_many_values_far_from_zero_keep_their_digits(layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Against NumPy in float64: a sum of 65,536 values near 5, or of their squares, may lose a thousandth of the variance."""
    norm = nn.BatchNorm2d(4)
    maps = (5 + 0.5 * torch.randn(64, 4, 32, 32, generator=torch.Generator().manual_seed(3))).to(dtype, memory_format=layout).requires_grad_()
    values = maps.detach().double().numpy()
    mean, variance = values.mean((0, 2, 3)), values.var((0, 2, 3))
    shift = batch_norm_shift(norm, maps)
    np.testing.assert_allclose(shift.detach().numpy(), [mean, variance - 1.0], rtol=1e-4)
    weights = torch.tensor([[1.0, -2.0, 0.5, 3.0], [2.0, 1.0, -1.0, 0.25]])
    (gradient,) = torch.autograd.grad((weights * shift).sum(), maps)
    of_mean, of_variance = weights.double().numpy()[:, :, None, None]
    expected = (of_mean + 2 * of_variance * (values - mean[:, None, None])) / (64 * 32 * 32)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient.double().numpy(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-9)


def test_a_constant_channel_has_no_variance_and_a_gradient() -> None:
    norm = nn.BatchNorm2d(2)
    images = torch.full((4, 2, 3, 3), 7.0, requires_grad=True)
    shift = batch_norm_shift(norm, images)
    assert shift.tolist() == [[7.0, 7.0], [-1.0, -1.0]]
    (gradient,) = torch.autograd.grad(batch_norm_distance(norm, images), images)
    assert torch.isfinite(gradient).all()


def test_averaged_statistics_are_the_distance_of_averaged_means_and_variances() -> None:
    """Three rounds of two teachers with two layers and one, in NumPy: averages of means and of variances, not of shifts."""
    rng = np.random.default_rng(1)
    norms = [[nn.BatchNorm2d(3), nn.BatchNorm2d(2)], [], [nn.BatchNorm2d(4)]]
    for norm in (layer for teacher in norms for layer in teacher):
        norm.running_mean, norm.running_var = torch.tensor(rng.normal(size=norm.num_features)), torch.tensor(rng.uniform(0.5, 2, norm.num_features))
    averages: dict[nn.BatchNorm2d, tuple[np.ndarray, np.ndarray]] = {}
    statistics = AveragedStatistics(0.9)
    for first in (True, False, False):
        seen = {norm: rng.normal(1.0, 2.0, size=(5, norm.num_features, 3, 3)) for teacher in norms for norm in teacher}
        shifts = [[batch_norm_shift(norm, torch.tensor(seen[norm])) for norm in teacher] for teacher in norms]
        found = statistics.distances(shifts)
        assert found[1] is None
        for teacher, distances in zip(norms, found, strict=True):
            expected = []
            for norm in teacher:
                rows = seen[norm].transpose(1, 0, 2, 3).reshape(norm.num_features, -1)
                mean, variance = rows.mean(1), rows.var(1)
                if not first:
                    mean, variance = 0.1 * mean + 0.9 * averages[norm][0], 0.1 * variance + 0.9 * averages[norm][1]
                averages[norm] = (mean, variance)
                expected.append(np.linalg.norm(mean - norm.running_mean.numpy()) + np.linalg.norm(variance - norm.running_var.numpy()))
            if distances is not None:
                np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-6)
        statistics.add(shifts)
        other = AveragedStatistics(0.9)
        other.load_state_dict(statistics.state_dict())
        statistics = other
    assert AveragedStatistics(0.9).state_dict() == {}


def test_an_average_passes_on_the_share_of_the_gradient_that_the_batch_has_in_it() -> None:
    shift = torch.tensor([[3.0, 4.0], [0.0, 1.0]], requires_grad=True)
    statistics = AveragedStatistics(0.75)
    statistics.add([[shift]])  # the average points the same way, so that only the share is left
    (distances,) = statistics.distances([[shift]])
    assert distances is not None
    (gradient,) = torch.autograd.grad(distances.sum(), shift)
    torch.testing.assert_close(gradient, 0.25 * torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
