"""Fresh, averaged and replayed images, with a generator whose images say which z and which weights made them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.synthetic_batches import BatchRecipe, SyntheticBatches
from cdfkd_strategy.types import ImageSpec, TeacherOutputs

IMAGE = ImageSpec(1, 4, 4, 2, mean=(0.0,), std=(1.0,))
SIZE, TEACHERS = 8, 4


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


def batches(generator: nn.Module, *, features: bool = True, **recipe: float) -> SyntheticBatches:
    return SyntheticBatches(generator, BatchRecipe(**recipe), SIZE, TEACHERS, Runtime(), features=features)  # type: ignore[arg-type]


class Asked:
    """Teacher k of an image that is v all over: logits (v + k, -v), features 10 v + k; the last one has no features."""

    def __init__(self, *teachers: int) -> None:
        self.teachers = list(teachers or range(TEACHERS))
        self.images = 0

    def __call__(self, images: Tensor) -> TeacherOutputs:
        self.images += len(images)
        value = images.mean((1, 2, 3))
        logits = torch.stack([torch.stack([value + k, -value], 1) for k in self.teachers])
        features = tuple(None if k == TEACHERS - 1 else (10 * value + k)[:, None] for k in self.teachers)
        return TeacherOutputs(logits, features, tuple(None for _ in self.teachers))


def following(made: SyntheticBatches, rng: torch.Generator, *teachers: int) -> Tensor:
    """The next images, whose answers must be those of the teachers that were asked for, whenever they were asked."""
    asked = Asked(*teachers)
    images, answers = made.next(asked, asked.teachers, rng)
    expected = Asked(*teachers)(images)
    assert torch.allclose(answers.logits, expected.logits)
    if made.replay is None or made.replay.features:
        for mine, theirs in zip(answers.features, expected.features, strict=True):
            assert (mine is None and theirs is None) or torch.allclose(mine, theirs)  # type: ignore[arg-type]
    return images


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
            assert torch.equal(following(plain, rng), generator(torch.randn(SIZE, 3, generator=same)))
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
        assert values(following(averaged, torch.Generator())) == pytest.approx(sorted([value] * 4 + [expected] * 4), abs=1e-4)
    assert averaged.averaged is not None
    averaged.generator_moved()
    assert float(averaged.averaged.calls) == float(generator.calls) == 3
    assert not any(parameter.requires_grad for parameter in averaged.averaged.parameters())


def test_earlier_images_are_replayed_and_capped() -> None:
    generator, rng = Constant(0.0), torch.Generator().manual_seed(0)
    replayed = batches(generator, replay_size=10, replay_share=0.25)
    assert values(following(replayed, rng)) == [0.0] * 8  # there are no earlier ones yet
    generator.value.data.fill_(1.0)
    assert values(following(replayed, rng)) == [0.0] * 2 + [1.0] * 6
    assert replayed.replay is not None
    assert len(replayed.replay) == 10  # 8 of the first batch and 6 of the second, without the oldest 4
    kept, _ = replayed.replay.draw(10, [0], rng) or pytest.fail("nothing is kept")
    assert sorted(float(image.mean()) for image in kept) == [0.0] * 4 + [1.0] * 6
    generator.value.data.fill_(-3.7)  # beyond the range of pixels, and kept as it is
    for _ in range(3):
        following(replayed, rng)
    assert set(values(following(replayed, rng))) == {-3.7}


def test_teachers_are_asked_for_fresh_images_only() -> None:
    replayed, rng, asked = batches(Constant(0.5), replay_size=64, replay_share=0.75), torch.Generator().manual_seed(0), Asked()
    for expected in (8, 10, 12):
        replayed.next(asked, asked.teachers, rng)
        assert asked.images == expected


def test_images_come_back_for_teachers_that_have_seen_them() -> None:
    generator, rng = Constant(0.1), torch.Generator().manual_seed(0)
    replayed = batches(generator, replay_size=32, replay_share=0.5)
    following(replayed, rng, 0, 1, 3)
    generator.value.data.fill_(0.2)
    assert values(following(replayed, rng, 1, 2)) == [0.2] * 8, "teacher 2 has seen none"
    generator.value.data.fill_(0.3)
    assert values(following(replayed, rng, 0, 3)) == [0.1] * 4 + [0.3] * 4
    assert set(values(following(replayed, rng, 1))) <= {0.1, 0.2, 0.3}


def test_slots_that_are_used_again_belong_to_their_new_teachers() -> None:
    generator, rng = Constant(0.1), torch.Generator().manual_seed(0)
    replayed = batches(generator, replay_size=SIZE, replay_share=0.5)
    following(replayed, rng, 0, 1)
    generator.value.data.fill_(0.2)
    following(replayed, rng, 2)  # in the place of all that teachers 0 and 1 have seen
    generator.value.data.fill_(0.3)
    assert values(following(replayed, rng, 0)) == [0.3] * 8


def test_no_image_is_twice_in_a_batch() -> None:
    generator = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    generator.latent_dim = 3  # type: ignore[assignment]
    replayed, rng = batches(generator, features=False, replay_size=20, replay_share=0.75), torch.Generator().manual_seed(0)
    for _ in range(6):
        assert len(set(values(following(replayed, rng)))) == SIZE
    assert replayed.replay is not None
    assert set(replayed.replay.state_dict()["rows"]) == {"images", *(f"logits.{k}" for k in range(TEACHERS))}, "features nobody wants are not kept"


def test_two_images_of_a_batch_are_always_fresh() -> None:
    """The generator's BatchNorm has no statistics of fewer, one for each of generator and average."""
    generator, rng = Constant(0.0), torch.Generator().manual_seed(0)
    replayed = batches(generator, average=0.5, replay_size=10, replay_share=0.99)
    following(replayed, rng)
    generator.value.data.fill_(1.0)
    replayed.generator_moved()
    assert values(following(replayed, rng)) == pytest.approx([0.0] * 6 + [0.5, 1.0], abs=1e-2)


def test_the_state_goes_on_exactly() -> None:
    first = batches(Constant(0.3), average=0.5, replay_size=6)
    rng = torch.Generator().manual_seed(1)
    following(first, rng)
    first.generator.value.data.fill_(0.9)
    first.generator_moved()
    other = batches(copy.deepcopy(first.generator), average=0.5, replay_size=6)
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    same = torch.Generator()
    same.set_state(rng.get_state())
    for _ in range(3):
        assert torch.equal(following(first, rng), following(other, same))


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
    images = following(averaged, torch.Generator().manual_seed(0))
    assert images[SIZE // 2 :].mean(0).abs().max() < 1e-5
