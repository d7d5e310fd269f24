"""Tiny classifiers that really were trained, on scikit-learn's digits: what the method tests distil, and judge by."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy import seeding
from cdfkd_strategy.models.head_fusion import fuse
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec

DIGITS = ImageSpec(channels=1, height=8, width=8, num_classes=10, mean=(0.3,), std=(0.35,))


class Digits(NamedTuple):
    """Normalised images ``[N, 1, 8, 8]`` and labels; the last 500 of 1,797 are held out."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@lru_cache(maxsize=1)
def digits() -> Digits:
    bunch = load_digits()
    x = DIGITS.normalise(torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16)
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=seeding.generator("digits split"))
    x, y = x[order], y[order]
    return Digits(x[:-500], y[:-500], x[-500:], y[-500:])


def tiny_net(*, group_norm: bool = False) -> nn.Module:
    """Two convolutions with normalisation, in two resolutions.

    The linear layer sees positions (no global pooling): a net that only sees texture distils badly from noise-like images.
    """

    def norm(width: int) -> nn.Module:
        return nn.GroupNorm(4, width) if group_norm else nn.BatchNorm2d(width)

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), norm(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * 4, DIGITS.num_classes),
    )  # fmt: skip


@lru_cache(maxsize=8)
def _trained(index: int, group_norm: bool) -> nn.Module:
    data = digits()
    with seeding.threads(1), seeding.seeded_scope("tiny teacher", index):
        net = tiny_net(group_norm=group_norm)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(8):
            for chosen in torch.randperm(len(data.y_train)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(data.x_train[chosen]), data.y_train[chosen]).backward()
                optimizer.step()
    return net.eval()


def trained_ensemble(count: int, weights: Tensor | None = None, *, group_norm: bool = False) -> TeacherEnsemble:
    """``count`` teachers that differ by their seed; copies, so that a test may break them."""
    return TeacherEnsemble([copy.deepcopy(_trained(k, group_norm)) for k in range(count)], weights, image=DIGITS)


def tiny_student(heads: int, seed: int = 0) -> MultiHeaderStudent:
    with seeding.seeded_scope("tiny student", seed):
        return MultiHeaderStudent(tiny_net(), heads, DIGITS)


@torch.no_grad()
def disagreement(student: nn.Module, teachers: TeacherEnsemble) -> float:
    """The fraction of held-out real digits that the fused student and the fused teachers classify differently."""
    was_training = student.training
    x_test = digits().x_test.to(teachers.weights.device)
    logits = student.eval()(x_test).logits
    student.train(was_training)
    weights = teachers.weights if len(logits) == len(teachers) else torch.ones_like(teachers.weights[:1])
    return float((fuse(logits, weights).argmax(-1) != teachers.fused(x_test).argmax(-1)).double().mean())
