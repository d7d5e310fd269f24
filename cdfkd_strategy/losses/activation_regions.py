"""Does the student see a class in the same places as its teacher? Class activation maps by gradients (Grad-CAM, https://arxiv.org/abs/1610.02391)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cdfkd_strategy.losses.attention import nearest_stage
from cdfkd_strategy.precision import full


def activation_regions(logits: Tensor, classes: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``A_l[i, j] = sum_c u_l[c, i, j] mean_ij d logit_y / d u_l[c]`` of every stage: where an image speaks for the class y, or against it.

    Without Grad-CAM's ReLU, as in the code of SpaceshipNet. The gradients are constants: what is learned moves the maps. The graph of
    the logits is kept.

    Args:
        logits: ``[B, C]``, computed from the maps.
        classes: y of every image, ``[B]``.
        maps: ``u_l [B, channels_l, H_l, W_l]``.

    Returns:
        Per stage ``[B, H_l, W_l]`` in float32.
    """
    gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), list(maps), retain_graph=True)
    return tuple((full(gradient).mean(dim=(2, 3), keepdim=True) * full(here)).sum(1) for gradient, here in zip(gradients, maps, strict=True))


def region_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of ``[B, H, W]`` and ``[B, H', W']`` for every image ``[B]``; both are pooled to the smaller height and width first."""
    size = min(student.shape[1], teacher.shape[1]), min(student.shape[2], teacher.shape[2])
    mine, theirs = (maps if maps.shape[1:] == size else F.adaptive_avg_pool2d(maps, size) for maps in (student, teacher))
    return (mine - theirs).square().mean(dim=(1, 2))


def multi_scale_difference(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The sum over the student's stages of the differences from the teacher's stage of the nearest resolution, for every image ``[B]``."""
    sizes = [(here.shape[1], here.shape[2]) for here in teacher]
    pairs = [(here, teacher[nearest_stage((here.shape[1], here.shape[2]), sizes)]) for here in student]
    return torch.stack([region_difference(mine, theirs) for mine, theirs in pairs]).sum(0)


def class_activation_difference(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The difference of the class activation maps of the last stages, for every image ``[B]``.

    The map of a class is ``H W A``: where only the mean over the positions and a linear classifier follow the maps, its weights times them
    (CAM, https://arxiv.org/abs/1512.04150), and for other networks what comes nearest to it.
    """
    mine, theirs = (maps[-1] * (maps[-1].shape[1] * maps[-1].shape[2]) for maps in (student, teacher))
    return region_difference(mine, theirs)
