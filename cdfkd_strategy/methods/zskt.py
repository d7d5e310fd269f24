"""ZSKT: zero-shot knowledge transfer via adversarial belief matching (Micaelli and Storkey, NeurIPS 2019).

Paper: https://arxiv.org/abs/1905.09768

A generator G searches for images x = G(z), z ~ N(0, I), on which the student S differs from the teacher T, and the student
learns on them. For every z: n_G = 1 step of G, then n_S = 10 steps of S on the images that the changed G makes of the same z.
With Q_l the channel mean of the squared maps of stage l, flattened:

    L_G = -KL( softmax(T(x)) || softmax(S(x)) ),   through T and S
    L_S =  KL( softmax(T(x)) || softmax(S(x)) ) + beta sum_l AT(Q_l^S / ||Q_l^S||_2, Q_l^T / ||Q_l^T||_2),   beta = 250

Adam for both, both rates along a cosine to 0, every gradient clipped to the norm 5. G ends in a BatchNorm with learned scale
and shift and has no tanh. Both networks are in train mode throughout.

``mode="code"``, the default, is the authors' code: its KL is also divided by the number of classes C (torch's reduction
"mean"), and AT is the mean of the squared difference over the positions. The published beta belongs to it. ``mode="paper"`` is
a *reconstruction* of the text, which was not at hand: KL as the formula reads, a sum over classes, and AT the L2 norm of the
difference, as in the paper on attention transfer (https://arxiv.org/abs/1612.03928). With the same beta attention then weighs
far more. The authors put attention at about two points; ``attention_weight=0`` is the method without it.

RDSKD compares itself with a method that it calls MSKD. As far as can be established, this is it: the initials are the authors'
(Micaelli, Storkey), but RDSKD's text could not be checked.

Deviations:

- Several teachers (the paper has one): header k imitates teacher k, and a student with one header imitates the ensemble fused
  with the teachers' class weights; KL is the mean over headers, in L_G too. The trunk's maps are compared with those of every
  teacher, and AT is the mean over the teachers, without class weights. One teacher is the paper's case.
- A teacher whose stages cannot be found (torch.fx cannot trace it) is left out of AT. Stages of other resolutions are paired
  with the nearest and pooled (`losses.attention`); the authors compare WideResNets with WideResNets.
- The images of the student's steps are made once: G does not change between them. The authors make them again in every step,
  with the same result, and compute the gradient of L_S at G, which nobody uses.
- G's inner BatchNorm layers have the eps of this project's generator (that of CDFKD-MFS); theirs is torch's.

A client must disclose its weights; BatchNorm statistics are not used as such.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from cdfkd_strategy.config import require
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.losses.attention import Reduction, attention_loss
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.models.multi_header import with_maps
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import cosine, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.term_means import TermMeans
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs, TeacherOutputs


def _generator() -> GeneratorConfig:
    return GeneratorConfig(latent_dim=100, output="affine_norm")


@dataclass(frozen=True)
class ZSKTConfig:
    """Settings of `ZSKT`; the defaults are the authors' for CIFAR-10, 80,000 batches.

    Args:
        mode: "code" (KL over C, attention as a mean of squares) or "paper" (KL, attention as a norm).
        epochs: passes of ``iterations``.
        iterations: latent batches per epoch.
        generator_steps: n_G, generator steps per latent batch.
        student_steps: n_S, student steps per latent batch.
        batch_size: synthetic images per latent batch.
        attention_weight: beta; 0 compares no maps, and any student will do.
        generator_lr: Adam, default betas, to 0 along a cosine.
        student_lr: the same.
        max_norm: the L2 norm that a gradient is clipped to, in both networks.
        generator: latent width and size of G.
    """

    mode: Literal["code", "paper"] = "code"
    epochs: int = 80
    iterations: int = 1000
    generator_steps: int = 1
    student_steps: int = 10
    batch_size: int = 128
    attention_weight: float = 250.0
    generator_lr: float = 1e-3
    student_lr: float = 2e-3
    max_norm: float = 5.0
    generator: GeneratorConfig = field(default_factory=_generator)

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "iterations", "generator_steps", "student_steps", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "attention_weight", least=0)
        require(self, "method", "generator_lr", "student_lr", "max_norm", above=0)

    @property
    def reduction(self) -> Reduction:
        """How the mode reduces a difference of attention maps."""
        return "mean" if self.mode == "code" else "norm"

    @classmethod
    def toy(cls) -> ZSKTConfig:
        """The smallest setting that runs every stage."""
        return cls(epochs=2, iterations=2, student_steps=2, batch_size=32, generator=GeneratorConfig(latent_dim=16, width=0.25, output="affine_norm"))


@METHODS.register("zskt")
class ZSKT(Distiller):
    """ZSKT (https://arxiv.org/abs/1905.09768); see the module's docstring for the losses and the deviations.

    The student may have one header per teacher, or one for all.

    Raises:
        ArchitectureError: attention has a weight, and the student gives no stage maps.
    """

    name = "zskt"
    students = ("single", "multi")
    status = "every loss tested; formulas of the authors' code"
    Config = ZSKTConfig
    needs = Needs()
    config: ZSKTConfig
    generator: nn.Module

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: ZSKTConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        if config.attention_weight > 0:
            with_maps(student)
        self.generator = runtime.place(build_generator(image, config.generator))
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr)
        self.student_optimizer = torch.optim.Adam(student.parameters(), lr=config.student_lr)

    @property
    def num_epochs(self) -> int:
        """``config.epochs``."""
        return self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """``iterations`` latent batches, each for ``generator_steps`` and then for ``student_steps``."""
        config = self.config
        self.generator.train()
        self.student.train()
        means = TermMeans()
        for iteration in range(config.iterations):
            factor = cosine(epoch * config.iterations + iteration, config.epochs * config.iterations)
            set_rate(self.generator_optimizer, config.generator_lr * factor)
            set_rate(self.student_optimizer, config.student_lr * factor)
            self._play(means)
        return means.means()  # the epoch's only host sync

    def divergence(self, student: Tensor, teachers: Tensor) -> Tensor:
        """KL of teachers ``[K, B, C]`` and student ``[heads, B, C]``, mean over headers; over C too in mode "code"."""
        kl = kl_divergence(student, head_targets(teachers, self.teachers.weights, len(student)))
        return kl / self.image.num_classes if self.config.mode == "code" else kl

    def _play(self, means: TermMeans) -> None:
        """All steps for one z."""
        config = self.config
        z = self.runtime.normal(config.batch_size, config.generator.latent_dim, rng=self.rng)
        for _ in range(config.generator_steps):
            means.add({"generator/kl": self._generator_step(z)})
        with self.runtime.autocast(), torch.no_grad():
            images = self.runtime.images(self.generator(z))
            teachers = self.teachers.observe(images, bn=False, maps=config.attention_weight > 0)
        for _ in range(config.student_steps):
            means.add(self._student_step(images, teachers))

    def _generator_step(self, z: Tensor) -> Tensor:
        with self.runtime.autocast():
            images = self.runtime.images(self.generator(z))
            teachers, student = self.teachers(images), self.student(images).logits
        loss = -self.divergence(student, teachers)
        parameters = list(self.generator.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, self.config.max_norm)
        self.generator_optimizer.step()
        return loss.detach()

    def _student_step(self, images: Tensor, teachers: TeacherOutputs) -> LossTerms:
        weight = self.config.attention_weight
        with self.runtime.autocast():
            student, maps = with_maps(self.student).observe(images) if weight > 0 else (self.student(images), ())
        terms = {"student/kl": self.divergence(student.logits, teachers.logits)}
        if weight > 0:
            terms["student/attention"] = weight * attention_loss(maps, teachers.maps, self.config.reduction)
        self.student_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.config.max_norm)
        self.student_optimizer.step()
        return terms
