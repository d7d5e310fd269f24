from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cdfkd_strategy.data.array_cache import cached_arrays, store
from cdfkd_strategy.data.image_data import ImageArrays
from cdfkd_strategy.errors import DataError

PIXELS = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 1, 8, 8)
ARRAYS = ImageArrays(PIXELS, np.array([0, 1]), PIXELS[:1], np.array([1]), ("a", "b"), np.array([1, 0]), ("x", "y"))


def test_arrays_come_back_memory_mapped_and_cannot_be_changed_on_disk(cache: Path) -> None:
    found = cached_arrays("set", "key", lambda folder: store(folder, ARRAYS))
    assert isinstance(found.x_train, np.memmap)
    assert np.array_equal(found.x_train, PIXELS)
    assert found.y_train.tolist() == [0, 1]
    assert (found.class_names, found.domain_names) == (("a", "b"), ("x", "y"))
    assert found.domain_train is not None
    assert found.domain_train.tolist() == [1, 0]
    found.x_train[:] = 7
    assert np.array_equal(cached_arrays("set", "key", pytest.fail).x_train, PIXELS)


def test_another_key_is_another_entry(cache: Path) -> None:
    built = []
    for key in ("one", "two", "one"):
        cached_arrays("set", key, lambda folder, key=key: (built.append(key), store(folder, ARRAYS))[-1])
    assert built == ["one", "two"]


def test_only_one_of_several_callers_builds(cache: Path) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.05)
        store(folder, ARRAYS)

    callers = [threading.Thread(target=cached_arrays, args=("set", "key", build)) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(built) == 1


def test_a_build_that_fails_leaves_nothing_and_can_be_tried_again(cache: Path) -> None:
    def fail(folder: Path) -> None:
        np.save(folder / "x_train.npy", PIXELS)
        raise DataError("broken source")

    with pytest.raises(DataError, match="broken source"):
        cached_arrays("set", "key", fail)
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert len(cached_arrays("set", "key", lambda folder: store(folder, ARRAYS)).x_train) == 2


def test_a_broken_entry_and_a_cache_that_cannot_be_written_say_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_arrays("set", "key", lambda folder: store(folder, ARRAYS))
    file = next(cache.glob("set-*")) / "x_train.npy"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match="delete that folder"):
        cached_arrays("set", "key", pytest.fail)
    monkeypatch.setenv("CDFKD_CACHE", str(file / "below-a-file"))
    with pytest.raises(DataError, match="set CDFKD_CACHE"):
        cached_arrays("set", "key", pytest.fail)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": PIXELS.astype(np.float32)}, "uint8"),
        ({"x_train": PIXELS[:, 0]}, "uint8"),
        ({"y_train": np.array([0])}, "one label per image"),
        ({"y_test": np.array([2])}, r"labels 2\.\.2"),
        ({"y_train": np.array([-1, 0])}, r"accepted: 0\.\.1"),
        ({"x_test": PIXELS[:1, :, :4]}, "one shape"),
        ({"x_train": PIXELS[:0], "y_train": np.array([], np.int64)}, "no training images"),
        ({"domain_train": np.array([0])}, "one domain per training image"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    values = {"x_train": PIXELS, "y_train": np.array([0, 1]), "x_test": PIXELS[:1], "y_test": np.array([1]), "class_names": ("a", "b")}
    with pytest.raises(DataError, match=message):
        ImageArrays(**{**values, **change})  # type: ignore[arg-type]
