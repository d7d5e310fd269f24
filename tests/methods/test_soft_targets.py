"""Soft targets: their distribution, which of them are kept, the images' loss, and the schedule."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cdfkd_strategy import seeding
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.methods import soft_targets
from cdfkd_strategy.methods.soft_targets import SoftTargets, SoftTargetsConfig, Targets, class_balance
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "soft targets test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, **changes: Any) -> SoftTargets:
    config = dataclasses.replace(SoftTargetsConfig.toy(), **{"augment": "none", **changes})
    student = tiny_student(heads or count)
    with seeding.seeded_scope(SEED):
        return SoftTargets(
            teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1)
        )  # fmt: skip


def lenet() -> TeacherEnsemble:
    with seeding.seeded_scope(SEED):
        return TeacherEnsemble([build_classifier("lenet", DIGITS)], image=DIGITS)


# -- stage (a): the targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mu", "sigma"), [("zero", 2.0), ("bias", 0.5)])
def test_the_distribution_is_that_of_the_paper(mu: str, sigma: float) -> None:
    """A network with one linear layer: v are the logits, so that mean and covariance can be seen."""
    distiller = build(mu=mu, sigma=sigma)
    layer = distiller.teachers.nets[0][-1]
    v = distiller.candidates(0, 20_000).double()
    rows = layer.weight.double()
    for i in range(10):
        for j in range(10):
            r = float((rows[i] * rows[j]).sum() / (rows[i].norm() * rows[j].norm()))
            found = float(((v[:, i] - v[:, i].mean()) * (v[:, j] - v[:, j].mean())).mean())
            assert found == pytest.approx(sigma**2 * r, abs=0.06 * sigma**2)
    expected = layer.bias if mu == "bias" else torch.zeros(10)
    torch.testing.assert_close(v.mean(0).float(), expected, rtol=0, atol=0.06 * sigma)


def test_features_pass_through_the_layers_behind_them() -> None:
    """LeNet's FC-2 gives 84 features: ReLU and the classifier make the targets of them."""
    distiller = build(teachers=lenet(), sigma=1.5)
    net = distiller.teachers.nets[0]
    g = torch.randn(6, 120, generator=seeding.generator(SEED))
    w = torch.stack([row / row.norm() for row in net.hidden[3].weight])
    torch.testing.assert_close(distiller.candidates(0, 6), net.classifier(torch.relu(1.5 * g @ w.T)))
    classes = build(teachers=lenet(), sigma=1.5, layer="classes")
    g = torch.randn(6, 84, generator=seeding.generator(SEED))
    w = torch.stack([row / row.norm() for row in net.classifier.weight])
    torch.testing.assert_close(classes.candidates(0, 6), 1.5 * g @ w.T)


def test_rejection_balances_the_classes() -> None:
    found = {}
    for balance in ("none", "reject"):
        distiller = build(mu="bias", balance=balance, candidates=20, image_batch=200)
        distiller.teachers.nets[0][-1].bias[3] += 3.0  # a class that comes too often
        found[balance] = float(class_balance(distiller.targets(0).logits.argmax(-1), 10)["targets/entropy"])
    assert found["reject"] > found["none"] + 0.05


def test_teachers_take_turns_and_make_targets_of_classes_they_know() -> None:
    weights = F.one_hot(torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1]), 3).T.float()  # nobody asks the third: it has no weight
    distiller = build(3, teachers=trained_ensemble(3, weights), candidates=10)
    for round_ in range(4):
        targets = distiller.targets(round_)
        assert targets.teacher == round_ % 2
        assert set(targets.logits.argmax(-1).tolist()) <= set(range(5 * targets.teacher, 5 * targets.teacher + 5))


def test_candidates_are_kept_in_proportion_to_their_weight() -> None:
    share = torch.full((10,), 0.25)
    share[7] = 0.75
    distiller = build(2, teachers=trained_ensemble(2, torch.stack([share, 1 - share])), candidates=50, image_batch=400)
    plain, kept = (Counter(logits.argmax(-1).tolist()) for logits in (distiller.candidates(0, 20_000), distiller.targets(0).logits))
    odds = [counter[7] / (sum(counter.values()) - counter[7]) for counter in (kept, plain)]
    assert odds[0] / odds[1] == pytest.approx(3.0, rel=0.3)


def test_balance_is_measured() -> None:
    terms = class_balance(torch.tensor([0, 0, 1, 3]), 4)
    assert float(terms["targets/entropy"]) == pytest.approx((0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / math.log(4))
    assert (float(terms["targets/rarest"]), float(terms["targets/commonest"])) == (0.0, 0.5)


# -- stage (a): the images -----------------------------------------------------------------------------------------


def test_image_loss_equals_a_plain_reference() -> None:
    distiller = build(3, activation_weight=0.3, image_temperature=5.0, target_temperature=2.0)
    pixels = torch.rand(7, *DIGITS.shape, generator=torch.Generator().manual_seed(1))
    targets = torch.randn(7, 10, generator=torch.Generator().manual_seed(2)) * 3
    found = {name: float(value) for name, value in distiller.image_loss(pixels, Targets(targets, 2)).items()}
    net, divergence, activation = distiller.teachers.nets[2], 0.0, 0.0
    for pixel, target in zip(pixels, targets, strict=True):
        features = net[:-1]((pixel[None] - 0.3) / 0.35)
        p, y = torch.softmax(net[-1](features)[0] / 5, dim=0), torch.softmax(target / 2, dim=0)
        divergence += 25 * sum(float(b * (b.log() - a.log())) for a, b in zip(p, y, strict=True)) / 7
        activation += sum(abs(float(value)) for value in features[0]) / len(features[0]) / 7
    assert found == pytest.approx({"images/kl": divergence, "images/activation": -0.3 * activation}, rel=1e-4)


def test_the_images_come_to_mean_their_targets() -> None:
    distiller = build(image_steps=60, image_batch=50, rounds=1)
    terms = distiller.run_epoch(0)
    assert terms["images/agreement"] > 0.9
    assert terms["images/kl"] < 0.05
    assert terms["targets/rarest"] < 0.1 < terms["targets/commonest"]


@pytest.mark.parametrize(("start", "mean", "std"), [("normal", 0.5, 0.1), ("uniform", 0.5, 12**-0.5)])
def test_where_pixels_start(start: str, mean: float, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Tensor] = []
    distiller = build(image_batch=500, rounds=1, image_steps=1, start=start)
    distiller.image = dataclasses.replace(DIGITS, mean=(0.5,), std=(0.1,))
    optimise = soft_targets.optimise_pixels
    monkeypatch.setattr(soft_targets, "optimise_pixels", lambda pixels, *rest, **named: (starts.append(pixels), optimise(pixels, *rest, **named))[1])
    distiller.run_epoch(0)
    assert float(starts[0].mean()) == pytest.approx(mean, abs=0.01)
    assert float(starts[0].std()) == pytest.approx(std, rel=0.02)
    assert 0 <= float(starts[0].min()) < float(starts[0].max()) <= 1


@pytest.mark.parametrize("pixels", ["free", "held"])
def test_free_and_held_pixels_start_dark_and_decay_and_held_ones_stay_pixels(pixels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    distiller = build(image_batch=40, rounds=1, image_steps=5, image_lr=0.3, pixels=pixels, pixel_decay=0.4)
    optimise = soft_targets.optimise_pixels

    def watched(start: Tensor, *rest: Any, **named: Any) -> Any:
        found = optimise(start, *rest, **named)
        seen.extend([start, found[0]])
        return found

    monkeypatch.setattr(soft_targets, "optimise_pixels", watched)
    terms = distiller.run_epoch(0)
    assert float((seen[0] <= 0).double().mean()) == pytest.approx(0.5, abs=0.05)
    outside = [float((values != values.clamp(0, 1)).double().mean()) for values in seen]
    assert (min(outside) > 0.3) if pixels == "free" else outside == [0, 0]
    some = torch.rand(3, *DIGITS.shape, generator=torch.Generator().manual_seed(1))
    targets = Targets(torch.zeros(3, 10), 0)
    expected = sum(0.4 / 2 * float(value) ** 2 for value in some.flatten()) / 3
    assert float(distiller.image_loss(some, targets)["images/decay"]) == pytest.approx(expected, rel=1e-5)
    assert terms["images/decay"] > 0


# -- the schedule --------------------------------------------------------------------------------------------------


def test_steps_and_rates_of_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(2, rounds=3, image_steps=4, image_batch=20, pool_size=50, epochs=2, iterations=3, student_lr=0.02, student_milestones=(1,))
    looks: list[tuple[int, int]] = []
    rates: list[float] = []
    image_loss, step, optimise = distiller.image_loss, distiller.student_optimizer.step, soft_targets.optimise_pixels

    def watched(pixels: Tensor, *arguments: Any, **named: Any) -> Any:
        rates.append(named["lr"])
        return optimise(pixels, *arguments, **named)

    monkeypatch.setattr(soft_targets, "optimise_pixels", watched)
    monkeypatch.setattr(distiller, "image_loss", lambda pixels, targets: (looks.append((targets.teacher, len(pixels))), image_loss(pixels, targets))[1])
    monkeypatch.setattr(distiller.student_optimizer, "step", lambda: (rates.append(distiller.student_optimizer.param_groups[0]["lr"]), step())[0])
    assert distiller.num_epochs == 5
    student = state_hash(distiller.student.state_dict())
    for epoch, (teacher, stored) in enumerate(((0, 20), (1, 40), (0, 50))):
        looks.clear()
        distiller.run_epoch(epoch)
        assert looks == [(teacher, 20)] * 4
        assert len(distiller.pool) == stored
    assert state_hash(distiller.student.state_dict()) == student
    assert rates == [0.05] * 3
    for epoch, rate in ((3, 0.02), (4, 0.002)):
        rates.clear()
        distiller.run_epoch(epoch)
        assert rates == pytest.approx([rate] * 3)


@pytest.mark.parametrize("heads", [2, 1])
def test_stage_b_equals_a_plain_reference(heads: int) -> None:
    weights = torch.rand(2, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    distiller = build(2, heads=heads, teachers=trained_ensemble(2, weights), rounds=1)
    distiller.run_epoch(0)
    config = distiller.config
    student, rng = copy.deepcopy(distiller.student).train(), torch.Generator()
    rng.set_state(distiller.rng.get_state())
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    total = 0.0
    for _ in range(config.iterations):
        x = distiller.pool.draw(config.batch_size, rng)
        logits, loss = student(x).logits, 0.0
        targets = [net(x) for net in distiller.teachers.nets]
        if heads == 1:
            targets = [sum(share * torch.log(torch.softmax(target, dim=1)) for share, target in zip(weights / weights.sum(0), targets, strict=True))]
        for k, target in enumerate(targets):
            p, q = torch.softmax(torch.log_softmax(target, dim=1) / 20, dim=1), torch.softmax(logits[k] / 20, dim=1)
            loss = loss + 400 * (p * torch.log(p / q)).sum(dim=1).mean() / heads
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    assert distiller.run_epoch(1)["student/kl"] == pytest.approx(total / config.iterations, rel=1e-3)


# -- settings ------------------------------------------------------------------------------------------------------


def test_what_is_disclosed_and_the_defaults_that_are_known() -> None:
    assert SoftTargets.needs.disclosed() == ("features",)
    config = SoftTargetsConfig()
    assert (config.layer, config.sigma, config.activation_weight) == ("fc2", 2.0, 0.1)
    assert (config.target_temperature, config.image_temperature, config.temperature) == (1.0, 1.0, 20.0)
    assert config.rounds * config.image_batch == config.iterations * config.batch_size == config.pool_size == 40_000


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 0},
        {"candidates": 0},
        {"batch_size": 1},
        {"sigma": 0.0},
        {"temperature": -1.0},
        {"target_temperature": 0.0},
        {"image_temperature": 0.0},
        {"least_area": 1.5},
        {"pixel_decay": -1.0},
    ],
)
def test_settings_that_cannot_work_are_errors(change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        dataclasses.replace(SoftTargetsConfig(), **change)
