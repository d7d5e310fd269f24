"""torchvision's image classification sets by name, with torchvision's own download, decoded once into the cache.

`TORCHVISION_SETS` has every set of ``torchvision.datasets`` that gives one picture and one class. What torchvision does not
download (any more) is read from files that lie where its documentation wants them. Classes without a picture are left out
(EMNIST's letters have one, CLEVR's numbers of objects begin at 3). Not here:

- ImageFolder, DatasetFolder: that is ``data.name=folder``. LSUNClass: one class of LSUN. FakeData: noise.
- CelebA: forty yes-or-no attributes per face, and in every split other people. LFWPairs, PhotoTour: pairs of pictures.
- CocoCaptions, Flickr8k, Flickr30k, SBU: captions. CocoDetection, VOCDetection, Kitti, WIDERFace: boxes.
- VOCSegmentation, Cityscapes, SBDataset: masks. Kinetics, HMDB51, UCF101, MovingMNIST: videos.
- KittiFlow, Sintel, FlyingChairs, FlyingThings3D, HD1K: motion. Kitti2012Stereo, Kitti2015Stereo, CarlaStereo, CREStereo,
  Middlebury2014Stereo, FallingThingsStereo, SceneFlowStereo, SintelStereo, InStereo2k, ETH3DStereo: depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
BROUGHT_ALONG = ("scipy", "sklearn")
"""Packages that the simulation extra installs."""


@dataclass(frozen=True)
class TorchvisionSet:
    """How one of torchvision's sets is opened.

    Args:
        cls: class name in ``torchvision.datasets``.
        train: keyword arguments of each training part.
        test: keyword arguments of the test part; None where there is no official split: stratified 80/20, seed 1.
        grey: one channel.
        sized: all pictures have one size; others need ``data.image_size``.
        local: torchvision does not download it.
        files: attribute that lists the pictures' files, where torchvision takes them in whatever order the disk gives them:
            they are sorted, so that every machine deals the same pictures to the same client.
        incomplete: torchvision also opens it without its pictures, once another part has brought the lists: it is always
            asked to download, and skips what is there.
    """

    cls: str
    train: Sequence[Mapping[str, Any]]
    test: Mapping[str, Any] | None
    grey: bool = False
    sized: bool = True
    # not shown, because the representation is part of the cache's key and these do not change what is stored
    local: bool = field(default=False, repr=False)
    files: str | None = field(default=None, repr=False)
    incomplete: bool = field(default=False, repr=False)


def _flag(cls: str, grey: bool = False) -> TorchvisionSet:
    return TorchvisionSet(cls, ({"train": True},), {"train": False}, grey)


def _splits(cls: str, *train: str, test: str = "test", grey: bool = False, sized: bool = False, local: bool = False) -> TorchvisionSet:
    return TorchvisionSet(cls, tuple({"split": name} for name in train), {"split": test}, grey, sized, local)


def _emnist(split: str) -> TorchvisionSet:
    return TorchvisionSet("EMNIST", ({"split": split, "train": True},), {"split": split, "train": False}, grey=True)


def _whole(cls: str, arguments: Mapping[str, Any] | None = None, **how: Any) -> TorchvisionSet:
    """A set without an official split."""
    return TorchvisionSet(cls, (arguments or {},), None, **how)


def _inaturalist(train: str, test: str | None = None) -> TorchvisionSet:
    return TorchvisionSet("INaturalist", ({"version": train},), None if test is None else {"version": test}, sized=False, files="index")


TORCHVISION_SETS: Mapping[str, TorchvisionSet] = {
    "mnist": _flag("MNIST", grey=True),
    "fashion_mnist": _flag("FashionMNIST", grey=True),
    "kmnist": _flag("KMNIST", grey=True),
    "qmnist": _flag("QMNIST", grey=True),
    "emnist": _emnist("balanced"),
    "emnist_byclass": _emnist("byclass"),
    "emnist_bymerge": _emnist("bymerge"),
    "emnist_digits": _emnist("digits"),
    "emnist_letters": _emnist("letters"),
    "emnist_mnist": _emnist("mnist"),
    "usps": _flag("USPS", grey=True),
    "semeion": _whole("SEMEION", grey=True),
    "omniglot": _whole("Omniglot", {"background": True}, grey=True),
    "cifar10": _flag("CIFAR10"),
    "cifar100": _flag("CIFAR100"),
    "svhn": _splits("SVHN", "train", sized=True),
    "stl10": _splits("STL10", "train", sized=True),
    "caltech101": _whole("Caltech101", sized=False),
    "caltech256": _whole("Caltech256", sized=False),
    "eurosat": _whole("EuroSAT"),
    "flowers102": _splits("Flowers102", "train", "val"),
    "oxford_pets": _splits("OxfordIIITPet", "trainval"),
    "food101": _splits("Food101", "train"),
    "dtd": _splits("DTD", "train", "val"),
    "gtsrb": _splits("GTSRB", "train"),
    "fgvc_aircraft": _splits("FGVCAircraft", "trainval"),
    "country211": _splits("Country211", "train", "valid"),
    "imagenette": _splits("Imagenette", "train", test="val"),
    "imagenet": _splits("ImageNet", "train", test="val", local=True),
    "places365": TorchvisionSet("Places365", ({"split": "train-standard", "small": True},), {"split": "val", "small": True}, incomplete=True),
    "sun397": _whole("SUN397", sized=False, files="_image_files"),
    "lsun": TorchvisionSet("LSUN", ({"classes": "train"},), {"classes": "val"}, sized=False, local=True),
    "inaturalist2017": _inaturalist("2017"),
    "inaturalist2018": _inaturalist("2018"),
    "inaturalist2019": _inaturalist("2019"),
    "inaturalist2021": _inaturalist("2021_train", "2021_valid"),
    "inaturalist2021_mini": _inaturalist("2021_train_mini", "2021_valid"),
    "stanford_cars": _splits("StanfordCars", "train", local=True),
    "pcam": _splits("PCAM", "train", "val", sized=True),
    "clevr": _splits("CLEVRClassification", "train", test="val", sized=True),
    "rendered_sst2": _splits("RenderedSST2", "train", "val", sized=True),
    "fer2013": _splits("FER2013", "train", grey=True, sized=True, local=True),
    "lfw_people": _whole("LFWPeople", {"split": "10fold"}, local=True),
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
        DataError: the set is not there and cannot be downloaded, or is broken, or pictures of it are missing.
    """
    source = TORCHVISION_SETS[name]
    if image_size is None and not source.sized:
        raise ConfigError(f"data set {name!r} has pictures of many sizes; set data.image_size (pixels), such as 64, 128 or 224")

    def build(folder: Path) -> None:
        _decode(name, source, root, image_size, folder)

    return cached_arrays(name, f"torchvision|{name}|{source}|{root.resolve()}|{image_size}", build)


def _decode(name: str, source: TorchvisionSet, root: Path, image_size: int | None, folder: Path) -> None:
    where = f"{name!r} in {root}"
    opened = [_open(name, source, root, arguments) for arguments in source.train]
    class_names = _class_names(opened[0])
    train: Any = ConcatDataset([_ordered(part, source) for part in opened])
    if source.test is None:
        labels = np.array([label for _, label in _samples(train, where)], np.int64)
        split = stratified_split(labels, TEST_FRACTION, numpy_rng("torchvision_split", 1))
        train, test = Subset(train, split.train.tolist()), Subset(train, split.test.tolist())
    else:
        test = _ordered(_open(name, source, root, source.test), source)
    labels_of: dict[str, NDArray[np.int64]] = {}
    for part, pictures in (("train", train), ("test", test)):
        labels_of[part] = _write_part(folder / f"x_{part}.npy", _samples(pictures, where), len(pictures), image_size, source.grey)
    present = np.unique(np.concatenate(list(labels_of.values())))
    for part, found in labels_of.items():
        np.save(folder / f"y_{part}.npy", np.searchsorted(present, found).astype(np.int64))
    store_names(folder, tuple(class_names[label] if label < len(class_names) else str(label) for label in present.tolist()))


def _write_part(target: Path, samples: Iterator[tuple[Image.Image, int]], count: int, size: int | None, grey: bool) -> NDArray[np.int64]:
    """Write the pictures of one part, and give its labels as torchvision counts them."""
    labels: list[int] = []

    def decoded() -> Iterator[Image.Image]:
        for picture, label in samples:
            labels.append(label)
            yield picture

    write_pictures(target, decoded(), count, size=size, grey=grey)
    return np.array(labels, np.int64)


def _samples(pictures: Any, where: str) -> Iterator[tuple[Image.Image, int]]:
    """All pictures with their labels; what cannot be read is the set's fault and not the cache's."""
    for index in range(len(pictures)):
        try:
            picture, label = pictures[index]
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"cannot read picture {index + 1} of {len(pictures)} of {where}: {error}; its files are incomplete or broken: "
                "remove their folder, so that they are fetched again, or put the missing ones there"
            ) from error
        if label is None:
            raise DataError(
                "torchvision gives pictures without labels (of a test part whose labels these files do not hold); get the files with labels, or an .npz file"
            )
        yield picture, int(label)


def _ordered(opened: Any, source: TorchvisionSet) -> Any:
    if source.files is None:
        return opened
    files = getattr(opened, source.files)
    return Subset(opened, sorted(range(len(files)), key=files.__getitem__))


def _open(name: str, source: TorchvisionSet, root: Path, arguments: Mapping[str, Any]) -> Any:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return _construct(source, {"root": str(root), **arguments})
    except ImportError as error:
        if error.name is not None and error.name not in BROUGHT_ALONG:
            raise DataError(f"the data set {name!r} needs the package {error.name}; run: pip install {error.name}") from error
        raise MissingExtraError(f"the data set {name!r} ({error})", "simulation") from error
    except (OSError, RuntimeError, ValueError) as error:
        fetch = f"put its files there, as torchvision's documentation of {source.cls} says" if source.local else "fetch it elsewhere"
        raise DataError(
            f"torchvision could not open{'' if source.local else ' or download'} {name!r} in {root}: {error}; "
            f"{fetch} and set data.path to its folder, or put {name}.npz into the folder that CDFKD_DATA names"
        ) from error


def _construct(source: TorchvisionSet, arguments: Mapping[str, Any]) -> Any:
    """Open what is there, else download it: some sets refuse to download what they find."""
    cls = getattr(torchvision.datasets, source.cls)
    if source.local:
        return cls(**arguments)
    if source.incomplete:
        return _complete(cls, arguments)
    try:
        return cls(download=False, **arguments)
    except (OSError, RuntimeError):
        return cls(download=True, **arguments)


def _complete(cls: Any, arguments: Mapping[str, Any]) -> Any:
    """Download what is missing; torchvision before 0.21 refuses where the pictures are there already."""
    try:
        return cls(download=True, **arguments)
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise
        return cls(download=False, **arguments)


def _class_names(opened: Any) -> tuple[str, ...]:
    for attribute in ("classes", "categories", "all_categories", "class_to_idx"):
        names = getattr(opened, attribute, None)
        if names:
            names = sorted(names, key=names.__getitem__) if isinstance(names, Mapping) else names
            return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)
    return ()
