"""DAFL against a plain reference of its simultaneous steps, and its schedule."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdfkd_strategy import seeding
from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.methods.dafl import DAFL, DAFLConfig
from cdfkd_strategy.models.generators import GeneratorConfig
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "dafl test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, **changes: Any) -> DAFL:
    config = dataclasses.replace(DAFLConfig.toy(), **changes)
    student = tiny_student(heads or count)
    with seeding.seeded_scope(SEED):
        return DAFL(
            teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1)
        )  # fmt: skip


def double(distiller: DAFL) -> None:
    """In float64 Adam has less rounding noise to magnify; the optimisers keep their parameters."""
    for part in (distiller.student, distiller.generator, distiller.teachers):
        part.double()
    distiller.generator.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))


def features_of(teacher: nn.Module, x: Tensor) -> Tensor:
    return nn.Sequential(*list(teacher)[:-1])(x)


@pytest.mark.parametrize(("count", "heads", "optimizer"), [(1, 1, "adam"), (3, 3, "sgd"), (3, 1, "sgd")])
def test_an_epoch_equals_a_plain_reference(count: int, heads: int, optimizer: str) -> None:
    """From the paper's symbols, with log10 as in the code: both networks step on the same batch."""
    weights = torch.rand(count, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    distiller = build(count, heads=heads, teachers=trained_ensemble(count, weights), student_optimizer=optimizer, student_lr=0.01)
    double(distiller)
    config, w = distiller.config, (weights / weights.sum(0)).double()
    generator, student, rng = copy.deepcopy(distiller.generator), copy.deepcopy(distiller.student).train(), seeding.generator(SEED)
    adam = torch.optim.Adam(generator.parameters(), lr=0.02)
    parameters = student.parameters()
    descent = torch.optim.Adam(parameters, lr=0.01) if optimizer == "adam" else torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)
    sums = [0.0] * 4
    for _ in range(config.iterations):
        x = generator(torch.randn(config.batch_size, config.generator.latent_dim, generator=rng))
        one_hot = entropy = activation = 0.0
        targets = []
        for teacher in distiller.teachers.nets:
            t = teacher(x)
            p = torch.softmax(t, dim=1)
            mean = p.mean(0)
            one_hot = one_hot - torch.log(p.max(dim=1).values).mean() / count
            entropy = entropy + (mean * torch.log10(mean)).sum() / count
            activation = activation - features_of(teacher, x).abs().mean() / count
            targets.append(t.detach())
        terms = [1.0 * one_hot, 5.0 * entropy, 0.1 * activation]
        adam.zero_grad()
        (terms[0] + terms[1] + terms[2]).backward()
        if heads == 1:
            pooled = sum(share * torch.log(torch.softmax(target, dim=1)) for share, target in zip(w, targets, strict=True))
            targets = [torch.log(torch.softmax(pooled, dim=1))]
        logits, loss = student(x.detach()).logits, 0.0
        for k, target in enumerate(targets):
            p, q = torch.softmax(target, dim=1), torch.softmax(logits[k], dim=1)
            loss = loss + (p * torch.log(p / q)).sum(dim=1).mean() / heads
        student.zero_grad()
        loss.backward()
        adam.step()
        descent.step()
        sums = [total + term.item() for total, term in zip(sums, [*terms, loss], strict=True)]
    found = distiller.run_epoch(0)
    assert list(found) == ["generator/one_hot", "generator/entropy", "generator/activation", "student/kl"]
    assert list(found.values()) == pytest.approx([total / config.iterations for total in sums], rel=1e-4)
    torch.testing.assert_close(distiller.student.eval()(x).logits, student.eval()(x).logits, rtol=1e-3, atol=1e-3)
    z = torch.randn(64, config.generator.latent_dim, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(distiller.generator(z), generator(z), rtol=1e-3, atol=1e-3)
    assert (build(count).generator.train()(z) - generator(z)).abs().mean() > 1e-2, "it has not moved"


def test_the_students_loss_does_not_reach_the_generator() -> None:
    """Two students, one generator: what the student is makes no difference to it."""
    found = []
    for seed in (0, 1):
        distiller = build()
        distiller.student.load_state_dict(tiny_student(1, seed).state_dict())
        distiller.run_epoch(0)
        found.append(copy.deepcopy(distiller.generator.state_dict()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_paper_has_nats_and_the_code_digits() -> None:
    found = [build(mode=mode, iterations=1).run_epoch(0) for mode in ("paper", "code")]
    assert found[0]["generator/entropy"] == pytest.approx(math.log(10) * found[1]["generator/entropy"], rel=1e-6)
    assert found[0]["generator/one_hot"] == found[1]["generator/one_hot"]


COSINE = [0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]


@pytest.mark.parametrize(("schedule", "rates"), [("multistep", [0.1] * 3 + [0.01] * 6 + [0.001] * 3), ("cosine", COSINE), ("constant", [0.1] * 12)])
def test_steps_and_rates_of_every_epoch(schedule: str, rates: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(epochs=4, iterations=3, student_schedule=schedule, student_milestones=(1, 3))
    steps: list[tuple[str, float]] = []
    for name in ("generator", "student"):
        optimizer = getattr(distiller, f"{name}_optimizer")

        def step(name: str = name, optimizer: torch.optim.Optimizer = optimizer, real: Any = optimizer.step) -> None:
            steps.append((name, optimizer.param_groups[0]["lr"]))
            real()

        monkeypatch.setattr(optimizer, "step", step)
    assert distiller.num_epochs == 4
    for epoch in range(4):
        steps.clear()
        distiller.run_epoch(epoch)
        assert [name for name, _ in steps] == ["generator", "student"] * 3
        assert [value for _, value in steps] == pytest.approx([value for rate in rates[3 * epoch : 3 * epoch + 3] for value in (0.02, rate)])


def test_another_number_of_headers_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        build(3, heads=2).run_epoch(0)


def test_the_defaults_are_the_authors_for_cifar10() -> None:
    config = DAFLConfig()
    assert (config.epochs, config.iterations, config.batch_size) == (2000, 120, 1024)
    assert (config.one_hot_weight, config.entropy_weight, config.activation_weight) == (0.05, 5.0, 0.01)
    assert (config.generator_lr, config.student_lr, config.momentum, config.weight_decay) == (0.02, 0.1, 0.9, 5e-4)
    assert (config.mode, config.student_optimizer, config.student_milestones) == ("code", "sgd", (800, 1600))
    assert config.generator == GeneratorConfig(latent_dim=1000)


@pytest.mark.parametrize(("setting", "value"), [("epochs", 0), ("iterations", 0), ("batch_size", 1)])
def test_settings_that_cannot_work_are_errors(setting: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"method.{setting} is {value}"):
        DAFLConfig(**{setting: value})
