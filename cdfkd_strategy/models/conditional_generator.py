"""A generator that is told the class: z and y in, normalised images out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy.models.generators import Generator, GeneratorConfig, build_generator
from cdfkd_strategy.precision import full
from cdfkd_strategy.types import ImageSpec


class ConditionalGenerator(nn.Module):
    """``z [B, Z]`` and classes ``[B]`` to normalised images: the class, one-hot, becomes one more map beside those that z becomes.

    Args:
        generator: its linear layer and its body, which takes one map more than z becomes.
        num_classes: ``C``.
    """

    def __init__(self, generator: Generator, num_classes: int) -> None:
        super().__init__()
        self.latent_dim, self.start, self.num_classes = generator.latent_dim, generator.start, num_classes
        self.project, self.body = generator.project, generator.body
        self.condition = nn.Linear(num_classes, self.start[1] * self.start[2])

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """``z [B, Z]`` and ``labels [B]`` (int64) to normalised images ``[B, channels, H, W]``."""
        one_hot = F.one_hot(labels, self.num_classes).to(z.dtype)
        maps = self.project(z).view(-1, *self.start), self.condition(one_hot).view(-1, 1, *self.start[1:])
        images: Tensor = self.body(torch.cat(maps, dim=1))
        return full(images)


def build_conditional_generator(image: ImageSpec, config: GeneratorConfig | None = None) -> ConditionalGenerator:
    """`build_generator` with a class: the same body, but for the map that its first layers take more. Weights come from torch's global random state.

    Raises:
        ArchitectureError: as `build_generator`.
    """
    return ConditionalGenerator(build_generator(image, config, extra_maps=1), image.num_classes)
