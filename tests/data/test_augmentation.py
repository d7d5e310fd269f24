"""Random views against torchvision and plain indexing: what is moved where, how often, and with whose random numbers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from cdfkd_strategy.data.augmentation import RandomViews, _hats
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.types import ImageSpec

COLOUR = ImageSpec(3, 6, 8, 10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
GREY = ImageSpec(1, 6, 8, 10)


def images(spec: ImageSpec, count: int, seed: int = 0) -> Tensor:
    return spec.normalise(torch.rand(count, *spec.shape, generator=torch.Generator().manual_seed(seed)))


def views(spec: ImageSpec, augment: str = "auto", padding: int = 2, seed: int = 1) -> RandomViews:
    return RandomViews(spec, augment, padding, torch.Generator().manual_seed(seed))


def shifted(spec: ImageSpec, picture: Tensor, down: int, right: int, mirror: bool) -> Tensor:
    """One image, pixel by pixel: black comes in from outside."""
    out = torch.zeros(spec.shape)
    pixels = spec.to_pixels(picture[None])[0]
    for y in range(spec.height):
        for x in range(spec.width):
            source = (y + down, (spec.width - 1 - x if mirror else x) + right)
            if 0 <= source[0] < spec.height and 0 <= source[1] < spec.width:
                out[:, y, x] = pixels[:, source[0], source[1]]
    return spec.normalise(out[None])[0]


@pytest.mark.parametrize(("spec", "augment", "mirrors"), [(COLOUR, "auto", {False, True}), (GREY, "auto", {False}), (COLOUR, "crop", {False})])
def test_a_crop_is_one_of_the_shifts_and_every_shift_occurs(spec: ImageSpec, augment: str, mirrors: set[bool]) -> None:
    batch = images(spec, 1)
    candidates = {(d, r, m): shifted(spec, batch[0], d, r, m) for d in range(-2, 3) for r in range(-2, 3) for m in mirrors}
    found: Counter[tuple[int, int, bool]] = Counter()
    for view in views(spec, augment).crop(batch.expand(1200, -1, -1, -1)):
        near = [place for place, candidate in candidates.items() if torch.allclose(view, candidate, atol=1e-5)]
        found[near[0]] += 1
    assert set(found) == set(candidates)
    assert max(found.values()) < 3.5 * 1200 / len(candidates)


def test_a_zoom_is_the_part_that_torchvision_enlarges(monkeypatch: pytest.MonkeyPatch) -> None:
    """At whole pixels both enlarge the same part; torchvision reads black-free borders as here."""
    batch, half = images(GREY, 1), torch.tensor([[0.0], [0.5], [0.0], [1.0]])  # area .25 of ratio 1, at the left lower corner
    drawn = torch.stack([half[0], half[1], torch.ones(1), torch.zeros(1)]).unsqueeze(1)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: drawn)
    found = views(GREY).zoom(batch, 0.25)
    expected = reference.resized_crop(batch, 3, 0, 3, 4, [6, 8], antialias=False)
    inside = (slice(None), slice(None), slice(1, None), slice(None, -1))  # torchvision does not look beyond the part it cut
    torch.testing.assert_close(found[inside], expected[inside])


def test_a_zoom_shows_at_least_the_given_share_and_stays_inside() -> None:
    spec = ImageSpec(1, 8, 8, 10, mean=(0.0,), std=(1.0,))
    rows = torch.arange(8.0).view(1, 1, 8, 1).expand(500, 1, 8, 8)  # a pixel's value is its row
    seen = views(spec, "crop").zoom(rows, 0.25)[:, 0, :, 0]
    height = (seen[:, -1] - seen[:, 0]) / 7 * 8
    assert seen.min() >= 0
    assert seen.max() <= 7
    assert (seen[:, 1:] >= seen[:, :-1]).all()
    assert 2.5 < height.min() < 4  # sqrt(.25 / (4/3)) * 8 = 3.5, less what the border clips
    assert height.max() == pytest.approx(8, abs=0.1)


def test_gradients_go_back_to_where_a_view_looked() -> None:
    spec = ImageSpec(1, 4, 4, 10)
    batch = torch.randn(3, *spec.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: RandomViews(spec, "crop_flip", 1, torch.Generator().manual_seed(3)).crop(x), (batch,))
    assert torch.autograd.gradcheck(lambda x: RandomViews(spec, "crop_flip", 1, torch.Generator().manual_seed(3)).zoom(x, 0.3), (batch,))


def test_random_numbers_come_from_the_given_generator_only() -> None:
    batch = images(COLOUR, 5)
    before = torch.random.get_rng_state()
    first, again, other = (views(COLOUR, seed=seed).crop(batch) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_none_is_the_image_itself_and_draws_nothing() -> None:
    plain, batch = views(COLOUR, "none"), images(COLOUR, 2)
    state = plain.rng.get_state()
    assert plain.crop(batch) is batch
    assert plain.zoom(batch, 0.25) is batch
    assert torch.equal(plain.rng.get_state(), state)


def test_weights_by_hand() -> None:
    places = torch.tensor([[0.0, 1.25, -0.5, 3.0]])
    expected = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.75, 0.25], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(_hats(places, 3), expected)


def test_negative_padding_is_an_error() -> None:
    with pytest.raises(ConfigError, match="padding is -1"):
        views(GREY, padding=-1)
