"""Image files in folders: one folder per class, or mini-ImageNet's ``images`` with lists in ``*.csv``."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cdfkd_strategy.data.array_cache import cached_arrays, store_names
from cdfkd_strategy.data.image_data import ImageArrays
from cdfkd_strategy.data.image_decoding import read_picture, write_pictures
from cdfkd_strategy.data.splits import stratified_split
from cdfkd_strategy.errors import ConfigError, DataError
from cdfkd_strategy.seeding import numpy_rng

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
PARTS = ("train", "val", "test")
BACKGROUND = "BACKGROUND_Google"
"""Caltech-101's folder of clutter: not one of the 101 classes."""
TEST_FRACTION = 0.2

_LAYOUTS = "root/<class>/*, root/{train,val,test}/<class>/*, or root/images/* with root/{train,val,test}.csv (columns filename,label)"


class LabelledFile(NamedTuple):
    """One image file and the name of its class."""

    path: Path
    label: str


class Listing(NamedTuple):
    """Training and test files of an image folder, and the class names in the order of their numbers."""

    train: list[LabelledFile]
    test: list[LabelledFile]
    class_names: tuple[str, ...]


def load_folder(root: Path, image_size: int | None) -> ImageArrays:
    """Read an image folder; the pictures are decoded once into the cache and memory-mapped from then on.

    Parts whose classes are the same are taken as they are: ``train``, and ``test`` (or ``val`` without one). Parts with
    different classes, as in mini-ImageNet's few-shot split, are merged and split 80/20 per class; so is a folder
    without parts. The split is fixed: it does not depend on the run's seed.

    Args:
        root: the folder.
        image_size: square side in pixels.

    Raises:
        ConfigError: no image size.
        DataError: the folder has none of the known layouts, or a file is broken.
    """
    if image_size is None:
        raise ConfigError("an image folder needs one size for all pictures; set data.image_size (pixels), such as 84 or 224")
    listing = list_folder(root)
    numbers = {name: number for number, name in enumerate(listing.class_names)}
    stamps = [(str(file.path), file.label, _stamp(file.path)) for file in (*listing.train, *listing.test)]
    key = hashlib.sha256(repr((stamps, len(listing.train))).encode()).hexdigest()

    def build(folder: Path) -> None:
        for part, files in (("train", listing.train), ("test", listing.test)):
            write_pictures(folder / f"x_{part}.npy", (read_picture(file.path) for file in files), len(files), size=image_size)
            np.save(folder / f"y_{part}.npy", np.array([numbers[file.label] for file in files], np.int64))
        store_names(folder, listing.class_names)

    return cached_arrays(f"folder-{root.resolve().name}", f"folder of 8 bits|{key}|{image_size}", build)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"the image {path} is listed but not there: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def list_folder(root: Path) -> Listing:
    """Find training and test files in a folder of one of the known layouts (see `load_folder`).

    Raises:
        DataError: none of the layouts fits.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; set data.path to an image folder: {_LAYOUTS}")
    lists = {part: root / f"{part}.csv" for part in PARTS if (root / f"{part}.csv").is_file()}
    folders = {part: root / part for part in PARTS if (root / part).is_dir()}
    if lists:
        parts = {part: _read_list(path, root / "images") for part, path in lists.items()}
    elif folders:
        parts = {part: _class_folders(path) for part, path in folders.items()}
    else:
        parts = {"train": _class_folders(root)}
    parts = {part: files for part, files in parts.items() if files}
    if not parts:
        raise DataError(f"{root} holds no images in a known layout; accepted: {_LAYOUTS}, files ending in {', '.join(sorted(SUFFIXES))}")
    return _arrange(root, parts)


def _class_folders(root: Path) -> list[LabelledFile]:
    """Files of ``root/<class>/``, in sorted order."""
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name != BACKGROUND and not path.name.startswith(".")):
        found += [LabelledFile(path, folder.name) for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    return found


def _read_list(path: Path, images: Path) -> list[LabelledFile]:
    """Rows ``filename,label`` of a CSV file with that header."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, rows = set(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the list {path}: {error}; accepted: CSV in UTF-8") from error
    if not {"filename", "label"} <= columns:
        raise DataError(f"{path} has the columns {', '.join(sorted(columns)) or 'none'}; accepted: filename,label")
    for number, row in enumerate(rows, 1):
        if not row["filename"] or not row["label"]:
            raise DataError(f"{path}: picture {number} has no file name or no label; accepted: filename,label in every line")
    return [LabelledFile(images / row["filename"], row["label"]) for row in rows]


def _arrange(root: Path, parts: dict[str, list[LabelledFile]]) -> Listing:
    """Decide what is training and what is test."""
    classes = {part: {file.label for file in files} for part, files in parts.items()}
    names = tuple(sorted(set().union(*classes.values())))
    every = [file for files in parts.values() for file in files]
    if len(parts) == 1 or sum(len(labels) for labels in classes.values()) == len(names):
        return _split(every, names)
    test = "test" if "test" in parts else "val"
    if "train" not in parts or not classes[test] <= classes["train"]:
        raise DataError(
            f"{root}: the parts {', '.join(parts)} share some classes but not all; "
            "accepted: the same classes in every part, or different ones in each (few-shot)"
        )
    return Listing(parts["train"], parts[test], tuple(sorted(classes["train"])))


def _split(files: Sequence[LabelledFile], names: tuple[str, ...]) -> Listing:
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers[file.label] for file in files], np.int64)
    split = stratified_split(labels, TEST_FRACTION, numpy_rng("folder_split", 1))
    return Listing([files[index] for index in split.train], [files[index] for index in split.test], names)
