"""A student on disk comes back as the same classifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cdfkd_strategy import load_student, seeding
from cdfkd_strategy.checkpoint import load_tensors, save_tensors
from cdfkd_strategy.errors import CheckpointError
from cdfkd_strategy.models.head_fusion import class_weights, fuse
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.student_io import DESCRIPTION, save_student
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(1, 8, 8, 4, (0.3,), (0.2,))


def student() -> MultiHeaderStudent:
    with seeding.seeded_scope("student io"):
        return MultiHeaderStudent("small_cnn", 3, IMAGE)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_loaded_student_is_the_saved_one(tmp_path: Path, weighted: bool) -> None:
    saved = student()
    weights = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) if weighted else None
    save_student(tmp_path, saved, weights)
    loaded = load_student(tmp_path)
    pixels = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = fuse(saved.eval()((pixels - 0.3) / 0.2).logits, class_weights(weights, 3, 4))
        assert torch.equal(loaded(pixels), expected)
    assert not any(module.training for module in loaded.modules())


def test_loading_draws_no_global_random_numbers(tmp_path: Path) -> None:
    save_student(tmp_path, student())
    before = torch.random.get_rng_state()
    load_student(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_same_student_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_student(tmp_path / name, student(), torch.ones(3))
    for file in ("student.safetensors", "student.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_broken_directories_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"student\.safetensors.*finished run"):
        load_student(tmp_path)
    save_student(tmp_path, student())
    description = json.loads((tmp_path / "student.json").read_text(encoding="utf-8"))
    state = load_tensors(tmp_path / "student.safetensors")
    description["spec"]["heads"] = 2
    save_tensors(tmp_path / "student.safetensors", state, {DESCRIPTION: json.dumps(description)})
    with pytest.raises(CheckpointError, match="do not fit"):
        load_student(tmp_path)
    save_tensors(tmp_path / "student.safetensors", state, {DESCRIPTION: "[]"})
    with pytest.raises(CheckpointError, match="lacks spec"):
        load_student(tmp_path)
    save_tensors(tmp_path / "student.safetensors", state)
    with pytest.raises(CheckpointError, match="missing or malformed"):
        load_student(tmp_path)
    (tmp_path / "student.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"cannot read .*student\.safetensors"):
        load_student(tmp_path)


def test_one_file_is_the_whole_student(tmp_path: Path) -> None:
    save_student(tmp_path, student(), torch.ones(3))
    (tmp_path / "student.json").unlink()  # as if the process died before it wrote that
    assert load_student(tmp_path).student.heads == 3
