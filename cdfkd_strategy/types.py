"""The vocabulary: dimension letters and the records that travel between layers.

Dimension letters, used in every docstring of the project:

- ``B`` batch, ``K`` teachers (= headers of the student), ``C`` classes, ``D`` feature width,
- ``Z`` latent width, ``H W`` pixels, ``N`` samples, ``S`` stages, ``L`` BatchNorm layers.

Tensors over teachers put ``K`` first: logits are ``[K, B, C]``. Images are ``[B, channels, H, W]``
and *normalised* with the mean and standard deviation of their `ImageSpec`, unless a name says ``pixels``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdfkd_strategy.errors import ConfigError

LossTerms = Mapping[str, Tensor]
"""Named scalar terms of a loss, already weighted: the total is their sum, and they are logged as they are."""

Metrics = Mapping[str, float]
"""Named numbers of one epoch."""


@dataclass(frozen=True)
class ImageSpec:
    """What every teacher and the student take as input, and how many classes they give.

    Args:
        channels: 1 (grey) or 3 (colour).
        height: pixels.
        width: pixels.
        num_classes: ``C``, at least 2.
        mean: per channel, of pixels in [0, 1]; networks see ``(pixels - mean) / std``.
        std: per channel, of pixels in [0, 1].

    Raises:
        ConfigError: a value is outside what is accepted.
    """

    channels: int
    height: int
    width: int
    num_classes: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.channels not in (1, 3):
            raise ConfigError(f"image channels are {self.channels}; accepted: 1 or 3")
        if min(self.height, self.width) < 4:
            raise ConfigError(f"images are {self.height}x{self.width} pixels; accepted: at least 4x4")
        if self.num_classes < 2:
            raise ConfigError(f"num_classes is {self.num_classes}; accepted: at least 2")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ConfigError(f"image {name} has {len(values)} values; accepted: 1 or one per channel ({self.channels})")
        if min(self.std) <= 0:
            raise ConfigError(f"image std is {self.std}; accepted: positive numbers")

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(channels, H, W)`` of one image."""
        return (self.channels, self.height, self.width)

    def _per_channel(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.cat([like.new_full((1, 1, 1, 1), value) for value in values], dim=1)  # made on the device: nothing waits for a copy

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], ``[B, channels, H, W]``, to what the networks see."""
        return (pixels - self._per_channel(self.mean, pixels)) / self._per_channel(self.std, pixels)

    def to_pixels(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`, clamped to [0, 1]."""
        return self._unclamped(images).clamp(0, 1)

    def share_outside(self, images: Tensor) -> float:
        """The share of values that `to_pixels` changes: below black or above white, by more than half of what 8 bits tell apart."""
        pixels = self._unclamped(images)
        return float((pixels - pixels.clamp(0, 1)).abs().gt(0.5 / 255).double().mean())

    def _unclamped(self, images: Tensor) -> Tensor:
        return images * self._per_channel(self.std, images) + self._per_channel(self.mean, images)


class StudentOutputs(NamedTuple):
    """What a multi-header student gives: ``logits [K, B, C]`` and post-pooling ``features [K, B, D]``."""

    logits: Tensor
    features: Tensor


class TeacherOutputs(NamedTuple):
    """What `TeacherEnsemble.observe` gives.

    ``logits [K, B, C]``; ``features``: K tensors ``[B, D_k]`` (input of the last linear layer) or None where a teacher
    has none; ``bn``: K tensors ``[L_k]``, the distance of every BatchNorm layer's batch statistics from its running
    ones, or None for a teacher without BatchNorm; ``maps``: per teacher the maps ``[B, channels_s, H_s, W_s]`` of its
    stages, finest first, or none if nobody asked for them or its stages cannot be found; ``shifts``: per teacher and BatchNorm
    layer ``[2, channels]``, what ``bn`` is the length of (`batch_norm_shift`).
    """

    logits: Tensor
    features: tuple[Tensor | None, ...]
    bn: tuple[Tensor | None, ...]
    maps: tuple[tuple[Tensor, ...], ...] = ()
    shifts: tuple[tuple[Tensor, ...], ...] = ()


def _need(words: str) -> Any:
    return field(default=False, metadata={"words": words})


@dataclass(frozen=True)
class Needs:
    """What a method must have: checked before training, and at the same time the privacy disclosure list.

    The first two are asked of the teachers; the others are in `Extras`, and reach a method only if it declares them.

    Args:
        batch_norm: the teachers' BatchNorm running statistics.
        features: the teachers' features before the classifier.
        label_counts: per-class sample counts of every client.
        proxy_data: real images at the server.
        aggregated_weights: only an average of the clients' weights (compatible with secure aggregation).
    """

    batch_norm: bool = _need("BatchNorm running statistics")
    features: bool = _need("features before a last linear layer")
    label_counts: bool = _need("label counts per class")
    proxy_data: bool = _need("real images at the server")
    aggregated_weights: bool = _need("an average of the clients' weights")

    def disclosed(self) -> tuple[str, ...]:
        """The names of what is needed, in the order of the fields."""
        return tuple(item.name for item in fields(self) if getattr(self, item.name))

    @classmethod
    def words(cls, name: str) -> str:
        """A need by its field's name, in words."""
        return str(cls.__dataclass_fields__[name].metadata["words"])


@dataclass(frozen=True, eq=False)
class Extras:
    """What a server may have besides the teachers; None is what it does not have. The names are those of `Needs`.

    Args:
        label_counts: ``[K, C]`` training samples per class, which every client chose to disclose.
        proxy_data: real images ``[N, channels, H, W]``, normalised.
        aggregated_weights: the state dict of an average of the clients' networks.
    """

    label_counts: Tensor | None = None
    proxy_data: Tensor | None = None
    aggregated_weights: Mapping[str, Tensor] | None = None

    def only(self, needs: Needs) -> Extras:
        """What of it a method with these needs gets: what it declared, and nothing else."""
        return Extras(**{item.name: getattr(self, item.name) for item in fields(self) if getattr(needs, item.name)})

    def lacking(self, needs: Needs) -> tuple[str, ...]:
        """The names of what is needed and is not here."""
        return tuple(item.name for item in fields(self) if getattr(needs, item.name) and getattr(self, item.name) is None)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is here, in one flat mapping."""
        plain = {"label_counts": self.label_counts, "proxy_data": self.proxy_data}
        weights = {f"aggregated_weights.{name}": tensor for name, tensor in (self.aggregated_weights or {}).items()}
        return {name: tensor for name, tensor in plain.items() if tensor is not None} | weights
