from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cdfkd_strategy import seeding
from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.image_optimisation import clipped, optimise_pixels, stretched
from cdfkd_strategy.methods import get_method, soft_targets, zskd
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

START = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
GOAL = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 - 1


def test_pixels_move_as_adam_moves_them_and_stay_pixels() -> None:
    """Adam written out, with the bound after every step; the terms are those that the last step saw."""
    x, m, v = START.double(), torch.zeros(START.shape).double(), torch.zeros(START.shape).double()
    last = 0.0
    for step in range(1, 6):
        last = float(((x - GOAL) ** 2).sum() + x.sum())
        gradient = 2 * (x - GOAL) + 1
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x - 0.2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)) ** 0.5 + 1e-8)
        x = x.clamp(0, 1)
    before = START.clone()

    def loss(pixels: Tensor) -> Mapping[str, Tensor]:
        return {"near": ((pixels - GOAL) ** 2).sum(), "dark": pixels.sum()}

    found, terms = optimise_pixels(START, loss, steps=5, lr=0.2, bounded=clipped)
    torch.testing.assert_close(found, x.float(), rtol=1e-4, atol=1e-5)
    assert abs(float(sum(terms.values())) - last) < 1e-2
    assert torch.equal(START, before)
    assert not found.requires_grad
    assert (found == 0).any()
    assert (found == 1).any()


def test_a_batch_is_stretched_as_a_whole() -> None:
    found = stretched(torch.tensor([[-1.0, 1.0], [0.0, 3.0]]))
    assert torch.equal(found, torch.tensor([[0.0, 0.5], [0.25, 1.0]]))
    assert torch.equal(stretched(torch.full((2, 2), 0.3)), torch.zeros(2, 2))


def build(name: str, **changes: Any) -> Any:
    method: type[Distiller] = get_method(name)
    config = dataclasses.replace(method.Config.toy(), rounds=1, image_steps=3, image_batch=20, **changes)
    return method(trained_ensemble(1), tiny_student(1), config, image=DIGITS, rng=seeding.generator(1), runtime=Runtime(threads=1))


@pytest.mark.parametrize("name", ["zskd", "soft_targets"])
def test_free_pixels_start_as_noise_decay_and_are_clipped_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(name, pixels="free", pixel_decay=0.2, image_lr=0.5, **({"start": "uniform"} if name == "soft_targets" else {}))
    given: list[Tensor] = []
    looked: list[Tensor] = []
    forward = TeacherEnsemble.forward

    def watched(pixels: Tensor, *arguments: Any, **named: Any) -> Any:
        assert torch.equal(named["bounded"](pixels * 3), pixels * 3)
        final, terms = optimise_pixels(pixels, *arguments, **named)
        given.extend((pixels.clone(), final.clone()))
        return final, terms

    monkeypatch.setattr({"zskd": zskd, "soft_targets": soft_targets}[name], "optimise_pixels", watched)
    monkeypatch.setattr(TeacherEnsemble, "forward", lambda self, images: (looked.append(images), forward(self, images))[1])
    distiller.run_epoch(0)
    start, final = given
    assert (float(start.mean()), float(start.std())) == pytest.approx((0.0, 1.0), abs=0.1)
    assert float(final.min()) < -0.5
    assert float(final.max()) > 1.5
    torch.testing.assert_close(looked[-1], DIGITS.normalise(final.clamp(0, 1)))  # what is measured is what is stored
    torch.testing.assert_close(distiller.pool.at(torch.arange(20)), DIGITS.normalise(final.clamp(0, 1)), atol=0.01, rtol=0)
    targets = distiller.targets(0)
    expected = sum(0.1 * float((image**2).sum()) for image in start) / 20
    assert float(distiller.image_loss(start, targets)["images/decay"]) == pytest.approx(expected, rel=1e-5)
    assert "images/decay" not in build(name).image_loss(start, targets)
