"""Distance of a batch from the statistics a BatchNorm layer remembers of its training data (DeepInversion, arXiv:1912.08795)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cdfkd_strategy import parallel
from cdfkd_strategy.errors import NeedsError
from cdfkd_strategy.precision import full, in_full


def batch_norm_distance(norm: nn.BatchNorm2d, inputs: Tensor) -> Tensor:
    """``||mean_batch - running_mean||_2 + ||var_batch - running_var||_2`` of one layer, a scalar; half precision is raised to float32.

    Plain L2 norms over channels (neither squared nor divided by their number), biased variance, as in the published
    code of every generator method here (and in the paper's eq. 4).

    Args:
        norm: a BatchNorm2d with running statistics.
        inputs: its input ``[B, channels, H, W]``.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with in_full(inputs):
        variance, shift = batch_moments(full(inputs), norm.running_mean)
    return torch.linalg.vector_norm(shift) + torch.linalg.vector_norm(variance - norm.running_var)


def batch_moments(values: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance ``[C]`` and mean minus ``centre`` ``[C]`` of the whole batch, of which ``values [B, C, ...]`` may be a process's rows."""
    maps = values if values.dim() == 4 else values.reshape(*values.shape[:2], -1, 1)
    variance, shift = _moments_about(maps, centre)
    if not parallel.is_split():
        return variance, shift
    square, shift = parallel.batch_mean(torch.stack([variance + shift.square(), shift]))
    return square - shift.square(), shift


def _moments_about(values: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance ``[C]`` and mean minus ``centre`` ``[C]`` over all but the channels.

    Channels-last maps are summed by a matrix product, since torch's ``var_mean`` is slow on them. Values are first centred,
    because ``E[v^2] - E[v]^2`` loses the digits of a mean far from zero.
    """
    if values.is_contiguous():
        variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        return variance, mean - centre
    rows = values.permute(0, 2, 3, 1).reshape(-1, values.shape[1]) - centre
    share = rows.new_full((1, len(rows)), 1 / len(rows))
    shift, square = (share @ rows)[0], (share @ rows.square())[0]
    return square - shift.square(), shift


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
