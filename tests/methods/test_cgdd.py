"""CGDD against a plain reference of its losses and its game, its schedule, and what its epochs say about classes."""

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
from cdfkd_strategy.methods.cgdd import CGDD, CGDDConfig
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import StudentOutputs
from tests.methods.trained_teachers import DIGITS, tiny_net, tiny_student, trained_ensemble

SEED = "cgdd test"
EVERYTHING = {
    "preset_weight": 0.7, "activation_weight": 0.2, "bn_weight": 0.3, "first_layer_weight": 5.0, "balance_weight": 0.4, "adversarial_weight": 0.6,
    "temperature": 3.0, "label_weight": 0.5, "attention_weight": 20.0,
}  # fmt: skip


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, student: nn.Module | None = None, **changes: Any) -> CGDD:
    config = dataclasses.replace(CGDDConfig.toy(), **changes)
    with seeding.seeded_scope(SEED):
        return CGDD(
            teachers or trained_ensemble(count), student or tiny_student(heads or count), config,
            image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1),
        )  # fmt: skip


# -- the formulas --------------------------------------------------------------------------------------------------


def pooled(probabilities: list[Tensor], shares: Tensor) -> Tensor:
    """The weighted geometric mean of distributions ``[B, C]``."""
    product = torch.exp(sum(share * torch.log(p) for share, p in zip(shares, probabilities, strict=True)))
    return product / product.sum(dim=1, keepdim=True)


def divergence(logits: list[Tensor], targets: list[Tensor], temperature: float = 1.0) -> Tensor:
    total = 0.0
    for mine, target in zip(logits, targets, strict=True):
        p = target ** (1 / temperature) / (target ** (1 / temperature)).sum(dim=1, keepdim=True)
        q = torch.softmax(mine / temperature, dim=1)
        total = total + temperature**2 * (p * torch.log(p / q)).sum(dim=1).mean() / len(logits)
    return total


def difference(logits: list[Tensor], targets: list[Tensor]) -> Tensor:
    return sum((mine - target).abs().mean() for mine, target in zip(logits, targets, strict=True)) / len(logits)


def looks(maps: Tensor) -> Tensor:
    q = (maps**2).mean(dim=1).reshape(len(maps), -1)
    return q / (q**2).sum(dim=1, keepdim=True).sqrt()


class Plain:
    """The reconstruction, term by term, one teacher after the other, with its own student and generator."""

    def __init__(self, distiller: CGDD, shares: Tensor) -> None:
        self.config, self.shares, self.nets = distiller.config, shares, list(distiller.teachers.nets)
        self.generator, self.student = copy.deepcopy(distiller.generator).train(), copy.deepcopy(distiller.student).train()
        self.rng = seeding.generator(SEED)

    def draw(self) -> tuple[Tensor, list[int]]:
        z = torch.randn(self.config.batch_size, self.config.generator.latent_dim, generator=self.rng)
        first = int(torch.randint(10, (1,), generator=self.rng))
        labels = [(first + place) % 10 for place in range(self.config.batch_size)]
        return self.generator(z, torch.tensor(labels)), labels

    def answers(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Every teacher's distribution, what the headers are to say, and the fused ensemble."""
        logits = [net(x) for net in self.nets]
        said = [torch.softmax(one, dim=1) for one in logits]
        fused = pooled(said, self.shares)
        each = len(self.student.headers) == len(said)
        if self.config.discrepancy == "kl":
            return said, said if each else [fused], fused
        return said, logits if each else [sum(share * one for share, one in zip(self.shares, logits, strict=True))], fused

    def discrepancy(self, logits: list[Tensor], targets: list[Tensor], temperature: float = 1.0) -> Tensor:
        return divergence(logits, targets, temperature) if self.config.discrepancy == "kl" else difference(logits, targets)

    def generator_terms(self) -> dict[str, Tensor]:
        config, (x, labels) = self.config, self.draw()
        said, targets, fused = self.answers(x)
        preset = sum(-self.shares[k, y] * torch.log(p[b, y]) for k, p in enumerate(said) for b, y in enumerate(labels)) / len(labels)
        features, distances = [], []
        for net in self.nets:
            here, index = x, 0
            for part in net:
                if isinstance(part, nn.BatchNorm2d):
                    mean, variance = here.mean((0, 2, 3)), here.var((0, 2, 3), correction=0)
                    rho = config.first_layer_weight if index == 0 else 1.0
                    distances.append(rho * ((mean - part.running_mean).norm() + (variance - part.running_var).norm()))
                    index += 1
                if isinstance(part, nn.Linear):
                    features.append(here.abs().mean())
                here = part(here)
        mean = fused.mean(dim=0)
        return {
            "generator/preset": config.preset_weight * preset,
            "generator/adversarial": -config.adversarial_weight * self.discrepancy(list(self.student(x).logits), targets),
            "generator/activation": -config.activation_weight * sum(features) / len(self.nets),
            "generator/bn": config.bn_weight * sum(distances) / len(self.nets),
            "generator/balance": config.balance_weight * (mean * torch.log(mean)).sum(),
        }

    def student_terms(self) -> tuple[dict[str, Tensor], list[int], list[int]]:
        config, (x, labels) = self.config, self.draw()
        x = x.detach()
        said, targets, fused = self.answers(x)
        maps = self.student.trunk(x)
        logits = [header(maps)[0] for header in self.student.headers]
        shares = self.shares if len(logits) == len(said) else torch.ones(1, 10)
        mine, seen = pooled([torch.softmax(one, dim=1) for one in logits], shares), fused.argmax(dim=1).tolist()
        label = sum(-torch.log(mine[b, y]) for b, y in enumerate(labels) if seen[b] == y or not config.mask_labels) / len(labels)
        attention = sum(
            ((looks(one) - looks(other)) ** 2).mean() / len(self.nets) for net in self.nets for one, other in zip(maps, (net[:3](x), net[:7](x)), strict=True)
        )
        terms = {
            f"student/{config.discrepancy}": self.discrepancy(logits, targets, config.temperature),
            "student/label": config.label_weight * label,
            "student/attention": config.attention_weight * attention,
        }
        return terms, labels, seen


@pytest.mark.parametrize(("mask", "discrepancy"), [(True, "l1"), (True, "kl"), (False, "kl")])
@pytest.mark.parametrize(("count", "heads"), [(1, 1), (3, 3), (3, 1)])
def test_an_epoch_equals_a_plain_reference(count: int, heads: int, mask: bool, discrepancy: str) -> None:
    weights = torch.rand(count, DIGITS.num_classes, generator=torch.Generator().manual_seed(0)) + 0.1
    distiller = build(count, heads=heads, teachers=trained_ensemble(count, weights), generator_steps=2, mask_labels=mask, discrepancy=discrepancy, **EVERYTHING)
    plain, config = Plain(distiller, weights / weights.sum(0)), distiller.config
    optimizers = torch.optim.SGD(plain.student.parameters(), momentum=0.9, weight_decay=5e-4), torch.optim.Adam(plain.generator.parameters())
    sums: dict[str, float] = {}
    agreed, histogram = 0, [0] * 10

    def step(optimizer: torch.optim.Optimizer, terms: dict[str, Tensor], rate: float, steps: int) -> None:
        optimizer.param_groups[0]["lr"] = rate
        plain.student.zero_grad()
        plain.generator.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / (steps * config.iterations)

    for iteration in range(config.iterations):
        falling = (1 + math.cos(math.pi * iteration / (config.epochs * config.iterations))) / 2
        for _ in range(config.student_steps):
            terms, labels, seen = plain.student_terms()
            agreed += sum(y == s for y, s in zip(labels, seen, strict=True))
            for s in seen:
                histogram[s] += 1
            step(optimizers[0], terms, 0.05 * falling, config.student_steps)
        for _ in range(config.generator_steps):
            step(optimizers[1], plain.generator_terms(), 1e-3 * falling, config.generator_steps)
    images = config.iterations * config.student_steps * config.batch_size
    sums["images/label_agreement"] = agreed / images
    sums["images/class_balance"] = -sum(n / images * math.log(n / images) for n in histogram if n) / math.log(10)
    assert distiller.run_epoch(0) == pytest.approx(sums, rel=2e-2, abs=2e-3)
    x = torch.randn(16, *DIGITS.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(distiller.student.eval()(x).logits, plain.student.eval()(x).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("weight", "term"),
    [
        ("activation_weight", "generator/activation"),
        ("bn_weight", "generator/bn"),
        ("balance_weight", "generator/balance"),
        ("label_weight", "student/label"),
        ("attention_weight", "student/attention"),
    ],
)
def test_every_term_can_be_left_out(weight: str, term: str) -> None:
    full, without = build().run_epoch(0), build(**{weight: 0.0}).run_epoch(0)
    assert set(full) - set(without) == {term}


# -- the classes ---------------------------------------------------------------------------------------------------


def test_labels_are_balanced_and_drawn_from_the_generator_that_was_given() -> None:
    distiller = build()
    starts = set()
    for seed in range(20):
        _, labels = distiller._draw(24, torch.Generator().manual_seed(seed))
        counts = torch.bincount(labels, minlength=10)
        assert int(counts.max()) - int(counts.min()) == 1
        starts.add(int(labels[0]))
    assert len(starts) > 4
    before = distiller.rng.get_state()
    assert distiller.sample(5, seeding.generator("look")) is not None
    assert torch.equal(distiller.rng.get_state(), before)


def test_images_come_to_show_their_preset_classes() -> None:
    settings = {"epochs": 3, "iterations": 30, "student_steps": 1, "batch_size": 64, "generator_lr": 0.01, "bn_weight": 0.1, "attention_weight": 0.0}
    told, blind = build(**settings, preset_weight=1.0), build(**settings, preset_weight=0.0)
    rows = [told.run_epoch(epoch) for epoch in range(3)]
    assert rows[0]["images/label_agreement"] < 0.3
    assert rows[2]["images/label_agreement"] > 0.6
    assert rows[2]["images/class_balance"] > 0.9
    assert [blind.run_epoch(epoch) for epoch in range(3)][2]["images/label_agreement"] < 0.3


# -- the schedule --------------------------------------------------------------------------------------------------


def test_steps_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(epochs=2, iterations=2, student_steps=5)
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
    assert [name for name, _ in steps] == (["student"] * 5 + ["generator"]) * 4
    assert [rate for _, rate in steps] == pytest.approx([rate * factor for factor in factors for rate in [0.05] * 5 + [1e-3]])
    assert len({float(z.sum()) for z in latents}) == len(latents) == 6 * 4, "every step has a fresh batch"


# -- students, teachers and settings -------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A student that is nobody's: logits and features, and no maps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, DIGITS.num_classes)

    def forward(self, x: Tensor) -> StudentOutputs:
        return StudentOutputs(self.linear(x.flatten(1))[None], x.flatten(1)[None])


def test_a_student_without_maps_is_refused_unless_attention_is_off() -> None:
    with pytest.raises(ArchitectureError, match=r"the student Foreign gives no stage maps.*weight of 0"):
        build(student=Foreign())
    assert "student/attention" not in build(student=Foreign(), attention_weight=0.0).run_epoch(0)


def test_terms_that_no_teacher_has_are_left_out() -> None:
    with seeding.seeded_scope("bare"):
        bare = nn.Sequential(*list(tiny_net(group_norm=True))[:-2], nn.Conv2d(32, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    row = build(teachers=TeacherEnsemble([bare], image=DIGITS)).run_epoch(0)
    assert {"generator/activation", "generator/bn"}.isdisjoint(row)
    assert all(math.isfinite(value) for value in row.values())


def test_another_number_of_headers_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        build(3, heads=2).run_epoch(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator_steps": 0}, "generator_steps is 0; accepted: at least 1"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"label_weight": -0.1}, "label_weight is -0.1; accepted: at least 0"),
        ({"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_settings_that_cannot_work_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CGDDConfig(), **change)
