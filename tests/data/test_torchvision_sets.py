from __future__ import annotations

import hashlib
import inspect
import re
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from cdfkd_strategy.data import torchvision_sets
from cdfkd_strategy.data.datasets import DATASETS, DataConfig, load_data
from cdfkd_strategy.data.torchvision_sets import TORCHVISION_SETS
from cdfkd_strategy.errors import ConfigError, DataError, MissingExtraError

RNG = np.random.default_rng(0)


def write_idx(root: Path, train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """MNIST's own file format, as torchvision unpacks it after its download."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = {}
    for prefix, images in (("train", train), ("t10k", test)):
        labels[prefix] = np.arange(len(images), dtype=np.uint8) % 10
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, *images.shape) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, len(images)) + labels[prefix].tobytes())
    return labels


def test_mnist_through_torchvision_without_a_network(tmp_path: Path) -> None:
    train, test = (RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8) for count in (40, 20))
    labels = write_idx(tmp_path, train, test)
    data = load_data(DataConfig(name="mnist", path=str(tmp_path)), seed=0)
    assert np.array_equal(data.x_train.numpy()[:, 0], train)
    assert np.array_equal(data.x_test.numpy()[:, 0], test)
    assert np.array_equal(data.y_train.numpy(), labels["train"])
    assert data.class_names[3] == "3 - three"
    assert (data.image.mean, data.image.std) == ((0.1307,), (0.3081,))
    for file in (tmp_path / "MNIST" / "raw").iterdir():  # what is in the cache needs the originals no more
        file.unlink()
    assert len(load_data(DataConfig(name="mnist", path=str(tmp_path)), seed=0).x_train) == 40


class Objects:
    """A set of pictures of many sizes and without an official split, like torchvision's Caltech101."""

    categories = ("ant", "bass", "camera")

    def __init__(self, root: str, download: bool) -> None:
        if not download:
            raise RuntimeError("not there")
        self.labels = [0] * 10 + [1] * 20 + [2] * 5

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L" if index % 2 else "RGB", (20 + index, 30), 50 * self.labels[index] if index % 2 else (50 * self.labels[index],) * 3), self.labels[
            index
        ]


def test_sets_without_an_official_split_are_split_per_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "Caltech101", Objects)
    config = DataConfig(name="caltech101", path=str(tmp_path), image_size=16)
    data = load_data(config, seed=0)
    assert data.image.shape == (3, 16, 16)
    assert data.image.mean == (0.5, 0.5, 0.5)
    assert data.class_names == Objects.categories
    assert Counter(data.y_test.tolist()) == {0: 2, 1: 4, 2: 1}
    assert Counter(data.y_train.tolist()) == {0: 8, 1: 16, 2: 4}
    assert np.array_equal(data.x_train.numpy()[:, 0, 0, 0], 50 * data.y_train.numpy())
    assert np.array_equal(load_data(config, seed=1).y_train.numpy(), data.y_train.numpy())
    with pytest.raises(ConfigError, match=r"data\.image_size"):
        load_data(DataConfig(name="caltech101", path=str(tmp_path)), seed=0)


@pytest.mark.parametrize(
    ("error", "raised", "message"), [(RuntimeError("no network"), DataError, r"no network; .*cifar10\.npz"), (ImportError("scipy"), MissingExtraError, "scipy")]
)
def test_a_set_that_cannot_be_had_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception], message: str
) -> None:
    def unavailable(**_: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", unavailable)
    with pytest.raises(raised, match=message):
        load_data(DataConfig(name="cifar10", path=str(tmp_path)), seed=0)


def test_a_download_folder_that_cannot_be_made_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"torchvision could not open or download 'cifar10'"):
        load_data(DataConfig(name="cifar10", path=str(tmp_path / "file" / "below")), seed=0)


def test_a_file_of_the_same_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = RNG.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", x_train=pixels, y_train=np.arange(20) % 10, x_test=pixels[:10], y_test=np.arange(10))
    by_path = load_data(DataConfig(name="cifar10", path=str(tmp_path)), seed=0)
    monkeypatch.setenv("CDFKD_DATA", str(tmp_path))
    by_environment = load_data(DataConfig(name="cifar10"), seed=0)
    for data in (by_path, by_environment):
        assert np.array_equal(data.x_train.numpy().transpose(0, 2, 3, 1), pixels)
        assert data.image.mean == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize("name", list(TORCHVISION_SETS))
def test_every_entry_fits_torchvision(name: str) -> None:
    source = TORCHVISION_SETS[name]
    signature = inspect.signature(getattr(torchvision.datasets, source.cls))
    for arguments in (*source.train, source.test or {}):
        signature.bind(root="x", **({} if source.local else {"download": True}), **arguments)
    assert name in DATASETS


def test_every_classification_set_of_torchvision_is_here_or_said_not_to_be() -> None:
    registered = {source.cls for source in TORCHVISION_SETS.values()}
    not_here = set(re.findall(r"\w+", (torchvision_sets.__doc__ or "").partition("Not here:")[2])) - {"LSUN"}  # "one class of LSUN"
    assert not registered & not_here
    assert set(torchvision.datasets.__all__) - registered - not_here == {"VisionDataset", "wrap_dataset_for_transforms_v2"}


def stand_in(name: str, opened: list[dict[str, Any]]) -> type:
    """A class with the constructor of a set's own, that is not there before it is downloaded and holds eleven pictures of two classes."""
    source = TORCHVISION_SETS[name]
    signature = inspect.signature(getattr(torchvision.datasets, source.cls))

    class StandIn:
        def __init__(self, **arguments: Any) -> None:
            signature.bind(**arguments)
            if arguments.get("download") is False:
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            opened.append(arguments)
            self.labels = [3, 5, 3, 3, 3, 3, 5, 5, 5, 5, 5]
            if source.files is not None:
                setattr(self, source.files, [f"{10 - index:02d}.png" for index in range(11)])

        def __len__(self) -> int:
            return 11

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (16, 16), (10 * index,) * 3), self.labels[index]

    return StandIn


@pytest.mark.parametrize("name", list(TORCHVISION_SETS))
def test_every_entry_is_opened_once_per_part_and_decoded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, opened = TORCHVISION_SETS[name], []
    monkeypatch.setattr(torchvision.datasets, source.cls, stand_in(name, opened))
    data = load_data(DataConfig(name=name, path=str(tmp_path), image_size=16), seed=0)
    parts = [*source.train, *([] if source.test is None else [source.test])]
    assert opened == [{"root": str(tmp_path), **({} if source.local else {"download": True}), **arguments} for arguments in parts]
    assert (len(data.x_train), len(data.x_test)) == ((9, 2) if source.test is None else (11 * len(source.train), 11))
    assert data.image.shape == (1 if source.grey else 3, 16, 16)
    assert data.class_names == ("3", "5"), "classes without a picture are left out"
    shade = data.x_train[:, 0, 0, 0].tolist()
    classes = dict(zip(range(0, 110, 10), [0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1], strict=True))
    assert [classes[value] for value in shade] == data.y_train.tolist()
    assert shade[:9] == (sorted(shade, reverse=True)[:9] if source.files else shade[:9]), "in the order of the files' names"


class Archives:
    """Stands for torchvision's downloader of Places365: the devkit holds the lists of all parts, and every part has its pictures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fetched: list[str] = []
        self.lists = {"categories_places365.txt": "/a/airfield 0\n/b/bakery 1\n"}
        for part, name in (("train", "places365_train_standard.txt"), ("val", "places365_val.txt")):
            self.lists[name] = "".join(f"/{part}{index}.jpg {index % 2}\n" for index in range(4))
        cls, sums = torchvision.datasets.Places365, {name: hashlib.md5(text.encode()).hexdigest() for name, text in self.lists.items()}
        monkeypatch.setattr(cls, "_CATEGORIES_META", ("categories_places365.txt", sums["categories_places365.txt"]))
        names = {"train-standard": "places365_train_standard.txt", "val": "places365_val.txt"}
        monkeypatch.setattr(cls, "_FILE_LIST_META", {part: (name, sums[name]) for part, name in names.items()})
        monkeypatch.setattr("torchvision.datasets.places365.download_and_extract_archive", self.fetch)

    def fetch(self, url: str, root: str, md5: str) -> None:
        name = url.rpartition("/")[2]
        self.fetched.append(name)
        if name.startswith("filelist"):
            for file, text in self.lists.items():
                (Path(root) / file).write_text(text)
            return
        part, folder = ("train", "data_256") if name.startswith("train") else ("val", "val_256")
        (Path(root) / folder).mkdir()
        for index in range(4):
            Image.new("RGB", (8, 8), (40 * index,) * 3).save(Path(root) / folder / f"{part}{index}.jpg")


def test_places365_has_the_pictures_of_all_parts_although_one_brings_the_lists_of_all(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = Archives(monkeypatch)
    config = DataConfig(name="places365", path=str(tmp_path / "places"))
    data = load_data(config, seed=0)
    assert (data.y_train.tolist(), data.y_test.tolist(), data.class_names) == ([0, 1, 0, 1], [0, 1, 0, 1], ("/a/airfield", "/b/bakery"))
    assert archives.fetched == ["filelist_places365-standard.tar", "train_256_places365standard.tar", "val_256.tar"]
    shutil.rmtree(cache)
    assert torch.equal(load_data(config, seed=0).x_test, data.x_test)
    assert len(archives.fetched) == 3, "what is there is not fetched again"
    shutil.rmtree(cache)
    monkeypatch.setattr(torchvision.datasets.Places365, "download_images", refuse)
    assert torch.equal(load_data(config, seed=0).x_test, data.x_test)


def refuse(self: Any) -> None:
    """As torchvision before 0.21 does."""
    assert Path(self.images_dir).exists()
    raise RuntimeError(f"The directory {self.images_dir} already exists. If you want to re-download the images, delete the directory.")


def test_a_picture_that_is_missing_is_not_blamed_on_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Holes(stand_in("dtd", [])):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            return (Image.open(tmp_path / "gone.jpg"), 0) if index == 7 else super().__getitem__(index)

    monkeypatch.setattr(torchvision.datasets, "DTD", Holes)
    with pytest.raises(DataError, match=r"cannot read picture 8 of 22 of 'dtd' in .*gone\.jpg.*remove their folder") as caught:
        load_data(DataConfig(name="dtd", path=str(tmp_path), image_size=16), seed=0)
    assert "CDFKD_CACHE" not in str(caught.value)


def test_what_is_there_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class There(Objects):
        def __init__(self, root: str, download: bool) -> None:
            if download:
                raise RuntimeError("The directory already exists")
            super().__init__(root, download=True)

    monkeypatch.setattr(torchvision.datasets, "Caltech101", There)
    assert len(load_data(DataConfig(name="caltech101", path=str(tmp_path), image_size=16), seed=0).class_names) == 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("no archive"), r"could not open 'imagenet'.*no archive; put its files there, as torchvision's documentation of ImageNet says"),
        (ModuleNotFoundError("No module named 'lmdb'", name="lmdb"), r"needs the package lmdb; run: pip install lmdb"),
    ],
)
def test_a_set_that_torchvision_does_not_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def unavailable(**arguments: object) -> None:
        assert "download" not in arguments
        raise error

    monkeypatch.setattr(torchvision.datasets, "ImageNet", unavailable)
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(name="imagenet", path=str(tmp_path), image_size=16), seed=0)


def test_pictures_without_labels_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlabelled(stand_in("fer2013", [])):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)[0], None

    monkeypatch.setattr(torchvision.datasets, "FER2013", Unlabelled)
    with pytest.raises(DataError, match="pictures without labels"):
        load_data(DataConfig(name="fer2013", path=str(tmp_path)), seed=0)
