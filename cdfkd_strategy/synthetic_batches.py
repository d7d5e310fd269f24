"""Which synthetic images a student sees: fresh ones, those of a generator that is averaged over time, and earlier ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cdfkd_strategy import parallel
from cdfkd_strategy.config import require
from cdfkd_strategy.data.transfer_pool import TransferPool
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.types import ImageSpec


@dataclass(frozen=True)
class BatchRecipe:
    """What a student's batch is made of; the defaults are fresh images of the generator, and nothing else.

    Args:
        reuse: student steps on one batch, within an iteration. It and the teachers' answers are computed once.
        average: decay of a moving average of the generator's weights over its steps, as in MAD (arXiv:2209.10359), which
            makes half of the fresh images; 0 is none.
        replay_size: earlier images that are kept, at most, as 8-bit pixels on the CPU; 0 is none. Values outside the range of pixels, which a generator
            without ``output="sigmoid"`` makes, are clipped.
        replay_share: of a batch that are earlier images, as soon as there are some.
    """

    reuse: int = 1
    average: float = 0.0
    replay_size: int = 0
    replay_share: float = 0.5

    def __post_init__(self) -> None:
        require(self, "method.batches", "reuse", least=1)
        require(self, "method.batches", "replay_size", least=0)
        require(self, "method.batches", "average", least=0, below=1)
        require(self, "method.batches", "replay_share", above=0, below=1)


class SyntheticBatches:
    """Makes a student's batches after a recipe.

    Args:
        generator: trained elsewhere, in place; sampled in train mode.
        recipe: what a batch is made of.
        size: ``B``, images per batch.
        image: what the images are.
        runtime: where they go.

    Raises:
        ConfigError: an average or a replay on several processes, which would each have other images.
    """

    def __init__(self, generator: nn.Module, recipe: BatchRecipe, size: int, image: ImageSpec, runtime: Runtime) -> None:
        if parallel.size() > 1 and (recipe.average or recipe.replay_size):
            raise ConfigError("method.batches.average and method.batches.replay_size need one process; set both to 0")
        self.generator, self.recipe, self.size, self.runtime = generator, recipe, size, runtime
        self.averaged = copy.deepcopy(generator).requires_grad_(False) if recipe.average else None
        self.pool = TransferPool(recipe.replay_size, image) if recipe.replay_size else None

    @torch.no_grad()
    def next(self, rng: torch.Generator) -> Tensor:
        """Normalised images ``[B, channels, H, W]`` without a graph."""
        pool, earlier = self.pool, 0
        if pool is not None and len(pool):
            earlier = min(round(self.size * self.recipe.replay_share), self.size - 2)  # BatchNorm needs two fresh ones
        fresh = self._fresh(self.size - earlier, rng)
        if pool is None:
            return fresh
        images = torch.cat([fresh, self.runtime.images(pool.draw(earlier, rng))]) if earlier else fresh
        pool.add(fresh)
        return self.runtime.images(images)

    def _fresh(self, count: int, rng: torch.Generator) -> Tensor:
        z = self.runtime.normal(count, int(self.generator.latent_dim), rng=rng)  # type: ignore[arg-type]
        if self.averaged is None:
            return self.runtime.images(self.generator(z))
        now, past = z.tensor_split(2)
        self.averaged.train()
        return self.runtime.images(torch.cat([self.generator(now), self.averaged(past)]))

    def generator_started(self) -> None:
        """To be called when the generator was filled: the average begins there."""
        if self.averaged is not None:
            self.averaged.load_state_dict(self.generator.state_dict())

    @torch.no_grad()
    def generator_moved(self) -> None:
        """To be called after every step of the generator: the average follows; of its buffers it takes the latest."""
        if self.averaged is None:
            return
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.generator.parameters()), 1 - self.recipe.average)
        for mine, latest in zip(self.averaged.buffers(), self.generator.buffers(), strict=True):
            mine.copy_(latest)

    def state_dict(self) -> dict[str, Any]:
        """The averaged generator and the earlier images, where there are any."""
        state: dict[str, Any] = {}
        if self.averaged is not None:
            state["averaged"] = self.averaged.state_dict()
        if self.pool is not None:
            state["pool"] = self.pool.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        if self.pool is not None:
            self.pool.load_state_dict(state["pool"])
