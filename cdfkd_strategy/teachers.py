"""The frozen client teachers as one module: logits of all of them, and what generator losses look at inside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.losses.statistics import batch_norm_distance
from cdfkd_strategy.models.classifiers import final_linear
from cdfkd_strategy.models.head_fusion import class_weights, fuse, weighted
from cdfkd_strategy.types import ImageSpec, TeacherOutputs


@dataclass(frozen=True)
class TeacherSpec:
    """Who a teacher is: client ``key``, architecture name, number of training samples, SHA-256 of its weights."""

    key: str
    arch: str
    num_samples: int = 0
    sha256: str = ""


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict: equal exactly when the weights are bit-identical."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TeacherEnsemble(nn.Module):
    """K frozen classifiers and their class weights ``[K, C]``.

    The networks are frozen in place (no gradients, eval mode for good: `train` has no effect on them), so that
    gradients flow to the input only and BatchNorm buffers never change.

    Args:
        models: K classifiers, images ``[B, channels, H, W]`` to logits ``[B, C]``.
        weights: ``[K]`` or ``[K, C]``, non-negative; columns are normalised to sum 1; None is uniform.
        image: what the teachers take, with ``C``.
        specs: K descriptions; None numbers the teachers from 0.

    Raises:
        ArchitectureError: no teacher, or as many specs as there are not teachers.
        ConfigError: the weights do not fit.
    """

    weights: Tensor

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Tensor | None = None,
        *,
        image: ImageSpec,
        specs: Sequence[TeacherSpec] | None = None,
    ) -> None:
        super().__init__()
        if not models:
            raise ArchitectureError("an ensemble of 0 teachers; accepted: at least one")
        if specs is not None and len(specs) != len(models):
            raise ArchitectureError(f"{len(models)} teachers but {len(specs)} specs; give one spec per teacher")
        self.image = image
        self.specs = tuple(specs or (TeacherSpec(str(k), type(model).__name__) for k, model in enumerate(models)))
        self.nets = nn.ModuleList(models).eval().requires_grad_(False)
        uniform = torch.ones(len(models))
        self.register_buffer("weights", class_weights(uniform if weights is None else weights, len(models), image.num_classes))
        self._norms = [[m for m in net.modules() if isinstance(m, nn.BatchNorm2d)] for net in self.nets]
        self._linears = [final_linear(net, image.num_classes) for net in self.nets]
        self.train(False)

    def __len__(self) -> int:
        return len(self.nets)

    @property
    def has_batch_norm(self) -> tuple[bool, ...]:
        """Per teacher: does it have a BatchNorm2d layer with running statistics?"""
        return tuple(any(norm.track_running_stats for norm in norms) for norms in self._norms)

    @property
    def has_features(self) -> tuple[bool, ...]:
        """Per teacher: is there a linear classifier whose input can serve as features?"""
        return tuple(linear is not None for linear in self._linears)

    @property
    def is_uniform(self) -> bool:
        """Do all teachers weigh the same for every class?"""
        return bool(torch.all(self.weights == self.weights[0, 0]))

    @property
    def counted(self) -> list[int]:
        """The teachers that have a weight for some class; one that is too old has none."""
        return weighted(self.weights)

    def only(self, chosen: Sequence[int]) -> TeacherEnsemble:
        """Some of the teachers with their weights, in this order; all of them is the ensemble itself. Networks are shared, not copied."""
        if list(chosen) == list(range(len(self))):
            return self
        some = TeacherEnsemble([self.nets[k] for k in chosen], image=self.image, specs=[self.specs[k] for k in chosen])
        some.weights = self.weights[list(chosen)]
        return some

    @torch.no_grad()
    def accepts_channels_last(self) -> bool:
        """Can every teacher compute on images in the channels-last layout?

        Networks that flatten their maps with ``view``, as many tutorials' do, fail on them. The answer leaves the
        teachers in their contiguous layout if it is no.
        """
        images = torch.zeros(2, *self.image.shape, device=self.weights.device).to(memory_format=torch.channels_last)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            self(images)
        except RuntimeError:
            self.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            return False
        return True

    def train(self, mode: bool = True) -> TeacherEnsemble:  # noqa: ARG002 - torch's signature
        """Teachers stay in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[K, B, C]`` of normalised images, differentiable in the images only."""
        return torch.stack([net(images) for net in self.nets])

    def fused(self, images: Tensor) -> Tensor:
        """Log-probabilities ``[B, C]`` of the weighted ensemble (`fuse` with this ensemble's weights)."""
        return fuse(self(images), self.weights)

    def observe(self, images: Tensor, *, bn: bool = True) -> TeacherOutputs:
        """Logits, features before the last linear layer, and BatchNorm distances (DeepInversion, arXiv:1912.08795, eq. 4).

        Args:
            images: normalised, ``[B, channels, H, W]``.
            bn: compute the distances: the batch statistics of every BatchNorm2d input, in float32. Without them it
                costs what `forward` costs, and ``bn`` is None for every teacher.
        """
        logits, features, distances = [], [], []
        for net, norms, linear in zip(self.nets, self._norms, self._linears, strict=True):
            layers: list[Tensor] = []
            seen: list[Tensor] = []
            hooks = [
                norm.register_forward_pre_hook(lambda module, inputs, into=layers: into.append(batch_norm_distance(module, inputs[0])))
                for norm in norms
                if bn and norm.track_running_stats
            ]
            if linear is not None:
                hooks.append(linear.register_forward_pre_hook(lambda module, inputs, into=seen: into.append(inputs[0])))
            try:
                logits.append(net(images))
            finally:
                for hook in hooks:
                    hook.remove()
            features.append(seen[-1] if seen else None)
            distances.append(torch.stack(layers) if layers else None)
        return TeacherOutputs(torch.stack(logits), tuple(features), tuple(distances))
