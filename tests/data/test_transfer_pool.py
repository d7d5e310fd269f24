from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cdfkd_strategy.data.transfer_pool import TransferPool
from cdfkd_strategy.errors import CheckpointError, ConfigError, DataError
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(3, 8, 8, 10, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def levels(*values: int) -> Tensor:
    """Normalised images of one constant pixel value each."""
    pixels = torch.tensor(values).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / 255
    return IMAGE.normalise(pixels)


def content(pool: TransferPool) -> list[int]:
    return sorted(pool.pixels[:, 0, 0, 0].tolist())


def filled(*values: int, capacity: int = 5) -> TransferPool:
    pool = TransferPool(capacity, IMAGE)
    pool.add(levels(*values), torch.tensor(values).float()[:, None].expand(-1, 10))
    return pool


def test_what_goes_in_comes_out_to_a_pixel_level() -> None:
    images = torch.randn(4, 3, 8, 8)
    pool = TransferPool(10, IMAGE)
    pool.add(images)
    expected = IMAGE.normalise(IMAGE.to_pixels(images))
    step = 0.5 / 255 / min(IMAGE.std)
    assert torch.allclose(pool.at(torch.arange(4)), expected, atol=step + 1e-6)
    assert pool.pixels.dtype == torch.uint8


@pytest.mark.parametrize("batches", [[3, 3, 3], [5, 1], [4, 4, 4, 4], [12], [1] * 13, [2, 9, 1]])
def test_a_full_pool_keeps_the_newest(batches: list[int]) -> None:
    pool, written = TransferPool(5, IMAGE), 0
    for size in batches:
        values = range(written, written + size)
        pool.add(levels(*values), torch.tensor(list(values)).float()[:, None])
        written += size
        newest = list(range(max(written - 5, 0), written))
        assert len(pool) == len(newest)
        assert content(pool) == newest
        assert pool.logits is not None
        assert torch.equal(pool.logits[:, 0].long(), pool.pixels[:, 0, 0, 0].long())  # rows stay beside their images


def test_drawing_is_seeded_and_does_not_repeat_while_it_can() -> None:
    pool = filled(10, 20, 30, 40, 50)
    first, again = (pool.draw(5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert sorted(IMAGE.to_pixels(first).mul(255).round()[:, 0, 0, 0].tolist()) == [10, 20, 30, 40, 50]
    assert pool.draw(12, torch.Generator()).shape == (12, 3, 8, 8)


def test_state_survives_a_dictionary_and_a_file(tmp_path: Path) -> None:
    pool = filled(1, 2, 3, 4, 5)
    pool.add(levels(6, 7), torch.tensor([6.0, 7.0])[:, None].expand(-1, 10))
    pool.save(tmp_path / "pool.safetensors")
    copies = [TransferPool(5, IMAGE) for _ in range(2)]
    copies[0].load_state_dict(pool.state_dict())
    copies[1].load(tmp_path / "pool.safetensors")
    for one in (pool, *copies):
        one.add(levels(8), torch.full((1, 10), 8.0))
        assert torch.equal(one.pixels, pool.pixels)
        assert content(one) == [4, 5, 6, 7, 8]
        assert one.logits is not None
        assert torch.equal(one.logits, pool.logits)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["pool.safetensors"]


def test_a_state_is_a_copy() -> None:
    pool = filled(1, 2, 3, 4, 5)
    state = pool.state_dict()
    pool.add(levels(9), torch.zeros(1, 10))
    assert state["pixels"][:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]


def test_wrong_use_says_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        TransferPool(0, IMAGE)
    with pytest.raises(DataError, match="empty"):
        TransferPool(5, IMAGE).draw(1, torch.Generator())
    pool = filled(1, 2)
    with pytest.raises(DataError, match="every batch or with none"):
        pool.add(levels(3))
    with pytest.raises(DataError, match="one row per image"):
        pool.add(levels(3), torch.zeros(2, 10))
    with pytest.raises(DataError, match=r"\[B, 3, 8, 8\]"):
        pool.add(torch.zeros(1, 1, 8, 8))
    with pytest.raises(CheckpointError, match="at most 1"):
        TransferPool(1, IMAGE).load_state_dict(pool.state_dict())
    (tmp_path / "broken").write_bytes(b"x" * 20)
    for name in ("broken", "missing"):
        with pytest.raises(CheckpointError, match="cannot read"):
            pool.load(tmp_path / name)
