from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cdfkd_strategy.data.datasets import DataConfig, load_data
from cdfkd_strategy.data.normalisation import KNOWN, normalisation
from cdfkd_strategy.errors import ConfigError, DataError, MissingExtraError, UnknownNameError
from cdfkd_strategy.types import ImageSpec


def test_digits_are_all_of_scikit_learn_split_80_20() -> None:
    data = load_data(DataConfig(), seed=0)
    assert data.x_train.shape == (1438, 1, 8, 8)
    assert data.x_test.shape == (359, 1, 8, 8)
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.uint8, torch.int64)
    digits = load_digits()
    ours = Counter((x.numpy().tobytes(), int(y)) for x, y in zip(torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test]), strict=True))
    theirs = Counter((np.rint(x * 255 / 16).astype(np.uint8).tobytes(), int(y)) for x, y in zip(digits.images, digits.target, strict=True))
    assert ours == theirs
    for label in range(10):
        assert int((data.y_test == label).sum()) == round(0.2 * np.sum(digits.target == label))
    assert data.image.num_classes == len(data.class_names) == 10


def test_the_split_does_not_depend_on_the_seed_and_the_subset_does() -> None:
    full = [load_data(DataConfig(), seed) for seed in (0, 1)]
    assert torch.equal(full[0].x_test, full[1].x_test)
    config = DataConfig(train_size=200, test_size=50)
    first, again, other = (load_data(config, seed) for seed in (0, 0, 1))
    assert (len(first.x_train), len(first.x_test)) == (200, 50)
    assert torch.equal(first.x_train, again.x_train)
    assert torch.equal(first.y_test, again.y_test)
    assert not torch.equal(first.x_train, other.x_train)
    assert first.image == other.image == full[0].image
    rows = {x.numpy().tobytes() for x in full[0].x_train}
    assert all(x.numpy().tobytes() in rows for x in first.x_train)
    for label in range(10):
        assert abs(int((first.y_train == label).sum()) - 200 * int((full[0].y_train == label).sum()) / 1438) < 1


def test_validation_images_come_from_the_training_set_and_nobody_holds_them() -> None:
    plain = load_data(DataConfig(), seed=0)
    held = load_data(DataConfig(validation_size=300), seed=0)
    rows = {part: Counter(x.numpy().tobytes() for x in images) for part, images in (("all", plain.x_train), ("train", held.x_train), ("held", held.x_test))}
    assert rows["train"] + rows["held"] == rows["all"]  # so none of them is a test image, and none is used twice
    assert len(held.x_test) == len(held.y_test) == 300
    assert torch.equal(held.x_test, load_data(DataConfig(validation_size=300, train_size=100), seed=1).x_test)
    with pytest.raises(DataError, match=r"there are 1438 training images; accepted: 1\.\.1437"):
        load_data(DataConfig(validation_size=1438), seed=0)


def test_images_can_be_resized() -> None:
    data = load_data(DataConfig(image_size=16, train_size=20), seed=0)
    assert data.image.shape == (1, 16, 16)
    assert data.x_train.shape == (20, 1, 16, 16)
    small = load_data(DataConfig(train_size=20), seed=0)
    assert torch.allclose(data.x_train.float().mean((1, 2, 3)), small.x_train.float().mean((1, 2, 3)), atol=4)


def test_digits_constants_are_those_of_the_images() -> None:
    pixels = load_data(DataConfig(), seed=0).x_train.double() / 255
    assert KNOWN["digits"].mean[0] == pytest.approx(float(pixels.mean()), abs=2e-3)
    assert KNOWN["digits"].std[0] == pytest.approx(float(pixels.std()), abs=2e-3)


def test_unknown_sets_are_measured() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 3, 6, 6), dtype=np.uint8)
    pixels[:, 1] //= 2
    mean, std = normalisation("mine", pixels)
    assert np.allclose(mean, pixels.mean((0, 2, 3)) / 255, atol=3e-3)
    assert np.allclose(std, pixels.std((0, 2, 3)) / 255, atol=3e-3)
    assert normalisation("mine", pixels) == (mean, std)
    assert normalisation("mnist", pixels).mean == mean  # a grey constant does not fit colour images
    assert normalisation("blank", np.zeros((5, 1, 6, 6), np.uint8)).std[0] > 0


def test_names_that_nobody_knows_list_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "my_cells.npz", x_train=np.zeros((2, 8, 8), np.uint8))
    monkeypatch.setenv("CDFKD_DATA", str(tmp_path))
    with pytest.raises(UnknownNameError, match=r"cifar10, .*digits, .*folder, .*my_cells, .*npz"):
        load_data(DataConfig(name="cells"), seed=0)
    with pytest.raises(DataError, match="lacks y_train"):  # the local file is found by its name
        load_data(DataConfig(name="my_cells"), seed=0)


def test_a_missing_extra_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "cdfkd-strategy\[simulation\]"'):
        load_data(DataConfig(), seed=0)


def test_bad_settings_say_what_is_accepted() -> None:
    for bad in ({"local_test": 1.0}, {"local_test": -0.1}, {"train_size": 0}, {"test_size": 0}, {"validation_size": 0}, {"image_size": 2}):
        with pytest.raises(ConfigError, match="accepted"):
            DataConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"1\.\.1438"):
        load_data(DataConfig(train_size=2000), seed=0)
    with pytest.raises(ConfigError, match=r"data\.path"):
        load_data(DataConfig(name="folder"), seed=0)


def test_the_configuration_may_say_what_the_images_are_like() -> None:
    wanted = ImageSpec(1, 8, 8, 12, (0.1,), (0.2,))
    data = load_data(DataConfig(image=wanted, train_size=20), seed=0)
    assert data.image == wanted
    assert data.class_names == (*map(str, range(12)),)
    plain = load_data(DataConfig(train_size=20), seed=0)
    assert torch.equal(data.x_train, plain.x_train)
    assert load_data(DataConfig(image=plain.image, class_names=plain.class_names, train_size=20), seed=0).image == plain.image
    for other in (ImageSpec(3, 8, 8, 10), ImageSpec(1, 9, 8, 10), ImageSpec(1, 8, 8, 9)):
        with pytest.raises(DataError, match=r"the data set digits has images of \(1, 8, 8\) and 10 classes; accepted in this run"):
            load_data(DataConfig(image=other), seed=0)


def test_no_data_set_is_a_choice_that_must_be_complete() -> None:
    with pytest.raises(ConfigError, match=r"data.name is null, .*give data.image: channels, height, width and num_classes"):
        DataConfig(name=None)
    with pytest.raises(ConfigError, match=r"are 2 names; accepted: data\.image.num_classes = 3"):
        DataConfig(image=ImageSpec(1, 8, 8, 3), class_names=("a", "b"))
    with pytest.raises(ConfigError, match=r"data.name is null: .*name a data set"):
        load_data(DataConfig(name=None, image=ImageSpec(1, 8, 8, 10)), seed=0)
