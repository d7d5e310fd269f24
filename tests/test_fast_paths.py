"""CDFKD-MFS on every fast path against the loop as the paper reads: both start every step from the same state and z."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy import compiled_networks, seeding, teacher_forms
from cdfkd_strategy.methods.cdfkd_mfs import CDFKDMFS, CDFKDMFSConfig
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.generators import Generator, GeneratorConfig
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.models.stages import Trunk
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from tests.broken_folding import fold_without_bias
from tests.methods.trained_teachers import DIGITS, digits

CONFIG = CDFKDMFSConfig(batch_size=64, schedule="constant", student_lr=0.05, generator=GeneratorConfig(latent_dim=32, width=0.5))
ITERATIONS = 20
WARM_UP = 3
"""Iterations of the plain path before the comparison: the gradient of a student that has not learned anything yet turns with every bit of an image."""


@lru_cache(maxsize=2)
def trained(arch: str) -> list[nn.Module]:
    """Two networks that know the digits."""
    nets = []
    for index in range(2):
        with seeding.seeded_scope("fast path teacher", index):
            net = build_classifier(arch, DIGITS)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            for _ in range(3):
                for chosen in torch.randperm(len(digits().y_train)).split(64):
                    optimizer.zero_grad()
                    F.cross_entropy(net(digits().x_train[chosen]), digits().y_train[chosen]).backward()
                    optimizer.step()
        nets.append(net.eval())
    return nets


def build(runtime: Runtime, mode: Literal["paper", "fused"], arch: str) -> CDFKDMFS:
    """The same initial state every time."""
    teachers = TeacherEnsemble(copy.deepcopy(trained(arch)), torch.linspace(0.2, 0.9, 20).view(2, 10).sin(), image=DIGITS)
    with seeding.seeded_scope("fast path"):
        student = MultiHeaderStudent(arch, 2, DIGITS).train()
        distiller = CDFKDMFS(teachers, student, dataclasses.replace(CONFIG, mode=mode), image=DIGITS, rng=seeding.generator("fast path"), runtime=runtime)
    assert distiller.generator is not None
    distiller.generator.train()
    return distiller


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


def compare(
    runtime: Runtime, repository: Path, mode: Literal["paper", "fused"] = "paper", *, arch: str = "small_cnn", iterations: int = ITERATIONS
) -> tuple[float, float]:
    """The largest relative difference of a loss term, and the smallest cosine of a gradient, over student and generator steps."""
    sys.path.insert(0, str(repository / "simulations" / "benchmarks"))
    try:
        from mfs_plain import PlainMFS
    finally:
        sys.path.pop(0)
    mine, built = build(runtime, mode, arch), build(Runtime(channels_last=False), mode, arch)
    assert isinstance(built.generator, Generator)
    plain = PlainMFS(list(built.teachers.nets), built.student, built.generator, built.config, built.rng, built.teachers.weights)
    state: dict[str, Any] = {
        "student": plain.student, "generator": plain.generator, "student_optimizer": plain.student_optimizer, "generator_optimizer": plain.generator_optimizer,
    }  # fmt: skip
    for _ in range(WARM_UP):
        plain.iteration()
    differences, cosines = [], []
    assert mine.generator is not None
    with mine.teachers.prepared(runtime), runtime.computing(mine.student), runtime.compiling([mine.generator]):
        for _ in range(iterations):
            for kind in ("student", "generator"):
                saved = {name: copy.deepcopy(part.state_dict()) for name, part in state.items()}
                mine.load_state_dict({**mine.state_dict(), **saved, "rng": plain.rng.get_state()})
                expected = getattr(plain, f"{kind}_step")()
                found = getattr(mine, f"{kind}_step")()
                assert {f"{kind}/{name}" for name in found} == set(expected)
                for name, value in found.items():
                    differences.append(abs(float(value.detach()) / expected[f"{kind}/{name}"] - 1))
                cosines.append(float(F.cosine_similarity(gradient(state[kind]), gradient(getattr(mine, kind)), dim=0)))
    assert all(math.isfinite(value) for value in (*differences, *cosines)), "max() and min() would pass over NaN"
    return max(differences), min(cosines)


FLOAT32 = {
    "nhwc": Runtime(),
    "folded": Runtime(fold=True),
    "recomputed": Runtime(fold=True, recompute=True),
    "nchw": Runtime(channels_last=False, fold=True),
}


@pytest.mark.parametrize("runtime", FLOAT32.values(), ids=FLOAT32.keys())
def test_float32_paths_are_the_plain_one(runtime: Runtime, repository: Path) -> None:
    difference, cosine = compare(runtime, repository)
    assert difference < 1e-4
    assert cosine > 0.9999


@pytest.mark.parametrize("arch", ["wrn16_1", "resnet8"])
def test_residual_networks_too(arch: str, repository: Path) -> None:
    """With BatchNorm layers that cannot be folded (before the activation), and shortcuts."""
    difference, cosine = compare(Runtime(fold=True), repository, arch=arch, iterations=4)
    assert difference < 1e-4
    assert cosine > 0.9999


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's tracer looks at all tensors
def test_compiled_networks_too(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's compiler up to where it would need one for C++."""
    monkeypatch.setattr(compiled_networks, "BACKEND", "aot_eager")
    compiled_networks.can_compile.cache_clear()
    called: list[nn.Module] = []
    compiling = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: (called.append(module), compiling(module, **how))[1])
    difference, cosine = compare(Runtime(fold=True, compile=True), repository, iterations=4)
    assert difference < 1e-4
    assert cosine > 0.9999
    assert [type(module) for module in called] == [Trunk, Generator]
    assert all(module._compiled_call_impl is None for module in called), "afterwards they are ordinary modules"
    compiled_networks.can_compile.cache_clear()


def test_without_a_compiler_networks_are_computed_as_they_are_which_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def compile_nothing(function: Any, **how: Any) -> Any:
        def fail(*values: Any) -> None:
            raise RuntimeError("there is no C++ compiler\nand a page of other words")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    compiled_networks.can_compile.cache_clear()
    student = MultiHeaderStudent("small_cnn", 2, DIGITS)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with Runtime(compile=True).computing(student):
                assert student.trunk._compiled_call_impl is None
                assert student(torch.zeros(2, *DIGITS.shape)).logits.shape == (2, 2, 10)
    compiled_networks.can_compile.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "engine.compile: torch cannot compile here, networks are computed as they are (RuntimeError: there is no C++ compiler)"
    ]


def test_the_fused_ensemble_too(repository: Path) -> None:
    difference, cosine = compare(Runtime(fold=True), repository, "fused")
    assert difference < 1e-4
    assert cosine > 0.9999


@pytest.mark.parametrize("mode", ["paper", "fused"])
def test_the_bfloat16_path_is_close(mode: Literal["paper", "fused"], repository: Path) -> None:
    difference, cosine = compare(Runtime(fold=True, precision="bfloat16"), repository, mode)
    assert difference < 2e-2
    assert cosine > 0.99


def test_a_wrong_path_is_found(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded without the bias of BatchNorm, and without the check that would refuse it."""
    monkeypatch.setattr(teacher_forms, "fold_batch_norm", fold_without_bias)
    monkeypatch.setattr(teacher_forms.TeacherForms, "_check", lambda *_: None)
    difference, cosine = compare(Runtime(fold=True), repository)
    assert difference > 2e-2
    assert cosine < 0.99
