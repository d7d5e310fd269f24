"""Uploads that fit their architecture and would still end the distillation are refused before they are stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cdfkd_strategy.errors import UploadError
from cdfkd_strategy.flower.architectures import Architectures
from cdfkd_strategy.flower.payload import Identity
from cdfkd_strategy.flower.roster import Roster
from cdfkd_strategy.types import ImageSpec, Needs
from tests.flower.memory_grid import MemoryGrid, echo_app, tiny_strategy

IMAGE = ImageSpec(1, 8, 8, 4)


def architectures() -> Architectures:
    return Architectures("lenet_bn", ["lenet"], IMAGE, seed=0)


def test_ordinary_weights_pass() -> None:
    known = architectures()
    known.try_out("lenet_bn", known.initial("lenet_bn"), Needs(batch_norm=True), "auto")


@pytest.mark.parametrize("size", [1e20, 1e38])
def test_absurd_weights_are_refused(size: float) -> None:
    known = architectures()
    state = {name: tensor * size if tensor.is_floating_point() else tensor for name, tensor in known.initial("lenet").items()}
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    with pytest.raises(UploadError, match=r"not finite|cannot be used"):
        known.try_out("lenet", state, Needs(), "auto")


def test_batch_norm_statistics_that_would_overflow_are_refused() -> None:
    """Logits and competence do not show them; the method's distance from the statistics does."""
    known = architectures()
    state = {name: torch.full_like(tensor, 3e38) if name.endswith("running_var") else tensor for name, tensor in known.initial("lenet_bn").items()}
    with pytest.raises(UploadError, match="distances from its BatchNorm statistics on random images are not finite"):
        known.try_out("lenet_bn", state, Needs(), "auto")


def test_a_network_without_what_the_method_needs_is_refused() -> None:
    known = architectures()
    with pytest.raises(UploadError, match="the method needs batch_norm of every teacher; a lenet does not have that"):
        known.try_out("lenet", known.initial("lenet"), Needs(batch_norm=True), "auto")


def test_the_round_goes_on_without_such_an_upload() -> None:
    def explode(state: dict[str, torch.Tensor]) -> None:
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.mul_(1e30)

    strategy = tiny_strategy()
    strategy.start(MemoryGrid([echo_app(), echo_app(explode), echo_app()]), num_rounds=1, timeout=5)
    assert strategy.teachers is not None
    assert len(strategy.teachers) == 2
    (reason,) = strategy.rounds[0].quarantined.values()
    assert "not finite" in reason or "cannot be used" in reason


def test_an_architecture_that_was_not_offered_is_refused() -> None:
    with pytest.raises(UploadError, match="accepted: lenet, lenet_bn"):
        architectures().build("vgg19")
    with pytest.raises(UploadError, match=r"accepted: lenet_bn$"):
        Architectures("lenet_bn", None, IMAGE, seed=0).build("lenet")


def test_a_users_own_network_is_never_taken_for_a_registered_one() -> None:
    """Its name is that of the student's backbone, and its tensors are others."""

    def lenet_bn() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    strategy = tiny_strategy(architecture=lenet_bn, student="lenet_bn")
    strategy.start(MemoryGrid([echo_app()] * 2), num_rounds=1, timeout=5)
    assert [spec.arch for spec in strategy.teachers.specs] == ["own lenet_bn"] * 2  # type: ignore[union-attr]
    assert strategy.options.settings()["architecture"] == "own lenet_bn"


def test_a_restarted_node_gets_its_key_when_the_old_one_is_gone() -> None:
    roster = Roster(num_classes=4)
    roster.enter(1, Identity("lenet", 0))
    with pytest.raises(UploadError, match="which is node 1"):
        roster.enter(2, Identity("lenet", 0))
    roster._refused[2] = "its key was taken"
    assert roster.unknown([1, 2]) == []
    roster.forget([2])  # node 1's heartbeat has run out
    assert roster.unknown([2]) == [2]
    assert roster.enter(2, Identity("lenet", 0)).key == "0"
