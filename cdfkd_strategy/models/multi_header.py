"""The multi-header student: one shared trunk of any backbone, and K private headers, one per teacher."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.models.classifiers import ARCHITECTURES, build_classifier
from cdfkd_strategy.models.stages import MAX_STAGES, find_stages
from cdfkd_strategy.precision import full
from cdfkd_strategy.types import ImageSpec, StudentOutputs

AUTO_MAX_WIDTH = 256
"""Channels per stage that enter the headers outside the paper's layouts: the headers' cost grows with its square."""


@dataclass(frozen=True)
class StudentSpec:
    """What a student is, in plain values: enough to build it again, anywhere, before its weights are loaded.

    Args:
        backbone: an architecture's name.
        heads: ``K``.
        image: input and classes.
        max_width: stages wider than this are narrowed by a 1x1 convolution; None narrows nothing.
        plain: not a multi-header student, but the backbone with its own classifier (`PlainStudent`).
        stages: how many of the deepest stages enter the headers, at most.
    """

    backbone: str
    heads: int
    image: ImageSpec
    max_width: int | None = None
    plain: bool = False
    stages: int = MAX_STAGES

    def build(self) -> MultiHeaderStudent:
        """A freshly initialised student (from torch's global random state).

        Raises:
            ArchitectureError: the student was built on a module of the user's, which plain values cannot describe, or it has no headers.
        """
        if self.plain:
            raise ArchitectureError("a plain student has no headers; accepted: the spec of a multi-header student (`build_student` builds both)")
        if self.backbone.startswith("<"):
            raise ArchitectureError(f"a student on the user's own module {self.backbone} cannot be built from its spec; build it where the module is known")
        return MultiHeaderStudent(self.backbone, self.heads, self.image, max_width=self.max_width, stages=self.stages)


class Encoder(nn.Sequential):
    """``E(c_in, c_out)`` of CDFKD-MFS: two depthwise-separable 3x3 convolutions with BatchNorm and ReLU, the first of stride 2.

    ``[B, c_in, H, W]`` to ``[B, c_out, ceil(H/2), ceil(W/2)]``; no convolution has a bias.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.Conv2d(before, before, 3, stride=2, padding=1, groups=before, bias=False),
            nn.Conv2d(before, before, 1, bias=False),
            nn.BatchNorm2d(before),
            nn.ReLU(inplace=True),
            nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False),
            nn.Conv2d(before, after, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        )


class Header(nn.Module):
    """One teacher's private part: an encoder per stage, ``a_s = E_s([u_s; a_(s-1)])``, global pooling, a linear layer.

    Args:
        widths: channels ``c_s`` of the ``S`` stages; ``E_s`` gives ``c_(s+1)`` channels, the last one ``c_S``.
        num_classes: ``C``.
    """

    def __init__(self, widths: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        after = (*widths[1:], widths[-1])
        before = (widths[0], *(2 * width for width in widths[1:]))
        self.encoders = nn.ModuleList(Encoder(*pair) for pair in zip(before, after, strict=True))
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The ``S`` maps ``u_s`` to logits ``[B, C]`` and features ``[B, D]``."""
        carried: Tensor | None = None
        for encoder, here in zip(self.encoders, maps, strict=True):
            if carried is not None:
                if carried.shape[2:] != here.shape[2:]:  # the backbone rounds an odd size down where the encoder rounds up
                    carried = F.adaptive_avg_pool2d(carried, (here.shape[2], here.shape[3]))
                carried = torch.cat([here, carried], dim=1)
            carried = encoder(here if carried is None else carried)
        assert carried is not None
        features = carried.permute(0, 2, 3, 1).flatten(1, 2).mean(1)  # mean(dim=(2, 3)), whose gradient would not be channels-last
        return self.classifier(features), features


class MultiHeaderStudent(nn.Module):
    """The student of CDFKD-MFS (IEEE TMM 2022, https://arxiv.org/abs/2205.11845), on any backbone with resolution stages.

    On resnet18, resnet34 and the WideResNets it is the authors' network (drawn as `classifiers` says); on others, stages wider than ``max_width`` are
    narrowed by a shared 1x1 convolution, and ``a_(s-1)`` is pooled to the size of ``u_s`` where rounding differs.
    Weights are drawn from torch's global random state (see `seeding.seeded_scope`).

    Args:
        backbone: an architecture's name, or a classifier of the user's that `torch.fx` can trace (it is copied, with its weights).
        heads: ``K``, at least 1.
        image: input and classes.
        max_width: channels; None narrows nothing; "auto" is None for the paper's backbones and `AUTO_MAX_WIDTH` for others.
        stages: how many of the deepest stages enter the headers, at most; 1 is no multi-level sharing, for comparison.

    Attributes:
        heads: ``K``.
        image: input and classes.
        spec: the plain values behind this student.
        feature_width: ``D``.

    Raises:
        ConfigError: ``heads``, ``max_width`` or ``stages`` is below 1.
        ArchitectureError: the backbone has no stages at this image size, or cannot be traced.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        heads: int,
        image: ImageSpec,
        *,
        max_width: int | Literal["auto"] | None = "auto",
        stages: int = MAX_STAGES,
    ) -> None:
        super().__init__()
        if heads < 1:
            raise ConfigError(f"the student has {heads} heads; accepted: at least 1, one per teacher")
        named = isinstance(backbone, str)
        if max_width == "auto":
            paper = isinstance(backbone, str) and ARCHITECTURES[backbone].paper_layout
            max_width = None if paper else AUTO_MAX_WIDTH
        if max_width is not None and (not isinstance(max_width, int) or max_width < 1):
            raise ConfigError(f"max_width is {max_width!r}; accepted: 'auto', None, or at least 1 channel")
        if not isinstance(stages, int) or stages < 1:
            raise ConfigError(f"the student's headers see {stages} stages; accepted: at least 1, a whole number")
        self.image = image
        self.spec = StudentSpec(str(backbone) if named else f"<{type(backbone).__name__}>", heads, image, max_width, stages=stages)
        classifier = build_classifier(backbone, image) if isinstance(backbone, str) else copy.deepcopy(backbone)
        self.trunk = find_stages(classifier, image, stages)
        self.widths = tuple(min(width, max_width or width) for width in self.trunk.channels)
        self.narrow = nn.ModuleList(
            nn.Identity() if width == wide else nn.Conv2d(wide, width, 1, bias=False) for width, wide in zip(self.widths, self.trunk.channels, strict=True)
        )
        self.headers = nn.ModuleList(Header(self.widths, image.num_classes) for _ in range(heads))

    @property
    def heads(self) -> int:
        """``K``."""
        return len(self.headers)

    @property
    def feature_width(self) -> int:
        """``D``, the width of what enters every header's linear layer."""
        return self.widths[-1]

    def trunk_features(self, x: Tensor) -> list[Tensor]:
        """What all headers share: normalised images ``[B, channels, H, W]`` to the ``S`` maps ``u_s``, narrowed."""
        return self._narrowed(self.trunk(x))

    def forward(self, x: Tensor) -> StudentOutputs:
        """Normalised images ``[B, channels, H, W]`` to logits ``[K, B, C]`` and features ``[K, B, D]``."""
        return self._answers(self.trunk_features(x))

    def observe(self, x: Tensor) -> tuple[StudentOutputs, tuple[Tensor, ...]]:
        """What `forward` gives, and the trunk's maps ``u_s [B, channels_s, H_s, W_s]`` before they are narrowed, as they were computed, finest first."""
        maps = self.trunk(x)
        return self._answers(self._narrowed(maps)), tuple(maps)

    def _narrowed(self, maps: list[Tensor]) -> list[Tensor]:
        return [narrow(here) for narrow, here in zip(self.narrow, maps, strict=True)]

    def _answers(self, maps: list[Tensor]) -> StudentOutputs:
        logits, features = zip(*(header(maps) for header in self.headers), strict=True)
        return StudentOutputs(full(torch.stack(logits)), full(torch.stack(features)))

    def with_heads(self, heads: int) -> MultiHeaderStudent:
        """A copy with another number of heads: the trunk and the first heads are copied, further ones freshly initialised.

        Names in the state dict do not change. New heads are drawn from torch's global random state.

        Raises:
            ConfigError: ``heads`` is below 1.
        """
        if heads < 1:
            raise ConfigError(f"with_heads({heads}); accepted: at least 1")
        student = copy.deepcopy(self)
        like = next(self.headers.parameters())
        for _ in range(heads - self.heads):
            header = Header(self.widths, self.image.num_classes).to(device=like.device, dtype=like.dtype)
            student.headers.append(header.train(self.training))
        del student.headers[heads:]
        student.spec = dataclasses.replace(self.spec, heads=heads)
        return student

    def only(self, heads: Sequence[int]) -> MultiHeaderStudent:
        """This student with some of its heads, in this order; all of them is the student itself.

        Nothing is copied: to train the one is to train the other, and heads that are left out stay as they are.

        Raises:
            ConfigError: no head is left.
        """
        if list(heads) == list(range(self.heads)):
            return self
        if not heads:
            raise ConfigError("only([]) leaves a student without heads; accepted: at least 1")
        student = copy.copy(self)  # a module keeps its parts in mappings that a shallow copy shares: the copy's own come next
        student._modules = {**self._modules, "headers": nn.ModuleList(self.headers[head] for head in heads)}
        student.spec = dataclasses.replace(self.spec, heads=len(heads))
        return student


@runtime_checkable
class GivesMaps(Protocol):
    """A student whose ``observe`` gives its outputs and the maps of its stages: `MultiHeaderStudent`, `PlainStudent`, or anybody's."""

    def observe(self, x: Tensor) -> tuple[StudentOutputs, tuple[Tensor, ...]]:
        """What ``forward`` gives, and the maps ``[B, channels_s, H_s, W_s]``, finest first."""
        ...


def with_maps(student: nn.Module) -> GivesMaps:
    """The student, if it gives the maps of its stages, with one header or many.

    Raises:
        ArchitectureError: it gives logits and features only.
    """
    if not isinstance(student, GivesMaps):
        raise ArchitectureError(
            f"the student {type(student).__name__} gives no stage maps to compare with the teachers'; accepted: {MultiHeaderStudent.__name__} "
            "(with one header too), which can be built on the same network, or a weight of 0 for the terms that need maps"
        )
    return student
