"""The interface of a data-free distillation method: one abstract method, ``run_epoch``."""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cdfkd_strategy import parallel
from cdfkd_strategy.errors import CheckpointError, ConfigError, NeedsError
from cdfkd_strategy.registry import Registry
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import Extras, ImageSpec, Metrics, Needs

StudentKind = Literal["single", "multi"]
LOST = (np.ndarray, np.random.Generator, np.random.RandomState, random.Random, bytearray)
"""What changes in place and no checkpoint holds."""


class Distiller(ABC):
    """Distils frozen teachers into a student, epoch by epoch, without data.

    A method owns its loops: ``run_epoch`` makes all generator and student steps of one epoch. Everything it keeps
    between epochs is an attribute set in ``__init__``: modules, optimisers, schedulers, pools (anything with
    ``state_dict``/``load_state_dict``), tensors, numbers, words, None, tuples of these and `torch.Generator` objects are saved and
    restored by name, so that a run resumed at any epoch boundary continues exactly. What changes and would be lost is an error: a
    list, dict, set or deque that is not empty, NumPy's arrays and random numbers, Python's random numbers. Other objects are taken
    to be constant.
    A `TransferPool` of synthetic images is called ``pool``: a transfer set on disk is made of it.

    Args:
        teachers: the frozen ensemble, already on the runtime's device.
        student: gives `StudentOutputs`; trained in place.
        config: an instance of the method's ``Config``.
        image: what teachers and student take.
        rng: the only source of the method's random numbers (a CPU generator).
        runtime: device and layout.
        extras: what the method declared in ``needs`` besides properties of the teachers, on the CPU; kept as ``self.extras``
            and not saved. A method that declares none of it need not take it.

    Raises:
        NeedsError: the teachers or ``extras`` lack something in ``needs``.
    """

    name: ClassVar[str]
    students: ClassVar[tuple[StudentKind, ...]] = ()
    """Which students it takes: "multi", with one header per teacher, "single", with one header for all; it refuses a kind that is not named.
    Empty is not stated."""
    status: ClassVar[str] = ""
    """In a few words: where its formulas come from, and what they were checked against. Empty is what the docstring says of *reconstruction*."""
    Config: ClassVar[type]
    needs: ClassVar[Needs] = Needs()
    uses: ClassVar[Needs] = Needs()
    """What it looks at where it is there, and can do without: for the list of what clients disclose; nothing is checked."""
    splits_batches: ClassVar[bool] = False
    """May several processes compute it, each with its rows of every batch? It may if z comes from `Runtime.normal` and every loss
    is a mean over the batch, or asks `parallel` for the whole batch; a test compares it with one process."""
    generator_lasts: ClassVar[bool] = True
    """Has it a generator from which the next round could start? False without one, and where every epoch draws a new one."""

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
        extras: Extras | None = None,
    ) -> None:
        self.teachers = teachers
        self.student = student
        self.config = config
        self.image = image
        self.rng = rng
        self.runtime = runtime
        self.extras = (extras or Extras()).only(self.needs)
        self.check_needs()

    @classmethod
    def teachers_at_once(cls, config: Any, teachers: int) -> int:  # noqa: ARG003 - for methods with such a setting
        """How many of so many teachers a step computes; what the activations take grows with it. All, unless a method draws some."""
        return teachers

    def check_needs(self) -> None:
        """Compare ``needs`` with what the teachers and the extras have; called before any training."""
        for need, have in (("batch_norm", self.teachers.has_batch_norm), ("features", self.teachers.has_features)):
            without = [spec.key for spec, has in zip(self.teachers.specs, have, strict=True) if not has]
            if without and getattr(self.needs, need):
                raise NeedsError(
                    f"method {self.name!r} needs {Needs.words(need)}, which teachers {', '.join(without)} do not have; "
                    "give it other teachers, or choose a method whose needs they meet (`cdfkd methods` lists them)"
                )
        self.check_extras(self.extras)

    @classmethod
    def check_extras(cls, extras: Extras) -> None:
        """Compare ``needs`` with what a server has besides the teachers; possible before there are any.

        Raises:
            NeedsError: something is not there; the message says what, and what to do.
        """
        lacking = extras.lacking(cls.needs)
        if lacking:
            what = " and ".join(Needs.words(need) for need in lacking)
            ask = "train teachers whose clients disclose them (server.weights=label_counts), " if "label_counts" in lacking else ""
            raise NeedsError(
                f"method {cls.name!r} needs {what}, which this run does not have; {ask}"
                f"hand it to distill() in Extras({', '.join(f'{need}=...' for need in lacking)}), or choose another method (`cdfkd methods` lists them)"
            )

    @classmethod
    def check_processes(cls) -> None:
        """Can as many processes as there are compute this method?

        Raises:
            ConfigError: there are several, and it needs all of a batch in one.
        """
        if parallel.size() > 1 and not cls.splits_batches:
            accepted = ", ".join(name for name in METHODS if METHODS[name].splits_batches)
            raise ConfigError(f"method {cls.name!r} does not split its batches among {parallel.size()} processes; start one, or choose another: {accepted}")

    @property
    def networks(self) -> list[nn.Module]:
        """The modules that the method trains or keeps: student, generator, and others; not the teachers."""
        return [value for value in vars(self).values() if isinstance(value, nn.Module) and value is not self.teachers]

    def start_generator(self, state: Mapping[str, Tensor]) -> None:
        """Fill the generator with the weights of an earlier one; a method that keeps an average of it fills that too.

        Args:
            state: the state dict of a generator of the same shape.

        Raises:
            ConfigError: the method has no generator that lasts, or one of another shape.
        """
        if self.generator is None or not self.generator_lasts:
            raise ConfigError(f"method {self.name!r} has no generator that could start from an earlier one")
        shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (self.generator.state_dict(), state)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"the generator to start from has not the shape of this run's; accepted: one of method {self.name!r} with the same method.generator"
            )
        self.generator.load_state_dict(state)

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
        """Attributes that change between epochs, by name; teachers, config, image, runtime and extras do not."""
        constant = {"teachers", "config", "image", "runtime", "extras"}
        kept = {}
        for name, value in vars(self).items():
            if name in constant or dataclasses.is_dataclass(value):
                continue
            if (isinstance(value, list | dict | set | deque) and value) or isinstance(value, LOST):
                raise CheckpointError(
                    f"method {self.name!r} keeps a {type(value).__name__} in {name!r}, which a checkpoint would lose; accepted: tensors, numbers, tuples, "
                    "torch.Generator, and what has a state_dict (nn.ModuleList, nn.ModuleDict), under attributes of their own"
                )
            if hasattr(value, "state_dict") or isinstance(value, torch.Generator) or _is_plain(value):
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
                if isinstance(value, torch.optim.Optimizer):
                    _lay_out_as_parameters(value)
            elif isinstance(value, Tensor) and isinstance(state[name], Tensor):
                with torch.no_grad():
                    value.copy_(state[name])
            elif _is_plain(state[name]):
                setattr(self, name, _placed(state[name], self.runtime.device))
            else:
                raise CheckpointError(f"method {self.name!r} has no {name!r} to restore the state of; accepted: modules, optimisers and pools set in __init__")


def _is_plain(value: Any) -> bool:
    """Can a checkpoint hold it as it is?"""
    return value is None or isinstance(value, Tensor | bool | int | float | str) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _placed(value: Any, device: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_placed(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded buffers the memory layout of their parameters, which they had before they were saved; files know one layout only.

    A step adds them up element by element, and whatever sums over a buffer does so in the order of its memory: in another
    layout the first may be slower, and the second gives other bits.
    """
    for parameter, buffers in optimizer.state.items():
        for name, buffer in buffers.items():
            if isinstance(buffer, Tensor) and buffer.shape == parameter.shape:
                buffers[name] = torch.empty_like(parameter, dtype=buffer.dtype, device=buffer.device).copy_(buffer)


METHODS: Registry[type[Distiller]] = Registry("method")
"""Every known method; `cdfkd_strategy.methods` fills it."""
