"""ZSKT against a plain reference of its game, its schedule, and what it asks of a student."""

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
from cdfkd_strategy.methods.zskt import ZSKT, ZSKTConfig
from cdfkd_strategy.models.generators import GeneratorConfig
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import StudentOutputs
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "zskt test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, student: nn.Module | None = None, **changes: Any) -> ZSKT:
    config = dataclasses.replace(ZSKTConfig.toy(), **changes)
    with seeding.seeded_scope(SEED):
        return ZSKT(
            teachers or trained_ensemble(count), student or tiny_student(heads or count), config,
            image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1),
        )  # fmt: skip


# -- the formulas --------------------------------------------------------------------------------------------------


def looks(maps: Tensor) -> Tensor:
    """``Q / ||Q||_2`` per image."""
    q = (maps**2).mean(dim=1).reshape(len(maps), -1)
    return q / (q**2).sum(dim=1, keepdim=True).sqrt()


def clipped(parameters: list[Tensor], most: float) -> None:
    length = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in parameters if parameter.grad is not None))
    for parameter in parameters:
        if parameter.grad is not None and length > most:
            parameter.grad *= most / length


class Plain:
    """The game as the paper writes it, with its own student and generator: softmax and log, one teacher after the other."""

    def __init__(self, distiller: ZSKT, shares: Tensor) -> None:
        self.config, self.shares = distiller.config, shares
        self.nets = list(distiller.teachers.nets)
        self.generator, self.student = copy.deepcopy(distiller.generator).train(), copy.deepcopy(distiller.student).train()
        self.rng = seeding.generator(SEED)
        self.optimizers = torch.optim.Adam(self.generator.parameters()), torch.optim.Adam(self.student.parameters())

    def kl(self, logits: list[Tensor], x: Tensor) -> Tensor:
        targets = [torch.softmax(net(x), dim=1) for net in self.nets]
        if len(logits) < len(targets):
            pooled = torch.exp(sum(share * torch.log(target) for share, target in zip(self.shares, targets, strict=True)))
            targets = [pooled / pooled.sum(dim=1, keepdim=True)]
        total = 0.0
        for mine, p in zip(logits, targets, strict=True):
            total = total + (p * torch.log(p / torch.softmax(mine, dim=1))).sum(dim=1).mean() / len(logits)
        return total / 10 if self.config.mode == "code" else total

    def attention(self, maps: list[Tensor], x: Tensor) -> Tensor:
        total = 0.0
        for net in self.nets:
            for mine, theirs in zip(maps, (net[:3](x), net[:7](x)), strict=True):
                difference = looks(mine) - looks(theirs)
                term = (difference**2).mean() if self.config.mode == "code" else (difference**2).sum(dim=1).sqrt().mean()
                total = total + term / len(self.nets)
        return self.config.attention_weight * total

    def step(self, which: int, loss: Tensor, rate: float) -> None:
        optimizer, module = self.optimizers[which], (self.generator, self.student)[which]
        optimizer.param_groups[0]["lr"] = rate
        self.generator.zero_grad()
        self.student.zero_grad()
        loss.backward()
        clipped(list(module.parameters()), self.config.max_norm)
        optimizer.step()

    def epoch(self, epoch: int) -> dict[str, float]:
        config, sums = self.config, {"generator/kl": 0.0, "student/kl": 0.0, "student/attention": 0.0}
        for iteration in range(config.iterations):
            done = (epoch * config.iterations + iteration) / (config.epochs * config.iterations)
            falling = (1 + math.cos(math.pi * done)) / 2
            z = torch.randn(config.batch_size, config.generator.latent_dim, generator=self.rng)
            for _ in range(config.generator_steps):
                x = self.generator(z)
                loss = -self.kl(list(self.student(x).logits), x)
                self.step(0, loss, 1e-3 * falling)
                sums["generator/kl"] += loss.item() / config.generator_steps
            for _ in range(config.student_steps):
                x = self.generator(z).detach()  # again in every step, as the authors do
                maps = self.student.trunk(x)
                kl = self.kl([header(maps)[0] for header in self.student.headers], x)
                attention = self.attention(maps, x)
                self.step(1, kl + attention, 2e-3 * falling)
                sums["student/kl"] += kl.item() / config.student_steps
                sums["student/attention"] += attention.item() / config.student_steps
        return {name: value / config.iterations for name, value in sums.items()}


@pytest.mark.parametrize("mode", ["code", "paper"])
@pytest.mark.parametrize(("count", "heads"), [(1, 1), (3, 3), (3, 1)])
def test_two_epochs_equal_a_plain_reference(count: int, heads: int, mode: str) -> None:
    weights = torch.rand(count, DIGITS.num_classes, generator=torch.Generator().manual_seed(0)) + 0.1
    distiller = build(count, heads=heads, teachers=trained_ensemble(count, weights), mode=mode, generator_steps=2, max_norm=0.05)
    plain = Plain(distiller, weights / weights.sum(0))
    expected = [plain.epoch(epoch) for epoch in range(2)]
    found = [distiller.run_epoch(epoch) for epoch in range(2)]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-2)
    assert found[0]["student/attention"] == pytest.approx(expected[0]["student/attention"], rel=2e-3)
    x = torch.randn(16, *DIGITS.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(distiller.student.eval()(x).logits, plain.student.eval()(x).logits, rtol=2e-2, atol=2e-2)


def test_the_clip_is_in_the_game() -> None:
    free, held = build(max_norm=1e9), build(max_norm=1e-9)
    before = copy.deepcopy(held.student.state_dict())
    for distiller in (free, held):
        distiller.run_epoch(0)

    def moved(distiller: ZSKT) -> float:
        return max(float((value.detach() - before[name]).abs().max()) for name, value in distiller.student.named_parameters())

    assert moved(free) > 1e-3
    assert moved(held) < moved(free) / 2  # Adam divides by the gradient's size; its 1e-8 does not shrink


# -- the schedule --------------------------------------------------------------------------------------------------


def test_steps_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(epochs=2, iterations=2, generator_steps=1, student_steps=10)
    steps: list[tuple[str, float]] = []
    latents: list[Tensor] = []
    for name in ("generator", "student"):
        optimizer = getattr(distiller, f"{name}_optimizer")

        def step(name: str = name, optimizer: torch.optim.Optimizer = optimizer, real: Any = optimizer.step) -> None:
            steps.append((name, optimizer.param_groups[0]["lr"]))
            real()

        monkeypatch.setattr(optimizer, "step", step)
    distiller.generator.register_forward_pre_hook(lambda module, inputs: latents.append(inputs[0]))
    for epoch in range(distiller.num_epochs):
        distiller.run_epoch(epoch)
    factors = [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert [name for name, _ in steps] == (["generator"] + ["student"] * 10) * 4
    assert [rate for _, rate in steps] == pytest.approx([rate * factor for factor in factors for rate in [1e-3] + [2e-3] * 10])
    assert len(latents) == 2 * 4
    assert all(torch.equal(first, second) for first, second in zip(latents[::2], latents[1::2], strict=True)), "the student sees the same z"
    assert not torch.equal(latents[0], latents[2])


def test_teachers_are_asked_once_per_latent_batch_of_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, bool]] = []
    observe = TeacherEnsemble.observe
    monkeypatch.setattr(TeacherEnsemble, "observe", lambda self, images, **options: asked.append(options) or observe(self, images, **options))
    for weight in (250.0, 0.0):
        asked.clear()
        row = build(attention_weight=weight, iterations=2, student_steps=3).run_epoch(0)
        assert asked == [{"bn": False, "maps": weight > 0}] * 2
        assert ("student/attention" in row) is (weight > 0)


# -- students, teachers and settings -------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A student that is nobody's: logits and features, and no maps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, DIGITS.num_classes)

    def forward(self, x: Tensor) -> StudentOutputs:
        features = x.flatten(1)
        return StudentOutputs(self.linear(features)[None], features[None])


def test_a_student_without_maps_is_refused_unless_attention_is_off() -> None:
    with pytest.raises(ArchitectureError, match=r"the student Foreign gives no stage maps.*weight of 0"):
        build(student=Foreign())
    distiller = build(student=Foreign(), attention_weight=0.0)
    before = distiller.student.linear.weight.detach().clone()
    assert set(distiller.run_epoch(0)) == {"generator/kl", "student/kl"}
    assert not torch.equal(distiller.student.linear.weight, before)


def test_a_teacher_without_maps_is_left_out_of_attention() -> None:
    class Branching(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.mean() < 100 else self.net(-x)

    nets = list(trained_ensemble(2).nets)
    both, one = (
        build(2, teachers=TeacherEnsemble([nets[0], other], image=DIGITS), iterations=1, student_steps=1)
        for other in (copy.deepcopy(nets[0]), Branching(copy.deepcopy(nets[0])))
    )
    rows = [distiller.run_epoch(0) for distiller in (both, one)]
    assert rows[0]["student/attention"] == pytest.approx(rows[1]["student/attention"], rel=1e-5)
    none = build(teachers=TeacherEnsemble([Branching(nets[0])], image=DIGITS))
    assert none.run_epoch(0)["student/attention"] == 0


def test_students_of_other_resolutions_learn_too() -> None:
    with seeding.seeded_scope("other resolutions"):
        student = MultiHeaderStudent("resnet8", 1, DIGITS)
    assert build(student=student).run_epoch(0)["student/attention"] > 0


def test_another_number_of_headers_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        build(3, heads=2).run_epoch(0)


def test_nothing_beyond_the_weights_is_disclosed() -> None:
    assert ZSKT.needs.disclosed() == ()


def test_the_defaults_are_the_authors_for_cifar10() -> None:
    config = ZSKTConfig()
    assert config.epochs * config.iterations == 80_000
    assert (config.generator_steps, config.student_steps, config.batch_size, config.attention_weight) == (1, 10, 128, 250.0)
    assert (config.generator_lr, config.student_lr, config.max_norm, config.mode) == (1e-3, 2e-3, 5.0, "code")
    assert config.generator == GeneratorConfig(latent_dim=100, output="affine_norm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_steps": 0}, "student_steps is 0; accepted: at least 1"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"attention_weight": -1.0}, "attention_weight is -1"),
        ({"max_norm": 0.0}, "max_norm is 0"),
    ],
)
def test_settings_that_cannot_work_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ZSKTConfig(), **change)
