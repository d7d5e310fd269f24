"""Methods that distil over a pool show the same views of its images to student and teachers, or the images themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from cdfkd_strategy import seeding
from cdfkd_strategy.data.augmentation import RandomViews
from cdfkd_strategy.methods import get_method
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import Extras, StudentOutputs
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble


class Watched(nn.Module):
    """Remembers what the student sees."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student, self.seen = student, [torch.zeros(0)][:0]

    def forward(self, x: Tensor) -> StudentOutputs:
        self.seen.append(x.detach().clone())
        outputs: StudentOutputs = self.student(x)
        return outputs


def same_images(left: Tensor, right: Tensor) -> list[bool]:
    return [bool((right - row).abs().amax((1, 2, 3)).min() < 1e-5) for row in left]


@pytest.mark.parametrize("augment", ["auto", "none"])
@pytest.mark.parametrize("name", ["zskd", "soft_targets", "deep_inversion", "kd"])
def test_student_and_teachers_see_the_same_views(name: str, augment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = get_method(name)
    assert method.Config().augment == "auto"
    images = torch.randn(60, *DIGITS.shape, generator=torch.Generator().manual_seed(1))
    extras = {"extras": Extras(proxy_data=images)} if name == "kd" else {}
    student, config = Watched(tiny_student(1)), dataclasses.replace(method.Config.toy(), augment=augment)
    distiller = method(trained_ensemble(1), student, config, image=DIGITS, rng=seeding.generator(1), runtime=Runtime(threads=1), **extras)
    last = distiller.num_epochs - 1
    for epoch in range(last):
        distiller.run_epoch(epoch)
    student.seen.clear()
    asked: list[Tensor] = []
    forward = TeacherEnsemble.forward
    monkeypatch.setattr(TeacherEnsemble, "forward", lambda self, images: (asked.append(images.clone()), forward(self, images))[1])
    distiller.run_epoch(last)
    pool = distiller.distillation.pool  # type: ignore[attr-defined]
    known = pool.at(torch.arange(len(pool)))
    steps = [seen for seen in student.seen if len(seen) == config.batch_size]
    assert len(steps) == config.iterations
    if augment == "none":
        assert asked == []
        assert all(all(same_images(batch, known)) for batch in steps)
    else:
        torch.testing.assert_close(torch.stack(asked), torch.stack(steps))
        assert not all(same_images(steps[0], known))


@pytest.mark.parametrize("name", ["deep_inversion", "zskd", "soft_targets"])
def test_views_show_parts_of_the_images_where_that_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = get_method(name)
    areas: list[float] = []
    zoom = RandomViews.zoom
    monkeypatch.setattr(RandomViews, "zoom", lambda self, images, area: (areas.append(area), zoom(self, images, area))[1])
    config = dataclasses.replace(method.Config.toy(), least_area=0.4)
    student = Watched(tiny_student(1))
    distiller = method(trained_ensemble(1), student, config, image=DIGITS, rng=seeding.generator(1), runtime=Runtime(threads=1))
    for epoch in range(distiller.num_epochs):
        distiller.run_epoch(epoch)
    assert areas == [0.4] * (config.epochs * config.iterations)
    pool = distiller.distillation.pool  # type: ignore[attr-defined]
    moved = [RandomViews(DIGITS, "crop", None, seeding.generator(seed)).crop(pool.at(torch.arange(len(pool)))) for seed in range(40)]
    assert not any(same_images(student.seen[-1], torch.cat(moved))), "no image is only shifted"
    areas.clear()
    still = method(trained_ensemble(1), tiny_student(1), dataclasses.replace(config, augment="none"), image=DIGITS, rng=seeding.generator(1), runtime=Runtime())
    for epoch in range(still.num_epochs):
        still.run_epoch(epoch)
    assert areas == []


def test_a_view_is_shifted_by_an_eighth_of_the_side_at_most() -> None:
    for side, most in ((8, 1), (28, 3), (32, 4), (224, 28)):
        assert RandomViews(dataclasses.replace(DIGITS, height=side, width=side + 5), "crop", None, torch.Generator()).padding == most
