"""DFQ: data-free network quantisation with adversarial knowledge distillation (Choi et al., CVPR workshops 2020), without the quantisation.

Paper: https://arxiv.org/abs/2005.04136

A generator G looks for images x = G(z), z ~ N(0, I), on which student and teacher differ, among those that look like data to the
teacher: they fit the statistics in its BatchNorm layers, it is sure of each, and together they cover all classes. With T(x) and
S(x) the logits, p_x = softmax(T(x)), pbar its batch mean and H the entropy:

    student steps, fresh z each:   L_S =  KL(p_x || softmax(S(x)))                                              (SGD, Nesterov)
    then one generator step:       L_G = -KL(p_x || softmax(S(x))) + alpha [ R_BN(T) + E_x H(p_x) - H(pbar) ]   (Adam, 0.5, 0.999)

The gradient of L_G passes through both networks. Both rates are annealed along a cosine, epoch by epoch.

``mode="paper"`` and ``mode="code"``, the re-implementation by CDFKD-MFS's authors (that of the paper's authors was not at hand),
differ in R_BN and in the unit of the entropies; the default is code, with which students learn more (study mnist_tuning: `dfq-code` and `dfq-longer`):

- paper: R_BN sums, over layers and channels, the KL divergence of the batch's Gaussian from the remembered one; entropies in nats.
  This is a *reconstruction*: neither the sum over channels (for a mean) nor the direction could be checked against the text, and
  neither has a setting. With
  that sum, alpha should fall as networks get wider.
- code: R_BN is DeepInversion's sum of L2 norms, the first layer weighted five times; entropies are taken with log10.

The schedule (5 student steps, alpha 0.1, temperature 1, 200 x 400 iterations, the rates) is the re-implementation's in both; that the
paper's is the same is a *reconstruction* too. Another re-implementation (CMI) has 10 student steps and its own weights.

Bugs of the re-implementation that are fixed in both modes: **the signs of both entropies are flipped**, so that images are sought
which the teacher is unsure of, and all of one class; and log10 of a probability that underflows is NaN. With flipped signs this
baseline is handicapped. Fast-Datafree, and CMI at commit 3f791f9, pass the teacher as the student of the generator's loss, so that its KL is
always 0.

Deviations:

- Quantisation, and several generators and students at once, are not here.
- Several teachers (the paper has one): header k imitates teacher k, and a student with one header imitates the ensemble fused with
  the class weights, in both losses. R_BN and the entropies are means over the teachers and do not use the weights.

R_BN covers BatchNorm1d layers too, where a network has them; authors look at BatchNorm2d alone.
A client must disclose its weights, including BatchNorm running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from cdfkd_strategy.config import require
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.losses.class_balance import DIGITS_PER_NAT, image_entropy, negative_class_entropy
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.losses.statistics import batch_norm_loss, shift_distance, shift_kl
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import cosine, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.term_means import TermMeans
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs, TeacherOutputs


@dataclass(frozen=True)
class DFQConfig:
    """Settings of `DFQ`; the defaults are the re-implementation's for CIFAR-100.

    Args:
        mode: "code" (R_BN as L2 norms, entropies with log10) or "paper" (R_BN as KL between Gaussians, entropies in nats).
        epochs: passes of ``iterations``.
        iterations: rounds of student and generator steps per epoch.
        student_steps: student steps per iteration, each on a fresh batch.
        batch_size: synthetic images per step.
        alpha: weight of R_BN and the entropies.
        student_lr: SGD with Nesterov's ``momentum``, and ``weight_decay``.
        momentum: of SGD.
        weight_decay: of SGD.
        generator_lr: Adam, betas 0.5 and 0.999.
        temperature: of the KL divergences.
        generator: latent width and size of G.
    """

    mode: Literal["code", "paper"] = "code"
    epochs: int = 200
    iterations: int = 400
    student_steps: int = 5
    batch_size: int = 256
    alpha: float = 0.1
    student_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    generator_lr: float = 1e-3
    temperature: float = 1.0
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "iterations", "student_steps", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "alpha", "weight_decay", least=0)
        require(self, "method", "generator_lr", "student_lr", "temperature", above=0)
        require(self, "method", "momentum", above=0, below=1, why="Nesterov's method needs it")

    @classmethod
    def toy(cls) -> DFQConfig:
        """The smallest setting that runs every stage."""
        return cls(epochs=2, iterations=3, student_steps=2, batch_size=32, student_lr=0.05, generator=GeneratorConfig(latent_dim=16, width=0.25))


@METHODS.register("dfq")
class DFQ(Distiller):
    """DFQ (https://arxiv.org/abs/2005.04136); see the module's docstring for the losses, what is reconstructed and the deviations.

    The student may have one header per teacher, or one for all.
    """

    name = "dfq"
    students = ("single", "multi")
    status = "every loss tested; reconstruction in part"
    Config = DFQConfig
    needs = Needs(batch_norm=True)
    config: DFQConfig
    generator: nn.Module

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: DFQConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        self.generator = runtime.place(build_generator(image, config.generator))
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr, betas=(0.5, 0.999))
        self.student_optimizer = torch.optim.SGD(
            student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=True
        )

    @property
    def num_epochs(self) -> int:
        """``config.epochs``."""
        return self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """``iterations`` times: ``student_steps`` on fresh batches, then a generator step."""
        config = self.config
        share = cosine(epoch, config.epochs)
        set_rate(self.student_optimizer, config.student_lr * share)
        set_rate(self.generator_optimizer, config.generator_lr * share)
        self.generator.train()
        self.student.train()
        means = TermMeans()
        for _ in range(config.iterations):
            for step, count in ((self.student_step, config.student_steps), (self.generator_step, 1)):
                for _ in range(count):
                    means.add(step())
        return means.means()  # the epoch's only host sync

    def divergence(self, student: Tensor, teachers: Tensor) -> Tensor:
        """KL from the teachers ``[K, B, C]`` to the headers ``[heads, B, C]``, a mean over the headers."""
        return kl_divergence(student, head_targets(teachers, self.teachers.weights, len(student)), self.config.temperature)

    def generator_loss(self, student: Tensor, teachers: TeacherOutputs) -> LossTerms:
        """The weighted terms of L_G, for the student's logits ``[heads, B, C]``."""
        alpha, code = self.config.alpha, self.config.mode == "code"
        unit = DIGITS_PER_NAT if code else 1.0
        return {
            "generator/adversarial": -self.divergence(student, teachers.logits),
            "generator/bn": alpha * batch_norm_loss(teachers.bn, 5.0 if code else 1.0),
            "generator/image_entropy": alpha * unit * image_entropy(teachers.logits),
            "generator/class_entropy": alpha * unit * negative_class_entropy(teachers.logits),
        }

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
        terms = {"student/kl": self.divergence(student, teachers)}
        self.student_optimizer.zero_grad(set_to_none=True)
        terms["student/kl"].backward()
        self.student_optimizer.step()
        return terms

    def generator_step(self) -> LossTerms:
        """One step of the generator; gives the terms of L_G."""
        with self.runtime.autocast():
            images = self._draw()
            teachers = self.teachers.observe(images, distance=shift_distance if self.config.mode == "code" else shift_kl)
            student = self.student(images).logits
        terms = self.generator_loss(student, teachers)
        self.generator_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward(inputs=list(self.generator.parameters()))
        self.generator_optimizer.step()
        return terms
