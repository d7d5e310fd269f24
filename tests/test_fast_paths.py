"""CDFKD-MFS on every fast path against the loop as the paper reads: both start every step from the same state and z."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy import seeding, teacher_forms
from cdfkd_strategy.methods.cdfkd_mfs import CDFKDMFS, CDFKDMFSConfig
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.generators import Generator, GeneratorConfig
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from tests.broken_folding import fold_without_bias
from tests.methods.trained_teachers import DIGITS, digits

CONFIG = CDFKDMFSConfig(batch_size=64, schedule="constant", student_lr=0.05, generator=GeneratorConfig(latent_dim=32, width=0.5))
ITERATIONS = 20
WARM_UP = 3
"""Iterations of the plain path before the comparison: the gradient of a student that has not learned anything yet turns with every bit of an image."""


@lru_cache(maxsize=1)
def trained() -> list[nn.Module]:
    """Two small CNNs that know the digits."""
    nets = []
    for index in range(2):
        with seeding.seeded_scope("fast path teacher", index):
            net = build_classifier("small_cnn", DIGITS)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            for _ in range(3):
                for chosen in torch.randperm(len(digits().y_train)).split(64):
                    optimizer.zero_grad()
                    F.cross_entropy(net(digits().x_train[chosen]), digits().y_train[chosen]).backward()
                    optimizer.step()
        nets.append(net.eval())
    return nets


def build(runtime: Runtime, mode: Literal["paper", "fused"]) -> CDFKDMFS:
    """The same initial state every time."""
    teachers = TeacherEnsemble(copy.deepcopy(trained()), torch.linspace(0.2, 0.9, 20).view(2, 10).sin(), image=DIGITS)
    with seeding.seeded_scope("fast path"):
        student = MultiHeaderStudent("small_cnn", 2, DIGITS).train()
        distiller = CDFKDMFS(teachers, student, dataclasses.replace(CONFIG, mode=mode), image=DIGITS, rng=seeding.generator("fast path"), runtime=runtime)
    assert distiller.generator is not None
    distiller.generator.train()
    return distiller


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


def compare(runtime: Runtime, repository: Path, mode: Literal["paper", "fused"] = "paper") -> tuple[float, float]:
    """The largest relative difference of a loss term, and the smallest cosine of a gradient, over student and generator steps."""
    sys.path.insert(0, str(repository / "simulations" / "benchmarks"))
    try:
        from mfs_plain import PlainMFS
    finally:
        sys.path.pop(0)
    mine, built = build(runtime, mode), build(Runtime(channels_last=False), mode)
    assert isinstance(built.generator, Generator)
    plain = PlainMFS(list(built.teachers.nets), built.student, built.generator, built.config, built.rng, built.teachers.weights)
    state: dict[str, Any] = {
        "student": plain.student, "generator": plain.generator, "student_optimizer": plain.student_optimizer, "generator_optimizer": plain.generator_optimizer,
    }  # fmt: skip
    for _ in range(WARM_UP):
        plain.iteration()
    differences, cosines = [], []
    with mine.teachers.prepared(runtime), runtime.computing(mine.student):
        for _ in range(ITERATIONS):
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
