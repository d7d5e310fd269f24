"""The bank of features: a ring, drawn without repetition, restored to the bit."""

from __future__ import annotations

import pytest
import torch

from cdfkd_strategy.data.feature_bank import FeatureBank
from cdfkd_strategy.errors import CheckpointError, ConfigError


def rows(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 2)


def held(bank: FeatureBank) -> list[float]:
    return sorted(bank.draw(99, torch.Generator().manual_seed(0))[:, 0].tolist())


def test_the_oldest_rows_give_way() -> None:
    bank = FeatureBank(5, 2)
    for batch, expected in ((rows(1, 2, 3), [1, 2, 3]), (rows(4, 5), [1, 2, 3, 4, 5]), (rows(6), [2, 3, 4, 5, 6]), (rows(7, 8, 9), [5, 6, 7, 8, 9])):
        bank.add(batch)
        assert held(bank) == expected
    bank.add(rows(*range(20)))
    assert held(bank) == [15, 16, 17, 18, 19]


def test_draws_are_different_rows_of_the_given_generator() -> None:
    bank = FeatureBank(50, 2)
    bank.add(rows(*range(30)))
    first, again, other = (bank.draw(10, torch.Generator().manual_seed(seed))[:, 0].tolist() for seed in (1, 1, 2))
    assert len(set(first)) == 10
    assert first == again != other
    assert len(bank.draw(99, torch.Generator())) == len(bank) == 30
    assert FeatureBank(5, 2).draw(3, torch.Generator()).shape == (0, 2)


def test_a_restored_bank_goes_on_where_it_was() -> None:
    bank, other = FeatureBank(4, 2), FeatureBank(4, 2)
    bank.add(rows(1, 2, 3, 4, 5))
    bank.add(rows(6))
    other.load_state_dict(bank.state_dict())
    for one in (bank, other):
        one.add(rows(7))
    assert torch.equal(bank.state_dict()["rows"], other.state_dict()["rows"])
    with pytest.raises(CheckpointError, match=r"stored bank is \[4, 2\]; accepted: at most 3 rows of 2"):
        FeatureBank(3, 2).load_state_dict(bank.state_dict())
    with pytest.raises(ConfigError, match="capacity is 0"):
        FeatureBank(0, 2)
