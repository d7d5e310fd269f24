"""Does the student look where its teachers look? Attention transfer (Zagoruyko and Komodakis, ICLR 2017, https://arxiv.org/abs/1612.03928)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cdfkd_strategy.precision import full

Reduction = Literal["mean", "sum", "norm"]
"""How the difference ``d`` of two attention maps becomes a number: "mean" of ``d^2`` over the positions (the code of attention transfer and of ZSKT),
"sum" of ``d^2``, or "norm", ``||d||_2`` as the paper writes it. All are means over the batch."""


def attention(maps: Tensor) -> Tensor:
    """``Q``: the mean over channels of squared activations ``[B, channels, H, W]``, as ``[B, 1, H, W]`` in float32."""
    return full(maps).square().mean(dim=1, keepdim=True)


def nearest_stage(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> int:
    """Which of ``sizes`` ``(H, W)`` has the area nearest to that of ``size``, by ratio; the first of two that are equally near."""
    distances = [abs(math.log((height * width) / (size[0] * size[1]))) for height, width in sizes]
    return distances.index(min(distances))


def attention_difference(student: Tensor, teacher: Tensor, reduction: Reduction = "mean") -> Tensor:
    """The difference of two attention maps ``Q / ||Q||_2``, flattened, normalised per image.

    Where the resolutions differ, both are pooled (adaptive average pooling) to the smaller height and width before they
    are normalised.

    Args:
        student: ``Q`` of one stage, ``[B, 1, H, W]``.
        teacher: of the same images, ``[B, 1, H', W']``.
        reduction: see `Reduction`.
    """
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    mine, theirs = (F.normalize((maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size)).flatten(1)) for maps in (student, teacher))
    difference = mine - theirs
    if reduction == "norm":
        lengths: Tensor = torch.linalg.vector_norm(difference, dim=1)
        return lengths.mean()
    return difference.square().mean() if reduction == "mean" else difference.square().sum(1).mean()


def attention_loss(student: Sequence[Tensor], teachers: Sequence[Sequence[Tensor]], reduction: Reduction = "mean") -> Tensor:
    """The sum over the student's stages of the differences from a teacher's, mean over the teachers.

    Every stage of the student is compared with the teacher's stage of the nearest resolution, so that networks with
    other stages can be compared too; those of the same family have the same.

    Args:
        student: the maps ``[B, channels_s, H_s, W_s]`` of its stages (`MultiHeaderStudent.observe`).
        teachers: the same of K teachers (`TeacherOutputs.maps`), on the same images. Teachers without maps are left out,
            and the mean is over the others; without any, the loss is 0.
        reduction: see `Reduction`.
    """
    mine = [attention(maps) for maps in student]
    terms = []
    for maps in (maps for maps in teachers if maps):
        sizes = [(here.shape[2], here.shape[3]) for here in maps]
        nearest = [maps[nearest_stage((here.shape[2], here.shape[3]), sizes)] for here in mine]
        terms.append(torch.stack([attention_difference(one, attention(other), reduction) for one, other in zip(mine, nearest, strict=True)]).sum())
    return torch.stack(terms).mean() if terms else mine[0].new_zeros(())
