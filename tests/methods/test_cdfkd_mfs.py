"""CDFKD-MFS: both losses against independently written references, the schedule, and the mode switch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.methods import cdfkd_mfs
from cdfkd_strategy.methods.cdfkd_mfs import CDFKDMFS, CDFKDMFSConfig
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.generators import GeneratorConfig
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.seeding import seeded_scope
from cdfkd_strategy.synthetic_batches import BatchRecipe
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, StudentOutputs, TeacherOutputs

IMAGE = ImageSpec(1, 8, 8, 4)
K, B, C, D = 3, 6, 4, 5


def method(teachers: int = 3, weights: Tensor | None = None, heads: int | None = None, **settings: Any) -> CDFKDMFS:
    settings = {"iterations": 2, "batch_size": 8, "generator": GeneratorConfig(latent_dim=8, width=0.125), **settings}
    with seeded_scope("mfs"):
        models = [build_classifier("small_cnn", IMAGE) for _ in range(teachers)]
        student = MultiHeaderStudent("small_cnn", heads or teachers, IMAGE)
        ensemble = TeacherEnsemble(models, weights, image=IMAGE)
        rng = torch.Generator().manual_seed(0)
        return CDFKDMFS(ensemble, student, CDFKDMFSConfig(**settings), image=IMAGE, rng=rng, runtime=Runtime())


def outputs() -> tuple[StudentOutputs, TeacherOutputs]:
    rng = torch.Generator().manual_seed(3)
    student = StudentOutputs(torch.randn(K, B, C, generator=rng), torch.randn(K, B, D, generator=rng))
    features = tuple(torch.randn(B, D, generator=rng) for _ in range(K))
    bn = tuple(torch.rand(7, generator=rng) for _ in range(K))
    return student, TeacherOutputs(torch.randn(K, B, C, generator=rng), features, bn)


def log_softmax(row: Tensor) -> Tensor:
    return row - torch.log(torch.exp(row).sum())


def fused_reference(logits: Tensor, weights: Tensor) -> Tensor:
    rows = []
    for b in range(B):
        pooled = sum(weights[k] * log_softmax(logits[k, b]) for k in range(K))
        rows.append(log_softmax(pooled))  # type: ignore[arg-type]
    return torch.stack(rows)


def kl_reference(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        for c in range(C):
            total += float(torch.exp(theirs[c]) * (theirs[c] - mine[c]))
    return total / len(student)


def test_the_papers_student_loss() -> None:
    student, teachers = outputs()
    terms = method(mode="paper", feature_weight=0.2, ensemble_weight=5.0).student_loss(student, teachers)
    s, t = student.logits, teachers.logits
    head = sum(float((s[k] - t[k]).abs().sum()) / (B * C) for k in range(K)) / K
    feature = sum(float((student.features[k] - teachers.features[k]).abs().sum()) / B for k in range(K)) / K  # type: ignore[operator]
    ensemble = float((s.sum(0) / K - t.sum(0) / K).abs().sum()) / (B * C)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"head_l1": head, "feature_l1": 0.2 * feature, "ensemble_l1": 5 * ensemble}, rel=1e-5
    )


def test_the_papers_generator_loss() -> None:
    student, teachers = outputs()
    terms = method(mode="paper").generator_loss(student, teachers)
    head = sum(float((student.logits[k] - teachers.logits[k]).abs().sum()) / (B * C) for k in range(K)) / K
    bn = sum(float(layers.sum() + 4 * layers[0]) for layers in teachers.bn if layers is not None) / K
    assert {name: value.item() for name, value in terms.items()} == pytest.approx({"adversarial": -head, "bn": 0.1 * bn}, rel=1e-5)


def test_the_fused_terms_use_the_class_weights() -> None:
    weights = torch.rand(K, C, generator=torch.Generator().manual_seed(5))
    weights = weights / weights.sum(0)
    student, teachers = outputs()
    distiller = method(weights=weights, fused_weight=2.0, balance_weight=3.0)
    mine, theirs = fused_reference(student.logits, weights), fused_reference(teachers.logits, weights)
    kl = kl_reference(mine, theirs)
    classes = torch.exp(theirs).sum(0) / B
    balance = float((classes * torch.log(classes)).sum())
    student_terms, generator_terms = distiller.student_loss(student, teachers), distiller.generator_loss(student, teachers)
    assert "ensemble_l1" not in student_terms
    assert student_terms["fused_kl"].item() == pytest.approx(2 * kl, rel=1e-4)
    assert generator_terms["fused_adversarial"].item() == pytest.approx(-2 * kl, rel=1e-4)
    assert generator_terms["balance"].item() == pytest.approx(3 * balance, rel=1e-4)


def test_auto_is_the_paper_for_uniform_weights_and_fused_for_others() -> None:
    skewed = torch.tensor([[0.5, 0.2, 0.2, 0.2], [0.3, 0.4, 0.4, 0.4], [0.2, 0.4, 0.4, 0.4]])
    assert not method().fused
    assert method(weights=skewed).fused
    assert not method(weights=skewed, mode="paper").fused
    assert method(mode="fused").fused


class Seen:
    """What a plain reference needs of a teacher: the statistics of every BatchNorm input, and the last layer's input."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher, self.distances, self.features = teacher, [], torch.zeros(())
        for part in teacher.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.register_forward_pre_hook(self.look)
        list(teacher.modules())[-1].register_forward_pre_hook(self.keep)

    def look(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        variance = ((rows - mean[:, None]) ** 2).mean(1)
        self.distances.append(((mean - norm.running_mean) ** 2).sum() ** 0.5 + ((variance - norm.running_var) ** 2).sum() ** 0.5)

    def keep(self, linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        self.features = inputs[0]

    def __call__(self, images: Tensor) -> Tensor:
        self.distances = []
        return self.teacher(images)


@pytest.mark.parametrize("mode", ["paper", "fused"])
def test_an_iteration_equals_a_plain_reference(mode: str) -> None:
    """Five student steps and a generator step, from the paper's symbols: fresh z each, SGD written out, gradients through everything.

    In float64: the signs in the gradients of L1 norms turn rounding noise of float32 into differences of a percent.
    """
    weights = torch.rand(K, C, generator=torch.Generator().manual_seed(5))
    distiller = method(weights=weights, mode=mode, iterations=1, student_lr=0.02, schedule="constant")
    for part in (distiller.student, distiller.generator, distiller.teachers):
        part.double()  # in place: the optimisers keep their parameters
    distiller.generator.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    w = weights / weights.sum(0)
    student, generator = copy.deepcopy(distiller.student).train(), copy.deepcopy(distiller.generator).train()
    teachers = [Seen(copy.deepcopy(net).requires_grad_(True)) for net in distiller.teachers.nets]
    rng, adam = torch.Generator().manual_seed(0), torch.optim.Adam(generator.parameters(), lr=1e-3)
    momenta = [torch.zeros_like(p) for p in student.parameters()]

    def fused(logits: list[Tensor]) -> Tensor:
        return torch.log(torch.softmax(sum(w[k] * torch.log(torch.softmax(logits[k], 1)) for k in range(K)), 1))

    def kl(mine: Tensor, theirs: Tensor) -> Tensor:
        return (theirs.exp() * (theirs - mine)).sum(1).mean()

    for _ in range(5):
        x = generator(torch.randn(8, 8, generator=rng)).detach()
        t = [teacher(x).detach() for teacher in teachers]
        s, features = student(x)
        loss = sum((s[k] - t[k]).abs().mean() for k in range(K)) / K
        loss = loss + 0.2 * sum((features[k] - teachers[k].features.detach()).abs().sum(1).mean() for k in range(K)) / K
        loss = loss + (5 * (sum(s) / K - sum(t) / K).abs().mean() if mode == "paper" else kl(fused(list(s)), fused(t)))
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p, momentum in zip(student.parameters(), momenta, strict=True):
                momentum.mul_(0.9).add_(p.grad + 5e-4 * p)
                p.sub_(0.02 * momentum)
    x = generator(torch.randn(8, 8, generator=rng))
    s, t = student(x).logits, [teacher(x) for teacher in teachers]
    loss = sum(-(s[k] - t[k]).abs().mean() + 0.1 * (sum(teachers[k].distances) + 4 * teachers[k].distances[0]) for k in range(K)) / K
    if mode == "fused":
        classes = fused(t).exp().mean(0)
        loss = loss - kl(fused(list(s)), fused(t)) + (classes * classes.log()).sum()
    adam.zero_grad()
    loss.backward()
    adam.step()

    terms = distiller.run_epoch(0)
    assert sum(value for name, value in terms.items() if name.startswith("generator/")) == pytest.approx(loss.item(), rel=1e-6)
    for (name, mine), theirs in zip(distiller.student.state_dict().items(), student.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    z = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(distiller.generator(z), generator(z), rtol=1e-3, atol=1e-5)
    assert (method().generator.train()(z) - generator(z)).abs().mean() > 1e-3, "it has not moved"


def test_features_of_another_width_are_left_out() -> None:
    student, teachers = outputs()
    narrow = teachers._replace(features=(teachers.features[0], None, torch.zeros(B, D + 1)))
    term = method(mode="paper", feature_weight=1.0).student_loss(student, narrow)["feature_l1"]
    assert teachers.features[0] is not None
    assert term.item() == pytest.approx(float((student.features[0] - teachers.features[0]).abs().sum()) / B / K, rel=1e-5)


def test_five_student_steps_then_one_generator_step(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = method(epochs=3, iterations=2, milestones=(1, 2), schedule="multistep")
    steps: list[tuple[str, float, float]] = []

    def count(name: str) -> None:
        original = getattr(distiller, f"{name}_step")

        def counted(*batch: Any) -> Any:
            rates = (distiller.student_optimizer.param_groups[0]["lr"], distiller.generator_optimizer.param_groups[0]["lr"])
            steps.append((name, *rates))
            return original(*batch)

        monkeypatch.setattr(distiller, f"{name}_step", counted)

    count("student")
    count("generator")
    for epoch in range(distiller.num_epochs):
        distiller.run_epoch(epoch)
    assert [name for name, _, _ in steps] == (["student"] * 5 + ["generator"]) * 6
    expected = [factor for factor in (1.0, 0.1, 0.01) for _ in range(12)]
    assert [rate for _, rate, _ in steps] == pytest.approx([0.1 * factor for factor in expected])
    assert [rate for _, _, rate in steps] == pytest.approx([1e-3 * factor for factor in expected])


def test_cosine_anneals_both_rates_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = method(epochs=2, iterations=2, schedule="cosine")
    rates: list[tuple[float, float]] = []
    original = distiller.generator_step

    def step() -> Any:
        rates.append((distiller.student_optimizer.param_groups[0]["lr"] / 0.1, distiller.generator_optimizer.param_groups[0]["lr"] / 1e-3))
        return original()

    monkeypatch.setattr(distiller, "generator_step", step)
    for epoch in range(2):
        distiller.run_epoch(epoch)
    factors = [1.0, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5]
    assert [student for student, _ in rates] == pytest.approx(factors)
    assert [generator for _, generator in rates] == pytest.approx(factors)


@pytest.mark.parametrize(("reuse", "drawn"), [(1, 10), (2, 6), (5, 2), (9, 2)])
def test_a_batch_is_reused_within_an_iteration(monkeypatch: pytest.MonkeyPatch, reuse: int, drawn: int) -> None:
    distiller = method(epochs=1, iterations=2, batches=BatchRecipe(reuse=reuse))
    batches: list[Any] = []
    seen: list[Tensor] = []
    draw, step = distiller.next_batch, distiller.student_step
    monkeypatch.setattr(distiller, "next_batch", lambda: batches.append(draw()) or batches[-1])
    monkeypatch.setattr(distiller, "student_step", lambda batch: seen.append(batch.images) or step(batch))
    distiller.run_epoch(0)
    assert len(batches) == drawn
    expected = [index // reuse for index in range(5)]
    assert [next(at for at, batch in enumerate(batches) if batch.images is images) for images in seen[:5]] == expected
    assert seen[5] is batches[drawn // 2].images  # the next iteration begins with a new batch


def test_moments_that_are_made_at_once_are_those_of_a_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that takes part for the first time later must start as in an Adam of its own: at step 1, from zero."""
    settings: dict[str, Any] = {"epochs": 1, "iterations": 4, "student_optimizer": "adam", "student_lr": 0.003, "teachers_per_step": 1}
    at_once = method(**settings)
    made = at_once.student_optimizer.state
    assert len(made) == len(list(at_once.student.parameters()))
    assert all(not float(value.abs().sum()) for state in made.values() for value in state.values())
    monkeypatch.setattr(cdfkd_mfs, "_make_moments", lambda optimizer: None)
    lazily = method(**settings)
    assert not lazily.student_optimizer.state
    for distiller in (at_once, lazily):
        distiller.run_epoch(0)
    for mine, theirs in zip(at_once.student.parameters(), lazily.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    steps = {float(state["step"]) for state in at_once.student_optimizer.state.values()}
    assert len(steps) > 1, "headers took part in some of the steps"


def test_adam_and_one_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = method(epochs=2, iterations=10, student_steps=1, student_optimizer="adam", student_lr=0.003, schedule="one_cycle")
    assert type(distiller.student_optimizer) is torch.optim.Adam
    rates: list[tuple[float, float, float]] = []
    original = distiller.generator_step

    def step() -> Any:
        group = distiller.student_optimizer.param_groups[0]
        rates.append((group["lr"] / 0.003, group["betas"][0], distiller.generator_optimizer.param_groups[0]["lr"] / 1e-3))
        return original()

    monkeypatch.setattr(distiller, "generator_step", step)
    for epoch in range(2):
        distiller.run_epoch(epoch)
    assert rates[0] == pytest.approx((0.04, 0.9, 1.0))
    assert rates[2] == pytest.approx((1.0, 0.85, 0.5 + 0.5 * math.cos(math.pi / 10)))  # 15 % of 20 steps, less one
    assert rates[-1][:2] == pytest.approx((0.0, 0.9), abs=1e-6)


def test_a_student_step_moves_only_the_student_and_a_generator_step_only_the_generator() -> None:
    distiller = method()
    assert distiller.generator is not None
    distiller.student.train()
    distiller.generator.train()

    def weights() -> tuple[list[Tensor], list[Tensor]]:
        assert distiller.generator is not None
        return [p.detach().clone() for p in distiller.student.parameters()], [p.detach().clone() for p in distiller.generator.parameters()]

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    student, generator = weights()
    distiller.student_step()
    student_after, generator_after = weights()
    assert same(generator, generator_after)
    assert not same(student, student_after)
    distiller.generator_step()
    assert same(student_after, weights()[0])
    assert not same(generator_after, weights()[1])
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in distiller.generator.parameters())


def test_the_generators_gradient_passes_through_teachers_and_student() -> None:
    distiller = method(mode="paper", bn_weight=0.0)
    images = torch.randn(4, 1, 8, 8, requires_grad=True)
    student, teachers = distiller.student(images), distiller.teachers.observe(images, bn=False)
    both = torch.autograd.grad(distiller.generator_loss(student, teachers)["adversarial"], images, retain_graph=True)[0]
    detached = teachers._replace(logits=teachers.logits.detach())
    through_student = torch.autograd.grad(distiller.generator_loss(student, detached)["adversarial"], images)[0]
    assert not torch.allclose(both, through_student)


def test_teachers_without_batch_norm_leave_the_bn_term_out() -> None:
    with seeded_scope("gn"):
        teachers = TeacherEnsemble([build_classifier("small_cnn_gn", IMAGE)], image=IMAGE)
        student = MultiHeaderStudent("small_cnn", 1, IMAGE)
        distiller = CDFKDMFS(teachers, student, CDFKDMFSConfig.toy(), image=IMAGE, rng=torch.Generator(), runtime=Runtime())
    assert "generator/bn" not in distiller.run_epoch(0)


def test_one_header_per_teacher() -> None:
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        method(heads=2)


@pytest.mark.parametrize(("setting", "value"), [("epochs", 0), ("student_steps", 0), ("batch_size", 1)])
def test_settings_that_cannot_work_are_refused(setting: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"method.{setting} is {value}"):
        CDFKDMFSConfig(**{setting: value})


def test_defaults_are_the_papers_for_cifar_100() -> None:
    config = CDFKDMFSConfig()
    assert (config.epochs, config.iterations, config.student_steps, config.generator_steps, config.batch_size) == (300, 50, 5, 1, 256)
    assert (config.feature_weight, config.ensemble_weight, config.bn_weight, config.first_layer_weight) == (0.2, 5.0, 0.1, 5.0)
    assert (config.student_lr, config.momentum, config.weight_decay, config.generator_lr, config.milestones) == (0.1, 0.9, 5e-4, 1e-3, (100, 200))
    assert config.generator.latent_dim == 256
