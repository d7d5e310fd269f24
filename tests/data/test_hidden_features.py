"""The memory of hidden features: bounded, drawn by layer, restored to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cdfkd_strategy.data.hidden_features import HiddenFeatures
from cdfkd_strategy.errors import CheckpointError, ConfigError

SHAPES = [(4, 1, 1), (2, 2, 3)]


def batch(*values: int) -> list[Tensor]:
    return [torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, *shape) * (layer + 1) for layer, shape in enumerate(SHAPES)]


def test_the_oldest_give_way_in_every_layer_and_draws_repeat_if_they_must() -> None:
    memory = HiddenFeatures(4, SHAPES)
    memory.add(batch(1, 2, 3))
    memory.add(batch(4, 5))
    assert len(memory) == 4
    for layer, shape in enumerate(SHAPES):
        drawn = memory.draw(layer, 4, torch.Generator().manual_seed(0))
        assert drawn.shape == (4, *shape)
        assert sorted((drawn[:, 0, 0, 0] / (layer + 1)).tolist()) == [2, 3, 4, 5]
        many = memory.draw(layer, 9, torch.Generator().manual_seed(0))
        assert torch.equal(many, drawn[torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])])


def test_features_keep_their_places_whatever_their_layout() -> None:
    memory, features = HiddenFeatures(1, [(2, 3, 4)]), torch.randn(1, 2, 3, 4)
    memory.add([features.to(memory_format=torch.channels_last)])
    assert torch.equal(memory.draw(0, 1, torch.Generator()), features)


def test_a_restored_memory_goes_on_where_it_was() -> None:
    memory, other = HiddenFeatures(3, SHAPES), HiddenFeatures(3, SHAPES)
    memory.add(batch(1, 2, 3, 4))
    other.load_state_dict(memory.state_dict())
    for one in (memory, other):
        one.add(batch(5))
    for layer in range(2):
        drawn = [one.draw(layer, 3, torch.Generator().manual_seed(1)) for one in (memory, other)]
        assert torch.equal(*drawn)
    with pytest.raises(CheckpointError, match="at most 2 rows"):
        HiddenFeatures(2, SHAPES).load_state_dict(memory.state_dict())
    with pytest.raises(ConfigError, match="capacity is 0"):
        HiddenFeatures(0, SHAPES)
