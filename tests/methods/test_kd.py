"""The upper bound: the loss and schedule against a plain reference, and where the real images are not."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cdfkd_strategy import seeding
from cdfkd_strategy.engine import SYNTHETIC_FILE, distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.errors import ConfigError, NeedsError
from cdfkd_strategy.methods.kd import KD, KDConfig
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import Extras
from tests.methods.trained_teachers import DIGITS, digits, tiny_student, trained_ensemble

SEED = "kd test"
IMAGES = DIGITS.normalise((DIGITS.to_pixels(digits().x_train[:60]) * 255).round() / 255)
"""Images that bytes can hold."""


def build(count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, extras: Extras | None = None, **changes: Any) -> KD:
    config = dataclasses.replace(KDConfig.toy(), **{"augment": "none", **changes})
    runtime = Runtime(channels_last=False, threads=1)
    student, given = tiny_student(heads or count), extras or Extras(proxy_data=IMAGES)
    return KD(teachers or trained_ensemble(count), student, config, image=DIGITS, rng=seeding.generator(SEED), runtime=runtime, extras=given)


@pytest.mark.parametrize("heads", [3, 1])
def test_every_epoch_equals_a_plain_reference(heads: int) -> None:
    """SGD at the rate of its epoch on random batches of the images, at T = 4; rates fall at the milestone."""
    weights = torch.rand(3, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    distiller = build(3, heads=heads, teachers=trained_ensemble(3, weights), temperature=4.0, epochs=3, iterations=4, student_milestones=(1,))
    student, rng = copy.deepcopy(distiller.student).train(), seeding.generator(SEED)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    assert distiller.num_epochs == 3
    for epoch, rate in enumerate((0.1, 0.01, 0.01)):
        optimizer.param_groups[0]["lr"] = rate
        total = 0.0
        for _ in range(4):
            x = IMAGES[torch.randperm(60, generator=rng)[:32]]
            logits, loss = student(x).logits, 0.0
            targets = [net(x) for net in distiller.teachers.nets]
            if heads == 1:
                targets = [sum(share * torch.log(torch.softmax(target, dim=1)) for share, target in zip(weights / weights.sum(0), targets, strict=True))]
            for k, target in enumerate(targets):
                p, q = torch.softmax(torch.log_softmax(target, dim=1) / 4, dim=1), torch.softmax(logits[k] / 4, dim=1)
                loss = loss + 16 * (p * torch.log(p / q)).sum(dim=1).mean() / heads
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        assert distiller.run_epoch(epoch)["student/kl"] == pytest.approx(total / 4, rel=1e-3)
        assert distiller.student_optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_the_teachers_are_asked_once_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    forward = TeacherEnsemble.forward
    monkeypatch.setattr(TeacherEnsemble, "forward", lambda self, images: (asked.append(len(images)), forward(self, images))[1])
    distiller = build(epochs=3)
    for epoch in range(3):
        distiller.run_epoch(epoch)
    assert sum(asked) == len(IMAGES)


def test_real_images_are_in_no_file_of_the_run(tmp_path: Path) -> None:
    given = Extras(proxy_data=IMAGES)
    distill(trained_ensemble(1), tiny_student(1), "kd", config=KDConfig.toy(), extras=given, out=tmp_path, engine=EngineConfig(device="cpu", progress=False))
    state = build().state_dict()
    assert set(state) == {"student", "student_optimizer", "rng"}
    pixels = (DIGITS.to_pixels(IMAGES[:1]) * 255).round().to(torch.uint8).numpy().tobytes()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert not [path for path in files if pixels in path.read_bytes() or IMAGES[:1].numpy().tobytes() in path.read_bytes()]
    assert not (tmp_path / SYNTHETIC_FILE).exists()


def test_without_images_nothing_begins() -> None:
    assert KD.needs.disclosed() == ("proxy_data",)
    with pytest.raises(NeedsError, match="'kd' needs real images at the server, which this run does not have"):
        build(extras=Extras(label_counts=torch.ones(1, 10)))
    with pytest.raises(NeedsError, match="real images at the server"):
        distill(trained_ensemble(1), tiny_student(1), "kd", config=KDConfig.toy())


@pytest.mark.parametrize("change", [{"epochs": 0}, {"iterations": 0}, {"batch_size": 1}, {"temperature": 0.0}])
def test_settings_that_cannot_work_are_errors(change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        dataclasses.replace(KDConfig(), **change)
