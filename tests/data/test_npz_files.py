from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from cdfkd_strategy.data.datasets import DataConfig, load_data
from cdfkd_strategy.data.npz_files import load_npz
from cdfkd_strategy.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int16)

# A decoder with the interface of imgpack.py: it inverts the pixels, and notes in a log every time that it runs.
FAKE_IMGPACK = """
import numpy as np
from pathlib import Path

def load(path):
    with Path(path).with_suffix(".log").open("a") as log:
        log.write("decoded ")
    packed = np.load(path)
    values = {name: packed[name] for name in packed.files if not name.endswith("_words")}
    return {**values, **{name: 255 - packed[f"{name}_words"] for name in ("x_train", "x_test")}}
"""


def write(path: Path, **changes: object) -> Path:
    values = {"x_train": COLOUR, "y_train": LABELS, "x_test": COLOUR[:3], "y_test": LABELS[:3]} | changes
    np.savez(path, **{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    (tmp_path / "imgpack.py").write_text(FAKE_IMGPACK)
    words = {"x_train_words": 255 - COLOUR, "x_test_words": 255 - COLOUR[:3]}
    return write(tmp_path / "packed.npz", x_train=None, x_test=None, class_names=np.array(["a", "b", "c"]), domain_train=np.array([0, 0, 0, 1, 1, 1]), **words)


@pytest.mark.parametrize("images", [COLOUR, COLOUR.transpose(0, 3, 1, 2)], ids=["channels last", "channels first"])
def test_plain_colour_files(tmp_path: Path, images: np.ndarray) -> None:
    found = load_npz(write(tmp_path / "set.npz", x_train=images))
    assert found.x_train.shape == (6, 3, 8, 9)
    assert found.y_train.dtype == np.int64
    for sample in range(6):
        for channel in range(3):
            assert np.array_equal(found.x_train[sample, channel], COLOUR[sample, :, :, channel])
    assert found.class_names == ("0", "1", "2")


def test_plain_grey_files_through_the_configuration(tmp_path: Path) -> None:
    path = write(tmp_path / "set.npz", x_train=GREY, x_test=GREY[:3], class_names=np.array(["a", "b", "c", "d"]))
    data = load_data(DataConfig(name="npz", path=str(path)), seed=0)
    assert data.image.shape == (1, 8, 9)
    assert data.image.num_classes == 4
    assert data.image.mean[0] == pytest.approx(GREY.mean() / 255, abs=1e-4)
    assert data.image.std[0] == pytest.approx(GREY.std() / 255, abs=1e-4)
    assert np.array_equal(data.x_train.numpy()[:, 0], GREY)


def test_packed_files_are_decoded_once_by_the_decoder_beside_them(packed: Path) -> None:
    for _ in range(3):
        found = load_npz(packed)
        assert np.array_equal(found.x_train.transpose(0, 2, 3, 1), COLOUR)
        assert found.class_names == ("a", "b", "c")
        assert found.domain_train is not None
        assert found.domain_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert packed.with_suffix(".log").read_text() == "decoded "


def test_other_content_or_another_decoder_is_decoded_anew(packed: Path) -> None:
    load_npz(packed)
    packed.with_name("imgpack.py").write_text(FAKE_IMGPACK + "# better\n")
    load_npz(packed)
    write(packed, x_train=None, x_test=None, x_train_words=COLOUR, x_test_words=COLOUR[:3])
    assert np.array_equal(load_npz(packed).x_train.transpose(0, 2, 3, 1), 255 - COLOUR)
    assert packed.with_suffix(".log").read_text().count("decoded") == 3


def test_packed_without_decoder_says_what_to_do(packed: Path) -> None:
    packed.with_name("imgpack.py").unlink()
    with pytest.raises(DataError, match=r"copy the imgpack\.py that came with the file beside it"):
        load_npz(packed)


def test_a_decoder_that_fails_is_a_data_error(packed: Path) -> None:
    packed.with_name("imgpack.py").write_text("def load(path):\n    raise IndexError('word 7')\n")
    with pytest.raises(DataError, match="IndexError: word 7"):
        load_npz(packed)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_pickled_objects_are_never_read(tmp_path: Path) -> None:
    path = write(tmp_path / "set.npz", class_names=np.array([Trap(tmp_path / "sprung")] * 3, dtype=object))
    with pytest.raises(DataError, match="no pickled objects"):
        load_npz(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": COLOUR / 255.0}, "float64"),
        ({"y_train": LABELS.astype(float)}, "whole numbers"),
        ({"class_names": np.array(["a", "b"])}, r"labels 0\.\.2"),
        ({"y_train": LABELS[:-1]}, "one label per image"),
        ({"y_train": np.eye(3, dtype=np.int64)[LABELS]}, r"y_train has the shape \(6, 3\)"),
        ({"y_test": np.int64(1)}, r"y_test has the shape \(\)"),
        ({"y_train": LABELS.astype(np.int64) + 2**31}, "has a label 2147483650 and no class_names"),
        ({"domain_train": np.array(list("abcdef"))}, "domain_train is <U1"),
        ({"class_names": np.array("abc")}, r"labels 0\.\.2"),
    ],
)
def test_wrong_content_names_the_file_and_what_is_accepted(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=rf"set\.npz.*{message}") as raised:
        load_npz(write(tmp_path / "set.npz", **changes))
    assert "accepted: " in str(raised.value)


def test_a_damaged_compressed_file_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez_compressed(path, x_train=COLOUR, y_train=LABELS, x_test=COLOUR[:3], y_test=LABELS[:3])
    with zipfile.ZipFile(path) as archive:
        first = archive.infolist()[0].header_offset
    content = bytearray(path.read_bytes())
    names = int.from_bytes(content[first + 26 : first + 28], "little") + int.from_bytes(content[first + 28 : first + 30], "little")
    content[first + 30 + names] = 0b111  # a kind of block that there is not
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*set\.npz: .*invalid block type"):
        load_npz(path)


def test_broken_and_missing_files(tmp_path: Path) -> None:
    path = write(tmp_path / "set.npz")
    content = bytearray(path.read_bytes())
    content[500] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read"):
        load_npz(path)
    path.write_bytes(content[:400])
    with pytest.raises(DataError, match="cannot read"):
        load_npz(path)
    with pytest.raises(DataError, match="No such file"):
        load_npz(tmp_path / "none.npz")
    with pytest.raises(ConfigError, match=r"data\.path"):
        load_data(DataConfig(name="npz"), seed=0)
