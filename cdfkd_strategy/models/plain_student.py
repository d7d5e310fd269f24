"""The plain student: a classifier as it is, seen as a student with one header, as papers with one teacher have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.models.classifiers import build_classifier, final_linear
from cdfkd_strategy.models.multi_header import MultiHeaderStudent, StudentSpec
from cdfkd_strategy.models.stages import StagedClassifier, with_stages
from cdfkd_strategy.precision import full
from cdfkd_strategy.types import ImageSpec, StudentOutputs


class PlainStudent(nn.Module):
    """A named architecture with its own classifier; of `MultiHeaderStudent` it has what a method may ask a student with one header for.

    Weights are drawn from torch's global random state.

    Args:
        backbone: an architecture's name.
        image: input and classes.

    Attributes:
        heads: 1.
        image: input and classes.
        spec: the plain values behind this student.
        linear: the classifier's last layer; its input is the student's features.

    Raises:
        ArchitectureError: the network does not end in a linear layer that gives the classes.
    """

    heads = 1

    def __init__(self, backbone: str, image: ImageSpec) -> None:
        super().__init__()
        self.image = image
        self.spec = StudentSpec(backbone, 1, image, plain=True)
        self.net = build_classifier(backbone, image)
        if final_linear(self.net, image.num_classes) is None:
            raise ArchitectureError(f"{backbone!r} does not end in a linear layer that gives {image.num_classes} classes; choose another backbone")
        self._staged: dict[bool, StagedClassifier] = {}  # by mode, found when asked for; in a dict, because its modules are those of `net`

    @property
    def linear(self) -> nn.Linear:
        """The last linear layer."""
        found = final_linear(self.net)
        assert found is not None
        return found

    @property
    def feature_width(self) -> int:
        """``D``, the width of what enters the last linear layer."""
        return self.linear.in_features

    def forward(self, x: Tensor) -> StudentOutputs:
        """Normalised images ``[B, channels, H, W]`` to logits ``[1, B, C]`` and features ``[1, B, D]``."""
        with self._features() as seen:
            logits = self.net(x)
        return StudentOutputs(full(logits)[None], full(seen[-1])[None])

    def observe(self, x: Tensor) -> tuple[StudentOutputs, tuple[Tensor, ...]]:
        """What `forward` gives, and the maps of the network's stages ``[B, channels_s, H_s, W_s]`` as they were computed, finest first.

        Raises:
            ArchitectureError: the network has no stages, or others in train mode.
        """
        if self.net.training not in self._staged:
            self._staged[self.net.training] = with_stages(self.net, self.image)
        with self._features() as seen:
            logits, maps = self._staged[self.net.training](x)
        return StudentOutputs(full(logits)[None], full(seen[-1])[None]), tuple(maps)

    @contextmanager
    def _features(self) -> Iterator[list[Tensor]]:
        """What enters the last linear layer while the block runs."""
        seen: list[Tensor] = []
        hook = self.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            hook.remove()

    def only(self, heads: Sequence[int]) -> PlainStudent:
        """The student itself: it has one header.

        Raises:
            ConfigError: another header is asked for.
        """
        if list(heads) != [0]:
            raise ConfigError(f"only({list(heads)}) of a plain student; accepted: [0], its one header")
        return self


Student = MultiHeaderStudent | PlainStudent


def build_student(spec: StudentSpec) -> Student:
    """A freshly initialised student of either kind (from torch's global random state)."""
    return PlainStudent(spec.backbone, spec.image) if spec.plain else spec.build()
