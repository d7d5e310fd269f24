"""A bounded pool of synthetic images for methods that first make images and then distil from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdfkd_strategy.errors import CheckpointError, ConfigError, DataError
from cdfkd_strategy.types import ImageSpec


class TransferPool:
    """A ring of uint8 images on the CPU: when it is full, the oldest ones give way.

    Images are rounded to 1/255 of the pixel range, so that a pool takes a quarter of the memory of float32.

    Args:
        capacity: images kept at most.
        image: shape and normalisation.

    Raises:
        ConfigError: the capacity is not positive.
    """

    def __init__(self, capacity: int, image: ImageSpec) -> None:
        if capacity < 1:
            raise ConfigError(f"transfer pool capacity is {capacity}; accepted: at least 1")
        self.capacity = capacity
        self.image = image
        self._pixels = torch.empty((0, *image.shape), dtype=torch.uint8)
        self._logits: Tensor | None = None
        self._next = 0

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def pixels(self) -> Tensor:
        """All images, uint8 ``[n, channels, H, W]``, in storage order."""
        return self._pixels

    @property
    def logits(self) -> Tensor | None:
        """What was stored beside the images, ``[n, ...]``, or None."""
        return self._logits

    def add(self, images: Tensor, logits: Tensor | None = None) -> None:
        """Store a batch.

        Args:
            images: normalised, ``[B, channels, H, W]``, on any device.
            logits: float ``[B, ...]`` kept beside them; with every batch or with none.

        Raises:
            DataError: another image shape, or logits with some batches only.
        """
        if tuple(images.shape[1:]) != self.image.shape:
            raise DataError(f"the pool got images {list(images.shape)}; accepted: [B, {', '.join(map(str, self.image.shape))}]")
        if len(self) and (logits is None) != (self._logits is None):
            raise DataError("the pool got logits with some batches and not with others; give them with every batch or with none")
        if logits is not None and len(logits) != len(images):
            raise DataError(f"the pool got {len(images)} images and {len(logits)} rows of logits; accepted: one row per image")
        pixels = (self.image.to_pixels(images.detach().float()) * 255).round().to(torch.uint8).cpu()
        rows = None if logits is None else logits.detach().float().cpu()
        self._append(pixels[-self.capacity :], None if rows is None else rows[-self.capacity :])

    def label(self, function: Callable[[Tensor], Tensor], batch_size: int) -> None:
        """Put ``function(images)`` beside all images, in place of what was there.

        Args:
            function: normalised images ``[B, channels, H, W]`` on the CPU to rows ``[B, ...]``, on any device.
            batch_size: images per call.
        """
        rows = [function(self.at(positions)).detach().float().cpu() for positions in torch.arange(len(self)).split(batch_size)]
        self._logits = torch.cat(rows) if rows else None

    def unlabel(self) -> None:
        """Forget what is beside the images: more images are coming."""
        self._logits = None

    def _append(self, pixels: Tensor, rows: Tensor | None) -> None:
        """Fill up to the capacity, then overwrite from the oldest; at most ``capacity`` rows come."""
        free = self.capacity - len(self)
        self._pixels = torch.cat([self._pixels, pixels[:free]])
        if rows is not None:
            self._logits = rows[:free].clone() if self._logits is None else torch.cat([self._logits, rows[:free]])
        rest = pixels[free:]
        places = (self._next + torch.arange(len(rest))) % self.capacity
        self._pixels[places] = rest
        if rows is not None and self._logits is not None:
            self._logits[places] = rows[free:]
        self._next = (self._next + len(rest)) % self.capacity

    def choose(self, count: int, rng: torch.Generator) -> Tensor:
        """``count`` random positions; without repetition if there are enough images.

        Raises:
            DataError: the pool is empty.
        """
        if not len(self):
            raise DataError("the transfer pool is empty; add images before drawing")
        if count <= len(self):
            return torch.randperm(len(self), generator=rng)[:count]
        return torch.randint(len(self), (count,), generator=rng)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """``count`` random images, normalised float32 ``[count, channels, H, W]``, on the CPU."""
        return self.at(self.choose(count, rng))

    def at(self, positions: Tensor) -> Tensor:
        """The images at ``positions [B]``, normalised; beside them, ``pool.logits[positions]``."""
        return self.image.normalise(self._pixels[positions].float() / 255)

    def state_dict(self) -> dict[str, Any]:
        """Everything the pool holds."""
        state: dict[str, Any] = {"pixels": self._pixels.clone(), "next": self._next}
        return state if self._logits is None else {**state, "logits": self._logits.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: it belongs to a pool of other images, or to a larger one.
        """
        pixels = state["pixels"]
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != self.image.shape or len(pixels) > self.capacity:
            raise CheckpointError(
                f"the stored pool is {pixels.dtype} {list(pixels.shape)}; accepted: at most {self.capacity} uint8 images of shape {list(self.image.shape)}"
            )
        self._pixels = pixels.clone()
        self._logits = state["logits"].clone() if "logits" in state else None
        self._next = int(state["next"])

    def save(self, path: Path) -> None:
        """Write the pool as one safetensors file, atomically."""
        state = self.state_dict()
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({**state, "next": torch.tensor(state["next"])}, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, broken, or of another pool.
        """
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the transfer pool {path}: {error}") from error
        if not {"pixels", "next"} <= set(state):
            raise CheckpointError(f"{path} is not a transfer pool: it holds {', '.join(sorted(state))}")
        self.load_state_dict(state)
