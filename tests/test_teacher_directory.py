from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cdfkd_strategy import freed_memory
from cdfkd_strategy.errors import CheckpointError
from cdfkd_strategy.local_training import initial_model
from cdfkd_strategy.teacher_directory import TeacherSet, load_teachers, save_teachers
from cdfkd_strategy.teachers import TeacherSpec, state_hash
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(3, 12, 12, 4, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
ARCHITECTURES = ("lenet_bn", "small_cnn_gn", "resnet8")


def teachers(**changes: Any) -> TeacherSet:
    values: dict[str, Any] = {
        "specs": tuple(TeacherSpec(str(k), arch, num_samples=10 + k) for k, arch in enumerate(ARCHITECTURES)),
        "models": [initial_model(arch, IMAGE, seed=k) for k, arch in enumerate(ARCHITECTURES)],
        "image": IMAGE,
        "seed": 7,
        "config": {"study": "x", "clients": {"count": 3}},
        "oracle_label_counts": [[1, 2, 3, 4], [0, 0, 1, 0], [5, 0, 0, 0]],
    }
    return TeacherSet(**{**values, **changes})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_teachers(tmp_path / "teachers", teachers())
    return tmp_path / "teachers"


def change(directory: Path, edit: Any) -> None:
    index = json.loads((directory / "teachers.json").read_text())
    edit(index)
    (directory / "teachers.json").write_text(json.dumps(index))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    given = teachers()
    given.models[2].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    saved, loaded = save_teachers(tmp_path / "new" / "folder", given), load_teachers(tmp_path / "new" / "folder")
    assert loaded.specs == saved.specs
    assert [spec.key for spec in loaded.specs] == ["0", "1", "2"]
    assert (loaded.image, loaded.seed, loaded.config, loaded.oracle_label_counts) == (IMAGE, 7, given.config, given.oracle_label_counts)
    images = torch.randn(2, 3, 12, 12)
    for before, after, spec in zip(given.models, loaded.models, loaded.specs, strict=True):
        assert state_hash(before.state_dict()) == state_hash(after.state_dict()) == spec.sha256
        assert not after.training
        assert torch.equal(before.eval().to(memory_format=torch.contiguous_format)(images), after(images))


def memory_of_its_own() -> int:
    """Bytes of this process that are not pages of files."""
    if (library := freed_memory._glibc()) is not None:
        library.malloc_trim(0)  # what earlier tests freed, and glibc keeps, is nobody's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 2**10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's count of a process's own pages")
def test_mapped_weights_are_the_same_and_stay_in_their_files(tmp_path: Path) -> None:
    image = ImageSpec(3, 32, 32, 10)
    saved = save_teachers(tmp_path, TeacherSet((TeacherSpec("0", "resnet18"),), [initial_model("resnet18", image, seed=0)], image))
    before = memory_of_its_own()
    mapped = load_teachers(tmp_path, mapped=True).models[0]
    grown = memory_of_its_own() - before
    assert state_hash(mapped.state_dict()) == saved.specs[0].sha256
    size = sum(parameter.nbytes for parameter in mapped.parameters())
    assert size > 40e6
    assert grown < size / 2
    loaded = load_teachers(tmp_path).models[0]
    assert torch.equal(loaded.state_dict()["fc.weight"], mapped.state_dict()["fc.weight"])


def test_the_format_is_the_documented_one(directory: Path) -> None:
    index = json.loads((directory / "teachers.json").read_text())
    assert sorted(path.name for path in directory.iterdir()) == [*(f"teacher-{k}.safetensors" for k in range(3)), "teachers.json"]
    assert set(index["teachers"][1]) == {"key", "arch", "file", "sha256", "num_samples"}
    assert index["teachers"][1]["file"] == "teacher-1.safetensors"
    assert index["image"] == {"channels": 3, "height": 12, "width": 12, "num_classes": 4, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert index["oracle"]["label_counts"][0] == [1, 2, 3, 4]
    assert index["seed"] == 7


def test_disclosed_counts_are_kept_apart_from_the_oracles(directory: Path, tmp_path: Path) -> None:
    assert load_teachers(directory).label_counts is None
    disclosed = [[1, 1, 1, 1], [0, 0, 2, 0], [6, 0, 0, 0]]
    save_teachers(tmp_path / "opted", teachers(label_counts=disclosed))
    found = load_teachers(tmp_path / "opted")
    assert (found.label_counts, found.oracle_label_counts) == (disclosed, teachers().oracle_label_counts)
    change(directory, lambda index: index.pop("disclosed"))  # as older versions wrote it
    assert load_teachers(directory).label_counts is None


def test_the_same_teachers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_teachers(tmp_path / name, teachers())
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_without_counts_and_without_changing_the_random_state(tmp_path: Path) -> None:
    save_teachers(tmp_path, teachers(oracle_label_counts=None))
    before = torch.get_rng_state()
    assert load_teachers(tmp_path).oracle_label_counts is None
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unfinished_directory_is_not_a_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving over an older directory and dying half-way must not leave new weights under an old index."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cdfkd_strategy.teacher_directory.write_json", die)
    with pytest.raises(KeyboardInterrupt):
        save_teachers(directory, teachers(seed=8))
    with pytest.raises(CheckpointError, match=r"holds no teachers\.json.*cdfkd teachers"):
        load_teachers(directory)


def test_changed_weights_are_noticed(directory: Path) -> None:
    path = directory / "teacher-1.safetensors"
    state = load_file(path)
    state["0.weight"][0, 0, 0, 0] += 1e-3
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"teacher-1\.safetensors was changed"):
        load_teachers(directory)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("0.weight"), r"does not hold a 'small_cnn_gn': .*0\.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra"),
        (lambda state: state.update({"0.weight": torch.zeros(2)}), r"accepted for 'small_cnn_gn': torch\.float32 \[32, 3, 3, 3\]"),
        (lambda state: state.update({"0.weight": state["0.weight"].half()}), r"torch\.float16"),
        (lambda state: state["0.weight"].fill_(float("nan")), "not finite"),
    ],
)
def test_weights_of_something_else_are_refused(directory: Path, edit: Any, message: str) -> None:
    path = directory / "teacher-1.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)
    with pytest.raises(CheckpointError, match=message):
        load_teachers(directory)


def test_broken_and_missing_files(directory: Path) -> None:
    path = directory / "teacher-2.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot read .*teacher-2"):
        load_teachers(directory)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*teacher-2"):
        load_teachers(directory)
    (directory / "teachers.json").write_text('{"format": 1, ')
    with pytest.raises(CheckpointError, match=r"cannot read .*teachers\.json"):
        load_teachers(directory)


def set_first(name: str, value: object) -> Any:
    return lambda index: index["teachers"][0].update({name: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index.pop("image"), "it has no 'image'"),
        (lambda index: index["image"].update(channels=2), "accepted: 1 or 3"),
        (lambda index: index["image"].update(num_classes=5), r"accepted for 'lenet_bn': .* \[5"),
        (lambda index: index.update(format=2), "another format"),
        (lambda index: index["teachers"].clear(), "at least one"),
        (lambda index: index.update(teachers=[3]), "not what this version writes"),
        (lambda index: index["oracle"].update(label_counts=[[1, 2]]), "oracle label counts"),
        (lambda index: index["disclosed"].update(label_counts=[[1, 2]]), "disclosed label counts"),
        (set_first("key", "1"), "each with its own key"),
        (set_first("arch", "no_such_net"), "is a 'no_such_net', which is no registered architecture"),
        (set_first("file", "../teacher-0.safetensors"), "a file name inside"),
        (set_first("num_samples", "many"), "num_samples"),
        (lambda index: index["teachers"][0].pop("sha256"), "it has no 'sha256'"),
    ],
)
def test_an_index_that_does_not_fit_says_why(directory: Path, edit: Any, message: str) -> None:
    change(directory, edit)
    with pytest.raises(CheckpointError, match=message):
        load_teachers(directory)


def test_sets_that_do_not_belong_together_are_not_written(tmp_path: Path) -> None:
    for bad in ({"models": teachers().models[:2]}, {"specs": (TeacherSpec("0", "lenet_bn"),) * 3}, {"oracle_label_counts": [[1]]}):
        with pytest.raises(CheckpointError, match="accepted"):
            save_teachers(tmp_path / "none", teachers(**bad))
    assert not (tmp_path / "none").exists()
