"""ZSKD: class similarity, the Dirichlet targets of both modes, the images' loss, and the schedule."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cdfkd_strategy import seeding
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.image_optimisation import optimise_pixels
from cdfkd_strategy.methods import zskd
from cdfkd_strategy.methods.zskd import ZSKD, Targets, ZSKDConfig
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "zskd test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, **changes: Any) -> ZSKD:
    config = dataclasses.replace(ZSKDConfig.toy(), **{"augment": "none", **changes})
    student = tiny_student(heads or count)
    with seeding.seeded_scope(SEED):
        return ZSKD(
            teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1)
        )  # fmt: skip


def random_weights(count: int) -> Tensor:
    weights = torch.rand(count, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    return weights / weights.sum(0)


# -- stage (a): the targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_similarity_is_the_weighted_cosine_of_class_rows_from_0_to_1(mode: str) -> None:
    """Each row of it in the paper, all of it in the authors' code."""
    weights = random_weights(3)
    distiller = build(3, teachers=trained_ensemble(3, weights), mode=mode)
    expected = np.zeros((10, 10))
    for k, net in enumerate(distiller.teachers.nets):
        rows = net[-1].weight.numpy().astype(np.float64)
        for i in range(10):
            for j in range(10):
                expected[i, j] += float(weights[k, i]) * rows[i] @ rows[j] / np.sqrt(rows[i] @ rows[i] * (rows[j] @ rows[j]))
    for part in [expected] if mode == "code" else expected:
        part[:] = (part - part.min()) / (part.max() - part.min())
    found = distiller.similarity().numpy()
    np.testing.assert_allclose(found.min(1), expected.min(1), atol=1e-6)
    assert (found.min(1) < 1e-6).all() == (mode == "paper")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.diagonal(), 1.0, atol=1e-6)


def test_beta_scales_the_concentrations_and_does_nothing_in_the_authors_code() -> None:
    labels, betas = torch.tensor([2, 2, 7]), torch.tensor([1.0, 0.1, 0.1], dtype=torch.float64)
    distiller = build()
    similarity = distiller.similarity()
    expected = torch.stack([similarity[2], 0.1 * similarity[2], 0.1 * similarity[7]]) + 1e-4
    torch.testing.assert_close(distiller.concentrations(labels, betas), expected)
    code = build(mode="code").concentrations(labels, betas)
    torch.testing.assert_close(code[0], code[1])
    assert float(code[1].max()) == pytest.approx(1 + 1e-4)
    assert float(code[1].min()) == pytest.approx(1e-4)


def test_targets_are_drawn_from_the_dirichlet_distribution_of_their_class_and_beta() -> None:
    distiller = build(image_batch=20_000)
    targets = distiller.targets(0)
    similarity = distiller.similarity().numpy()
    places = np.arange(20_000)
    for label, beta in ((3, 1.0), (3, 0.1)):
        mine = targets.probabilities.numpy()[(places % 10 == label) & (places // 10 % 2 == (0 if beta == 1.0 else 1))]
        assert len(mine) == 1000
        concentration = beta * similarity[label] + 1e-4
        mean = concentration / concentration.sum()
        np.testing.assert_allclose(mine.mean(0), mean, atol=0.04)
        np.testing.assert_allclose(mine.var(0), mean * (1 - mean) / (concentration.sum() + 1), atol=0.02)
    assert torch.isfinite(targets.probabilities).all()
    torch.testing.assert_close(targets.probabilities.sum(1), torch.ones(20_000))


def test_classes_and_betas_go_on_where_the_round_before_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(image_batch=7)
    asked: list[tuple[int, float]] = []
    concentrations = distiller.concentrations

    def watched(labels: Tensor, betas: Tensor) -> Tensor:
        asked.extend(zip(labels.tolist(), betas.tolist(), strict=True))
        return concentrations(labels, betas)

    monkeypatch.setattr(distiller, "concentrations", watched)
    labels = [int(label) for round_ in range(20) for label in distiller.targets(round_).labels]
    assert [label for label, _ in asked] == labels == [place % 10 for place in range(140)]
    assert {pair: asked.count(pair) for pair in asked} == {(c, beta): 7 for c in range(10) for beta in (1.0, 0.1)}


# -- stage (a): the images -----------------------------------------------------------------------------------------


def test_image_loss_equals_a_plain_reference() -> None:
    weights = random_weights(3)
    distiller = build(3, teachers=trained_ensemble(3, weights), temperature=4.0)
    pixels = torch.rand(6, *DIGITS.shape, generator=torch.Generator().manual_seed(1))
    targets = Targets(torch.softmax(torch.randn(6, 10, generator=torch.Generator().manual_seed(2)), dim=1), torch.tensor([0, 1, 2, 7, 8, 9]))
    total = 0.0
    for pixel, y, label in zip(pixels, targets.probabilities, targets.labels, strict=True):
        for k, net in enumerate(distiller.teachers.nets):
            p = torch.softmax(net((pixel[None] - 0.3) / 0.35)[0] / 4, dim=0)
            total -= float(weights[k, label] * (y * torch.log(p)).sum()) / 6
    (found,) = distiller.image_loss(pixels, targets).values()
    assert float(found) == pytest.approx(total, rel=1e-4)


def test_held_pixels_are_stored_as_they_were_optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping free ones at the end takes some of their meaning."""
    kept: dict[str, float] = {}
    for pixels in ("free", "held"):
        distiller = build(image_steps=60, image_batch=50, pool_size=50, rounds=1, betas=(0.1,), image_lr=0.3, pixels=pixels, pixel_decay=0.1)
        targets, found = distiller.targets(0), []

        def watched(*arguments: Any, found: list[Tensor] = found, **named: Any) -> Any:
            result = optimise_pixels(*arguments, **named)
            found.extend([arguments[0], result[0]])
            return result

        monkeypatch.setattr(zskd, "optimise_pixels", watched)
        terms = distiller._impress(targets)
        assert "images/decay" in terms
        start, end = found
        share = [float(((value < 0) | (value > 1)).float().mean()) for value in (start, end)]
        assert (min(share) > 0.2) if pixels == "free" else (max(share) == 0)
        assert 0.3 < float((start <= 0).float().mean()) < 0.7, "half of the noise is black"
        stored = DIGITS.normalise(distiller.pool.pixels.float() / 255)
        logits = distiller.teachers(stored)[0] / 20
        kept[pixels] = float(-(targets.probabilities * logits.log_softmax(-1)).sum(-1).mean())
    assert kept["held"] < kept["free"]


def test_the_images_come_to_mean_their_targets_and_fill_the_pixel_range() -> None:
    distiller = build(image_steps=80, image_batch=50, pool_size=50, rounds=1, betas=(0.1,))
    terms = distiller.run_epoch(0)
    assert terms["images/agreement"] > 0.8
    assert 0 < terms["targets/other_class"] < 0.9
    assert (int(distiller.pool.pixels.min()), int(distiller.pool.pixels.max())) == (0, 255)


# -- the schedule --------------------------------------------------------------------------------------------------


def test_every_round_starts_from_noise_and_steps_and_rates_are_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(rounds=2, image_steps=3, image_batch=20, pool_size=30, epochs=2, iterations=4, student_lr=0.02, student_milestones=(1,), image_lr=0.03)
    starts: list[Tensor] = []
    looks: list[int] = []
    rates: list[float] = []
    image_loss, step, optimise = distiller.image_loss, distiller.student_optimizer.step, zskd.optimise_pixels

    def watched(pixels: Tensor, *arguments: Any, **named: Any) -> Any:
        starts.append(pixels.clone())
        assert (named["lr"], named["bounded"]) == (0.03, zskd.stretched)
        return optimise(pixels, *arguments, **named)

    monkeypatch.setattr(zskd, "optimise_pixels", watched)
    monkeypatch.setattr(distiller, "image_loss", lambda pixels, targets: (looks.append(len(pixels)), image_loss(pixels, targets))[1])
    monkeypatch.setattr(distiller.student_optimizer, "step", lambda: (rates.append(distiller.student_optimizer.param_groups[0]["lr"]), step())[0])
    assert distiller.num_epochs == 4
    student = state_hash(distiller.student.state_dict())
    for epoch, stored in enumerate((20, 30)):
        looks.clear()
        distiller.run_epoch(epoch)
        assert looks == [20] * 3
        assert len(distiller.pool) == stored
    assert state_hash(distiller.student.state_dict()) == student
    assert not torch.equal(*starts)
    for start in starts:
        assert 0 <= float(start.min()) < 0.01
        assert float(start.mean()) == pytest.approx(0.5, abs=0.05)
    for epoch, rate in ((2, 0.02), (3, 0.002)):
        rates.clear()
        distiller.run_epoch(epoch)
        assert rates == pytest.approx([rate] * 4)


def test_stage_b_equals_a_plain_reference() -> None:
    """The authors' tau^2 cross entropy against the teacher's soft answers, less the answers' own entropy: the same gradient."""
    distiller = build(2, rounds=1)
    distiller.run_epoch(0)
    config = distiller.config
    student, rng = copy.deepcopy(distiller.student).train(), torch.Generator()
    rng.set_state(distiller.rng.get_state())
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    total = 0.0
    for _ in range(config.iterations):
        x = distiller.pool.draw(config.batch_size, rng)
        logits, loss, entropy = student(x).logits, 0.0, 0.0
        for k, net in enumerate(distiller.teachers.nets):
            p = torch.softmax(net(x) / 20, dim=1)
            loss = loss - 400 * (p * torch.log_softmax(logits[k] / 20, dim=1)).sum(dim=1).mean() / 2
            entropy -= 400 * float((p * torch.log(p)).sum(dim=1).mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() - entropy
    assert distiller.run_epoch(1)["student/kl"] == pytest.approx(total / config.iterations, rel=1e-3)


# -- settings ------------------------------------------------------------------------------------------------------


def test_what_is_disclosed_and_the_authors_defaults() -> None:
    assert ZSKD.needs.disclosed() == ("features",)
    config = ZSKDConfig()
    assert (config.image_steps, config.image_batch, config.image_lr, config.temperature, config.student_lr) == (1500, 100, 1e-3, 20.0, 1e-3)
    assert config.rounds * config.image_batch == config.iterations * config.batch_size == config.pool_size == 40_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"betas": ()}, "betas is empty"),
        ({"betas": (1.0, 0.0)}, "betas is .*accepted: above 0"),
        ({"least_area": 0.0}, "least_area is 0.0"),
        ({"pixel_decay": -1.0}, "pixel_decay is -1.0"),
    ],
)
def test_settings_that_cannot_work_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ZSKDConfig(), **change)
