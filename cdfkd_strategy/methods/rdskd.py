"""RDSKD: robustness and diversity seeking data-free knowledge distillation (Han et al., ICASSP 2021).

Paper: https://arxiv.org/abs/2011.03749

Two separate stages. With T(x) the teacher's logits of x = G(z), p = softmax(T(x)), pbar its batch mean, and x_1, x_2
(p_1, p_2) the halves of the batch:

    (a) only G:  L_oh = CE(T(x), argmax T(x)),   L_ie = sum_c pbar_c ln pbar_c,
                 L_ds = 1 / ( ||x_2 - x_1||_F / ||p_2 - p_1||_F + 1e-20 ),
                 L_G  = exp(L_oh - L_oh^ref) + exp(L_ie - L_ie^ref) + L_ds        (Adam)
    (b) only S:  L_S  = T^2 KL( softmax(T(x) / T) || softmax(S(x) / T) ),  T = 10  (Adam), G frozen

The references start at 0 and are refreshed once per epoch, after the step of iteration 1: the gradient of a term is
scaled by the exponential of its growth since then, so that a growing term is pulled back harder. There are no weights; factors
of the three terms, 1 unless they are set, are for asking how much weights would matter.
G is sampled in train mode in stage (a), and in eval mode, with its running BatchNorm statistics, in stage (b).

The formulas are those of the authors' code; whether the paper's text differs could not be checked.

Deviations:

- Several teachers (the paper has one): L_oh, L_ie and L_ds are the means over the teachers of the losses of each; the
  exponentials are taken of the means, so that there is one reference each. In stage (b) header k imitates teacher k,
  and a student with one header imitates the ensemble fused with the teachers' class weights; one teacher is the
  paper's case. Stage (a) does not use the weights.
- ``p ln p`` of a class that underflows is NaN in the authors' code; here the batch mean is taken in log space. L_ds is
  written without the quotient that is 0 / 0 when both halves are classified alike (`losses.diversity`).
- The exponentials cannot overflow and need no clamp: 0 <= L_oh <= ln C, because the largest of C probabilities is at
  least 1/C, and -ln C <= L_ie <= 0, so that each of them is at most C.

A client must disclose its weights; BatchNorm statistics are not used as such.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy.config import require
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.losses.class_balance import negative_class_entropy, one_hot_cross_entropy
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.losses.diversity import diversity_loss
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.precision import full
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import factor, multistep, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.term_means import TermMeans
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs

REFRESH_AT = 1
"""The references are refreshed after the step of this iteration (from 0) of every epoch, as in the authors' code."""


def _cifar_generator() -> GeneratorConfig:
    return GeneratorConfig(latent_dim=1000)


@dataclass(frozen=True)
class RDSKDConfig:
    """Settings of `RDSKD`; the defaults are the authors' for CIFAR-10.

    Args:
        generator_epochs: epochs of stage (a).
        student_epochs: epochs of stage (b).
        iterations: steps per epoch, in both stages; at least 2, since the references are refreshed after the second.
        batch_size: synthetic images per step; even, for the two halves.
        student_batch_size: images per step of stage (b); None is ``batch_size``, as in the authors' code. Where steps and not images are what a
            short budget lacks, many small steps teach the student more.
        generator_lr: Adam, default betas.
        generator_schedule: of that rate over stage (a), "constant", as the authors have it, or "cosine" (to 0): a high rate for few steps leaves running
            BatchNorm statistics behind the weights, and stage (b) draws its images from them.
        student_lr: Adam, default betas.
        student_milestones: epochs of stage (b), from its start, at which the student's rate is divided by 10; none for MNIST and SVHN.
        temperature: T of stage (b).
        one_hot_factor: of exp(L_oh - L_oh^ref). The method has no weights: other factors than 1 are for comparing its robustness with that of weighted sums.
        entropy_factor: of exp(L_ie - L_ie^ref), the same.
        diversity_factor: of L_ds, the same.
        generator: latent width (100 for MNIST) and size of G.
    """

    generator_epochs: int = 20
    student_epochs: int = 1000
    iterations: int = 120
    batch_size: int = 512
    student_batch_size: int | None = None
    generator_lr: float = 1e-3
    generator_schedule: Literal["constant", "cosine"] = "constant"
    student_lr: float = 2e-3
    student_milestones: tuple[int, ...] = (800,)
    temperature: float = 10.0
    one_hot_factor: float = 1.0
    entropy_factor: float = 1.0
    diversity_factor: float = 1.0
    generator: GeneratorConfig = field(default_factory=_cifar_generator)

    def __post_init__(self) -> None:
        require(self, "method", "generator_epochs", "student_epochs", least=1)
        require(self, "method", "iterations", least=REFRESH_AT + 1)
        require(self, "method", "student_batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "generator_lr", "student_lr", "temperature", above=0)
        require(self, "method", "student_milestones", "one_hot_factor", "entropy_factor", "diversity_factor", least=0)
        if self.batch_size < 4 or self.batch_size % 2:
            raise ConfigError(f"method.batch_size is {self.batch_size}; accepted: an even number, at least 4 (the diversity loss compares two halves)")

    @classmethod
    def toy(cls) -> RDSKDConfig:
        """The smallest setting that runs every stage."""
        return cls(
            generator_epochs=2,
            student_epochs=2,
            iterations=4,
            batch_size=32,
            student_milestones=(1,),
            generator=GeneratorConfig(latent_dim=16, width=0.25),
        )


@METHODS.register("rdskd")
class RDSKD(Distiller):
    """RDSKD (https://arxiv.org/abs/2011.03749); see the module's docstring for the losses and the deviations.

    The student may have one header per teacher, or one for all.
    """

    name = "rdskd"
    students = ("single", "multi")
    status = "every loss tested; formulas of the authors' code"
    Config = RDSKDConfig
    needs = Needs()
    splits_batches = True
    config: RDSKDConfig
    generator: nn.Module

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: RDSKDConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        self.generator = runtime.place(build_generator(image, config.generator))
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr)
        self.student_optimizer = torch.optim.Adam(student.parameters(), lr=config.student_lr)
        self.reference_one_hot = torch.zeros((), device=runtime.device)
        self.reference_entropy = torch.zeros((), device=runtime.device)
        self.frozen = False

    @property
    def num_epochs(self) -> int:
        """Epochs of both stages."""
        return self.config.generator_epochs + self.config.student_epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """``iterations`` generator steps (stage a), or as many student steps (stage b)."""
        self.frozen = epoch >= self.config.generator_epochs
        means = TermMeans()
        if self.frozen:
            set_rate(self.student_optimizer, self.config.student_lr * multistep(epoch - self.config.generator_epochs, self.config.student_milestones))
            self.generator.eval()
            self.student.train()
        else:
            self.generator.train()
        for iteration in range(self.config.iterations):
            means.add(self._student_step() if self.frozen else self._generator_step(epoch, iteration))
        return means.means()  # the epoch's only host sync

    def sample(self, count: int, rng: torch.Generator) -> Tensor | None:
        """Images as the running stage sees them: from running BatchNorm statistics once G is frozen."""
        if not self.frozen:
            return super().sample(count, rng)
        self.generator.eval()
        with torch.no_grad():
            return self._draw(count, rng)

    def _draw(self, count: int, rng: torch.Generator) -> Tensor:
        z = self.runtime.normal(count, self.config.generator.latent_dim, rng=rng)
        return self.runtime.images(self.generator(z))

    def _generator_step(self, epoch: int, iteration: int) -> LossTerms:
        config = self.config
        scale = factor(config.generator_schedule, epoch, iteration, epochs=config.generator_epochs, iterations=config.iterations, milestones=())
        set_rate(self.generator_optimizer, config.generator_lr * scale)
        with self.runtime.autocast():
            images = self._draw(config.batch_size, self.rng)
            logits = self.teachers(images)
        one_hot, entropy = one_hot_cross_entropy(logits), negative_class_entropy(logits)
        terms = {
            "generator/one_hot": config.one_hot_factor * (one_hot - self.reference_one_hot).exp(),
            "generator/entropy": config.entropy_factor * (entropy - self.reference_entropy).exp(),
            "generator/diversity": config.diversity_factor * diversity_loss(images, F.softmax(full(logits), dim=-1)),
        }
        self.generator_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self.generator_optimizer.step()
        if iteration == REFRESH_AT:
            self.reference_one_hot.copy_(one_hot.detach())
            self.reference_entropy.copy_(entropy.detach())
        return terms

    def _student_step(self) -> LossTerms:
        with self.runtime.autocast():
            with torch.no_grad():
                images = self._draw(self.config.student_batch_size or self.config.batch_size, self.rng)
                teachers = self.teachers(images)
            student = self.student(images).logits
        target = head_targets(teachers, self.teachers.weights, len(student))
        terms = {"student/kl": kl_divergence(student, target, self.config.temperature)}
        self.student_optimizer.zero_grad(set_to_none=True)
        terms["student/kl"].backward()
        self.student_optimizer.step()
        return terms
