"""DFAD: data-free adversarial distillation (Fang et al., 2019).

Paper: https://arxiv.org/abs/1912.11006

A generator G looks for images x = G(z), z ~ N(0, I), on which student and teacher differ, and the student learns to agree on
them. With T(x) and S(x) the logits, the discrepancy is their mean absolute difference:

    five student steps, fresh z each:   L_S =  mean|S(x) - T(x)|      (SGD)
    then one generator step:            L_G = -mean|S(x) - T(x)|      (Adam), the gradient through both networks

Nothing makes images look like the data, or cover the classes. Both rates fall together. Generator and student are always
in train mode.

Settings: CIFAR-10 and CIFAR-100 are the defaults (the authors' command with its scheduler). MNIST: 40 epochs, 512 images,
latent width 100, student_lr 0.01, weight_decay 1e-4, no milestones. Caltech-101: 300 epochs, 64 images, student_lr 0.05.

Deviations:

- Several teachers (the paper has one): header k imitates teacher k and the discrepancy is the mean over the headers; a
  student with one header imitates the class-weighted mean of the teachers' logits. One teacher is the paper's case.
- The generator's BatchNorm has the epsilon of CDFKD-MFS's (0.8; ``generator.batch_norm_eps``), where DFAD's own has 1e-5. The large one (from 64 px
  on) starts from torch's weights, the authors' from N(0, 0.02^2).
- Rates fall after as many epochs as the milestones say; the authors count one step before the first epoch, so theirs fall one epoch earlier.
- The last epoch counts; the authors keep the epoch that is best on test images.
- ``schedule="cosine"`` instead of the authors' steps, for short budgets.

A public re-implementation (Fast-Datafree) passes the teacher as the student of the generator's loss, which is then 0
whatever the images are: its numbers for DFAD are not DFAD's.

A client must disclose its weights; BatchNorm statistics are not used as such.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cdfkd_strategy.config import require
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.losses.divergence import logit_l1
from cdfkd_strategy.losses.head_targets import head_targets, mean_logits
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import ScheduleName, factor, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.term_means import TermMeans
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs


@dataclass(frozen=True)
class DFADConfig:
    """Settings of `DFAD`; the defaults are the authors' for CIFAR-10 and CIFAR-100.

    Args:
        epochs: passes of ``iterations``. MNIST: 40.
        iterations: rounds of student and generator steps per epoch.
        student_steps: student steps per iteration, each on a fresh batch.
        batch_size: synthetic images per step. MNIST: 512, Caltech-101: 64.
        student_lr: SGD, with ``momentum`` and ``weight_decay``. MNIST: 0.01, Caltech-101: 0.05.
        momentum: of SGD.
        weight_decay: of SGD. MNIST: 1e-4.
        generator_lr: Adam, default betas.
        schedule: "multistep" (x0.1 at ``milestones``, in epochs), "cosine" (to 0, per iteration) or "constant", for both.
        milestones: epochs at which both rates are divided by 10.
        generator: latent width (MNIST: 100) and size of G.
    """

    epochs: int = 500
    iterations: int = 50
    student_steps: int = 5
    batch_size: int = 256
    student_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    generator_lr: float = 1e-3
    schedule: ScheduleName = "multistep"
    milestones: tuple[int, ...] = (100, 200)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "iterations", "student_steps", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "generator_lr", "student_lr", above=0)
        require(self, "method", "milestones", "weight_decay", least=0)
        require(self, "method", "momentum", least=0, below=1)

    @classmethod
    def toy(cls) -> DFADConfig:
        """The smallest setting that runs every stage."""
        return cls(
            epochs=2, iterations=3, student_steps=2, batch_size=32, student_lr=0.05, milestones=(1,), generator=GeneratorConfig(latent_dim=16, width=0.25)
        )


@METHODS.register("dfad")
class DFAD(Distiller):
    """DFAD (https://arxiv.org/abs/1912.11006); see the module's docstring for the losses and the deviations.

    The student may have one header per teacher, or one for all.
    """

    name = "dfad"
    students = ("single", "multi")
    status = "every loss tested; formulas of the authors' code"
    Config = DFADConfig
    needs = Needs()
    config: DFADConfig
    generator: nn.Module

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: DFADConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        self.generator = runtime.place(build_generator(image, config.generator))
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr)
        self.student_optimizer = torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay)

    @property
    def num_epochs(self) -> int:
        """``config.epochs``."""
        return self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """``iterations`` times: ``student_steps`` on fresh batches, then a generator step."""
        config = self.config
        self.generator.train()
        self.student.train()
        means = TermMeans()
        for iteration in range(config.iterations):
            share = factor(config.schedule, epoch, iteration, epochs=config.epochs, iterations=config.iterations, milestones=config.milestones)
            set_rate(self.student_optimizer, config.student_lr * share)
            set_rate(self.generator_optimizer, config.generator_lr * share)
            for step, count in ((self.student_step, config.student_steps), (self.generator_step, 1)):
                for _ in range(count):
                    means.add(step())
        return means.means()  # the epoch's only host sync

    def discrepancy(self, student: Tensor, teachers: Tensor) -> Tensor:
        """``mean|S - T|`` of logits ``[heads, B, C]`` and ``[K, B, C]``, over the headers too."""
        return logit_l1(student, head_targets(teachers, self.teachers.weights, len(student), mean_logits))

    def _draw(self) -> Tensor:
        z = self.runtime.normal(self.config.batch_size, self.config.generator.latent_dim, rng=self.rng)
        return self.runtime.images(self.generator(z))

    def student_step(self) -> LossTerms:
        """One step of the student on a fresh batch; gives L_S."""
        with self.runtime.autocast():
            with torch.no_grad():
                images = self._draw()
                teachers = self.teachers(images)
            student = self.student(images).logits
        terms = {"student/l1": self.discrepancy(student, teachers)}
        self.student_optimizer.zero_grad(set_to_none=True)
        terms["student/l1"].backward()
        self.student_optimizer.step()
        return terms

    def generator_step(self) -> LossTerms:
        """One step of the generator; gives L_G."""
        with self.runtime.autocast():
            images = self._draw()
            teachers = self.teachers(images)
            student = self.student(images).logits
        terms = {"generator/adversarial": -self.discrepancy(student, teachers)}
        self.generator_optimizer.zero_grad(set_to_none=True)
        terms["generator/adversarial"].backward(inputs=list(self.generator.parameters()))
        self.generator_optimizer.step()
        return terms
