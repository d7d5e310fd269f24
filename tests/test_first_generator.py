"""A distillation whose generator starts from an earlier one: it does, its average too, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

from cdfkd_strategy.engine import distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.methods import get_method
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.generators import build_generator
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.seeding import seeded_scope
from cdfkd_strategy.synthetic_batches import BatchRecipe
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(1, 8, 8, 3)


def started(method: str, state: Mapping[str, Tensor], **choices: Any) -> None:
    cls = get_method(method)
    with seeded_scope("networks"):
        teachers = TeacherEnsemble([build_classifier("lenet_bn", IMAGE)], image=IMAGE)
        student = MultiHeaderStudent("lenet_bn", 1, IMAGE)
    config = dataclasses.replace(cls.Config.toy(), **choices)
    distill(teachers, student, cls, config=config, engine=EngineConfig(device="cpu", progress=False, watch_images=0), first_generator=state)


def earlier(method: str, **choices: Any) -> dict[str, Tensor]:
    config = dataclasses.replace(get_method(method).Config.toy().generator, **choices)
    with seeded_scope("another"):
        return dict(build_generator(IMAGE, config).state_dict())


@pytest.mark.parametrize(
    ("method", "average", "choices"),
    [("cdfkd_mfs", "batches.averaged", {"batches": BatchRecipe(average=0.5)}), ("mad", "ema_generator", {}), ("dfad", "generator", {})],
)
def test_generator_and_average_start_where_they_are_told_to(method: str, average: str, choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def look(self: Any, epoch: int) -> Mapping[str, float]:
        seen.append([state_hash(network.state_dict()) for network in (self.generator, operator.attrgetter(average)(self))])
        return {}

    monkeypatch.setattr(get_method(method), "run_epoch", look)
    first = earlier(method)
    started(method, first, **choices)
    assert seen[0] == [state_hash(first)] * 2


def test_what_cannot_start_from_a_generator_says_so() -> None:
    with pytest.raises(ConfigError, match="has not the shape of this run's; accepted: one of method 'dfad' with the same"):
        started("dfad", earlier("dfad", latent_dim=3))
    with pytest.raises(ConfigError, match="'zskd' has no generator that could start"):
        started("zskd", {})
    with pytest.raises(ConfigError, match="'cmi' has no generator that could start"):
        started("cmi", earlier("cmi"))
