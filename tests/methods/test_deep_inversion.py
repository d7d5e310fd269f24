"""DeepInversion: its loss against a plain reference, the pool, the best images, and the schedule of its two stages."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdfkd_strategy import pool_distillation, seeding
from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.methods.deep_inversion import DeepInversion, DeepInversionConfig
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "deep inversion test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, **changes: Any) -> DeepInversion:
    config = dataclasses.replace(DeepInversionConfig.toy(), **{"augment": "none", **changes})
    student = tiny_student(heads or count)
    with seeding.seeded_scope(SEED):
        return DeepInversion(
            teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1)
        )  # fmt: skip


# -- stage (a): the loss -------------------------------------------------------------------------------------------


def plain_bn(net: nn.Module, images: Tensor, first_layer_weight: float) -> Tensor:
    """R_BN layer by layer through a plain sequence of modules."""
    total, layers, x = torch.zeros(()), 0, images
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            mean = x.mean(dim=(0, 2, 3))
            variance = ((x - mean.view(1, -1, 1, 1)) ** 2).mean(dim=(0, 2, 3))
            distance = ((mean - module.running_mean) ** 2).sum().sqrt() + ((variance - module.running_var) ** 2).sum().sqrt()
            total = total + distance * (first_layer_weight if layers == 0 else 1.0)
            layers += 1
        x = module(x)
    assert layers == 2
    return total


def test_image_loss_equals_a_plain_reference() -> None:
    weights = torch.rand(3, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    weights = weights / weights.sum(0)
    distiller = build(teachers=trained_ensemble(3, weights), heads=3, tv_weight=0.3, l2_weight=0.2, bn_weight=7.0, first_layer_weight=4.0)
    images = torch.randn(12, *DIGITS.shape, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 10
    cross_entropy = 0.0
    for b, y in enumerate(labels.tolist()):
        for k, net in enumerate(distiller.teachers.nets):
            cross_entropy -= float(weights[k, y] * torch.log(torch.softmax(net(images), dim=1)[b, y])) / 12
    variation = sum(
        float(((images[:, :, a:, b:] - images[:, :, : 8 - a, : 8 - b]) ** 2).sum().sqrt()) for a, b in ((0, 1), (1, 0), (1, 1))
    ) + float(((images[:, :, 1:, :-1] - images[:, :, :-1, 1:]) ** 2).sum().sqrt())  # fmt: skip
    expected = {
        "images/cross_entropy": cross_entropy,
        "images/total_variation": 0.3 * variation,
        "images/l2": 0.2 * sum(float((image**2).sum().sqrt()) for image in images) / 12,
        "images/bn": 7.0 * sum(float(plain_bn(net, images, 4.0)) for net in distiller.teachers.nets) / 3,
    }
    mine = {name: float(value) for name, value in distiller.image_loss(images, labels).items()}
    assert mine == pytest.approx(expected, rel=1e-4)


def test_labels_are_balanced_over_the_rounds() -> None:
    distiller = build(image_batch=7)
    labels = [int(label) for epoch in range(10) for label in distiller.labels(epoch)]
    assert set(Counter(labels).values()) == {7}


def test_the_teacher_sees_the_preset_classes_in_the_pool() -> None:
    distiller = build(rounds=1, image_steps=50, image_batch=50, image_lr=0.2, bn_weight=0.3, pool_size=50)
    first = float(sum(distiller.image_loss(torch.randn(50, *DIGITS.shape, generator=seeding.generator(SEED)), distiller.labels(0)).values()))
    best = distiller.run_epoch(0)
    assert sum(best.values()) < first / 2
    seen = distiller.teachers(DIGITS.normalise(distiller.pool.pixels.float() / 255))[0].argmax(-1)
    assert (seen == distiller.labels(0)).double().mean() > 0.9


# -- stage (a): the best images ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("losses", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([3.0, math.nan, 2.0], 2), ([2.0, 2.0, 2.0], 0)])
def test_the_images_of_the_lowest_loss_are_kept_as_they_were(losses: list[float], best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images go on changing in place: a reference to the best ones would end up as the last ones."""
    distiller = build(image_steps=3, jitter=0)
    seen: list[Tensor] = []

    def scripted(images: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        value = losses[len(seen)]
        seen.append(images.detach().clone())
        return {"images/half": value / 2 + 0 * images.sum(), "images/moving": value / 2 + images.sum() - images.sum().detach()}

    monkeypatch.setattr(distiller, "image_loss", scripted)
    terms = distiller.run_epoch(0)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(distiller.pool.pixels, (DIGITS.to_pixels(seen[best]) * 255).round().to(torch.uint8))
    assert list(terms.values()) == [losses[best] / 2] * 2


def test_jitter_moves_what_the_teachers_see_and_not_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(image_steps=8, jitter=1, image_lr=1e-12)
    seen: list[Tensor] = []

    def scripted(images: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        seen.append((DIGITS.to_pixels(images.detach()) * 255).round().to(torch.uint8))
        return {"images/any": images.sum()}

    monkeypatch.setattr(distiller, "image_loss", scripted)
    distiller.run_epoch(0)
    rolled = [distiller.pool.pixels.roll((down, right), (2, 3)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    places = [[torch.equal(images, candidate) for candidate in rolled].index(True) for images in seen]
    assert len(set(places)) > 2


@pytest.mark.parametrize("clip", [True, False])
def test_with_clipping_the_images_of_the_pool_are_those_that_were_optimised(clip: bool) -> None:
    distiller = build(rounds=1, image_steps=30, image_batch=30, image_lr=0.2, pool_size=30, jitter=0, clip=clip)
    told = distiller.run_epoch(0)
    images = DIGITS.normalise(distiller.pool.pixels.float() / 255)
    stored = {name: float(value) for name, value in distiller.image_loss(images, distiller.labels(0)).items()}
    assert (stored["images/bn"] == pytest.approx(told["images/bn"], rel=0.02)) is clip
    assert (sum(stored.values()) == pytest.approx(sum(told.values()), rel=0.02)) is clip


# -- the schedule --------------------------------------------------------------------------------------------------


def test_steps_rates_and_pool_of_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(rounds=3, image_steps=4, image_batch=20, pool_size=50, epochs=4, iterations=3, student_milestones=(1, 3), student_lr=0.1)
    looks: list[int] = []
    rates: list[float] = []
    image_loss, step = distiller.image_loss, distiller.student_optimizer.step
    monkeypatch.setattr(distiller, "image_loss", lambda images, labels: (looks.append(len(images)), image_loss(images, labels))[1])
    monkeypatch.setattr(distiller.student_optimizer, "step", lambda: (rates.append(distiller.student_optimizer.param_groups[0]["lr"]), step())[0])
    assert distiller.num_epochs == 7
    student = state_hash(distiller.student.state_dict())
    for epoch, stored in enumerate((20, 40, 50)):
        looks.clear()
        distiller.run_epoch(epoch)
        assert looks == [20] * 4
        assert len(distiller.pool) == stored
    assert not rates
    assert state_hash(distiller.student.state_dict()) == student
    pixels = distiller.pool.pixels.clone()
    looks.clear()
    for epoch, rate in enumerate((0.1, 0.01, 0.01, 0.001), start=3):
        rates.clear()
        distiller.run_epoch(epoch)
        assert rates == pytest.approx([rate] * 3)
    assert not looks
    assert torch.equal(distiller.pool.pixels, pixels)


def test_stage_b_equals_a_plain_reference() -> None:
    distiller = build(3, temperature=4.0)
    distiller.run_epoch(0)
    config = distiller.config
    student, rng = copy.deepcopy(distiller.student).train(), torch.Generator()
    rng.set_state(distiller.rng.get_state())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    total = 0.0
    for _ in range(config.iterations):
        x = distiller.pool.draw(config.batch_size, rng)
        logits, loss = student(x).logits, 0.0
        for k in range(3):
            p, q = torch.softmax(distiller.teachers.nets[k](x) / 4, dim=1), torch.softmax(logits[k] / 4, dim=1)
            loss = loss + 16 * (p * torch.log(p / q)).sum(dim=1).mean() / 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    assert distiller.run_epoch(config.rounds)["student/kl"] == pytest.approx(total / config.iterations, rel=1e-3)
    torch.testing.assert_close(dict(distiller.student.state_dict()), dict(student.state_dict()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("count", "heads"), [(3, 3), (3, 1)])
def test_teachers_are_asked_once_per_image_and_the_student_learns_the_same(count: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cached, asked = build(count, heads=heads), build(count, heads=heads)
    seen: list[int] = []
    forward = TeacherEnsemble.forward
    monkeypatch.setattr(TeacherEnsemble, "forward", lambda self, images: (seen.append(len(images)), forward(self, images))[1])
    for distiller in (cached, asked):
        distiller.run_epoch(0)
    found = [cached.run_epoch(epoch)["student/kl"] for epoch in (2, 3)]
    assert cached.pool.logits is not None
    assert cached.pool.logits.shape == (len(cached.pool), heads, DIGITS.num_classes)
    assert sum(seen) == len(cached.pool)
    monkeypatch.setattr(pool_distillation, "MAX_LABEL_BYTES", 0)
    assert [asked.run_epoch(epoch)["student/kl"] for epoch in (2, 3)] == pytest.approx(found, rel=1e-4)
    assert asked.pool.logits is None
    assert len(seen) > 2 * asked.config.iterations


def test_there_are_no_samples_before_the_first_round() -> None:
    distiller = build()
    assert distiller.sample(4, seeding.generator("look")) is None
    assert distiller.generator is None


# -- adaptive DeepInversion ----------------------------------------------------------------------------------------


def test_blocks_of_rounds_and_epochs_alternate_and_the_student_of_one_block_is_the_opponent_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(rounds=4, epochs=4, blocks=2, adaptive_weight=0.5, image_batch=10, iterations=2, student_milestones=(1, 3), student_lr=0.1)
    rates: list[float] = []
    step = distiller.student_optimizer.step
    monkeypatch.setattr(distiller.student_optimizer, "step", lambda: (rates.append(distiller.student_optimizer.param_groups[0]["lr"]), step())[0])
    assert distiller.num_epochs == 8
    expected = [None, None, [0.1] * 2, [0.01] * 2, None, None, [0.01] * 2, [0.001] * 2]
    stored = [10, 20, 20, 20, 30, 40, 40, 40]
    for epoch, (rate, size) in enumerate(zip(expected, stored, strict=True)):
        rates.clear()
        before = state_hash(distiller.student.state_dict())
        terms = distiller.run_epoch(epoch)
        assert len(distiller.pool) == size
        if rate is None:
            assert not rates
            assert state_hash(distiller.student.state_dict()) == before, "the opponent does not move"
            assert all(parameter.grad is None or epoch > 3 for parameter in distiller.student.parameters())
            assert ("images/competition" in terms) == (epoch > 3)
            assert distiller.pool.logits is None
        else:
            assert rates == pytest.approx(rate)
            assert set(terms) == {"student/kl"}
            assert distiller.pool.logits is not None
            assert len(distiller.pool.logits) == size


@pytest.mark.parametrize("heads", [3, 1])
def test_the_competition_term_equals_a_plain_reference(heads: int) -> None:
    weights = torch.rand(3, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    distiller = build(3, heads=heads, teachers=trained_ensemble(3, weights), rounds=2, epochs=2, blocks=2, adaptive_weight=0.7, adaptive_temperature=2.0)
    distiller.competing = True
    images = torch.randn(6, *DIGITS.shape, generator=torch.Generator().manual_seed(1))
    distiller.student.train()
    found = float(distiller.image_loss(images, torch.arange(6))["images/competition"].detach())
    assert distiller.student.training
    targets = [net(images) for net in distiller.teachers.nets]
    if heads == 1:
        targets = [sum(share * torch.log(torch.softmax(logits, dim=1)) for share, logits in zip(weights / weights.sum(0), targets, strict=True))]
    total = 0.0
    for mine, theirs in zip(distiller.student.eval()(images).logits, targets, strict=True):
        p, q = torch.softmax(mine / 2, dim=1), torch.softmax(torch.log_softmax(theirs, dim=1) / 2, dim=1)
        m = (p + q) / 2
        total += float((p * torch.log(p / m) + q * torch.log(q / m)).detach().sum() / 2 / 6)
    assert found == pytest.approx(0.7 * (1 - total / heads), rel=1e-4)


def test_competition_finds_images_that_the_student_does_not_understand() -> None:
    found = {}
    for weight in (0.0, 20.0):
        distiller = build(
            rounds=2, epochs=2, blocks=2, adaptive_weight=weight, image_steps=30, image_batch=40, pool_size=40, iterations=30, bn_weight=1.0, clip=False
        )
        for epoch in range(3):
            distiller.run_epoch(epoch)
        images = distiller.pool.at(torch.arange(40))
        said = [logits[0].argmax(-1) for logits in (distiller.student.eval()(images).logits, distiller.teachers(images))]
        found[weight] = float((said[0] != said[1]).double().mean())
    assert found[20.0] > found[0.0] + 0.1


# -- students and settings -----------------------------------------------------------------------------------------


def test_a_student_with_one_header_learns_the_fused_ensemble() -> None:
    distiller = build(3, heads=1)
    losses = [distiller.run_epoch(epoch) for epoch in range(distiller.num_epochs)]
    assert math.isfinite(losses[-1]["student/kl"])


def test_another_number_of_headers_is_an_error() -> None:
    distiller = build(3, heads=2)
    distiller.run_epoch(0)
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        distiller.run_epoch(2)


def test_batch_norm_statistics_are_disclosed() -> None:
    assert DeepInversion.needs.disclosed() == ("batch_norm",)


def test_the_defaults_are_the_authors_for_cifar() -> None:
    config = DeepInversionConfig()
    assert (config.image_steps, config.image_batch, config.jitter, config.bn_weight, config.l2_weight) == (2000, 256, 2, 10.0, 0.0)
    assert (config.resolved_image_lr, config.resolved_tv_weight) == (0.1, 1e-3)
    assert config.rounds * config.image_batch >= config.pool_size == 50_000
    paper = DeepInversionConfig(mode="paper")
    assert (paper.resolved_image_lr, paper.resolved_tv_weight) == (0.05, 2.5e-5)
    assert (config.adaptive_weight, config.blocks) == (0.0, 1)
    own = DeepInversionConfig(mode="paper", image_lr=0.2, tv_weight=0.0)
    assert (own.resolved_image_lr, own.resolved_tv_weight) == (0.2, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"image_batch": 1}, "image_batch is 1"),
        ({"jitter": -1}, "jitter is -1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"least_area": 0.0}, "least_area is 0.0"),
        ({"blocks": 3}, r"blocks is 3; accepted: a divisor of method.rounds \(196\)"),
        ({"blocks": 0}, "blocks is 0"),
        ({"adaptive_weight": 0.2}, "at least 2 blocks"),
        ({"adaptive_weight": -0.2, "blocks": 2}, r"adaptive_weight is -0\.2"),
    ],
)
def test_settings_that_cannot_work_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(DeepInversionConfig(), **change)
