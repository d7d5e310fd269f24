"""Distance of a batch from the statistics a BatchNorm layer remembers of its data: L2 norms (DeepInversion, arXiv:1912.08795), or KL (DFQ)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cdfkd_strategy import parallel
from cdfkd_strategy.errors import NeedsError
from cdfkd_strategy.precision import in_full

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
"""The layers whose statistics are compared. Authors look at BatchNorm2d alone, and have networks with no other; LeNet-5 has both."""

ShiftDistance = Callable[[BatchNorm, Tensor], Tensor]
"""``(layer, what a batch's statistics have more [2, channels]) -> scalar``: `shift_distance` or `shift_kl`."""


def batch_norm_distance(norm: BatchNorm, inputs: Tensor) -> Tensor:
    """``||mean_batch - running_mean||_2 + ||var_batch - running_var||_2`` of one layer, a scalar; half precision is raised to float32.

    Plain L2 norms over channels (neither squared nor divided by their number), biased variance, as in the published
    code of every generator method here (and in the paper's eq. 4).

    Args:
        norm: with running statistics.
        inputs: its input ``[B, channels, H, W]`` or ``[B, channels]``.
    """
    return shift_distance(norm, batch_norm_shift(norm, inputs))


def batch_norm_shift(norm: BatchNorm, inputs: Tensor) -> Tensor:
    """What a batch has more than one layer's training data ``[2, channels]``: of the mean, and of the biased variance.

    Args:
        norm: with running statistics.
        inputs: its input ``[B, channels, H, W]`` or ``[B, channels]``; half precision is raised to float32.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with in_full(inputs):
        variance, shift = batch_moments(inputs, norm.running_mean)
        return torch.stack([shift, variance - norm.running_var])


def shift_distance(_: BatchNorm | None, shift: Tensor) -> Tensor:
    """``||shift of the mean||_2 + ||shift of the variance||_2``, see `batch_norm_distance`; unlike other distances it needs no layer."""
    norms: Tensor = torch.linalg.vector_norm(shift, dim=1)
    return norms.sum()


def shift_kl(norm: BatchNorm, shift: Tensor) -> Tensor:
    """``sum_c KL( N(mean_batch, var_batch) || N(running_mean, running_var) )`` of one layer, in nats.

    DFQ (arXiv:2005.04136): ``((m - mu)^2 + v) / (2 sigma^2) - ln(v / sigma^2) / 2 - 1/2`` for each channel. Both variances get the
    layer's ``eps``, as in the layer itself: a channel that was constant in training would otherwise divide by 0.
    """
    assert norm.running_var is not None
    mean, variance = shift[0], (shift[1] + norm.running_var).clamp_min(0)
    expected = norm.running_var + norm.eps
    ratio = (variance + norm.eps) / expected
    return 0.5 * (mean.square() / expected + ratio - ratio.log() - 1).sum()


def batch_moments(values: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance ``[C]`` and mean minus ``centre`` ``[C]`` of the whole batch, of which ``values [B, C, ...]`` may be a process's rows."""
    maps = values if values.dim() == 4 else values.reshape(*values.shape[:2], -1, 1)
    variance, shift = _moments_about(maps, centre)
    if not parallel.is_split():
        return variance, shift
    square, shift = parallel.batch_mean(torch.stack([variance + shift.square(), shift]))
    return square - shift.square(), shift


def _moments_about(values: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance ``[C]`` and mean minus ``centre`` ``[C]`` over all but the channels."""
    variance, mean = _Moments.apply(values)
    return variance, mean - centre


class _Moments(torch.autograd.Function):
    """Biased variance and mean ``[C]`` of maps ``[B, C, H, W]``, in float32 at least: two reads of the maps, and one pass over them in backward.

    They are what torch's BatchNorm computes, which is made for both layouts and for half precision, without its normalised maps. ``var_mean`` is some
    twenty times slower on channels-last maps of a CPU, and ``E[v^2] - E[v]^2`` loses the digits of a mean far from zero.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(maps.dtype, torch.float32)
        unused = maps.new_zeros(2, maps.shape[1], dtype=precise)  # running statistics, to which a momentum of 0 adds nothing; they tell the precision
        mean, variance = torch.batch_norm_update_stats(maps, unused[0], unused[1], 0.0)
        ctx.save_for_backward(maps, mean)
        return variance, mean

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_variance: Tensor, of_mean: Tensor) -> Tensor:
        """``(of_mean + 2 of_variance (v - mean)) / n`` for every value v: BatchNorm in inference form, with a variance of 1."""
        maps, mean = ctx.saved_tensors
        count = maps.numel() // maps.shape[1]
        return F.batch_norm(maps, mean, torch.ones_like(mean), weight=of_variance * (2 / count), bias=of_mean / count, eps=0.0)


def batch_norm_loss(bn: Sequence[Tensor | None], first_layer_weight: float = 5.0) -> Tensor:
    """``(1/K) sum_k sum_l rho_l R_kl`` with ``rho_1 = first_layer_weight`` and 1 for all other layers.

    Args:
        bn: per teacher the layer distances ``[L_k]`` (`TeacherOutputs.bn`), or None for a teacher without BatchNorm.
            Those teachers are left out, and the mean is over the others.
        first_layer_weight: 5 in CDFKD-MFS; 1 or 10 in variants of DeepInversion.

    Raises:
        NeedsError: no teacher has BatchNorm.
    """
    terms = [distances.sum() + (first_layer_weight - 1.0) * distances[0] for distances in bn if distances is not None]
    if not terms:
        raise NeedsError("a BatchNorm loss for teachers without BatchNorm; set its weight to 0 or choose other teachers")
    return torch.stack(terms).mean()


class AveragedStatistics:
    """Distances for the average over many batches, of which the present one is the last (FastDFKD, arXiv:2112.06253, its code).

    With a batch's shift d from the running statistics, and a the average of earlier ones, a layer's distance is that of
    ``(1 - m) d + m a``: a batch need not look like the whole training set, if it completes the ones before it. It is linear in
    means and variances, so that averaging shifts is averaging statistics. Gradients flow to d, and shrink to ``1 - m``.

    Args:
        momentum: m; 0 is the plain distance.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._average: Tensor | None = None

    def distances(self, shifts: Sequence[Sequence[Tensor]]) -> list[Tensor | None]:
        """Per teacher the layers' distances ``[L_k]``, or None without layers, as `batch_norm_loss` takes them.

        Args:
            shifts: per teacher and layer, ``[2, channels]`` (`TeacherOutputs.shifts`).
        """
        layers = [shift for teacher in shifts for shift in teacher]
        if self._average is not None:
            averages = self._average.to(layers[0].device).split([shift.shape[1] for shift in layers], dim=1)
            layers = [(1 - self.momentum) * shift + self.momentum * average for shift, average in zip(layers, averages, strict=True)]
        distances = iter([shift_distance(None, shift) for shift in layers])
        return [torch.stack([next(distances) for _ in teacher]) if teacher else None for teacher in shifts]

    @torch.no_grad()
    def add(self, shifts: Sequence[Sequence[Tensor]]) -> None:
        """Let a batch become part of the average; the first one is the average."""
        latest = torch.cat([shift for teacher in shifts for shift in teacher], dim=1)
        self._average = latest if self._average is None else (1 - self.momentum) * latest + self.momentum * self._average.to(latest.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, if there is one yet."""
        return {} if self._average is None else {"average": self._average.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self._average = state["average"].clone() if "average" in state else None
