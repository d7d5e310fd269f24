"""Fresh, averaged and replayed images, with a generator whose images say which z and which weights made them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.synthetic_batches import BatchRecipe, SyntheticBatches
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(1, 4, 4, 2, mean=(0.0,), std=(1.0,))
SIZE = 8


class Constant(nn.Module):
    """Every image is one number, its only weight; the buffer counts calls."""

    latent_dim = 3

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.value.expand(len(z), *IMAGE.shape)


def batches(generator: nn.Module, **recipe: float) -> SyntheticBatches:
    return SyntheticBatches(generator, BatchRecipe(**recipe), SIZE, IMAGE, Runtime())  # type: ignore[arg-type]


def values(images: Tensor) -> list[float]:
    assert images.shape == (SIZE, *IMAGE.shape)
    assert not images.requires_grad
    return sorted(round(float(image.mean()), 4) for image in images)


def test_the_default_is_fresh_images_of_the_same_z() -> None:
    rng, same = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    generator = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    generator.latent_dim = 3  # type: ignore[assignment]
    plain = batches(generator)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(plain.next(rng), generator(torch.randn(SIZE, 3, generator=same)))
    plain.generator_moved()
    assert plain.state_dict() == {}


def test_half_of_the_fresh_images_come_from_the_average() -> None:
    generator = Constant(1.0)
    averaged = batches(generator, average=0.75)
    expected = 1.0
    for value in (0.0, 0.5, 0.9):
        generator.value.data.fill_(value)
        averaged.generator_moved()
        expected = 0.75 * expected + 0.25 * value
        assert values(averaged.next(torch.Generator())) == pytest.approx(sorted([value] * 4 + [expected] * 4), abs=1e-4)
    assert averaged.averaged is not None
    averaged.generator_moved()
    assert float(averaged.averaged.calls) == float(generator.calls) == 3
    assert not any(parameter.requires_grad for parameter in averaged.averaged.parameters())


def test_earlier_images_are_replayed_and_capped() -> None:
    generator, rng = Constant(0.0), torch.Generator().manual_seed(0)
    replayed = batches(generator, replay_size=10, replay_share=0.25)
    assert values(replayed.next(rng)) == [0.0] * 8  # there are no earlier ones yet
    generator.value.data.fill_(1.0)
    assert values(replayed.next(rng)) == [0.0] * 2 + [1.0] * 6
    assert replayed.pool is not None
    assert len(replayed.pool) == 10  # 8 of the first batch and 6 of the second, without the oldest 4
    assert values(replayed.pool.at(torch.arange(8)))[:4] == [0.0] * 4
    generator.value.data.fill_(0.2)
    for _ in range(3):
        replayed.next(rng)
    assert set(values(replayed.next(rng))) == {0.2}


def test_two_images_of_a_batch_are_always_fresh() -> None:
    """The generator's BatchNorm has no statistics of fewer, one for each of generator and average."""
    generator, rng = Constant(0.0), torch.Generator().manual_seed(0)
    replayed = batches(generator, average=0.5, replay_size=10, replay_share=0.99)
    replayed.next(rng)
    generator.value.data.fill_(1.0)
    replayed.generator_moved()
    assert values(replayed.next(rng)) == pytest.approx([0.0] * 6 + [0.5, 1.0], abs=1e-2)


def test_the_state_goes_on_exactly() -> None:
    first = batches(Constant(0.3), average=0.5, replay_size=6)
    rng = torch.Generator().manual_seed(1)
    first.next(rng)
    first.generator.value.data.fill_(0.9)
    first.generator_moved()
    other = batches(copy.deepcopy(first.generator), average=0.5, replay_size=6)
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    same = torch.Generator()
    same.set_state(rng.get_state())
    for _ in range(3):
        assert torch.equal(first.next(rng), other.next(same))


@pytest.mark.parametrize(
    ("setting", "value"), [("reuse", 0), ("average", 1.0), ("average", -0.1), ("replay_size", -1), ("replay_share", 0.0), ("replay_share", 1.0)]
)
def test_recipes_that_cannot_work_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"method\.batches\.{setting} is {value}; accepted: "):
        BatchRecipe(**{setting: value})  # type: ignore[arg-type]


def test_the_average_is_sampled_in_train_mode_as_the_generator_is() -> None:
    """Its images are standardised over their batch, whatever its running statistics are."""
    generator = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16, affine=False), nn.Unflatten(1, (1, 4, 4)))
    generator.latent_dim = 3  # type: ignore[assignment]
    generator[1].running_mean.fill_(5.0)  # type: ignore[union-attr, operator]
    averaged = batches(generator, average=0.5)
    averaged.averaged.eval()  # type: ignore[union-attr]
    images = averaged.next(torch.Generator().manual_seed(0))
    assert images[SIZE // 2 :].mean(0).abs().max() < 1e-5
