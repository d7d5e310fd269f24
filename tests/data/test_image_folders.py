from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdfkd_strategy.data.datasets import DataConfig, load_data
from cdfkd_strategy.data.image_data import ImageArrays
from cdfkd_strategy.data.image_decoding import resize_pixels
from cdfkd_strategy.data.image_folders import list_folder, load_folder
from cdfkd_strategy.errors import ConfigError, DataError


def shade(name: str) -> int:
    """Every class has its own grey, so that a picture shows its label."""
    return 10 + 20 * (ord(name[-1]) - ord("a"))


def picture(path: Path, name: str, mode: str = "RGB", size: tuple[int, int] = (12, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade(name),) * 3).convert(mode).save(path)


def fill(root: Path, names: str, count: int) -> None:
    for name in names:
        for number in range(count):
            picture(root / name / f"{number}.png", name)


def listed(root: Path, part: str, names: str, count: int) -> None:
    rows = [(f"{part}{name}{number}.png", name) for name in names for number in range(count)]
    for file, name in rows:
        picture(root / "images" / file, name)
    (root / f"{part}.csv").write_text("filename,label\n" + "".join(f"{file},{name}\n" for file, name in rows))


def check_pictures(found: ImageArrays) -> None:
    for images, labels in ((found.x_train, found.y_train), (found.x_test, found.y_test)):
        for pixels, label in zip(images, labels, strict=True):
            assert np.all(pixels == shade(found.class_names[label]))


def test_one_folder_per_class_is_split_80_20(tmp_path: Path) -> None:
    fill(tmp_path, "abc", 10)
    picture(tmp_path / "BACKGROUND_Google" / "0.png", "z")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"not a picture")
    found = load_folder(tmp_path, 8)
    assert found.class_names == ("a", "b", "c")
    assert found.x_train.shape == (24, 3, 8, 8)
    assert Counter(found.y_test.tolist()) == {0: 2, 1: 2, 2: 2}
    assert isinstance(found.x_train, np.memmap)
    check_pictures(found)


def test_parts_with_the_same_classes_stay(tmp_path: Path) -> None:
    fill(tmp_path / "train", "abc", 4)
    fill(tmp_path / "val", "abc", 3)
    assert Counter(load_folder(tmp_path, 8).y_test.tolist()) == {0: 3, 1: 3, 2: 3}
    fill(tmp_path / "test", "ab", 2)
    found = load_folder(tmp_path, 8)
    assert Counter(found.y_train.tolist()) == {0: 4, 1: 4, 2: 4}
    assert Counter(found.y_test.tolist()) == {0: 2, 1: 2}
    check_pictures(found)


@pytest.mark.parametrize("write", [fill, listed], ids=["folders", "csv"])
def test_few_shot_parts_with_different_classes_are_merged(tmp_path: Path, write: object) -> None:
    for part, names in (("train", "abcd"), ("val", "ef"), ("test", "gh")):
        if write is fill:
            fill(tmp_path / part, names, 5)
        else:
            listed(tmp_path, part, names, 5)
    found = load_folder(tmp_path, 8)
    assert found.class_names == tuple("abcdefgh")
    assert Counter(found.y_train.tolist()) == dict.fromkeys(range(8), 4)
    assert Counter(found.y_test.tolist()) == dict.fromkeys(range(8), 1)
    check_pictures(found)


def test_lists_with_the_same_classes_stay(tmp_path: Path) -> None:
    listed(tmp_path, "train", "ab", 5)
    listed(tmp_path, "test", "ab", 2)
    found = load_folder(tmp_path, 8)
    assert (len(found.y_train), len(found.y_test)) == (10, 4)
    check_pictures(found)


def test_the_split_is_the_same_every_time(tmp_path: Path) -> None:
    fill(tmp_path, "abc", 10)
    assert list_folder(tmp_path) == list_folder(tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    for name in "ab":
        for number in range(2):
            picture(tmp_path / name / f"{number}.png", name, mode)
    assert load_folder(tmp_path, 8).x_train.shape == (2, 3, 8, 8)


def test_a_changed_file_is_decoded_anew(tmp_path: Path) -> None:
    fill(tmp_path, "ab", 2)
    before = load_folder(tmp_path, 8)
    for file in tmp_path.glob("a/*.png"):
        picture(file, "e", size=(40, 40))
    after = load_folder(tmp_path, 8)
    assert np.all(np.asarray(after.x_train[after.y_train == 0]) == shade("e"))
    assert np.all(np.asarray(before.x_train[before.y_train == 0]) == shade("a"))


def test_the_centre_square_is_what_remains(tmp_path: Path) -> None:
    for number in range(2):
        wide = np.zeros((8, 24, 3), np.uint8)
        wide[:, 8:16] = 200
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(wide).save(tmp_path / "a" / f"{number}.png")
    fill(tmp_path, "b", 2)
    found = load_folder(tmp_path, 8)
    assert np.all(np.asarray(found.x_train[found.y_train == 0]) == 200)


def test_the_configuration_reaches_the_folder(tmp_path: Path) -> None:
    fill(tmp_path, "ab", 5)
    data = load_data(DataConfig(name="folder", path=str(tmp_path), image_size=10), seed=0)
    assert data.image.shape == (3, 10, 10)
    assert data.class_names == ("a", "b")
    with pytest.raises(ConfigError, match=r"data\.image_size"):
        load_data(DataConfig(name="folder", path=str(tmp_path)), seed=0)


def test_broken_pictures_name_the_file_and_leave_no_cache(tmp_path: Path, cache: Path) -> None:
    fill(tmp_path / "set", "ab", 5)
    broken = tmp_path / "set" / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError, match=r"b/3\.png"):
        load_folder(tmp_path / "set", 8)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(("mode", "kind"), [("I;16", np.uint16), ("I", np.int32), ("F", np.float32)])
def test_pictures_of_more_than_eight_bits_are_refused(tmp_path: Path, mode: str, kind: type[np.generic]) -> None:
    """Pillow would make everything above 255 white."""
    fill(tmp_path, "ab", 2)
    Image.fromarray(np.linspace(500, 60000, 64).astype(kind).reshape(8, 8)).save(tmp_path / "b" / "1.tiff")
    with pytest.raises(DataError, match=rf"b/1\.tiff has the mode {mode}.*; accepted: 8 bits per channel"):
        load_folder(tmp_path, 8)


def test_a_picture_that_pillow_takes_for_a_bomb_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "ab", 2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12)
    with pytest.raises(DataError, match=r"cannot decode the image .*a/.\.png: .*exceeds limit"):
        load_folder(tmp_path, 8)


def test_unknown_layouts_say_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        list_folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"root/<class>/\*"):
        list_folder(tmp_path)
    fill(tmp_path / "train", "abc", 2)
    fill(tmp_path / "test", "cd", 2)
    with pytest.raises(DataError, match="share some classes but not all"):
        list_folder(tmp_path)


def test_lists_with_wrong_columns_or_missing_files(tmp_path: Path) -> None:
    listed(tmp_path, "train", "ab", 2)
    next((tmp_path / "images").iterdir()).unlink()
    with pytest.raises(DataError, match="listed but not there"):
        load_folder(tmp_path, 8)
    (tmp_path / "train.csv").write_text("file,class\nx.png,a\n")
    with pytest.raises(DataError, match="accepted: filename,label"):
        load_folder(tmp_path, 8)
    (tmp_path / "train.csv").write_text("filename,label\nx.png,a\ny.png\n")
    with pytest.raises(DataError, match=r"train\.csv: picture 2 has no file name or no label"):
        load_folder(tmp_path, 8)
    (tmp_path / "train.csv").write_bytes("filename,label\nx.png,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot read the list .*train\.csv: .*; accepted: CSV in UTF-8"):
        load_folder(tmp_path, 8)


def test_resizing_keeps_means_and_cuts_the_centre() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 16, 32), dtype=np.uint8)
    small = resize_pixels(pixels, 8)
    assert small.shape == (3, 1, 8, 8)
    centre = pixels[:, :, :, 8:24]
    assert np.allclose(small.mean((1, 2, 3)), centre.mean((1, 2, 3)), atol=3)
    flat = np.full((1, 1, 8, 8), 77, np.uint8)
    assert np.all(resize_pixels(flat, 13) == 77)
    assert resize_pixels(flat, 8) is flat
