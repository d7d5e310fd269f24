"""DFQ against a plain reference of its game in both modes, the signs of its entropies, and its schedule."""

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
from cdfkd_strategy.methods.dfq import DFQ, DFQConfig
from cdfkd_strategy.models.generators import GeneratorConfig
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import TeacherOutputs
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "dfq test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, **changes: Any) -> DFQ:
    config = dataclasses.replace(DFQConfig.toy(), **changes)
    student = tiny_student(heads or count)
    with seeding.seeded_scope(SEED):
        return DFQ(
            teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1)
        )  # fmt: skip


def plain_bn(teacher: nn.Module, x: Tensor, mode: str) -> Tensor:
    """R_BN layer by layer through a plain sequence of modules: KL of Gaussians, or L2 norms with the first layer weighted five times."""
    layers = []
    for part in teacher:
        if isinstance(part, nn.BatchNorm2d):
            m = x.mean((0, 2, 3))
            v = ((x - m.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
            mu, sigma2 = part.running_mean, part.running_var
            if mode == "paper":
                p = torch.distributions.Normal(m, (v + part.eps).sqrt())
                layers.append(torch.distributions.kl_divergence(p, torch.distributions.Normal(mu, (sigma2 + part.eps).sqrt())).sum())
            else:
                layers.append(((m - mu) ** 2).sum().sqrt() + ((v - sigma2) ** 2).sum().sqrt())
        x = part(x)
    assert len(layers) == 2
    return layers[0] * (5 if mode == "code" else 1) + layers[1]


@pytest.mark.parametrize(("mode", "count", "heads"), [("paper", 1, 1), ("code", 3, 3), ("paper", 3, 1)])
def test_two_iterations_equal_a_plain_reference(mode: str, count: int, heads: int) -> None:
    """From the paper's symbols: H = -sum p log p, certain images and balanced classes; Nesterov's SGD and Adam are torch's."""
    weights = torch.rand(count, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    distiller = build(count, heads=heads, teachers=trained_ensemble(count, weights), iterations=2, mode=mode, alpha=0.3)
    for part in (distiller.student, distiller.generator, distiller.teachers):
        part.double()  # in place: the optimisers keep their parameters
    distiller.generator.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    w, rng = (weights / weights.sum(0)).double(), seeding.generator(SEED)
    log = torch.log if mode == "paper" else torch.log10
    generator, student = copy.deepcopy(distiller.generator).train(), copy.deepcopy(distiller.student).train()
    adam = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    descent = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def divergence(x: Tensor, t: list[Tensor]) -> Tensor:
        targets = t if heads == count else [sum(w[k] * torch.log(torch.softmax(t[k], 1)) for k in range(count))]
        total = torch.zeros(())
        for target, header in zip(targets, student(x).logits, strict=True):
            p, q = torch.softmax(target, 1), torch.softmax(header, 1)
            total = total + (p * torch.log(p / q)).sum(1).mean() / heads
        return total

    sums = [0.0] * 5
    for _ in range(2):
        for _ in range(2):
            x = generator(torch.randn(32, 16, generator=rng)).detach()
            loss = divergence(x, [teacher(x).detach() for teacher in distiller.teachers.nets])
            descent.zero_grad()
            loss.backward()
            descent.step()
            sums[0] += loss.item() / 4
        x = generator(torch.randn(32, 16, generator=rng))
        t = [teacher(x) for teacher in distiller.teachers.nets]
        adversarial = -divergence(x, t)
        bn = image = classes = torch.zeros(())
        for teacher, logits in zip(distiller.teachers.nets, t, strict=True):
            p = torch.softmax(logits, 1)
            bn = bn + 0.3 * plain_bn(teacher, x, mode) / count
            image = image + 0.3 * -(p * log(p)).sum(1).mean() / count
            classes = classes - 0.3 * -(p.mean(0) * log(p.mean(0))).sum() / count
        adam.zero_grad()
        (adversarial + bn + image + classes).backward()
        adam.step()
        sums[1:] = [total + term.item() / 2 for total, term in zip(sums[1:], (adversarial, bn, image, classes), strict=True)]
    found = distiller.run_epoch(0)
    names = ["student/kl", "generator/adversarial", "generator/bn", "generator/image_entropy", "generator/class_entropy"]
    assert found == pytest.approx(dict(zip(names, sums, strict=True)), rel=1e-4)
    torch.testing.assert_close(distiller.student.eval()(x).logits, student.eval()(x).logits, rtol=1e-3, atol=1e-3)
    z = torch.randn(64, 16, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(distiller.generator(z), generator(z), rtol=1e-3, atol=1e-3)
    assert (build(count).generator.train()(z) - generator(z)).abs().mean() > 1e-3, "it has not moved"


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_certain_and_balanced_images_are_rewarded(mode: str) -> None:
    """The intended signs, which a known re-implementation has flipped."""
    distiller = build(mode=mode)
    certain = 1000 * torch.eye(10)[None]
    unsure, one_class = torch.zeros(1, 10, 10), certain[:, :1].expand(-1, 10, -1)

    def entropies(logits: Tensor) -> tuple[float, float]:
        terms = distiller.generator_loss(torch.zeros(1, 10, 10), TeacherOutputs(logits, (None,), (torch.zeros(2),)))
        return terms["generator/image_entropy"].item(), terms["generator/class_entropy"].item()

    most = 0.1 * (math.log(10) if mode == "paper" else 1.0)
    assert entropies(certain) == pytest.approx((0.0, -most), abs=1e-6)
    assert entropies(unsure) == pytest.approx((most, -most), abs=1e-6)
    assert entropies(one_class) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_steps_and_rates_of_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(epochs=4, iterations=2, student_steps=5)
    steps: list[tuple[str, float]] = []
    for name in ("generator", "student"):
        optimizer = getattr(distiller, f"{name}_optimizer")

        def step(name: str = name, optimizer: torch.optim.Optimizer = optimizer, real: Any = optimizer.step) -> None:
            steps.append((name, optimizer.param_groups[0]["lr"]))
            real()

        monkeypatch.setattr(optimizer, "step", step)
    assert distiller.num_epochs == 4
    half = 0.5 * 2**-0.5
    for epoch, factor in enumerate((1.0, 0.5 + half, 0.5, 0.5 - half)):
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


def test_another_number_of_headers_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        build(3, heads=2).run_epoch(0)


def test_batch_norm_statistics_are_disclosed() -> None:
    assert DFQ.needs.disclosed() == ("batch_norm",)


def test_the_defaults_are_the_re_implementations_for_cifar_100() -> None:
    config = DFQConfig()
    assert (config.mode, config.epochs, config.iterations, config.student_steps, config.batch_size) == ("code", 200, 400, 5, 256)
    assert (config.alpha, config.temperature, config.generator) == (0.1, 1.0, GeneratorConfig(latent_dim=256))
    assert (config.student_lr, config.momentum, config.weight_decay, config.generator_lr) == (0.1, 0.9, 5e-4, 1e-3)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("iterations", 0), ("student_steps", 0), ("batch_size", 1), ("alpha", -1.0), ("momentum", 0.0), ("temperature", 0.0)],
)
def test_settings_that_cannot_work_are_errors(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"method.{setting} is {value}"):
        DFQConfig(**{setting: value})
