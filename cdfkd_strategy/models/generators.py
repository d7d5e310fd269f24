"""Generators: z in, normalised images out. The two families of the paper, for 8 to 32 px and for 64 px and above."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cdfkd_strategy.config import require
from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.models.modes import modes_kept
from cdfkd_strategy.precision import full
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.types import ImageSpec

LARGE_FROM = 64
"""Images of at least this many pixels per side (the larger side) take the transposed-convolution family."""

FINAL_NORM_ABOVE = 128
"""In the large family the paper standardises the output at 224 px, and does not at 128 px."""


@dataclass(frozen=True)
class GeneratorConfig:
    """The generator's size.

    Args:
        latent_dim: ``Z``.
        width: multiplies every hidden width; 1.0 is the paper's generator.
        final_norm: standardise the images over the batch after the tanh (BatchNorm without affine parameters); None
            does as the paper: yes at 32 px and 224 px, no at 128 px.
        output: "tanh" (CDFKD-MFS); "affine_norm": no tanh, and the last BatchNorm has a learned scale and shift per
            channel (ZSKT, arXiv:1905.09768); or "sigmoid": pixels in [0, 1], normalised like real ones (CMI, arXiv:2105.08584).
        batch_norm_eps: of the BatchNorm layers behind convolutions; None does as the authors of CDFKD-MFS and DAFL: 0.8 below `LARGE_FROM` pixels
            (it was meant as a momentum; it damps the normalisation and changes the images), torch's 1e-5 from there on. Those of DFAD,
            ZSKT, CMI, FastDFKD and SpaceshipNet have 1e-5 everywhere.

    Raises:
        ConfigError: a value is outside what is accepted.
    """

    latent_dim: int = 256
    width: float = 1.0
    final_norm: bool | None = None
    output: Literal["tanh", "affine_norm", "sigmoid"] = "tanh"
    batch_norm_eps: float | None = None

    def __post_init__(self) -> None:
        require(self, "generator", "latent_dim", least=1)
        require(self, "generator", "width", above=0)
        if self.batch_norm_eps is not None:
            require(self, "generator", "batch_norm_eps", above=0)
        if self.output == "affine_norm" and self.final_norm is False:
            raise ConfigError("generator output is 'affine_norm' and final_norm is False; accepted: final_norm null or true with it")
        if self.output == "sigmoid" and self.final_norm:
            raise ConfigError("generator output is 'sigmoid' and final_norm is True; accepted: final_norm null or false with it")

    def channels(self, paper: int) -> int:
        """The paper's number of channels, scaled by ``width``; at least 1."""
        return max(1, round(paper * self.width))


class Generator(nn.Module):
    """``z [B, Z]`` -> normalised images ``[B, channels, H, W]``: a linear layer to a small map, and a body that enlarges it.

    Sample it in train mode: the paper does, and with a final BatchNorm the images are standardised over their batch.

    Args:
        latent_dim: ``Z``.
        start: ``(channels, H, W)`` of the first map.
        body: from the first map to images.
    """

    def __init__(self, latent_dim: int, start: tuple[int, int, int], body: nn.Module) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.start = start
        self.project = nn.Linear(latent_dim, start[0] * start[1] * start[2])
        self.body = body

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, Z]`` to normalised images ``[B, channels, H, W]``."""
        images: Tensor = self.body(self.project(z).view(-1, *self.start))
        return full(images)


class NormalisedPixels(nn.Module):
    """A sigmoid gives pixels, which are then normalised like real ones: no value lies outside the range of real images.

    Args:
        image: mean and standard deviation.
    """

    def __init__(self, image: ImageSpec) -> None:
        super().__init__()
        self.image = image

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels, H, W]``, any values, to normalised images."""
        return self.image.normalise(torch.sigmoid(full(x)))


def build_generator(image: ImageSpec, config: GeneratorConfig | None = None, extra_maps: int = 0) -> Generator:
    """The generator of CDFKD-MFS (IEEE TMM 2022, as in the authors' code) for this image size.

    Weights are drawn from torch's global random state.

    Args:
        image: the larger side chooses the family (below or from `LARGE_FROM` pixels).
        config: sizes; None is the paper's.
        extra_maps: further first maps that the body takes, which somebody else makes (`models.conditional_generator`).

    Raises:
        ArchitectureError: a side is not a multiple of 4 (below 64 px) or 16 (from 64 px).
    """
    config = config or GeneratorConfig()
    side = max(image.height, image.width)
    large = side >= LARGE_FROM
    factor = 16 if large else 4
    if image.height % factor or image.width % factor:
        raise ArchitectureError(
            f"no generator for {image.height}x{image.width} px; accepted: both sides multiples of {factor} "
            f"(4 below {LARGE_FROM} px, 16 from there on); resize the images (data.image_size)"
        )
    tail = _tail(image, config, standardise=not large or side > FINAL_NORM_ABOVE)
    first, layers = (_large_body if large else _small_body)(image.channels, config, extra_maps)
    start = (first, image.height // factor, image.width // factor)
    return Generator(config.latent_dim, start, nn.Sequential(*layers, *tail))


def _tail(image: ImageSpec, config: GeneratorConfig, *, standardise: bool) -> list[nn.Module]:
    """What makes images of the last convolution; ``standardise`` is what the paper does at this size."""
    if config.output == "sigmoid":
        return [NormalisedPixels(image)]
    affine = config.output == "affine_norm"
    tail: list[nn.Module] = [] if affine else [nn.Tanh()]
    if affine or (standardise if config.final_norm is None else config.final_norm):
        tail.append(nn.BatchNorm2d(image.channels, affine=affine))
    return tail


def _small_body(channels: int, config: GeneratorConfig, extra: int) -> tuple[int, list[nn.Module]]:
    wide, narrow = config.channels(128), config.channels(64)
    eps = 0.8 if config.batch_norm_eps is None else config.batch_norm_eps
    return wide, [
        nn.BatchNorm2d(wide + extra),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(wide + extra, wide, 3, padding=1),
        nn.BatchNorm2d(wide, eps=eps),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(wide, narrow, 3, padding=1),
        nn.BatchNorm2d(narrow, eps=eps),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(narrow, channels, 3, padding=1),
    ]


def _large_body(channels: int, config: GeneratorConfig, extra: int) -> tuple[int, list[nn.Module]]:
    widths = [config.channels(paper) for paper in (512, 256, 128, 64, 64)]
    eps = 1e-5 if config.batch_norm_eps is None else config.batch_norm_eps
    layers: list[nn.Module] = [nn.BatchNorm2d(widths[0] + extra)]
    for narrow, wide in zip(widths[1:], [widths[0] + extra, *widths[1:]], strict=False):
        layers += [
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(narrow, eps=eps),
            nn.LeakyReLU(0.2, inplace=True),
        ]
    return widths[0], [*layers, nn.Conv2d(widths[-1], channels, 3, padding=1)]


@contextmanager
def sampling(generator: nn.Module) -> Iterator[None]:
    """Draw images inside the block as the methods do (train mode, no graph), and leave the generator exactly as it was found.

    Modes and BatchNorm statistics are untouched: looking at a run must not change it.
    """
    before = [(buffer, buffer.detach().clone()) for buffer in generator.buffers()]
    with torch.no_grad(), modes_kept(generator):
        try:
            generator.train()
            yield
        finally:
            for buffer, value in before:
                buffer.copy_(value)


def sample_images(generator: nn.Module, count: int, rng: torch.Generator, runtime: Runtime) -> Tensor:
    """Images of a generator that takes z only, under `sampling`.

    Args:
        generator: has a ``latent_dim``; on the runtime's device.
        count: images, at least 1.
        rng: a CPU generator; z is drawn from it.
        runtime: says where z goes.

    Returns:
        Normalised images ``[count, channels, H, W]``, without a graph.
    """
    z = runtime.normal(count, int(generator.latent_dim), rng=rng)  # type: ignore[arg-type]
    with sampling(generator):
        images: Tensor = generator(z)
        return images
