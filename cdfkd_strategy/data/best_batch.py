"""Of all steps that optimise a batch, the one with the lowest loss."""

from __future__ import annotations

import torch
from torch import Tensor


class BestBatch:
    """Keeps copies of what belongs to the lowest loss so far, chosen on the device: no step waits for the host."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self.kept: tuple[Tensor, ...] = ()
        """The tensors offered with the lowest loss; the first ones until then, if there is none (NaN)."""

    @torch.no_grad()
    def offer(self, loss: Tensor, *tensors: Tensor) -> None:
        """Keep the tensors if the scalar loss is below all earlier ones."""
        if self._loss is None:
            self._loss = torch.full_like(loss, torch.inf)
            self.kept = tuple(tensor.detach().clone() for tensor in tensors)
        better = loss < self._loss
        self._loss = torch.where(better, loss, self._loss)
        self.kept = tuple(torch.where(better, tensor, old) for tensor, old in zip(tensors, self.kept, strict=True))
