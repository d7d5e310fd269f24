"""The interface of a data-free distillation method: one abstract method, ``run_epoch``."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cdfkd_strategy.errors import CheckpointError, NeedsError
from cdfkd_strategy.registry import Registry
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, Metrics, Needs


class Distiller(ABC):
    """Distils frozen teachers into a student, epoch by epoch, without data.

    A method owns its loops: ``run_epoch`` makes all generator and student steps of one epoch. Everything it keeps
    between epochs is an attribute set in ``__init__``: modules, optimisers, schedulers, pools (anything with
    ``state_dict``/``load_state_dict``), tensors, numbers and `torch.Generator` objects are saved and restored by name,
    so that a run resumed at any epoch boundary continues exactly.

    Args:
        teachers: the frozen ensemble, already on the runtime's device.
        student: gives `StudentOutputs`; trained in place.
        config: an instance of the method's ``Config``.
        image: what teachers and student take.
        rng: the only source of the method's random numbers (a CPU generator).
        runtime: device and layout.

    Raises:
        NeedsError: the teachers lack something in ``needs``.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    needs: ClassVar[Needs] = Needs()

    generator: nn.Module | None = None

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: Any,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        self.teachers = teachers
        self.student = student
        self.config = config
        self.image = image
        self.rng = rng
        self.runtime = runtime
        self.check_needs()

    def check_needs(self) -> None:
        """Compare ``needs`` with what the teachers have; called before any training."""
        lacking = []
        if self.needs.batch_norm and not all(self.teachers.has_batch_norm):
            lacking.append(("BatchNorm running statistics", self.teachers.has_batch_norm))
        if self.needs.features and not all(self.teachers.has_features):
            lacking.append(("features before a last linear layer", self.teachers.has_features))
        for what, have in lacking:
            without = [spec.key for spec, has in zip(self.teachers.specs, have, strict=True) if not has]
            raise NeedsError(
                f"method {self.name!r} needs {what}, which teachers {', '.join(without)} do not have; "
                "give it other teachers, or choose a method whose needs they meet (`cdfkd methods` lists them)"
            )

    @property
    @abstractmethod
    def num_epochs(self) -> int:
        """Epochs of the whole schedule, all stages included."""

    @abstractmethod
    def run_epoch(self, epoch: int) -> Metrics:
        """Run epoch ``epoch`` (from 0) and return its named terms, averaged over the epoch's steps."""

    def sample(self, count: int, rng: torch.Generator) -> Tensor | None:
        """``count`` synthetic images ``[count, channels, H, W]`` as the student sees them now, or None before there are any.

        Used for pictures and the collapse watch. It must leave the method's state untouched: it draws from the given
        ``rng`` only.
        """
        if self.generator is None:
            return None
        from cdfkd_strategy.models.generators import sample_images

        return sample_images(self.generator, count, rng, self.runtime)

    # -- state -------------------------------------------------------------------------------------------------

    def _stateful(self) -> dict[str, Any]:
        """Attributes that change between epochs, by name; teachers, config, image and runtime do not."""
        constant = {"teachers", "config", "image", "runtime"}
        kept = {}
        for name, value in vars(self).items():
            if name in constant or dataclasses.is_dataclass(value):
                continue
            if hasattr(value, "state_dict") or isinstance(value, Tensor | torch.Generator | bool | int | float):
                kept[name] = value
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, as nested mappings of tensors and plain values."""
        state: dict[str, Any] = {}
        for name, value in self._stateful().items():
            if isinstance(value, torch.Generator):
                state[name] = value.get_state()
            else:
                state[name] = value.state_dict() if hasattr(value, "state_dict") else value
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: the saved names are not this method's.
        """
        mine = self._stateful()
        if set(mine) != set(state):
            raise CheckpointError(
                f"the checkpoint holds the state of {sorted(state)}, but method {self.name!r} keeps {sorted(mine)}; "
                "it was written by another method or version: start a new run directory"
            )
        for name, value in mine.items():
            if isinstance(value, torch.Generator):
                value.set_state(state[name].cpu())
            elif hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            elif isinstance(value, Tensor):
                with torch.no_grad():
                    value.copy_(state[name])
            else:
                setattr(self, name, state[name])


METHODS: Registry[type[Distiller]] = Registry("method")
"""Every known method; `cdfkd_strategy.methods` fills it."""
