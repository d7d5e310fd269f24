"""Data sets by name: scikit-learn's digits, torchvision's sets, image folders, and ``.npz`` files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdfkd_strategy.config import require
from cdfkd_strategy.data.array_cache import cache_dir
from cdfkd_strategy.data.image_data import ImageArrays, ImageData
from cdfkd_strategy.data.image_decoding import resize_pixels
from cdfkd_strategy.data.image_folders import load_folder
from cdfkd_strategy.data.normalisation import normalisation
from cdfkd_strategy.data.npz_files import load_npz
from cdfkd_strategy.data.partition import PartitionConfig
from cdfkd_strategy.data.splits import stratified_split, stratified_subset
from cdfkd_strategy.data.torchvision_sets import TORCHVISION_SETS, load_torchvision
from cdfkd_strategy.errors import ConfigError, DataError, MissingExtraError, UnknownNameError
from cdfkd_strategy.registry import Registry
from cdfkd_strategy.seeding import numpy_rng
from cdfkd_strategy.types import ImageSpec

__all__ = ["DATASETS", "DataConfig", "ImageData", "load_data"]


@dataclass(frozen=True)
class DataConfig:
    """Which images, how many of them, and who holds them.

    Args:
        name: a name in `DATASETS`, or of a file ``NAME.npz`` in the folder that ``CDFKD_DATA`` names; None where the
            server has no images (a deployment), and ``image`` says what the clients' are like.
        path: the image folder (``folder``), the file (``npz``), or where a named set lies or is downloaded to.
        train_size: samples of a seeded class-stratified subset of the training set; None takes all.
        test_size: the same of the test set.
        validation_size: this many training images, the same for every seed, take the place of the test set, and no
            client holds them: for choosing settings, so that the test images are not used for it. None tests on the test set.
        image_size: square side in pixels that images are resized to; None keeps their size.
        partition: how training samples are dealt to clients.
        local_test: fraction of every client's share that it keeps for testing, 0 to below 1.
        seed: of the subsets, the shares and the local test parts; None is the run's. `cdfkd distill` fills in that of the
            run that trained the teachers, so that a distillation with another seed is still about their data.
        image: what networks take; None is what the data set gives. A set must have images of this shape, and no more classes.
        class_names: in the order of their numbers; the folders of an image folder are numbered by it, so that a class
            has one number at all clients. None numbers them by name.

    Raises:
        ConfigError: a value is outside what is accepted.
    """

    name: str | None = "digits"
    path: str | None = None
    train_size: int | None = None
    test_size: int | None = None
    validation_size: int | None = None
    image_size: int | None = None
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    local_test: float = 0.1
    seed: int | None = None
    image: ImageSpec | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.name is None and self.image is None:
            raise ConfigError("data.name is null, so no data set says what the images are like; give data.image: channels, height, width and num_classes")
        if self.image is not None and self.class_names is not None and len(self.class_names) != self.image.num_classes:
            raise ConfigError(f"data.class_names are {len(self.class_names)} names; accepted: data.image.num_classes = {self.image.num_classes} of them")
        require(self, "data", "local_test", least=0, below=1)
        require(self, "data", "train_size", "test_size", "validation_size", least=1)
        require(self, "data", "image_size", least=4)

    def seed_in(self, run: int) -> int:
        """The seed of everything about the data, in a run with the seed ``run``."""
        return run if self.seed is None else self.seed


Source = Callable[[DataConfig], ImageArrays]

DATASETS: Registry[Source] = Registry("data set")
"""Name -> reader of a configuration's images, before subsets."""


def load_data(config: DataConfig, seed: int) -> ImageData:
    """Read a data set; the same configuration and seed give the same images on the server and on every client.

    Args:
        config: which set and how much of it.
        seed: of the run; it draws the subsets (unless ``config.seed`` does), never the split into training and test.

    Raises:
        UnknownNameError: no such data set.
        ConfigError: the configuration names none.
        DataError: the set is missing, broken, smaller than the subset asked for, or not of the images that ``image`` says.
        MissingExtraError: ``digits`` without scikit-learn.
    """
    if config.name is None:
        raise ConfigError("data.name is null: the run has no images, and here they are needed; name a data set (a client may also have its own: data-path)")
    arrays, seed = _hold_out(_numbered(_source(config)(config), config), config.validation_size), config.seed_in(seed)
    mean, std = normalisation(_known_name(config), arrays.x_train)
    x_train, y_train, train = _subset(arrays.x_train, arrays.y_train, config.train_size, "train", seed)
    x_test, y_test, _ = _subset(arrays.x_test, arrays.y_test, config.test_size, "test", seed)
    if config.image_size is not None:
        x_train, x_test = resize_pixels(x_train, config.image_size), resize_pixels(x_test, config.image_size)
    channels, height, width = x_train.shape[1:]
    image = _agreed(ImageSpec(channels, height, width, len(arrays.class_names), mean, std), config)
    return ImageData(
        x_train=_tensor(x_train),
        y_train=_tensor(y_train),
        x_test=_tensor(x_test),
        y_test=_tensor(y_test),
        class_names=(*arrays.class_names, *map(str, range(len(arrays.class_names), image.num_classes))),
        image=image,
        domain_train=None if arrays.domain_train is None else _tensor(arrays.domain_train[train]),
        domain_names=arrays.domain_names,
    )


def _numbered(arrays: ImageArrays, config: DataConfig) -> ImageArrays:
    """The arrays with the configuration's class names; the labels of an image folder are numbered by them, others are numbers already."""
    names = config.class_names
    if names is None:
        return arrays
    if config.name != "folder":
        return dataclasses.replace(arrays, class_names=names)
    unknown = sorted(set(arrays.class_names) - set(names))
    if unknown:
        raise DataError(f"{config.path} has folders named {', '.join(unknown[:5])}; accepted (data.class_names): {', '.join(names)}")
    number = np.array([names.index(name) for name in arrays.class_names], np.int64)
    return dataclasses.replace(arrays, y_train=number[arrays.y_train], y_test=number[arrays.y_test], class_names=names)


def _agreed(found: ImageSpec, config: DataConfig) -> ImageSpec:
    """What the networks of the run take, if the data set fits it; normalisation is the run's, so that all parties agree."""
    wanted = config.image
    if wanted is None:
        return found
    if found.shape != wanted.shape or found.num_classes > wanted.num_classes:
        raise DataError(
            f"the data set {config.path or config.name} has images of {found.shape} and {found.num_classes} classes; accepted in this run (data.image): "
            f"{wanted.shape} (channels, height, width) and at most {wanted.num_classes} classes; data.image_size resizes"
        )
    return wanted


def _hold_out(arrays: ImageArrays, size: int | None) -> ImageArrays:
    """Validation images from the training set in place of the test set."""
    if size is None:
        return arrays
    if size >= len(arrays.y_train):
        raise DataError(f"data.validation_size is {size}, but there are {len(arrays.y_train)} training images; accepted: 1..{len(arrays.y_train) - 1}")
    held = stratified_subset(arrays.y_train, size, numpy_rng("validation"))
    rest = np.setdiff1d(np.arange(len(arrays.y_train)), held)
    return dataclasses.replace(
        arrays,
        x_train=arrays.x_train[rest],
        y_train=arrays.y_train[rest],
        x_test=arrays.x_train[held],
        y_test=arrays.y_train[held],
        domain_train=None if arrays.domain_train is None else arrays.domain_train[rest],
    )


def _subset(
    x: NDArray[np.uint8], y: NDArray[np.int64], size: int | None, part: str, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64] | slice]:
    """The chosen images, their labels, and how to choose them; without a size nothing is copied."""
    chosen: NDArray[np.int64] | slice = slice(None) if size is None else stratified_subset(y, size, numpy_rng("subset", part, seed))
    return x[chosen], y[chosen], chosen


def _tensor(array: NDArray[np.uint8] | NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(array)


def _known_name(config: DataConfig) -> str:
    return Path(config.path).stem if config.name == "npz" and config.path else str(config.name)


def _source(config: DataConfig) -> Source:
    """A ``NAME.npz`` that lies where the configuration points comes before torchvision."""
    if config.name not in _OWN:
        file = _npz_file(config)
        if file is not None:
            return lambda _: load_npz(file)
    if config.name is None or config.name not in DATASETS:
        raise UnknownNameError("data set", config.name, {*DATASETS, *_local_names()})
    return DATASETS[config.name]


def _npz_file(config: DataConfig) -> Path | None:
    places = [config.path] if config.path else [os.environ.get("CDFKD_DATA")]
    candidates = [Path(place).expanduser() for place in places if place]
    files = [place if place.suffix == ".npz" else place / f"{config.name}.npz" for place in candidates]
    return next((file for file in files if file.is_file()), None)


def _local_names() -> list[str]:
    folder = os.environ.get("CDFKD_DATA")
    return [path.stem for path in Path(folder).expanduser().glob("*.npz")] if folder else []


def _path(config: DataConfig, what: str) -> Path:
    if config.path is None:
        raise ConfigError(f"data set {config.name!r} needs data.path: {what}")
    return Path(config.path).expanduser()


@DATASETS.register("digits")
def _digits(_: DataConfig) -> ImageArrays:
    """1,797 real 8x8 digits of scikit-learn, split 80/20 per class once and for all."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("the digits data set", "simulation") from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    split = stratified_split(labels, 0.2, numpy_rng("digits_split"))
    names = tuple(str(label) for label in range(10))
    return ImageArrays(pixels[split.train], labels[split.train], pixels[split.test], labels[split.test], names)


@DATASETS.register("folder")
def _folder(config: DataConfig) -> ImageArrays:
    return load_folder(_path(config, "the image folder"), config.image_size)


@DATASETS.register("npz")
def _npz(config: DataConfig) -> ImageArrays:
    return load_npz(_path(config, "the .npz file"))


def _torchvision(name: str, config: DataConfig) -> ImageArrays:
    root = config.path or os.environ.get("CDFKD_DATA")
    return load_torchvision(name, Path(root).expanduser() if root else cache_dir() / "torchvision", config.image_size)


_OWN = frozenset(DATASETS)
for _name in TORCHVISION_SETS:
    DATASETS.add(_name, partial(_torchvision, _name))
