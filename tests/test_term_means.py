from __future__ import annotations

import pytest
import torch

from cdfkd_strategy.term_means import TermMeans


def test_a_term_is_averaged_over_the_steps_that_had_it() -> None:
    means, weight = TermMeans(), torch.tensor(2.0, requires_grad=True)
    first = weight * 1.5
    means.add({"loss": first}, "student/")
    means.add({"loss": weight * 3.0, "rare": torch.tensor(7.0, dtype=torch.float64)}, "student/")
    means.add({"loss": torch.tensor(-1.0)})
    assert means.means() == {"student/loss": pytest.approx(4.5), "student/rare": pytest.approx(7.0), "loss": pytest.approx(-1.0)}
    assert not any(total.requires_grad for total in means._sums.values())
    assert first.item() == 3.0  # what was added is not changed in place
