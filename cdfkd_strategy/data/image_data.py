"""One image data set in memory (or memory-mapped): pixels, labels, class names, and how pixels are normalised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cdfkd_strategy.errors import DataError
from cdfkd_strategy.types import ImageSpec


@dataclass(frozen=True, eq=False)
class ImageData:
    """Training and test images of one run, the same on the server and on every client.

    Args:
        x_train: uint8 ``[N, channels, H, W]``, pixels 0..255; may be memory-mapped, so read it by index.
        y_train: int64 ``[N]``, classes 0..C-1.
        x_test: uint8 ``[N_test, channels, H, W]``, the global test set.
        y_test: int64 ``[N_test]``.
        class_names: ``C`` names.
        image: shape, classes and normalisation.
        domain_train: int64 ``[N]``, the domain of each training image, or None if the set has no domains.
        domain_names: names of the domains, empty without domains.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: tuple[str, ...]
    image: ImageSpec
    domain_train: Tensor | None = None
    domain_names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """What a source of images gives: NumPy arrays, pixels uint8 ``[N, channels, H, W]``, labels int64 ``[N]``.

    Raises:
        DataError: arrays that do not belong together.
    """

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    class_names: tuple[str, ...]
    domain_train: NDArray[np.int64] | None = None
    domain_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part, x, y in (("train", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
                raise DataError(f"x_{part} is {x.dtype} {list(x.shape)}; accepted: uint8 pixels 0..255, grey or with 3 channels")
            if y.shape != (len(x),):
                raise DataError(f"x_{part} has {len(x)} images, y_{part} has the shape {list(y.shape)}; accepted: one label per image")
            if len(y) and (y.min() < 0 or y.max() >= len(self.class_names)):
                raise DataError(f"y_{part} holds labels {y.min()}..{y.max()}; accepted: 0..{len(self.class_names) - 1}, one per class name")
        if len(self.x_train) == 0:
            raise DataError("the data set has no training images")
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise DataError(f"training images are {list(self.x_train.shape[1:])}, test images {list(self.x_test.shape[1:])}; accepted: one shape")
        if self.domain_train is not None and self.domain_train.shape != self.y_train.shape:
            raise DataError(f"domain_train has the shape {list(self.domain_train.shape)}; accepted: one domain per training image, [{len(self.y_train)}]")
