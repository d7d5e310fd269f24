"""FastDFKD: a whole round against a plain reference, the average of statistics over rounds, the schedule, and the reset."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdfkd_strategy import seeding
from cdfkd_strategy.data.augmentation import RandomViews
from cdfkd_strategy.errors import ArchitectureError, ConfigError, NeedsError
from cdfkd_strategy.methods.fast_dfkd import FastDFKD, FastDFKDConfig
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "fast dfkd test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, **changes: Any) -> FastDFKD:
    config = dataclasses.replace(FastDFKDConfig.toy(), **changes)
    student = tiny_student(heads or count)
    with seeding.seeded_scope(SEED):
        return FastDFKD(
            teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1)
        )  # fmt: skip


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 sum_c p ln(p / q)`` of every image; logits ``[B, C]``."""
    p, q = torch.softmax(teacher / temperature, dim=1), torch.softmax(student / temperature, dim=1)
    return temperature**2 * (p * torch.log(p / q)).sum(dim=1)


def moments(net: nn.Module, images: Tensor) -> list[tuple[nn.BatchNorm2d, Tensor, Tensor]]:
    """Mean and variance of what every BatchNorm layer of a plain sequence of modules gets."""
    found, x = [], images
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            rows = x.transpose(0, 1).flatten(1)
            mean = rows.mean(1)
            found.append((module, mean, ((rows - mean[:, None]) ** 2).mean(1)))
        x = module(x)
    return found


# -- a round -------------------------------------------------------------------------------------------------------


class Plain:
    """The authors' algorithm, step by step, for K teachers."""

    def __init__(self, distiller: FastDFKD, weights: Tensor) -> None:
        self.config, self.weights = distiller.config, weights
        self.nets, self.student = list(distiller.teachers.nets), copy.deepcopy(distiller.student).eval()
        self.generator, self.rng = copy.deepcopy(distiller.generator), seeding.generator(SEED)
        self.views = RandomViews(DIGITS, "crop", self.config.padding, self.rng)
        self.adam = torch.optim.Adam(self.generator.parameters(), lr=2e-3 * self.config.inner_steps, betas=(0.5, 0.999))
        self.average: list[list[tuple[Tensor, Tensor]]] | None = None

    def targets(self, x: Tensor, heads: int) -> list[Tensor]:
        logits = [net(x) for net in self.nets]
        if heads > 1:
            return logits
        pooled = sum(share * torch.log(torch.softmax(one, dim=1)) for share, one in zip(self.weights, logits, strict=True))
        return [torch.log(torch.softmax(pooled, dim=1))]

    def terms(self, x: Tensor, labels: Tensor, adversarial: bool) -> list[Tensor]:
        bn = entropy = disagreement = torch.zeros(())
        self.latest = [moments(net, x) for net in self.nets]
        for k, layers in enumerate(self.latest):
            for at, (norm, *latest) in enumerate(layers):
                old = latest if self.average is None else self.average[k][at]
                mean, variance = (0.1 * new + 0.9 * before for new, before in zip(latest, old, strict=True))
                rho = self.config.first_layer_weight if at == 0 else 1.0
                bn = bn + rho * (torch.norm(mean - norm.running_mean) + torch.norm(variance - norm.running_var)) / len(self.nets)
            p = torch.softmax(self.nets[k](x), dim=1)
            for b, y in enumerate(labels.tolist()):
                entropy = entropy - self.weights[k, y] * torch.log(p[b, y]) / len(x)
        logits = self.student(x).logits
        for mine, theirs in zip(logits, self.targets(x, len(logits)), strict=True):
            agree = (mine.argmax(1) == theirs.argmax(1)).double()
            disagreement = disagreement + (agree * kl(theirs, mine)).mean() / len(logits)
        found = [10 * bn, 0.5 * entropy, -1.33 * disagreement]
        return found if adversarial else found[:2]

    def round(self, adversarial: bool) -> tuple[list[float], Tensor]:
        labels = torch.randint(10, (self.config.synthesis_batch,), generator=self.rng)
        z = torch.randn(self.config.synthesis_batch, 16, generator=self.rng).requires_grad_()
        copied = copy.deepcopy(self.generator).train()
        adam = torch.optim.Adam([{"params": copied.parameters()}, {"params": [z], "lr": 0.01}], lr=2e-3, betas=(0.5, 0.999))
        sums = [torch.zeros_like(parameter) for parameter in copied.parameters()]
        best, kept = float("inf"), ([], torch.empty(()))
        for _ in range(self.config.inner_steps):
            images = copied(z)
            terms = self.terms(self.views.crop(images), labels, adversarial)
            loss = sum(terms)
            if loss.item() < best:
                best, kept = loss.item(), ([term.item() for term in terms], images.detach().clone())
            adam.zero_grad()
            loss.backward()
            sums = [total + parameter.grad for total, parameter in zip(sums, copied.parameters(), strict=True)]
            adam.step()
        for parameter, total in zip(self.generator.parameters(), sums, strict=True):
            parameter.grad = total
        self.adam.step()
        latest = [[(mean.detach(), variance.detach()) for _, mean, variance in layers] for layers in self.latest]
        if self.average is not None:
            latest = [
                [(0.9 * a + 0.1 * mean, 0.9 * b + 0.1 * variance) for (a, b), (mean, variance) in zip(old, new, strict=True)]
                for old, new in zip(self.average, latest, strict=True)
            ]
        self.average = latest
        return kept


@pytest.mark.parametrize("heads", [3, 1])
def test_rounds_equal_a_plain_reference(heads: int) -> None:
    """Three rounds, of which the first has no average yet and no opponent: losses, the best images, and where the meta-generator goes."""
    weights = torch.rand(3, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    weights = weights / weights.sum(0)
    distiller = build(3, heads=heads, teachers=trained_ensemble(3, weights), inner_steps=6, synthesis_batch=24, first_layer_weight=2.0)
    plain = Plain(distiller, weights)
    z = torch.randn(24, 16, generator=torch.Generator().manual_seed(7))
    for adversarial in (False, True, True):
        found = distiller._synthesise(adversarial=adversarial)
        terms, images = plain.round(adversarial)
        assert list(found.values()) == pytest.approx(terms, rel=1e-2)
        assert (distiller.pool.pixels[-24:].int() - (DIGITS.to_pixels(images) * 255).round().int()).abs().max() <= 2
        torch.testing.assert_close(distiller.generator(z), plain.generator(z), rtol=2e-2, atol=2e-2)


def test_the_student_does_not_change_while_images_are_made() -> None:
    distiller = build()
    before = state_hash(distiller.student.state_dict())
    distiller.student.train()
    distiller._synthesise(adversarial=True)
    assert state_hash(distiller.student.state_dict()) == before  # its BatchNorm statistics too
    assert distiller.student.training
    assert all(parameter.grad is None for parameter in distiller.student.parameters())


def test_without_weight_there_is_no_adversarial_term() -> None:
    assert list(build(adversarial_weight=0.0)._synthesise(adversarial=True)) == ["images/bn", "images/cross_entropy"]


# -- the student ---------------------------------------------------------------------------------------------------


def test_the_student_learns_views_of_the_pool_of_which_the_teachers_are_asked() -> None:
    distiller = build(3, student_steps=4)
    distiller.run_epoch(0)
    student, rng = copy.deepcopy(distiller.student).train(), torch.Generator()
    rng.set_state(distiller.rng.get_state())
    views = RandomViews(DIGITS, "crop", 1, rng)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    total = 0.0
    for _ in range(4):
        x = views.crop(distiller.pool.draw(32, rng))
        loss = sum(kl(net(x), mine, 20.0).mean() for net, mine in zip(distiller.teachers.nets, student(x).logits, strict=True)) / 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() / 4
    assert distiller.distillation.epoch(4) == pytest.approx(total, rel=1e-3)
    torch.testing.assert_close(dict(distiller.student.state_dict()), dict(student.state_dict()), rtol=1e-3, atol=1e-4)


# -- the schedule --------------------------------------------------------------------------------------------------


def test_steps_rates_and_pool_of_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(epochs=5, warm_up=1, reset_epoch=3, inner_steps=4, synthesis_batch=20, pool_size=70, student_steps=3, student_lr=0.2)
    losses: list[bool] = []
    steps: list[tuple[str, float]] = []
    image_loss, reset = distiller.image_loss, distiller._reset_first_layer

    def watched(images: Tensor, *others: Any, adversarial: bool) -> Any:
        losses.append(adversarial)
        return image_loss(images, *others, adversarial=adversarial)

    for name in ("generator", "student"):
        optimizer = getattr(distiller, f"{name}_optimizer")

        def step(name: str = name, optimizer: torch.optim.Optimizer = optimizer, real: Any = optimizer.step) -> None:
            steps.append((name, optimizer.param_groups[0]["lr"]))
            real()

        monkeypatch.setattr(optimizer, "step", step)
    monkeypatch.setattr(distiller, "image_loss", watched)
    monkeypatch.setattr(distiller, "_reset_first_layer", lambda: (steps.append(("reset", 0.0)), reset())[0])
    assert distiller.num_epochs == 5
    cosine = [0.2, 0.1708, 0.1001, 0.02946]  # from .2 to 2e-4 over four epochs
    for epoch, stored in enumerate((20, 40, 60, 70, 70)):
        losses.clear()
        steps.clear()
        terms = distiller.run_epoch(epoch)
        assert losses == [epoch >= 1] * 4
        assert len(distiller.pool) == stored
        expected = ["reset"] * (epoch == 3) + ["generator"] + ["student"] * 3 * (epoch >= 1)
        assert [name for name, _ in steps] == expected
        assert [rate for name, rate in steps if name == "generator"] == pytest.approx([4 * 3e-3])
        assert [rate for name, rate in steps if name == "student"] == pytest.approx([cosine[epoch - 1]] * 3 * (epoch >= 1), rel=1e-3)
        assert ("student/kl" in terms) == (epoch >= 1)


def test_the_reset_draws_the_first_layer_anew_and_nothing_else() -> None:
    distiller = build(generator=dataclasses.replace(FastDFKDConfig.toy().generator, width=1.0))
    before = copy.deepcopy(distiller.generator.state_dict())
    distiller._reset_first_layer()
    after = distiller.generator.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"project.weight", "project.bias", "body.0.weight"}  # the norm's bias was zero before
    assert after["project.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert after["project.weight"].mean().abs() < 1e-3
    assert not after["project.bias"].any()
    assert after["body.0.weight"].mean().item() == pytest.approx(1.0, abs=0.01)


def test_samples_are_images_of_the_pool() -> None:
    distiller = build()
    assert distiller.sample(4, seeding.generator("look")) is None
    distiller.run_epoch(0)
    samples = distiller.sample(4, seeding.generator("look"))
    assert all(any(torch.equal(sample, image) for image in distiller.pool.at(torch.arange(len(distiller.pool)))) for sample in samples)


# -- students and settings -----------------------------------------------------------------------------------------


def test_another_number_of_headers_is_an_error() -> None:
    distiller = build(3, heads=2)
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        distiller._synthesise(adversarial=True)


def test_batch_norm_statistics_are_disclosed_and_needed() -> None:
    assert FastDFKD.needs.disclosed() == ("batch_norm",)
    with pytest.raises(NeedsError, match="BatchNorm running statistics"):
        build(teachers=trained_ensemble(1, group_norm=True))


def test_the_defaults_are_the_authors_for_cifar() -> None:
    config = FastDFKDConfig()
    assert (config.bn_weight, config.label_weight, config.adversarial_weight, config.statistics_momentum) == (10.0, 0.5, 1.33, 0.9)
    assert (config.epochs, config.warm_up, config.reset_epoch, config.student_steps, config.batch_size) == (220, 20, 140, 400, 256)
    assert (config.student_lr, config.weight_decay, config.temperature) == (0.2, 1e-4, 20.0)
    assert config.epochs * config.synthesis_batch <= config.pool_size
    assert (config.generator.output, config.generator.batch_norm_eps) == ("sigmoid", 1e-5)
    assert [FastDFKDConfig(inner_steps=k).rates for k in (2, 5, 10, 50)] == [(5e-3, 0.015), (3e-3, 0.01), (2e-3, 0.01), (2e-3, 0.01)]
    assert FastDFKDConfig(generator_lr=0.1, latent_lr=0.2).rates == (0.1, 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_steps": 0}, "inner_steps is 0"),
        ({"synthesis_batch": 1}, "synthesis_batch is 1"),
        ({"warm_up": 220}, r"warm_up is 220; accepted: at least 0 and below method.epochs \(220\)"),
        ({"statistics_momentum": 1.0}, "statistics_momentum is 1.0"),
        ({"padding": -1}, "padding is -1"),
        ({"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_settings_that_cannot_work_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(FastDFKDConfig(), **change)
