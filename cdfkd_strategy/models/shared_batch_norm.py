"""BatchNorm over the batch of all processes: student and generator normalise as one process would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cdfkd_strategy import parallel
from cdfkd_strategy.losses.statistics import batch_moments
from cdfkd_strategy.precision import full, in_full


class SharedBatchNorm(_BatchNorm):
    """BatchNorm with the statistics of the whole batch where it is split; for devices on which torch's SyncBatchNorm does not run.

    In plain operations, and so slower than torch's own BatchNorm.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's signature
        pass

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's signature
        """``[B, c, ...]`` to the same shape."""
        if not (self.training and parallel.is_split()):
            return super().forward(input)
        per_channel = (1, -1, *(1,) * (input.dim() - 2))
        with in_full(input):
            values = full(input)
            centre = values.new_zeros(values.shape[1]) if self.running_mean is None else self.running_mean.clone()
            variance, shift = batch_moments(values, centre)
            mean = centre + shift
            self._remember(mean.detach(), variance.detach(), parallel.size() * values.numel() // len(mean))
            scale = (variance + self.eps).rsqrt()
            if self.affine:
                scale = scale * self.weight
            offset = self.bias - mean * scale if self.affine else -mean * scale
            return torch.addcmul(offset.view(per_channel), values, scale.view(per_channel)).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Running statistics as torch keeps them, with the unbiased variance of ``count`` values."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / (count - 1)), share)


class _SyncBatchNorm(nn.SyncBatchNorm):
    """torch's own, which needs a GPU, in the group of all processes."""

    process_group = None


@contextmanager
def shared_batch_norm(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Let the BatchNorm layers of networks that are on their device share their statistics inside the block; weights and names stay as they are."""
    layers = [part for network in networks for part in network.modules() if type(part) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)]
    kinds = [type(layer) for layer in layers]
    for layer in layers:
        tensor = next(iter(layer.state_dict().values()), torch.empty(0))
        layer.__class__ = _SyncBatchNorm if tensor.is_cuda else SharedBatchNorm
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind


@torch.no_grad()
def average_statistics(networks: Iterable[nn.Module]) -> None:
    """Give every process the mean of the running statistics that each gathered from its own rows."""
    for network in networks:
        for part in network.modules():
            if isinstance(part, _BatchNorm) and part.running_mean is not None and part.running_var is not None:
                for statistic in (part.running_mean, part.running_var):
                    statistic.copy_(parallel.everyone(statistic).mean(0))
