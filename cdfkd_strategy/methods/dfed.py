"""DFED: data-free ensemble knowledge distillation for privacy-conscious multimedia model compression (Hao et al., ACM MM 2021).

Paper: https://doi.org/10.1145/3474085.3475329 (not on arXiv). The formulas are those that CDFKD-MFS's authors
(https://arxiv.org/abs/2205.11845) run under its name; that the paper's text says the same is a *reconstruction*.

It is DFAD (https://arxiv.org/abs/1912.11006) with an ensemble for a teacher, and a generator held to the statistics in the
teachers' BatchNorm layers. With T_i the logits of teacher i, S the student's, x = G(z), z ~ N(0, I), and R_BN the distance from
the BatchNorm statistics, its first layer weighted five times:

    five student steps, fresh z each:   L_S =  mean| S - (1/N) sum_i T_i |                                        (SGD)
    then one generator step:            L_G = -mean| S - (1/N) sum_i T_i | + w_bn (1/N) sum_i R_BN(T_i)           (Adam)

The gradient of L_G passes through the student and all teachers. Both rates fall together. The same steps, rates and batches as
CDFKD-MFS: the difference is what its headers and its terms on single teachers add.

Deviations:

- With class weights w[k, c] the target is the weighted mean of the logits, sum_k w[k, c] T_k[c]; uniform weights are the paper's.
- A student with several headers, of any number: *every* header imitates the ensemble, and the discrepancy is the mean over the
  headers, in both losses. So however the headers are fused, the answer is the ensemble's; the mean of the headers as the one
  student would leave single headers undetermined. This is the ablation of CDFKD-MFS without teachers for headers.
- R_BN is the mean over the teachers that have BatchNorm, and left out where none has. In the authors' code 3 teachers are
  hard-wired in it, a bug for any other number.
- ``schedule="cosine"`` instead of the authors' steps, for short budgets.

R_BN covers BatchNorm1d layers too, where a network has them; authors look at BatchNorm2d alone.
A client must disclose its weights, including BatchNorm running statistics (unless ``bn_weight`` is 0).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cdfkd_strategy.config import require
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.losses.divergence import logit_l1
from cdfkd_strategy.losses.head_targets import mean_logits
from cdfkd_strategy.losses.statistics import batch_norm_loss
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import ScheduleName, factor, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.term_means import TermMeans
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs


@dataclass(frozen=True)
class DFEDConfig:
    """Settings of `DFED`; the defaults are the authors' for CIFAR-100.

    Args:
        epochs: passes of ``iterations``. mini-ImageNet, as CDFKD-MFS: 100.
        iterations: rounds of student and generator steps per epoch. mini-ImageNet: 750.
        student_steps: student steps per iteration, each on a fresh batch.
        batch_size: synthetic images per step. Caltech-101, mini-ImageNet: 64.
        bn_weight: w_bn; 0 does without.
        first_layer_weight: rho_1, the weight of the first BatchNorm layer.
        student_lr: SGD, with ``momentum`` and ``weight_decay``.
        momentum: of SGD.
        weight_decay: of SGD.
        generator_lr: Adam, default betas.
        schedule: "multistep" (x0.1 at ``milestones``, in epochs), "cosine" (to 0, per iteration) or "constant", for both.
        milestones: epochs at which both rates are divided by 10. mini-ImageNet: 30, 60 and 90.
        generator: latent width and size of G.
    """

    epochs: int = 300
    iterations: int = 50
    student_steps: int = 5
    batch_size: int = 256
    bn_weight: float = 0.1
    first_layer_weight: float = 5.0
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
        require(self, "method", "milestones", "bn_weight", "first_layer_weight", "weight_decay", least=0)
        require(self, "method", "generator_lr", "student_lr", above=0)
        require(self, "method", "momentum", least=0, below=1)

    @classmethod
    def toy(cls) -> DFEDConfig:
        """The smallest setting that runs every stage."""
        return cls(
            epochs=2, iterations=3, student_steps=2, batch_size=32, student_lr=0.05, milestones=(1,), generator=GeneratorConfig(latent_dim=16, width=0.25)
        )


@METHODS.register("dfed")
class DFED(Distiller):
    """DFED (ACM MM 2021); see the module's docstring for the losses and the deviations.

    The student may have any number of headers; each imitates the ensemble.
    """

    name = "dfed"
    students = ("single", "multi")
    status = "every loss tested; formulas of the code of CDFKD-MFS"
    Config = DFEDConfig
    uses = Needs(batch_norm=True)
    config: DFEDConfig
    generator: nn.Module

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: DFEDConfig,
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
        """The mean over headers ``[heads, B, C]`` of ``mean|S - mean T|``, for teachers' logits ``[K, B, C]``."""
        return logit_l1(student, mean_logits(teachers, self.teachers.weights).expand_as(student))

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
        """One step of the generator; gives the terms of L_G."""
        config = self.config
        with self.runtime.autocast():
            images = self._draw()
            teachers = self.teachers.observe(images, bn=config.bn_weight > 0)
            student = self.student(images).logits
        terms = {"generator/adversarial": -self.discrepancy(student, teachers.logits)}
        if any(distances is not None for distances in teachers.bn):
            terms["generator/bn"] = config.bn_weight * batch_norm_loss(teachers.bn, config.first_layer_weight)
        self.generator_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward(inputs=list(self.generator.parameters()))
        self.generator_optimizer.step()
        return terms
