"""MAD: an iteration against a plain reference, the moving average by hand, the schedule, and what the checkpoint must hold."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdfkd_strategy import seeding
from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.methods.mad import MAD, MADConfig
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "mad test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, **changes: Any) -> MAD:
    config = dataclasses.replace(MADConfig.toy(), **changes)
    student = tiny_student(heads or count)
    with seeding.seeded_scope(SEED):
        return MAD(
            teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1)
        )  # fmt: skip


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 sum_c p ln(p / q)``, mean over the batch; logits ``[B, C]``."""
    p, q = torch.softmax(teacher / temperature, dim=1), torch.softmax(student / temperature, dim=1)
    return temperature**2 * (p * torch.log(p / q)).sum(dim=1).mean()


def plain_bn(net: nn.Module, images: Tensor) -> Tensor:
    """R_BN, layer by layer through a plain sequence of modules."""
    total, x = torch.zeros((), dtype=images.dtype), images
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            rows = x.transpose(0, 1).flatten(1)
            mean = rows.mean(1)
            variance = ((rows - mean[:, None]) ** 2).mean(1)
            total = total + ((mean - module.running_mean) ** 2).sum().sqrt() + ((variance - module.running_var) ** 2).sum().sqrt()
        x = module(x)
    return total


# -- the formulas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [3, 1])
def test_an_iteration_equals_a_plain_reference(heads: int) -> None:
    """Student and generator steps from the paper's symbols, in float64; the average is written out, and its images are fresh."""
    weights = torch.rand(3, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    weights = (weights / weights.sum(0)).double()
    distiller = build(
        3, heads=heads, teachers=trained_ensemble(3, weights), iterations=1, student_steps=2, generator_steps=2,
        ema_weight=0.7, bn_weight=0.3, temperature=2.0, schedule="constant", batch_size=12,
    )  # fmt: skip
    for network in (distiller.teachers, distiller.student, distiller.generator, distiller.ema_generator):
        network.double()
    distiller.ema_generator.project.weight.data *= 0.5  # its images are its own
    for network in (distiller.generator, distiller.ema_generator):
        network.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    generator, student, average = (copy.deepcopy(net).train() for net in (distiller.generator, distiller.student, distiller.ema_generator))
    nets, rng = [copy.deepcopy(net) for net in distiller.teachers.nets], seeding.generator(SEED)
    student_optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)

    def draw(source: nn.Module) -> Tensor:
        return source(torch.randn(12, 16, generator=rng))

    def divergence(x: Tensor, logits: Tensor) -> Tensor:
        targets = [net(x) for net in nets]
        if heads == 1:
            pooled = sum(share * torch.log(torch.softmax(target, dim=1)) for share, target in zip(weights, targets, strict=True))
            targets = [torch.log(torch.softmax(pooled, dim=1))]
        return sum(kl(target, mine, 2.0) for target, mine in zip(targets, logits, strict=True)) / heads

    expected = {"student/kl": 0.0, "student/ema_kl": 0.0, "generator/adversarial": 0.0, "generator/bn": 0.0}
    for _ in range(2):
        x, past = draw(generator).detach(), draw(average).detach()
        logits = student(torch.cat([x, past])).logits
        now, before = divergence(x, logits[:, :12]), 0.7 * divergence(past, logits[:, 12:])
        student_optimizer.zero_grad()
        (now + before).backward()
        student_optimizer.step()
        expected["student/kl"] += now.item() / 2
        expected["student/ema_kl"] += before.item() / 2
    for _ in range(2):
        x = draw(generator)
        adversarial = -divergence(x, student(x).logits)
        bn = 0.3 * sum(plain_bn(net, x) for net in nets) / 3
        generator_optimizer.zero_grad()
        (adversarial + bn).backward()
        generator_optimizer.step()
        for old, new in zip([*average.parameters(), *average.buffers()], [*generator.parameters(), *generator.buffers()], strict=True):
            old.data = 0.95 * old.data + (1 - 0.95) * new.data if old.is_floating_point() else new.data.clone()
        expected["generator/adversarial"] += adversarial.item() / 2
        expected["generator/bn"] += bn.item() / 2
    assert distiller.run_epoch(0) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(distiller.student.eval()(x).logits, student.eval()(x).logits, rtol=1e-4, atol=1e-4)
    z = torch.randn(12, 16, generator=torch.Generator().manual_seed(7))
    for mine, theirs in ((distiller.generator, generator), (distiller.ema_generator, average)):
        torch.testing.assert_close(mine(z), theirs(z), rtol=1e-3, atol=1e-3)


def test_the_average_covers_parameters_and_buffers() -> None:
    """By hand: 0.95 of what was, and 0.05 of what is; a counter is no average."""
    distiller = build()
    for network, value in ((distiller.ema_generator, 1.0), (distiller.generator, 3.0)):
        for tensor in network.state_dict().values():
            tensor.fill_(value)
    distiller._follow()
    found = distiller.ema_generator.state_dict()
    assert len([name for name in found if "running" in name]) >= 6
    for tensor in found.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 1.1 if tensor.is_floating_point() else 3))


def test_without_weight_the_average_is_not_sampled() -> None:
    distiller = build(ema_weight=0.0)
    asked: list[int] = []
    distiller.ema_generator.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    assert "student/ema_kl" not in distiller.run_epoch(0)
    assert not asked


def test_no_batch_norm_term_for_teachers_without_batch_norm_or_without_weight() -> None:
    assert "generator/bn" not in build(teachers=trained_ensemble(1, group_norm=True)).run_epoch(0)
    assert "generator/bn" not in build(bn_weight=0.0).run_epoch(0)


# -- the schedule --------------------------------------------------------------------------------------------------


def test_steps_and_rates_of_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(epochs=4, iterations=2, student_steps=3, generator_steps=2, schedule="multistep", milestones=(1, 3), student_lr=0.1)
    steps: list[tuple[str, float]] = []
    for name in ("generator", "student"):
        optimizer = getattr(distiller, f"{name}_optimizer")

        def step(name: str = name, optimizer: torch.optim.Optimizer = optimizer, real: Any = optimizer.step) -> None:
            steps.append((name, optimizer.param_groups[0]["lr"]))
            real()

        monkeypatch.setattr(optimizer, "step", step)
    follow = distiller._follow
    monkeypatch.setattr(distiller, "_follow", lambda: (steps.append(("average", 0.0)), follow())[0])
    assert distiller.num_epochs == 4
    for epoch, factor in enumerate((1.0, 0.1, 0.1, 0.01)):
        steps.clear()
        distiller.run_epoch(epoch)
        assert [name for name, _ in steps] == (["student"] * 3 + ["generator", "average"] * 2) * 2
        assert [rate for name, rate in steps if name == "student"] == pytest.approx([0.1 * factor] * 6)
        assert [rate for name, rate in steps if name == "generator"] == pytest.approx([1e-3 * factor] * 4)


def test_the_average_lags_behind_and_is_in_the_checkpoint() -> None:
    distiller = build()
    distiller.run_epoch(0)
    assert state_hash(distiller.ema_generator.state_dict()) != state_hash(distiller.generator.state_dict())
    assert not any(parameter.requires_grad for parameter in distiller.ema_generator.parameters())
    other = build(heads=1)
    other.load_state_dict(copy.deepcopy(distiller.state_dict()))
    assert state_hash(other.ema_generator.state_dict()) == state_hash(distiller.ema_generator.state_dict())


# -- students and settings -----------------------------------------------------------------------------------------


def test_another_number_of_headers_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        build(3, heads=2).run_epoch(0)


def test_the_average_of_the_paper_is_the_default() -> None:
    assert (MADConfig().ema_decay, MADConfig().ema_weight) == (0.95, 1.0)
    assert MAD.needs.disclosed() == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_steps": 0}, "student_steps is 0; accepted: at least 1"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; accepted: at least 0 and below 1"),
        ({"ema_weight": -1.0}, "ema_weight is -1.0; accepted: at least 0"),
        ({"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_settings_that_cannot_work_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(MADConfig(), **change)
