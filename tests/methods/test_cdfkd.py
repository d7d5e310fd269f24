"""CDFKD against a plain reference of its losses, its schedule, and attention over the heads it leaves."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy import seeding
from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.methods.cdfkd import CDFKD, CDFKDConfig
from cdfkd_strategy.models.generators import GeneratorConfig
from cdfkd_strategy.models.head_fusion import fit_head_attention
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from tests.methods.trained_teachers import DIGITS, digits, tiny_student, trained_ensemble

SEED = "cdfkd test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, **changes: Any) -> CDFKD:
    config = dataclasses.replace(CDFKDConfig.toy(), **changes)
    student = tiny_student(heads or count)
    with seeding.seeded_scope(SEED):
        return CDFKD(
            teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1)
        )  # fmt: skip


def kl(theirs: Tensor, mine: Tensor) -> Tensor:
    p, q = torch.softmax(theirs, dim=1), torch.softmax(mine, dim=1)
    return (p * torch.log(p / q)).sum(dim=1).mean()


def logits(seed: int, count: int = 3) -> Tensor:
    return 2 * torch.randn(count, 6, DIGITS.num_classes, generator=torch.Generator().manual_seed(seed))


# -- the formulas --------------------------------------------------------------------------------------------------


def test_the_papers_student_loss() -> None:
    """Uniform weights: the mean of the headers' KL, and the KL of the mean logits."""
    s, t = logits(1), logits(2)
    terms = build(3, ensemble_weight=2.0, head_weight=0.5).student_loss(s, t)
    heads = sum(kl(t[k], s[k]) for k in range(3)) / 3
    ensemble = kl((t[0] + t[1] + t[2]) / 3, (s[0] + s[1] + s[2]) / 3)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"student/kl": 0.5 * heads.item(), "student/ensemble_kl": 2 * ensemble.item()}, rel=1e-4
    )


def fused(outputs: Tensor, weights: Tensor) -> Tensor:
    return sum(share * torch.log(torch.softmax(mine, dim=1)) for share, mine in zip(weights, outputs, strict=True))  # type: ignore[return-value]


def test_class_weights_enter_the_ensemble_term_and_the_target_of_one_header() -> None:
    weights = torch.rand(3, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    w, s, t = weights / weights.sum(0), logits(1), logits(2)
    terms = build(teachers=trained_ensemble(3, weights), heads=3).student_loss(s, t)
    assert terms["student/ensemble_kl"].item() == pytest.approx(kl(fused(t, w), fused(s, w)).item(), rel=1e-4)
    single = build(teachers=trained_ensemble(3, weights), heads=1).student_loss(s[:1], t)
    expected = kl(fused(t, w), s[0]).item()
    assert [value.item() for value in single.values()] == pytest.approx([expected, expected], rel=1e-4)


def test_an_epoch_equals_a_plain_reference() -> None:
    """Three teachers and headers, from the paper's symbols with log10: both networks step on the same batch, the student without a say in the generator."""
    distiller = build(3, one_hot_weight=1.0, activation_weight=0.1)
    for part in (distiller.student, distiller.generator, distiller.teachers):
        part.double()  # in place: the optimisers keep their parameters
    distiller.generator.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    config = distiller.config
    generator, student, rng = copy.deepcopy(distiller.generator), copy.deepcopy(distiller.student).train(), seeding.generator(SEED)
    adam = torch.optim.Adam(generator.parameters(), lr=1e-3)
    descent = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    sums = [0.0] * 5
    for _ in range(config.iterations):
        x = generator(torch.randn(config.batch_size, config.generator.latent_dim, generator=rng))
        one_hot = entropy = activation = heads = 0.0
        answers = student(x.detach()).logits
        targets = []
        for k, teacher in enumerate(distiller.teachers.nets):
            t = teacher(x)
            mean = torch.softmax(t, dim=1).mean(0)
            one_hot = one_hot + F.nll_loss(torch.log(torch.softmax(t, dim=1)), t.argmax(1)) / 3
            entropy = entropy + 5 * (mean * torch.log10(mean)).sum() / 3
            activation = activation - 0.1 * nn.Sequential(*list(teacher)[:-1])(x).abs().mean() / 3
            heads = heads + kl(t.detach(), answers[k]) / 3
            targets.append(t.detach())
        ensemble = kl(sum(targets) / 3, answers.sum(0) / 3)
        adam.zero_grad()
        descent.zero_grad()
        (one_hot + entropy + activation).backward()
        (heads + ensemble).backward()
        adam.step()
        descent.step()
        sums = [total + term.item() for total, term in zip(sums, [one_hot, entropy, activation, heads, ensemble], strict=True)]
    found = distiller.run_epoch(0)
    assert list(found) == ["generator/one_hot", "generator/entropy", "generator/activation", "student/kl", "student/ensemble_kl"]
    assert list(found.values()) == pytest.approx([total / config.iterations for total in sums], rel=1e-4)
    torch.testing.assert_close(distiller.student.eval()(x).logits, student.eval()(x).logits, rtol=1e-3, atol=1e-3)
    z = torch.randn(64, config.generator.latent_dim, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(distiller.generator(z), generator(z), rtol=1e-3, atol=1e-3)


def test_the_paper_has_nats_and_the_code_digits() -> None:
    found = [build(mode=mode, iterations=1).run_epoch(0)["generator/entropy"] for mode in ("paper", "code")]
    assert found[0] == pytest.approx(math.log(10) * found[1], rel=1e-6)


# -- the schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "first"), [("sgd", 0.1), ("adam", 2e-3)])
def test_milestones_are_epochs_and_not_iterations(optimizer: str, first: float, monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(epochs=4, iterations=3, student_milestones=(1, 3), student_optimizer=optimizer, student_lr=first)
    steps: list[tuple[str, float]] = []
    for name in ("generator", "student"):
        stepped = getattr(distiller, f"{name}_optimizer")

        def step(name: str = name, optimizer: torch.optim.Optimizer = stepped, real: Any = stepped.step) -> None:
            steps.append((name, optimizer.param_groups[0]["lr"]))
            real()

        monkeypatch.setattr(stepped, "step", step)
    assert distiller.num_epochs == 4
    for epoch, factor in enumerate((1.0, 0.1, 0.1, 0.01)):
        steps.clear()
        distiller.run_epoch(epoch)
        assert [name for name, _ in steps] == ["generator", "student"] * 3
        assert [value for _, value in steps] == pytest.approx([1e-3, first * factor] * 3)


def test_the_students_rate_can_follow_a_cosine() -> None:
    distiller = build(epochs=2, iterations=2, student_schedule="cosine", student_lr=0.1)
    for epoch, last in enumerate((0.05 * (1 + math.cos(math.pi / 4)), 0.05 * (1 + math.cos(math.pi * 3 / 4)))):
        distiller.run_epoch(epoch)
        assert distiller.student_optimizer.param_groups[0]["lr"] == pytest.approx(last)
        assert distiller.generator_optimizer.param_groups[0]["lr"] == 1e-3


# -- attention over the heads --------------------------------------------------------------------------------------


def test_attention_over_the_heads_is_fitted_on_few_real_samples_afterwards() -> None:
    """Better than the mean of the headers on the samples it was fitted on; the student is left as it is."""
    distiller = build(3, iterations=20)
    distiller.run_epoch(0)
    few = slice(0, 100)
    images, labels = digits().x_train[few], digits().y_train[few]
    before = copy.deepcopy(distiller.student.state_dict())
    attention = fit_head_attention(distiller.student, images, labels, epochs=30, rng=torch.Generator().manual_seed(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in distiller.student.state_dict().items())
    with torch.no_grad():
        headers = distiller.student.eval()(images).logits
        assert F.cross_entropy(attention(headers), labels) < F.cross_entropy(headers.mean(0), labels)


# -- students and settings -----------------------------------------------------------------------------------------


def test_another_number_of_headers_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        build(3, heads=2).run_epoch(0)


def test_the_defaults_are_the_authors_for_cifar10() -> None:
    config = CDFKDConfig()
    assert (config.epochs, config.iterations, config.batch_size) == (800, 120, 1024)
    assert (config.one_hot_weight, config.entropy_weight, config.activation_weight) == (0.05, 5.0, 0.01)
    assert (config.head_weight, config.ensemble_weight) == (1.0, 1.0)
    assert (config.generator_lr, config.student_lr, config.momentum, config.weight_decay) == (1e-3, 0.1, 0.9, 5e-4)
    assert (config.mode, config.student_optimizer, config.student_milestones) == ("code", "sgd", (400, 600))
    assert config.generator == GeneratorConfig(latent_dim=1000)


@pytest.mark.parametrize(("setting", "value"), [("epochs", 0), ("iterations", 0), ("batch_size", 1)])
def test_settings_that_cannot_work_are_errors(setting: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"method.{setting} is {value}"):
        CDFKDConfig(**{setting: value})
