"""Transfer sets on disk: what goes in comes out, and what is wrong with a file is said in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cdfkd_strategy.config import to_dict
from cdfkd_strategy.data.transfer_set import DESCRIPTION, Origin, TransferSet, load_transfer_set, save_transfer_set
from cdfkd_strategy.errors import DataError
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(3, 8, 6, 10, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
ORIGIN = Origin(IMAGE, "zskd", 7, ("a" * 64, "b" * 64))
PIXELS = torch.randint(256, (5, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_transfer_set(tmp_path / name, TransferSet(PIXELS, ORIGIN))
    found = load_transfer_set(tmp_path / "one", IMAGE)
    assert torch.equal(found.pixels, PIXELS)
    assert found.origin == ORIGIN
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_another_normalisation_is_no_hindrance(tmp_path: Path) -> None:
    save_transfer_set(tmp_path / "set", TransferSet(PIXELS, ORIGIN))
    assert torch.equal(load_transfer_set(tmp_path / "set", dataclasses.replace(IMAGE, mean=(0.0,), std=(1.0,))).pixels, PIXELS)


def described(**changes: object) -> dict[str, str]:
    return {DESCRIPTION: json.dumps({**to_dict(ORIGIN), **changes})}


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    good = tmp_path / "good"
    save_transfer_set(good, TransferSet(PIXELS, ORIGIN))
    (tmp_path / "truncated").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "cut").write_bytes(good.read_bytes()[:30])
    (tmp_path / "text").write_text("two lines\nof text\n" * 20, encoding="utf-8")
    (tmp_path / "empty").touch()
    save_file({"pixels": PIXELS}, tmp_path / "bare")
    save_file({"weight": torch.zeros(2)}, tmp_path / "student", described())
    save_file({"pixels": PIXELS}, tmp_path / "malformed", {DESCRIPTION: "{"})
    save_file({"pixels": PIXELS}, tmp_path / "unnamed", described(method=3))
    save_file({"pixels": PIXELS.float()}, tmp_path / "floats", described())
    save_file({"pixels": PIXELS[:0]}, tmp_path / "none", described())
    save_file({"pixels": PIXELS[:, :1].contiguous()}, tmp_path / "grey", described())
    save_file({"pixels": PIXELS[0]}, tmp_path / "flat", described())
    words = {
        "missing": "cannot read", "truncated": "cannot read", "cut": "cannot read", "text": "cannot read", "empty": "cannot read",
        "bare": "has no description", "student": "it holds weight", "malformed": "description is malformed", "unnamed": "method",
        "floats": r"torch\.float32 \[5, 3, 8, 6\]; accepted: at least one image, uint8 \[N, 3, 8, 6\]",
        "none": r"\[0, 3, 8, 6\]", "grey": r"\[5, 1, 8, 6\]", "flat": r"\[3, 8, 6\]; accepted",
    }  # fmt: skip
    for name, expected in words.items():
        with pytest.raises(DataError, match=expected) as caught:
            load_transfer_set(tmp_path / name, IMAGE)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"height": 16}, {"channels": 1, "mean": (0.5,), "std": (0.5,)}, {"num_classes": 11}])
def test_images_of_another_kind_are_refused(change: dict[str, int], tmp_path: Path) -> None:
    save_transfer_set(tmp_path / "set", TransferSet(PIXELS, ORIGIN))
    with pytest.raises(DataError, match=r"images of \(3, 8, 6\) .* and 10 classes; accepted by these teachers: "):
        load_transfer_set(tmp_path / "set", dataclasses.replace(IMAGE, **change))  # type: ignore[arg-type]
