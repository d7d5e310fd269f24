"""The batch of the lowest loss, as it was."""

from __future__ import annotations

import math

import pytest
import torch

from cdfkd_strategy.data.best_batch import BestBatch


@pytest.mark.parametrize(("losses", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0], 0), ([math.nan, 3.0, math.nan, 2.0], 3), ([math.nan], 0), ([2.0, 2.0], 0)])
def test_the_tensors_of_the_lowest_loss_are_kept_as_they_were(losses: list[float], best: int) -> None:
    """They go on changing in place, as optimisers do."""
    found, images = BestBatch(), torch.zeros(2, 3, requires_grad=True)
    for step, loss in enumerate(losses):
        with torch.no_grad():
            images.fill_(step)
        found.offer(torch.tensor(loss) + 0 * images.sum(), images, torch.tensor([10.0 * step]))
    with torch.no_grad():
        images.fill_(-1)
    kept, value = found.kept
    assert torch.equal(kept, torch.full((2, 3), float(best)))
    assert value.item() == 10 * best
    assert not kept.requires_grad
