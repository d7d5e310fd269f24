"""One header distilled from all: the trunk stays, the answer approaches the fused one, the seed decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cdfkd_strategy import seeding
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.models.head_fusion import class_weights, fuse
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.single_header import distill_single_header
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(1, 8, 8, 4)
RUNTIME = Runtime(threads=1)


def noise(count: int, rng: torch.Generator) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=rng)


@pytest.fixture
def student() -> MultiHeaderStudent:
    with seeding.seeded_scope("test"):
        student = MultiHeaderStudent("lenet_bn", 3, IMAGE)
        for header in student.headers:
            torch.nn.init.normal_(header.classifier.weight, std=2.0)  # heads that disagree
    return student.eval()


WEIGHTS = torch.tensor([[1.0, 0, 0.2, 3], [0, 1, 0.3, 1], [0, 0.5, 0.5, 0]])


def distance(single: MultiHeaderStudent, student: MultiHeaderStudent) -> float:
    images = noise(200, torch.Generator().manual_seed(99))
    with torch.no_grad():
        target = fuse(student(images).logits, class_weights(WEIGHTS, 3, 4))
        return float(kl_divergence(single(images).logits[0].log_softmax(1), target))


def train(student: MultiHeaderStudent, steps: int, seed: int = 0) -> MultiHeaderStudent:
    return distill_single_header(student, WEIGHTS, noise, steps=steps, batch_size=32, lr=0.01, rng=torch.Generator().manual_seed(seed), runtime=RUNTIME)


def test_it_approaches_the_fused_heads_on_an_untouched_trunk(student: MultiHeaderStudent) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    barely, trained = train(student, 1), train(student, 80)
    assert trained.heads == 1
    assert not any(part.training for part in trained.modules())
    assert distance(trained, student) < 0.5 * distance(barely, student)
    after = student.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(trained.state_dict()[name], tensor) for name, tensor in before.items() if not name.startswith("headers."))
    assert trained.spec.heads == 1
    trained.spec.build().load_state_dict(trained.state_dict())


def test_the_header_is_fresh_and_the_seed_decides(student: MultiHeaderStudent) -> None:
    one, two, other = train(student, 2), train(student, 2), train(student, 2, seed=1)
    key = "headers.0.classifier.weight"
    assert torch.equal(one.state_dict()[key], two.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])
    assert float((one.state_dict()[key] - student.state_dict()[key]).abs().mean()) > 0.5  # not the first header, warmed up


def test_absurd_settings_are_refused(student: MultiHeaderStudent) -> None:
    with pytest.raises(ConfigError, match="0 steps"):
        train(student, 0)
