"""What the README says is true: map, commands, links, examples, tables."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from cdfkd_strategy import TeacherEnsemble, cli, distill, seeding
from cdfkd_strategy.distiller import METHODS
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.report import find_results, with_tables
from cdfkd_strategy.run_config import bench_root, find_config
from cdfkd_strategy.student_io import save_student
from cdfkd_strategy.types import ImageSpec

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
IMAGE = ImageSpec(1, 8, 8, 10)


def blocks(language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def block_with(word: str, language: str = "") -> str:
    (found,) = [block for block in blocks(language) if word in block]
    return found


def mapped() -> list[str]:
    """The paths of the map, in full."""
    paths, folder = [], ""
    for line in block_with("pyproject.toml").splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name == "cdfkd_strategy/" else ""
        paths.append(folder + name if line.startswith(" ") else name)
    return paths


def test_every_path_of_the_map_exists() -> None:
    assert len(mapped()) > 20
    assert [path for path in mapped() if not (REPOSITORY / path).exists()] == []


def test_the_map_is_complete() -> None:
    inside = [path for path in (REPOSITORY / "cdfkd_strategy").iterdir() if not path.name.startswith(("_", "."))]
    here = {f"cdfkd_strategy/{path.name}{'/' if path.is_dir() else ''}" for path in inside if path.is_dir() or path.suffix == ".py"}
    assert here - set(mapped()) == set(), "add a line to the README's map"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"make ([a-z][a-z-]+)", README)) | {"demo", "demo-mixed", "test", "lint", "study", "clean"}
    documents = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "simulations/README.md")]
    for text in documents:
        named |= set(re.findall(r"`make ([a-z][a-z-]+)", text))
    assert named <= targets


def test_commands_parse() -> None:
    lines = [line for block in blocks() for line in block.splitlines() if line.startswith("cdfkd ")]
    assert len(lines) >= 8
    for line in lines:
        arguments = shlex.split(line, comments=True)[1:]
        args, rest = cli.build_parser().parse_known_args(arguments)
        assert all("=" in item for item in rest), line
        if getattr(args, "config", None):
            assert find_config(args.config, bench_root()).exists()


def test_relative_links_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "simulations/README.md"):
        path = REPOSITORY / document
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{document} links {link}"


@pytest.mark.parametrize("document", ["README.md", "simulations/README.md"])
def test_tables_are_those_of_the_committed_results(document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    assert with_tables(text, find_results(REPOSITORY / "simulations" / "results")) == text, "run `make report`"


def test_student_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's doctest, on a run directory of its own."""
    monkeypatch.chdir(tmp_path)
    save_student(tmp_path / "runs" / "demo", MultiHeaderStudent("small_cnn", 2, IMAGE))
    test = doctest.DocTestParser().get_doctest(block_with("load_student", "python"), {}, "README", "README.md", 0)
    assert test.examples
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test)
    assert runner.failures == 0


def test_method_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    (tmp_path / "static_method.py").write_text(block_with("class Static(", "python"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    example = importlib.import_module("static_method")
    with seeding.seeded_scope("readme"):
        teachers = TeacherEnsemble([build_classifier("small_cnn", IMAGE) for _ in range(2)], None, image=IMAGE)
        student = MultiHeaderStudent("small_cnn", 2, IMAGE)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    result = distill(teachers, student, "static", config=example.StaticConfig.toy(), out=tmp_path / "run")
    assert result.epochs_done == 2
    assert result.history[0]["student/kl"] > 0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
