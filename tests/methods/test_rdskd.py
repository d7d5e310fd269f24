"""RDSKD against a plain reference of its two stages, its schedule, and its numerical corners."""

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
from cdfkd_strategy.methods.rdskd import RDSKD, RDSKDConfig
from cdfkd_strategy.models.generators import GeneratorConfig
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "rdskd test"


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, **changes: Any) -> RDSKD:
    config = dataclasses.replace(RDSKDConfig.toy(), **changes)
    student = tiny_student(heads or count)
    with seeding.seeded_scope(SEED):
        return RDSKD(
            teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=Runtime(channels_last=False, threads=1)
        )  # fmt: skip


def same_images(mine: nn.Module, theirs: nn.Module) -> None:
    """Compares what comes out: Adam turns the rounding noise of gradients that should be 0 (biases before BatchNorm) into weights."""
    z = torch.randn(64, mine.latent_dim, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(mine.train()(z), theirs.train()(z), rtol=1e-2, atol=1e-2)


# -- the formulas --------------------------------------------------------------------------------------------------


def frobenius(difference: Tensor) -> Tensor:
    return (difference**2).sum() ** 0.5


@pytest.mark.parametrize(("count", "factors"), [(1, (1.0, 1.0, 1.0)), (3, (1.0, 1.0, 1.0)), (1, (0.1, 3.0, 10.0))])
def test_stage_a_equals_a_plain_reference(count: int, factors: tuple[float, float, float]) -> None:
    """Two epochs written from the paper's symbols: softmax and log, the quotient as it stands, references as floats; losses are means over teachers."""
    distiller = build(count, generator_epochs=2, **dict(zip(("one_hot_factor", "entropy_factor", "diversity_factor"), factors, strict=True)))
    config = distiller.config
    generator, rng = copy.deepcopy(distiller.generator), seeding.generator(SEED)
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.generator_lr)
    one_hot_reference = entropy_reference = 0.0
    rows = []
    for _epoch in range(2):
        sums = [0.0, 0.0, 0.0]
        for iteration in range(config.iterations):
            x = generator(torch.randn(config.batch_size, config.generator.latent_dim, generator=rng))
            one_hot = entropy = diversity = 0.0
            for teacher in distiller.teachers.nets:
                p = torch.softmax(teacher(x), dim=1)
                mean = p.mean(dim=0)
                x1, x2 = x.chunk(2)
                p1, p2 = p.chunk(2)
                one_hot = one_hot - torch.log(p.max(dim=1).values).mean() / count
                entropy = entropy + (mean * torch.log(mean)).sum() / count
                diversity = diversity + 1 / (frobenius(x2 - x1) / frobenius(p2 - p1) + 1e-20) / count
            terms = [torch.exp(one_hot - one_hot_reference), torch.exp(entropy - entropy_reference), diversity]
            terms = [factor * term for factor, term in zip(factors, terms, strict=True)]
            optimizer.zero_grad()
            (terms[0] + terms[1] + terms[2]).backward()
            optimizer.step()
            if iteration == 1:
                one_hot_reference, entropy_reference = one_hot.item(), entropy.item()
            sums = [total + term.item() for total, term in zip(sums, terms, strict=True)]
        rows.append([total / config.iterations for total in sums])
    mine = [list(distiller.run_epoch(epoch).values()) for epoch in range(2)]
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(rows), rtol=1e-3, atol=1e-4)
    assert float(distiller.reference_one_hot) == pytest.approx(one_hot_reference, rel=1e-3)
    assert float(distiller.reference_entropy) == pytest.approx(entropy_reference, rel=1e-3)
    same_images(distiller.generator, generator)


@pytest.mark.parametrize(("heads", "own_batch"), [(3, None), (1, None), (3, 8)])
def test_stage_b_equals_a_plain_reference(heads: int, own_batch: int | None) -> None:
    """Header k learns teacher k; a single one learns the ensemble fused with the class weights. It may have a batch size of its own."""
    weights = torch.rand(3, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    distiller = build(3, heads=heads, teachers=trained_ensemble(3, weights), student_batch_size=own_batch)
    distiller.run_epoch(0)
    config = distiller.config
    generator, student = copy.deepcopy(distiller.generator).eval(), copy.deepcopy(distiller.student).train()
    rng = torch.Generator()
    rng.set_state(distiller.rng.get_state())
    optimizer = torch.optim.Adam(student.parameters(), lr=config.student_lr)
    total = 0.0
    for _ in range(config.iterations):
        x = generator(torch.randn(own_batch or config.batch_size, config.generator.latent_dim, generator=rng)).detach()
        logits, loss = student(x).logits, 0.0
        targets = [teacher(x) for teacher in distiller.teachers.nets]
        if heads == 1:
            pooled = sum(share * torch.log(torch.softmax(target, dim=1)) for share, target in zip(weights / weights.sum(0), targets, strict=True))
            targets = [torch.log(torch.softmax(pooled, dim=1))]
        for k, target in enumerate(targets):
            p = torch.softmax(target / 10, dim=1)
            q = torch.softmax(logits[k] / 10, dim=1)
            loss = loss + 100 * (p * torch.log(p / q)).sum(dim=1).mean() / heads
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    assert distiller.run_epoch(config.generator_epochs)["student/kl"] == pytest.approx(total / config.iterations, rel=1e-3)
    torch.testing.assert_close(distiller.student.eval()(x).logits, student.eval()(x).logits, rtol=1e-2, atol=1e-2)


def test_the_exponentials_are_bounded_by_the_number_of_classes() -> None:
    """Why they need no clamp, at the worst: a teacher that is certain of one class, after one that knew nothing, and the reverse."""
    confident = torch.nn.functional.one_hot(torch.zeros(8, dtype=torch.long), 10) * 1e4

    class Constant(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, x: Tensor) -> Tensor:
            return self.logits + 0 * x.flatten(1).sum(1, keepdim=True)

    for first, then in ((confident, 0 * confident), (0 * confident, confident)):
        constant = Constant(first)
        distiller = build(teachers=TeacherEnsemble([constant], image=DIGITS), batch_size=8)
        distiller.run_epoch(0)
        constant.logits = then
        terms = distiller.run_epoch(1)
        assert all(math.isfinite(value) and 0 <= value <= 10.001 for value in terms.values())
        assert all(torch.isfinite(tensor).all() for tensor in distiller.generator.state_dict().values())


# -- the schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "falling"), [("constant", [1.0] * 6), ("cosine", [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)])])
def test_steps_and_rates_of_every_epoch(schedule: str, falling: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(generator_epochs=2, generator_schedule=schedule, student_epochs=4, student_milestones=(1, 3), iterations=3)
    steps: list[tuple[str, float]] = []
    for name in ("generator", "student"):
        optimizer = getattr(distiller, f"{name}_optimizer")

        def step(name: str = name, optimizer: torch.optim.Optimizer = optimizer, real: Any = optimizer.step) -> None:
            steps.append((name, optimizer.param_groups[0]["lr"]))
            real()

        monkeypatch.setattr(optimizer, "step", step)
    assert distiller.num_epochs == 6
    expected = [("generator", [1e-3 * share for share in shares]) for shares in (falling[:3], falling[3:])]
    expected += [("student", [rate] * 3) for rate in (2e-3, 2e-4, 2e-4, 2e-5)]
    for epoch, (name, rates) in enumerate(expected):
        steps.clear()
        distiller.run_epoch(epoch)
        assert [stepped for stepped, _ in steps] == [name] * 3
        assert [value for _, value in steps] == pytest.approx(rates)


def test_each_stage_leaves_the_other_network_alone() -> None:
    distiller = build()
    student = state_hash(distiller.student.state_dict())
    distiller.run_epoch(0)
    distiller.run_epoch(1)
    assert state_hash(distiller.student.state_dict()) == student
    assert distiller.generator.training
    generator = state_hash(distiller.generator.state_dict())
    distiller.run_epoch(2)
    assert state_hash(distiller.generator.state_dict()) == generator  # its BatchNorm statistics too
    assert not distiller.generator.training
    assert distiller.student.training


def test_samples_are_what_the_running_stage_sees() -> None:
    distiller = build()
    distiller.run_epoch(0)
    z = torch.randn(6, distiller.config.generator.latent_dim, generator=seeding.generator("look"))

    def expected(training: bool) -> Tensor:
        with torch.no_grad():
            return copy.deepcopy(distiller.generator).train(training)(z)

    assert torch.equal(distiller.sample(6, seeding.generator("look")), expected(training=True))
    distiller.run_epoch(2)
    assert torch.equal(distiller.sample(6, seeding.generator("look")), expected(training=False))
    resumed = build()
    resumed.load_state_dict(copy.deepcopy(distiller.state_dict()))
    assert torch.equal(resumed.sample(6, seeding.generator("look")), expected(training=False))


# -- students and settings -----------------------------------------------------------------------------------------


def test_another_number_of_headers_is_an_error() -> None:
    distiller = build(3, heads=2)
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        distiller.run_epoch(2)


def test_nothing_beyond_the_weights_is_disclosed() -> None:
    assert RDSKD.needs.disclosed() == ()


def test_the_defaults_are_the_authors_for_cifar10() -> None:
    config = RDSKDConfig()
    assert (config.generator_epochs, config.student_epochs, config.iterations, config.batch_size) == (20, 1000, 120, 512)
    assert (config.generator_lr, config.student_lr, config.student_milestones, config.temperature) == (1e-3, 2e-3, (800,), 10.0)
    assert (config.one_hot_factor, config.entropy_factor, config.diversity_factor) == (1.0, 1.0, 1.0), "the method has no weights"
    assert config.generator == GeneratorConfig(latent_dim=1000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 1}, "iterations is 1; accepted: at least 2"),
        ({"batch_size": 33}, "an even number"),
        ({"batch_size": 2}, "at least 4"),
        ({"student_batch_size": 1}, "student_batch_size is 1; accepted: at least 2"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"diversity_factor": -1.0}, "diversity_factor is -1.0; accepted: at least 0"),
    ],
)
def test_settings_that_cannot_work_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(RDSKDConfig(), **change)
