"""torchvision's classification sets by name, with torchvision's own download, decoded once into the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from cdfkd_strategy.data.array_cache import cached_arrays, store_names
from cdfkd_strategy.data.image_data import ImageArrays
from cdfkd_strategy.data.image_decoding import write_pictures
from cdfkd_strategy.data.splits import stratified_split
from cdfkd_strategy.errors import ConfigError, DataError, MissingExtraError
from cdfkd_strategy.seeding import numpy_rng

TEST_FRACTION = 0.2


@dataclass(frozen=True)
class TorchvisionSet:
    """How one of torchvision's sets is opened.

    Args:
        cls: class name in ``torchvision.datasets``.
        train: keyword arguments of each training part.
        test: keyword arguments of the test part; None where there is no official split: stratified 80/20, seed 1.
        grey: one channel.
        sized: all pictures have one size; others need ``data.image_size``.
    """

    cls: str
    train: Sequence[Mapping[str, Any]]
    test: Mapping[str, Any] | None
    grey: bool = False
    sized: bool = True


def _flag(cls: str, grey: bool = False) -> TorchvisionSet:
    return TorchvisionSet(cls, ({"train": True},), {"train": False}, grey)


def _splits(cls: str, *train: str, test: str = "test", sized: bool = False) -> TorchvisionSet:
    return TorchvisionSet(cls, tuple({"split": name} for name in train), {"split": test}, sized=sized)


TORCHVISION_SETS: Mapping[str, TorchvisionSet] = {
    "mnist": _flag("MNIST", grey=True),
    "fashion_mnist": _flag("FashionMNIST", grey=True),
    "kmnist": _flag("KMNIST", grey=True),
    "qmnist": _flag("QMNIST", grey=True),
    "emnist": TorchvisionSet("EMNIST", ({"split": "balanced", "train": True},), {"split": "balanced", "train": False}, grey=True),
    "usps": _flag("USPS", grey=True),
    "cifar10": _flag("CIFAR10"),
    "cifar100": _flag("CIFAR100"),
    "svhn": _splits("SVHN", "train", sized=True),
    "stl10": _splits("STL10", "train", sized=True),
    "caltech101": TorchvisionSet("Caltech101", ({},), None, sized=False),
    "caltech256": TorchvisionSet("Caltech256", ({},), None, sized=False),
    "eurosat": TorchvisionSet("EuroSAT", ({},), None),
    "flowers102": _splits("Flowers102", "train", "val"),
    "oxford_pets": _splits("OxfordIIITPet", "trainval"),
    "food101": _splits("Food101", "train"),
    "dtd": _splits("DTD", "train", "val"),
    "gtsrb": _splits("GTSRB", "train"),
    "fgvc_aircraft": _splits("FGVCAircraft", "trainval"),
    "country211": _splits("Country211", "train", "valid"),
    "imagenette": _splits("Imagenette", "train", test="val"),
}


def load_torchvision(name: str, root: Path, image_size: int | None) -> ImageArrays:
    """Open a set (downloading it into ``root`` if it is not there), decode it, and keep it in the cache.

    Once it is in the cache, neither the originals nor a network are needed.

    Args:
        name: a key of `TORCHVISION_SETS`.
        root: torchvision's download folder.
        image_size: square side in pixels; None keeps the size of sets that have one.

    Raises:
        ConfigError: a set of pictures of many sizes needs ``image_size``.
        DataError: the set is not there and cannot be downloaded, or is broken.
    """
    source = TORCHVISION_SETS[name]
    if image_size is None and not source.sized:
        raise ConfigError(f"data set {name!r} has pictures of many sizes; set data.image_size (pixels), such as 64, 128 or 224")

    def build(folder: Path) -> None:
        _decode(name, source, root, image_size, folder)

    return cached_arrays(name, f"torchvision|{name}|{source}|{root.resolve()}|{image_size}", build)


def _decode(name: str, source: TorchvisionSet, root: Path, image_size: int | None, folder: Path) -> None:
    opened = [_open(name, source, root, arguments) for arguments in source.train]
    class_names = _class_names(opened[0])
    train: Any = ConcatDataset(opened)
    if source.test is None:
        labels = np.array([label for _, label in _samples(train)], np.int64)
        split = stratified_split(labels, TEST_FRACTION, numpy_rng("torchvision_split", 1))
        train, test = Subset(train, split.train.tolist()), Subset(train, split.test.tolist())
    else:
        test = _open(name, source, root, source.test)
    labels_seen: list[NDArray[np.int64]] = []
    for part, pictures in (("train", train), ("test", test)):
        labels_seen.append(_write_part(folder, part, pictures, image_size, source.grey))
    known = class_names or tuple(str(number) for number in range(int(max(labels.max() for labels in labels_seen)) + 1))
    store_names(folder, known)


def _write_part(folder: Path, part: str, pictures: Any, size: int | None, grey: bool) -> NDArray[np.int64]:
    """Write pictures and labels of one part in one pass."""
    labels: list[int] = []

    def decoded() -> Iterator[Image.Image]:
        for picture, label in _samples(pictures):
            labels.append(label)
            yield picture

    write_pictures(folder / f"x_{part}.npy", decoded(), len(pictures), size=size, grey=grey)
    array = np.array(labels, np.int64)
    np.save(folder / f"y_{part}.npy", array)
    return array


def _samples(pictures: Any) -> Iterator[tuple[Image.Image, int]]:
    for index in range(len(pictures)):
        picture, label = pictures[index]
        yield picture, int(label)


def _open(name: str, source: TorchvisionSet, root: Path, arguments: Mapping[str, Any]) -> Any:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return getattr(torchvision.datasets, source.cls)(root=str(root), download=True, **arguments)
    except ImportError as error:
        raise MissingExtraError(f"the data set {name!r} ({error})", "simulation") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"torchvision could not open or download {name!r} in {root}: {error}; "
            f"fetch it elsewhere and set data.path to its folder, or put {name}.npz into the folder that CDFKD_DATA names"
        ) from error


def _class_names(opened: Any) -> tuple[str, ...]:
    for attribute in ("classes", "categories"):
        names = getattr(opened, attribute, None)
        if names:
            return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)
    return ()
