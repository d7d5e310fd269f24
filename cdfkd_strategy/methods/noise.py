"""Noise: the student imitates the teachers on Gaussian noise. A reference row: the lower bound that every method must beat.

Reported as such beside DAFL (https://arxiv.org/abs/1904.01186) and DFAD (https://arxiv.org/abs/1912.11006).

    L_S = T^2 KL( softmax(T(x) / T) || softmax(S(x) / T) ),  x ~ N(0, I)  (SGD)

Noise is normalised as the networks see it, and new in every step: no image comes twice, the most that noise can do. A fixed transfer
set of noise, as in those papers, is `cdfkd distill --method noise --save-transfer-set N` and then ``--transfer-set``; its pixels are clipped to [0, 1], which
changes a third of them where images are as dark as MNIST's. Schedule and rates are those of `kd`,
the upper bound. Header k imitates teacher k; a student with one header imitates the ensemble fused with the class weights.

A client must disclose its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cdfkd_strategy.config import require
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import multistep, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, Metrics, Needs


@dataclass(frozen=True)
class NoiseConfig:
    """Settings of `Noise`; the defaults are those of `kd`.

    Args:
        epochs: of distillation.
        iterations: student steps per epoch.
        batch_size: images per step.
        student_lr: SGD, with ``momentum`` and ``weight_decay``.
        momentum: of SGD.
        weight_decay: of SGD.
        student_milestones: epochs at which the student's rate is divided by 10.
        temperature: T.
    """

    epochs: int = 200
    iterations: int = 391
    batch_size: int = 128
    student_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    student_milestones: tuple[int, ...] = (80, 120)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "iterations", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "student_lr", "temperature", above=0)
        require(self, "method", "student_milestones", "weight_decay", least=0)
        require(self, "method", "momentum", least=0, below=1)

    @classmethod
    def toy(cls) -> NoiseConfig:
        """The smallest setting that runs."""
        return cls(epochs=2, iterations=8, batch_size=32, student_milestones=(1,))


@METHODS.register("noise")
class Noise(Distiller):
    """Distillation on Gaussian noise (a row of https://arxiv.org/abs/1904.01186); see the module's docstring.

    The student may have one header per teacher, or one for all.
    """

    name = "noise"
    students = ("single", "multi")
    generator_lasts = False
    status = "every loss tested; reference on noise"
    Config = NoiseConfig
    needs = Needs()
    config: NoiseConfig

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: NoiseConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        self.student_optimizer = torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay)

    @property
    def num_epochs(self) -> int:
        """Epochs of distillation."""
        return self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """``iterations`` student steps."""
        set_rate(self.student_optimizer, self.config.student_lr * multistep(epoch, self.config.student_milestones))
        self.student.train()
        total = torch.zeros((), device=self.runtime.device)
        for _ in range(self.config.iterations):
            total += self._student_step()
        return {"student/kl": float(total / self.config.iterations)}  # the epoch's only host sync

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        """Noise."""
        return self.runtime.images(self.runtime.normal(count, *self.image.shape, rng=rng))

    def _student_step(self) -> Tensor:
        images = self.sample(self.config.batch_size, self.rng)
        with self.runtime.autocast():
            with torch.no_grad():
                teachers = self.teachers(images)
            student = self.student(images).logits
        loss = kl_divergence(student, head_targets(teachers, self.teachers.weights, len(student)), self.config.temperature)
        self.student_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.student_optimizer.step()
        return loss.detach()
