"""The frozen client teachers as one module: logits of all of them, and what generator losses look at inside them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cdfkd_strategy import parallel
from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.losses.statistics import BatchNorm, ShiftDistance, batch_norm_shift, shift_distance
from cdfkd_strategy.models.classifiers import final_linear
from cdfkd_strategy.models.head_fusion import class_weights, fuse, weighted
from cdfkd_strategy.precision import full
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teacher_forms import TeacherForms
from cdfkd_strategy.teacher_shards import Answer, answers_of_all
from cdfkd_strategy.types import ImageSpec, TeacherOutputs

T = TypeVar("T")


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
        self._forms = TeacherForms(image, Runtime(channels_last=False))
        self._numbers = tuple(range(len(models)))  # among the teachers that were prepared together
        self.train(False)

    def __len__(self) -> int:
        return len(self.nets)

    @property
    def has_batch_norm(self) -> tuple[bool, ...]:
        """Per teacher: does it have a BatchNorm layer with running statistics?"""
        return tuple(any(isinstance(part, BatchNorm) and part.track_running_stats for part in net.modules()) for net in self.nets)

    @property
    def has_features(self) -> tuple[bool, ...]:
        """Per teacher: is there a linear classifier whose input can serve as features?"""
        return tuple(final_linear(net, self.image.num_classes) is not None for net in self.nets)

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
        nets = nn.ModuleList(self.nets[k] for k in chosen)
        if not nets:
            raise ArchitectureError("only([]) leaves an ensemble of 0 teachers; accepted: at least one")
        nets.training = False
        some = copy.copy(self)  # a step has no time for a new ensemble; what a shallow copy shares and must not, comes next
        some._modules, some._buffers = {**self._modules, "nets": nets}, {**self._buffers, "weights": torch.stack([self.weights[k] for k in chosen])}
        some.specs, some._numbers = tuple(self.specs[k] for k in chosen), tuple(self._numbers[k] for k in chosen)
        return some

    def drawn(self, chosen: Sequence[int]) -> TeacherEnsemble:
        """`only` with class weights that sum to 1 again, for a step that some teachers take part in. A class that none of them knows is shared equally."""
        some = self.only(chosen)
        if some is not self:
            weights = some.weights.clamp_min(torch.finfo(some.weights.dtype).tiny)
            some.weights = weights / weights.sum(0)
        return some

    @torch.no_grad()
    def accepts_channels_last(self) -> bool:
        """Can every teacher compute on images in the channels-last layout?

        Networks that flatten their maps with ``view``, as many tutorials' do, fail on them. Copies are asked, one at a time.
        """
        images = torch.zeros(2, *self.image.shape).to(memory_format=torch.channels_last)
        for net in self.nets:
            device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
            copied = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            try:
                copied(images.to(device))
            except RuntimeError:
                return False
        return True

    def train(self, mode: bool = True) -> TeacherEnsemble:  # noqa: ARG002 - torch's signature
        """Teachers stay in eval mode."""
        return super().train(False)

    def _own(self, sharded: bool) -> int:
        """The teachers that one process computes, at most."""
        return -(-len(self) // parallel.size()) if sharded else len(self)

    def folding(self, runtime: Runtime, resident: int, *, sharded: bool = False) -> Runtime:
        """What `prepared` makes of a runtime: where not all teachers fit on the device with and without BatchNorm, nothing is folded.

        Folding takes four times as long as copying and saves a tenth of a forward pass, and a copy with BatchNorm serves every step.
        """
        return dataclasses.replace(runtime, fold=False) if 0 < resident < 2 * self._own(sharded) else runtime

    @contextmanager
    def prepared(self, runtime: Runtime, resident: int = 0, *, sharded: bool = False) -> Iterator[TeacherEnsemble]:
        """Compute inside the block on the runtime's device and as it says; results stay the same up to rounding.

        Weights must not change inside: working copies would not follow. They are dropped at the end; the device is kept, unless ``resident``.

        Args:
            runtime: device, layout, precision; whether BatchNorm is folded, and whether teachers are computed a second time in the backward pass.
            resident: teachers with working copies on the device at a time; the others wait where they are. 0 is all. See `folding`.
            sharded: of several processes each has working copies of some, and computes those where batches are split.
        """
        runtime, sharded = self.folding(runtime, resident, sharded=sharded), sharded and parallel.size() > 1
        if sharded and not resident:
            resident = 2 * self._own(sharded)  # folded, and with their BatchNorm
        weights = self.weights
        if resident:
            self.weights = weights.to(runtime.device)
        before, self._forms = self._forms, TeacherForms(self.image, runtime, resident, sharded=sharded)
        numbers, self._numbers = self._numbers, tuple(range(len(self)))
        try:
            with nullcontext() if resident else runtime.computing(self):
                yield self
        finally:
            self._forms, self._numbers = before, numbers
            if resident:  # the networks stayed where they were, and the ensemble is asked further on
                self.weights = weights

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[K, B, C]`` of normalised images, differentiable in the images only."""
        if self._asks_others:
            return self.observe(images, bn=False).logits
        return torch.stack([self._recomputed(self._logits, net, images) for net in self.nets])

    def fused(self, images: Tensor) -> Tensor:
        """Log-probabilities ``[B, C]`` of the weighted ensemble (`fuse` with this ensemble's weights)."""
        return fuse(self(images), self.weights)

    def observe(self, images: Tensor, *, bn: bool = True, maps: bool = False, distance: ShiftDistance = shift_distance) -> TeacherOutputs:
        """Logits, features before the last linear layer, BatchNorm distances (DeepInversion, arXiv:1912.08795, eq. 4), and stage maps.

        Args:
            images: normalised, ``[B, channels, H, W]``.
            bn: compute the distances: the batch statistics of every BatchNorm input (1d and 2d), in float32. Without them it
                costs what `forward` costs, and ``bn`` is None for every teacher.
            maps: give the last map of every resolution (`models.stages`), at most four per teacher, as it was computed: gradients of logits reach it.
            distance: of a BatchNorm layer's batch statistics from its running ones; `losses.statistics` has several.
        """
        if self._asks_others:

            def answer(net: nn.Module, batch: Tensor) -> Answer:
                return self._recomputed(self._observe, net, batch, bn, maps, distance)[:3]

            asked = answers_of_all(answer, list(self.nets), self._numbers, images)  # methods that want more do not run on several processes
            logits, features, distances = zip(*asked, strict=True)
            return TeacherOutputs(torch.stack(logits), features, distances)
        seen = (self._recomputed(self._observe, net, images, bn, maps, distance) for net in self.nets)
        logits, features, distances, stages, shifts = zip(*seen, strict=True)
        return TeacherOutputs(torch.stack(logits), features, distances, stages, shifts)

    @property
    def _asks_others(self) -> bool:
        return self._forms.sharded and parallel.is_split()

    def _logits(self, net: nn.Module, images: Tensor) -> Tensor:
        with self._forms.runtime.autocast():
            return full(self._forms.get(net, observed=False).net(images))

    def _observe(
        self, original: nn.Module, images: Tensor, bn: bool, maps: bool, distance: ShiftDistance
    ) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits ``[B, C]``, features ``[B, D_k]``, distances ``[L_k]``, stage maps, and shifts of the BatchNorm layers of one teacher."""
        (net, linear), staged = self._forms.staged(original, observed=bn) if maps else (self._forms.get(original, observed=bn), None)
        norms = [part for part in net.modules() if isinstance(part, BatchNorm) and part.track_running_stats] if bn else []
        layers: list[tuple[BatchNorm, Tensor]] = []
        seen: list[Tensor] = []
        hooks = [norm.register_forward_pre_hook(lambda module, inputs: layers.append((module, batch_norm_shift(module, inputs[0])))) for norm in norms]
        if linear is not None:
            hooks.append(linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
        try:
            with self._forms.runtime.autocast(), parallel.not_split() if self._forms.sharded else nullcontext():  # sharded: images of all processes
                logits, stages = (net(images), ()) if staged is None else staged(images)
        finally:
            for hook in hooks:
                hook.remove()
        distances = torch.stack([distance(norm, shift) for norm, shift in layers]) if layers else None
        return full(logits), full(seen[-1]) if seen else None, distances, tuple(stages), tuple(shift for _, shift in layers)

    def _recomputed(self, function: Callable[..., T], net: nn.Module, images: Tensor, *more: Any) -> T:
        """``function(net, images, ...)``; its activations are computed anew in the backward pass if the runtime says so."""
        if not (self._forms.runtime.recompute and torch.is_grad_enabled() and images.requires_grad):
            return function(net, images, *more)
        return checkpoint(function, net, images, *more, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
