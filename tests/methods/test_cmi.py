"""CMI: a round against a plain reference, the bank, the schedule, and teachers without stages."""

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
from cdfkd_strategy.methods.cmi import CMI, CMIConfig
from cdfkd_strategy.models.generators import build_generator
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.step_counter import GENERATOR_STEPS, StepCounter
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "cmi test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, **changes: Any) -> CMI:
    config = dataclasses.replace(CMIConfig.toy(), **changes)
    student = tiny_student(heads or count)
    with seeding.seeded_scope(SEED):
        return CMI(
            teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1)
        )  # fmt: skip


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """``sum_c p ln(p / q)`` of every image; logits ``[B, C]``."""
    p, q = torch.softmax(teacher, dim=1), torch.softmax(student, dim=1)
    return (p * torch.log(p / q)).sum(dim=1)


def look(net: nn.Module, images: Tensor, first_layer_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, R_BN and the means of both stages (what comes before each of the two poolings) of a plain sequence of modules."""
    bn, means, layers, x = torch.zeros(()), [], 0, images
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            rows = x.transpose(0, 1).flatten(1)
            mean, variance = rows.mean(1), ((rows - rows.mean(1, keepdim=True)) ** 2).mean(1)
            bn = bn + (first_layer_weight if layers == 0 else 1.0) * (torch.norm(mean - module.running_mean) + torch.norm(variance - module.running_var))
            layers += 1
        if isinstance(module, nn.MaxPool2d):
            means.append(x.flatten(2).mean(2))
        x = module(x)
    return x, bn, torch.cat(means, dim=1)


class Plain:
    """The authors' algorithm for K teachers; the bank never overflows and is never sampled, but taken whole."""

    def __init__(self, distiller: CMI, weights: Tensor) -> None:
        self.config, self.weights, self.nets = distiller.config, weights, list(distiller.teachers.nets)
        self.student, self.head, self.rng = copy.deepcopy(distiller.student).eval(), copy.deepcopy(distiller.head), seeding.generator(SEED)
        self.views = RandomViews(DIGITS, "crop", 1, self.rng)
        self.head_adam = torch.optim.Adam(self.head.parameters(), lr=0.01)
        self.bank: list[Tensor] = []

    def contrast(self, local: Tensor, whole: Tensor) -> Tensor:
        """Row by row: the query is a local view, its key the global view of the same image."""
        torch.randperm(sum(map(len, self.bank)), generator=self.rng)  # the bank is drawn in another order, which does not matter
        known = torch.cat(self.bank) if self.bank else torch.zeros(0, 2 * local.shape[1])
        queries = self.head(torch.cat([local, known[:, : local.shape[1]]]))
        keys = self.head(torch.cat([whole, known[:, local.shape[1] :]])).detach()
        losses = []
        for i, query in enumerate(queries):
            scores = torch.exp((keys * query).sum(1) / 0.1)
            losses.append(-torch.log(scores[i] / scores.sum()))
        now, past = losses[: len(local)], losses[len(local) :]
        return torch.stack(now).mean() + (torch.stack(past).mean() if past else 0.0)

    def terms(self, images: Tensor, labels: Tensor, adversarial: bool) -> tuple[list[Tensor], Tensor]:
        x = self.views.crop(images)
        seen = [look(net, x, 2.0) for net in self.nets]
        bn = sum(one[1] for one in seen) / len(seen)
        entropy = disagreement = torch.zeros(())
        for k, (logits, _, _) in enumerate(seen):
            for b, y in enumerate(labels.tolist()):
                entropy = entropy - self.weights[k, y] * torch.log(torch.softmax(logits[b], dim=0)[y]) / len(x)
        if adversarial:
            for mine, (theirs, _, _) in zip(self.student(x).logits, seen, strict=True):
                disagreement = disagreement + ((mine.argmax(1) == theirs.argmax(1)) * kl(theirs, mine)).mean() / len(seen)
        part = self.views.zoom(images, 0.25)
        local, whole = torch.cat([look(net, part, 1.0)[2] for net in self.nets], dim=1), torch.cat([one[2] for one in seen], dim=1)
        found = [0.3 * bn, 0.5 * entropy, -0.5 * disagreement, 0.8 * self.contrast(local, whole)]
        return found if adversarial else [*found[:2], found[3]], torch.cat([local, whole], dim=1)

    def round(self, adversarial: bool) -> tuple[list[float], Tensor]:
        with seeding.seeded_scope("cmi", int(torch.randint(2**62, (1,), generator=self.rng))):
            generator = build_generator(DIGITS, self.config.generator).train()
        labels = torch.randint(10, (12,), generator=self.rng)
        z = torch.randn(12, 16, generator=self.rng).requires_grad_()
        adam = torch.optim.Adam([*generator.parameters(), z], lr=0.01, betas=(0.5, 0.999))
        best, kept = float("inf"), ([], torch.empty(()), torch.empty(()))
        for _ in range(self.config.inversion_steps):
            images = generator(z)
            terms, features = self.terms(images, labels, adversarial)
            loss = sum(terms)
            if loss.item() < best:
                best, kept = loss.item(), ([term.item() for term in terms], images.detach().clone(), features.detach().clone())
            for optimizer in (adam, self.head_adam):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in (adam, self.head_adam):
                optimizer.step()
        self.bank.append(kept[2])
        return kept[0], kept[1]


def test_rounds_equal_a_plain_reference() -> None:
    """Three rounds: an empty bank without an opponent, and a filled one with it. Losses, the best images, their features, and the head."""
    weights = torch.rand(2, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    weights = weights / weights.sum(0)
    distiller = build(
        2, teachers=trained_ensemble(2, weights), inversion_steps=3, synthesis_batch=12, bank_size=99, negatives=99, first_layer_weight=2.0, bn_weight=0.3
    )
    plain = Plain(distiller, weights)
    for adversarial in (False, True, True):
        found = distiller._invert(adversarial=adversarial)
        terms, images = plain.round(adversarial)
        assert list(found.values()) == pytest.approx(terms, rel=1e-2)
        assert (distiller.pool.pixels[-12:].int() - (DIGITS.to_pixels(images) * 255).round().int()).abs().max() <= 2
        torch.testing.assert_close(distiller.bank.state_dict()["rows"][-12:], plain.bank[-1], rtol=1e-2, atol=1e-2)
    features = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(distiller.head(features), plain.head(features), rtol=2e-2, atol=2e-2)


def test_every_round_has_a_new_generator_and_the_head_stays() -> None:
    distiller = build(generator_lr=1e-9)
    head = copy.deepcopy(distiller.head.state_dict())
    found = []
    for epoch in range(2):
        distiller.run_epoch(epoch)
        found.append(distiller.generator.project.weight.clone())
    assert (found[0] - found[1]).abs().max() > 0.1
    torch.testing.assert_close(dict(distiller.head.state_dict()), head)


def test_bank_and_negatives_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(bank_size=40, negatives=10, pre_rounds=3)
    counts: list[int] = []

    def watched(count: int, rng: torch.Generator, draw: Any = distiller.bank.draw) -> Tensor:
        rows = draw(count, rng)
        counts.append(len(rows))
        return rows

    monkeypatch.setattr(distiller.bank, "draw", watched)
    for epoch, (held, drawn) in enumerate(((32, 0), (40, 10), (40, 10))):
        counts.clear()
        distiller.run_epoch(epoch)
        assert set(counts) == {drawn}
        assert len(distiller.bank) == held


def test_without_weight_there_is_no_local_view_and_no_step_of_the_head() -> None:
    distiller = build(contrastive_weight=0.0)
    with StepCounter(distiller.student).counting() as steps:
        assert list(distiller.run_epoch(0)) == ["images/bn", "images/cross_entropy"]
    assert steps[GENERATOR_STEPS] == distiller.config.inversion_steps
    assert len(distiller.bank) == 0


def test_the_student_does_not_change_while_images_are_made() -> None:
    distiller = build()
    before = state_hash(distiller.student.state_dict())
    distiller.student.train()
    distiller._invert(adversarial=True)
    assert state_hash(distiller.student.state_dict()) == before
    assert distiller.student.training
    assert all(parameter.grad is None for parameter in distiller.student.parameters())


# -- the schedule --------------------------------------------------------------------------------------------------


def test_steps_rates_and_pool_of_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(pre_rounds=2, rounds=3, inversion_steps=4, synthesis_batch=20, pool_size=90, student_steps=3, student_milestones=(1, 2), student_lr=0.1)
    losses: list[bool] = []
    steps: list[tuple[str, float]] = []
    image_loss = distiller.image_loss
    monkeypatch.setattr(distiller, "image_loss", lambda *given, adversarial: (losses.append(adversarial), image_loss(*given, adversarial=adversarial))[1])
    for name in ("head", "student"):
        optimizer = getattr(distiller, f"{name}_optimizer")

        def step(name: str = name, optimizer: torch.optim.Optimizer = optimizer, real: Any = optimizer.step) -> None:
            steps.append((name, optimizer.param_groups[0]["lr"]))
            real()

        monkeypatch.setattr(optimizer, "step", step)
    assert distiller.num_epochs == 5
    for epoch, stored in enumerate((20, 40, 60, 80, 90)):
        losses.clear()
        steps.clear()
        distiller.run_epoch(epoch)
        assert losses == [epoch >= 2] * 4
        assert len(distiller.pool) == stored
        assert [name for name, _ in steps] == ["head"] * 4 + ["student"] * 3 * (epoch >= 2)
        assert [rate for name, rate in steps if name == "student"] == pytest.approx([0.1 ** (epoch - 1)] * 3 * (epoch >= 2))


# -- students, teachers and settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2])
def test_students_with_one_header_learn_the_fused_ensemble_and_two_for_three_are_an_error(heads: int) -> None:
    distiller = build(3, heads=heads)
    if heads == 1:
        assert distiller._invert(adversarial=True)["images/adversarial"] <= 0
        return
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        distiller._invert(adversarial=True)


class Untraceable(nn.Module):
    """Its control flow depends on values, so that its stages cannot be found."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() < 1e9 else self.net(-x)


def test_teachers_without_stages_are_left_out_and_alone_an_error() -> None:
    traced, other = trained_ensemble(2).nets
    mixed = build(2, teachers=TeacherEnsemble([traced, Untraceable(other)], image=DIGITS))
    assert mixed.head.layers[0].in_features == 16 + 32
    assert "images/contrastive" in mixed.run_epoch(0)
    alone = TeacherEnsemble([Untraceable(other)], image=DIGITS)
    with pytest.raises(ArchitectureError, match=r"no teacher has stage maps.*contrastive_weight=0"):
        build(teachers=alone)
    assert build(teachers=alone, contrastive_weight=0.0).run_epoch(0)


def test_batch_norm_statistics_are_disclosed_and_needed() -> None:
    assert CMI.needs.disclosed() == ("batch_norm",)
    with pytest.raises(NeedsError, match="BatchNorm running statistics"):
        build(teachers=trained_ensemble(1, group_norm=True))


def test_the_defaults_are_the_authors_for_cifar10() -> None:
    config = CMIConfig()
    assert (config.bn_weight, config.label_weight, config.adversarial_weight, config.contrastive_weight) == (1.0, 0.5, 0.5, 0.8)
    assert (config.contrastive_temperature, config.bank_size, config.negatives, config.head_width) == (0.1, 40_960, 4096, 256)
    assert (config.rounds, config.inversion_steps, config.synthesis_batch, config.generator_lr) == (40, 200, 256, 1e-3)
    assert (config.student_steps, config.batch_size, config.student_lr, config.student_milestones, config.temperature) == (2000, 128, 0.1, (25, 30, 35), 20.0)
    assert config.pre_rounds * config.synthesis_batch >= 50_000
    assert (config.generator.output, config.generator.batch_norm_eps) == ("sigmoid", 1e-5)
    assert (config.pre_rounds + config.rounds) * config.synthesis_batch <= config.pool_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"synthesis_batch": 1}, "synthesis_batch is 1"),
        ({"negatives": -1}, "negatives is -1"),
        ({"contrastive_temperature": 0.0}, "contrastive_temperature is 0"),
        ({"least_area": 0.0}, "least_area is 0.0; accepted: above 0 and at most 1"),
    ],
)
def test_settings_that_cannot_work_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CMIConfig(), **change)
