"""DFED against a plain reference of its game, with one header and with several, and its schedule."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from cdfkd_strategy import seeding
from cdfkd_strategy.engine import distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.methods.dfed import DFED, DFEDConfig
from cdfkd_strategy.models.generators import GeneratorConfig
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "dfed test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, **changes: Any) -> DFED:
    config = dataclasses.replace(DFEDConfig.toy(), **changes)
    student = tiny_student(heads or count)
    with seeding.seeded_scope(SEED):
        return DFED(
            teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1)
        )  # fmt: skip


@pytest.mark.parametrize(("count", "heads"), [(1, 1), (3, 1), (3, 3), (2, 4)])
def test_two_iterations_equal_a_plain_reference(count: int, heads: int) -> None:
    """Every header has the weighted mean of the logits for a target; the generator's gradient passes through teachers and student. SGD written out.

    In float64: the signs in the gradients of L1 norms turn rounding noise of float32 into differences of a percent.
    """
    weights = torch.rand(count, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    distiller = build(count, heads=heads, teachers=trained_ensemble(count, weights), iterations=2)
    for part in (distiller.student, distiller.generator, distiller.teachers):
        part.double()  # in place: the optimisers keep their parameters
    distiller.generator.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    w, rng = (weights / weights.sum(0)).double(), seeding.generator(SEED)
    generator, student = copy.deepcopy(distiller.generator).train(), copy.deepcopy(distiller.student).train()
    adam, momenta = torch.optim.Adam(generator.parameters(), lr=1e-3), [torch.zeros_like(p) for p in student.parameters()]

    def distance(x: torch.Tensor) -> torch.Tensor:
        target = sum(w[k] * teacher(x) for k, teacher in enumerate(distiller.teachers.nets))
        return sum((header - target).abs().sum() / target.numel() for header in student(x).logits) / heads

    def bn(x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for teacher in distiller.teachers.nets:
            layers, maps = [], x
            for part in teacher:
                if isinstance(part, nn.BatchNorm2d):
                    mean = maps.mean((0, 2, 3))
                    variance = ((maps - mean.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
                    layers.append((((mean - part.running_mean) ** 2).sum()) ** 0.5 + (((variance - part.running_var) ** 2).sum()) ** 0.5)
                maps = part(maps)
            assert len(layers) == 2
            total = total + (5 * layers[0] + layers[1]) / count
        return total

    sums = [0.0, 0.0, 0.0]
    for _ in range(2):
        for _ in range(2):
            loss = distance(generator(torch.randn(32, 16, generator=rng)).detach())
            student.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p, momentum in zip(student.parameters(), momenta, strict=True):
                    momentum.mul_(0.9).add_(p.grad + 5e-4 * p)
                    p.sub_(0.05 * momentum)
            sums[0] += loss.item() / 4
        x = generator(torch.randn(32, 16, generator=rng))
        terms = [-distance(x), 0.1 * bn(x)]
        adam.zero_grad()
        (terms[0] + terms[1]).backward()
        adam.step()
        sums[1], sums[2] = sums[1] + terms[0].item() / 2, sums[2] + terms[1].item() / 2
    found = distiller.run_epoch(0)
    assert found == pytest.approx({"student/l1": sums[0], "generator/adversarial": sums[1], "generator/bn": sums[2]}, rel=1e-6)
    for mine, theirs in zip(distiller.student.state_dict().values(), student.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    z = torch.randn(64, 16, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(distiller.generator(z), generator(z), rtol=1e-3, atol=1e-5)
    assert (build(count).generator.train()(z) - generator(z)).abs().mean() > 1e-3, "it has not moved"


@pytest.mark.parametrize(("schedule", "factors"), [("multistep", (1.0, 0.1, 0.01)), ("constant", (1.0, 1.0, 1.0))])
def test_steps_and_rates_of_every_epoch(schedule: str, factors: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(epochs=3, iterations=2, student_steps=5, milestones=(1, 2), schedule=schedule)
    steps: list[tuple[str, float]] = []
    for name in ("generator", "student"):
        optimizer = getattr(distiller, f"{name}_optimizer")

        def step(name: str = name, optimizer: torch.optim.Optimizer = optimizer, real: Any = optimizer.step) -> None:
            steps.append((name, optimizer.param_groups[0]["lr"]))
            real()

        monkeypatch.setattr(optimizer, "step", step)
    assert distiller.num_epochs == 3
    for epoch, factor in enumerate(factors):
        steps.clear()
        distiller.run_epoch(epoch)
        assert [name for name, _ in steps] == (["student"] * 5 + ["generator"]) * 2
        assert [value for _, value in steps] == pytest.approx(([0.05 * factor] * 5 + [1e-3 * factor]) * 2)


def test_a_generator_step_leaves_the_students_weights_and_gradients_alone() -> None:
    distiller = build()
    before = [parameter.detach().clone() for parameter in distiller.student.parameters()]
    distiller.generator_step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(distiller.student.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in distiller.student.parameters())


def test_teachers_without_batch_norm_leave_the_bn_term_out() -> None:
    assert set(build(teachers=trained_ensemble(1, group_norm=True)).run_epoch(0)) == {"student/l1", "generator/adversarial"}
    assert set(build(bn_weight=0.0).run_epoch(0)) == {"student/l1", "generator/adversarial"}
    assert set(build().run_epoch(0)) == {"student/l1", "generator/adversarial", "generator/bn"}


def test_the_defaults_are_the_authors_for_cifar_100_and_those_of_cdfkd_mfs() -> None:
    config = DFEDConfig()
    assert (config.epochs, config.iterations, config.student_steps, config.batch_size) == (300, 50, 5, 256)
    assert (config.bn_weight, config.first_layer_weight) == (0.1, 5.0)
    assert (config.student_lr, config.momentum, config.weight_decay, config.generator_lr) == (0.1, 0.9, 5e-4, 1e-3)
    assert (config.schedule, config.milestones, config.generator) == ("multistep", (100, 200), GeneratorConfig(latent_dim=256))


@pytest.mark.parametrize(("setting", "value"), [("epochs", 0), ("iterations", 0), ("student_steps", 0), ("batch_size", 1), ("bn_weight", -1.0)])
def test_settings_that_cannot_work_are_errors(setting: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"method.{setting} is {value}"):
        DFEDConfig(**{setting: value})


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_a_student_with_another_number_of_headers_is_distilled_and_watched(heads: int) -> None:
    """Where headers are not the teachers', the watch fuses them with equal weights."""
    teachers = trained_ensemble(3)
    student = tiny_student(heads)
    result = distill(teachers, student, "dfed", config=DFEDConfig.toy(), seed=3, engine=EngineConfig(device="cpu", progress=False))
    images = result.sample(64, seeding.generator("watch", 3, result.epochs_done - 1))
    assert images is not None
    with torch.no_grad():
        mine = student(images).logits.log_softmax(-1).mean(0).softmax(-1)
        theirs = teachers(images).log_softmax(-1).mean(0).softmax(-1)
    assert result.history[-1]["watch/student_teacher_l1"] == pytest.approx(float((mine - theirs).abs().sum(-1).mean()), rel=1e-3)
