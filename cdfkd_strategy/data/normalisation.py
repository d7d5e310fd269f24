"""Mean and standard deviation of training pixels: the usual constants for known sets, measured for others."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdfkd_strategy.seeding import numpy_rng

MEASURED_IMAGES = 2000


class Normalisation(NamedTuple):
    """Per channel, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


KNOWN = {
    "digits": Normalisation((0.3053,), (0.3759,)),
    "mnist": Normalisation((0.1307,), (0.3081,)),
    "qmnist": Normalisation((0.1307,), (0.3081,)),
    "fashion_mnist": Normalisation((0.2860,), (0.3530,)),
    "kmnist": Normalisation((0.1918,), (0.3483,)),
    "cifar10": Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": Normalisation((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "caltech101": Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""CIFAR-100 and Caltech-101 as in CDFKD-MFS's code; the others as usually given, of the official training set."""


def normalisation(name: str, pixels: NDArray[np.uint8]) -> Normalisation:
    """The constants of a known set, or measured on a fixed random subset of the training images.

    The subset does not depend on the run's seed, and the numbers are rounded, so that all parties and runs agree.

    Args:
        name: of the data set.
        pixels: uint8 ``[N, channels, H, W]``, all training images.
    """
    known = KNOWN.get(name)
    if known is not None and len(known.mean) == pixels.shape[1]:
        return known
    chosen = np.arange(len(pixels))
    if len(pixels) > MEASURED_IMAGES:
        chosen = np.sort(numpy_rng("normalisation").choice(len(pixels), MEASURED_IMAGES, replace=False))
    levels = np.arange(256) / 255
    mean, std = [], []
    for channel in range(pixels.shape[1]):
        histogram = np.bincount(pixels[chosen, channel].reshape(-1), minlength=256)
        share = histogram / histogram.sum()
        centre = float(share @ levels)
        mean.append(round(centre, 4))
        std.append(max(round(float(np.sqrt(share @ (levels - centre) ** 2)), 4), 0.01))
    return Normalisation(tuple(mean), tuple(std))
