"""KD: knowledge distillation on real images (Hinton et al., 2015). A reference row: the upper bound of a benchmark, and not data-free.

Paper: https://arxiv.org/abs/1503.02531

    L_S = T^2 KL( softmax(T(x) / T) || softmax(S(x) / T) )  on random batches of the server's images x  (SGD)

`cdfkd distill --method kd` hands it the training images of all clients (of more than 50,000, so many), which no server of a federation has, and
`cdfkd distill --transfer-set FILE` the synthetic images of an earlier run instead; what it is then is another question than the upper bound.

Deviations:

- No cross entropy with labels (the paper adds a little of it): images come without labels. T = 1, SGD and epochs are those of the
  real-data row of CDFKD-MFS's authors, with their crops and flips; ``augment="auto"`` mirrors colour images only.
- Several teachers (the paper has one, or the mean of several): header k imitates teacher k, and a student with one header
  imitates the ensemble fused with the teachers' class weights.
- What it learns from is a pool of 8-bit pixels. Images stay out of checkpoints, pictures and transfer sets.

A client must disclose its weights, and the server must have real images: those of clients, for the upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cdfkd_strategy.config import require
from cdfkd_strategy.data.augmentation import AugmentName, RandomViews
from cdfkd_strategy.data.transfer_pool import TransferPool
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.pool_distillation import PoolDistillation
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import multistep, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import Extras, ImageSpec, Metrics, Needs

STORED_AT_ONCE = 5000
"""Images that are turned into bytes at a time."""


@dataclass(frozen=True)
class KDConfig:
    """Settings of `KD`.

    Args:
        epochs: of distillation.
        iterations: student steps per epoch; 391 of 128 images are one pass over 50,000.
        batch_size: images per step.
        student_lr: SGD, with ``momentum`` and ``weight_decay``.
        momentum: of SGD.
        weight_decay: of SGD.
        student_milestones: epochs at which the student's rate is divided by 10.
        temperature: T.
        augment: how images of the pool are moved in every step of the student, see `RandomViews`.
    """

    epochs: int = 200
    iterations: int = 391
    batch_size: int = 128
    student_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    student_milestones: tuple[int, ...] = (80, 120)
    temperature: float = 1.0
    augment: AugmentName = "auto"

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "iterations", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "student_lr", "temperature", above=0)
        require(self, "method", "student_milestones", "weight_decay", least=0)
        require(self, "method", "momentum", least=0, below=1)

    @classmethod
    def toy(cls) -> KDConfig:
        """The smallest setting that runs."""
        return cls(epochs=2, iterations=8, batch_size=32, student_milestones=(1,))


@METHODS.register("kd")
class KD(Distiller):
    """Knowledge distillation on real images (https://arxiv.org/abs/1503.02531); see the module's docstring.

    The student may have one header per teacher, or one for all.
    """

    name = "kd"
    students = ("single", "multi")
    generator_lasts = False
    status = "every loss tested; reference on real images"
    Config = KDConfig
    needs = Needs(proxy_data=True)
    config: KDConfig

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: KDConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
        extras: Extras | None = None,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime, extras=extras)
        assert self.extras.proxy_data is not None
        pool = TransferPool(max(len(self.extras.proxy_data), 1), image)
        for images in self.extras.proxy_data.split(STORED_AT_ONCE):
            pool.add(images)
        self.student_optimizer = torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay)
        # The pool is no attribute of its own: a checkpoint would hold the real images.
        self.distillation = PoolDistillation(
            pool,
            teachers,
            student,
            self.student_optimizer,
            batch_size=config.batch_size,
            temperature=config.temperature,
            rng=rng,
            runtime=runtime,
            views=RandomViews(image, config.augment, None, rng),
        )

    @property
    def num_epochs(self) -> int:
        """Epochs of distillation."""
        return self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """``iterations`` student steps."""
        set_rate(self.student_optimizer, self.config.student_lr * multistep(epoch, self.config.student_milestones))
        if self.distillation.pool.logits is None:  # the first epoch, or the first after a resume
            self.distillation.ask_teachers()
        return {"student/kl": self.distillation.epoch(self.config.iterations)}
