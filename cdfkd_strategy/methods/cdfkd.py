"""CDFKD: collaborative data-free knowledge distillation for edge intelligence (Hao et al., IEEE ICME 2021).

Paper: https://doi.org/10.1109/ICME51207.2021.9428308 (not on arXiv; the formulas are those of the authors' code,
https://github.com/Hao840/pytorch-CDFKD). It is DAFL, https://arxiv.org/abs/1904.01186, with N teachers and a student with one
header per teacher. Generator and student learn at the same time, from the same batch x = G(z), z ~ N(0, I). With T_i and
S_i the logits of teacher i and header i, f_i the teacher's features before its classifier, pbar_i the batch mean of
softmax(T_i), and avg the mean over i:

    L_G = (1/N) sum_i [ oh CE(T_i, argmax T_i) + ie sum_c pbar_ic log10 pbar_ic - a mean|f_i| ]      (Adam)
    L_S = (1/N) sum_i KL(T_i || S_i) + KL(avg T || avg S)                                            (SGD; MNIST: Adam)

There is no adversarial term. CDFKD-MFS's authors run another method under this name as a baseline (CDFKD.py: five student
steps, then L_G = -L_S + 0.1 R_BN with the teachers' logits detached); that one is not here.

*Attention over heads*, when a few labelled images are at hand, is fitted after the distillation and is no part of it:
`models.head_fusion.fit_head_attention(student, images, labels, rng=...)`, then `FusedStudent(student, attention=...)`. In a
federation the clients fit it on their own samples (``clients.attention_samples``) and the strategy averages the parameters;
`cdfkd distill` and `cdfkd bench` do the same with the clients' images (``student_attention`` in the summary).
The authors take 600 images and 100 epochs (MNIST), or 500 and 30 (CIFAR-10), and keep the epoch that is best on test images;
here the last one is kept.

Deviations:

- The authors step the student's schedule once per *iteration*, so that its rate has fallen to a hundredth after 5 of
  200 or 800 epochs. A bug: the milestones are epochs here.
- The number of teachers is free (3 is hard-wired in the losses of their code).
- With the teachers' class weights w[k, c] the ensemble term is KL(fuse(T, w) || fuse(S, w)); with uniform weights that is the
  paper's term, because softmax(avg T) is what `fuse` gives. L_G does not use the weights.
- A student with one header takes the fused ensemble as its target in both terms, which are then equal.
- ``mode="paper"`` takes the natural logarithm in the entropy: the same as ``entropy_weight`` times 2.303. That the paper's
  text says so is a *reconstruction*; ``mode="code"``, the default, is what the published weights belong to.
- f is the input of the last linear layer, as in the authors' ResNets; their LeNet-5 gives the 120 (60 in the small one) values behind its last
  convolution, two layers earlier, so that on LeNet the published ``activation_weight`` belongs to another layer.
- ``p log p`` of a class that underflows is NaN in the authors' code; here the batch mean is taken in log space.
- The student is this project's multi-header student; theirs owns its whole last stage per header.

A client must disclose its weights; the activation term needs teachers that end in a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from cdfkd_strategy.config import require
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.losses.class_balance import DIGITS_PER_NAT
from cdfkd_strategy.losses.dafl import dafl_terms
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.models.head_fusion import fuse
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import ScheduleName, factor, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.term_means import TermMeans
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs


def _cifar_generator() -> GeneratorConfig:
    return GeneratorConfig(latent_dim=1000)


@dataclass(frozen=True)
class CDFKDConfig:
    """Settings of `CDFKD`; the defaults are the authors' for CIFAR-10.

    Args:
        mode: "code" (entropy in digits, log10) or "paper" (in nats).
        epochs: passes of ``iterations``. MNIST: 200.
        iterations: steps of generator and student per epoch.
        batch_size: synthetic images per step; the authors say that fewer cost accuracy. MNIST: 512.
        one_hot_weight: oh. MNIST: 1.
        entropy_weight: ie.
        activation_weight: a. MNIST: 0.1.
        head_weight: weight of the headers' KL.
        ensemble_weight: weight of the ensemble's KL.
        generator_lr: Adam, default betas. MNIST: 0.2.
        student_optimizer: "sgd" (with ``momentum`` and ``weight_decay``) or "adam" (default betas, without). MNIST: adam.
        student_lr: of the student. MNIST: 2e-3.
        momentum: of SGD.
        weight_decay: of SGD.
        student_schedule: "multistep" (x0.1 at ``student_milestones``), "cosine" (to 0, per iteration) or "constant". The authors have the first.
        student_milestones: epochs at which the student's rate is divided by 10; 200 epochs (MNIST) reach none.
        generator: latent width (MNIST: 100) and size of G.
    """

    mode: Literal["code", "paper"] = "code"
    epochs: int = 800
    iterations: int = 120
    batch_size: int = 1024
    one_hot_weight: float = 0.05
    entropy_weight: float = 5.0
    activation_weight: float = 0.01
    head_weight: float = 1.0
    ensemble_weight: float = 1.0
    generator_lr: float = 1e-3
    student_optimizer: Literal["sgd", "adam"] = "sgd"
    student_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    student_schedule: ScheduleName = "multistep"
    student_milestones: tuple[int, ...] = (400, 600)
    generator: GeneratorConfig = field(default_factory=_cifar_generator)

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "iterations", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "student_milestones", "weight_decay", least=0)
        require(self, "method", "one_hot_weight", "entropy_weight", "activation_weight", "head_weight", "ensemble_weight", least=0)
        require(self, "method", "generator_lr", "student_lr", above=0)
        require(self, "method", "momentum", least=0, below=1)

    @property
    def entropy_weight_in_nats(self) -> float:
        """``entropy_weight`` for an entropy with the natural logarithm."""
        return self.entropy_weight * (DIGITS_PER_NAT if self.mode == "code" else 1.0)

    @classmethod
    def toy(cls) -> CDFKDConfig:
        """The smallest setting that runs every stage."""
        return cls(epochs=2, iterations=4, batch_size=32, student_milestones=(1,), generator=GeneratorConfig(latent_dim=16, width=0.25))


@METHODS.register("cdfkd")
class CDFKD(Distiller):
    """CDFKD (ICME 2021), DAFL (https://arxiv.org/abs/1904.01186) with headers; see the module's docstring for the losses and the deviations.

    The student may have one header per teacher, or one for all.
    """

    name = "cdfkd"
    students = ("single", "multi")
    status = "every loss tested; formulas of the authors' code"
    Config = CDFKDConfig
    needs = Needs(features=True)
    config: CDFKDConfig
    generator: nn.Module

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: CDFKDConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        self.generator = runtime.place(build_generator(image, config.generator))
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr)
        self.student_optimizer: torch.optim.Optimizer
        if config.student_optimizer == "adam":
            self.student_optimizer = torch.optim.Adam(student.parameters(), lr=config.student_lr)
        else:
            self.student_optimizer = torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay)

    @property
    def num_epochs(self) -> int:
        """``config.epochs``."""
        return self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """``iterations`` steps of generator and student."""
        self.generator.train()
        self.student.train()
        means = TermMeans()
        config = self.config
        for iteration in range(config.iterations):
            scale = factor(config.student_schedule, epoch, iteration, epochs=config.epochs, iterations=config.iterations, milestones=config.student_milestones)
            set_rate(self.student_optimizer, config.student_lr * scale)
            means.add(self.step())
        return means.means()  # the epoch's only host sync

    def student_loss(self, student: Tensor, teachers: Tensor) -> LossTerms:
        """The weighted terms of L_S for logits ``[heads, B, C]`` and ``[K, B, C]``."""
        weights = self.teachers.weights
        target = head_targets(teachers, weights, len(student))
        mine = student[0] if len(student) == 1 else fuse(student, weights)
        return {
            "student/kl": self.config.head_weight * kl_divergence(student, target),
            "student/ensemble_kl": self.config.ensemble_weight * kl_divergence(mine, fuse(teachers, weights)),
        }

    def step(self) -> LossTerms:
        """One step of both networks on the same fresh batch; gives the terms of L_G and L_S."""
        config = self.config
        z = self.runtime.normal(config.batch_size, config.generator.latent_dim, rng=self.rng)
        with self.runtime.autocast():
            images = self.runtime.images(self.generator(z))
            teachers = self.teachers.observe(images, bn=False)
            student = self.student(images.detach()).logits
        generator = dafl_terms(teachers, config.one_hot_weight, config.entropy_weight_in_nats, config.activation_weight)
        terms = {**{f"generator/{name}": value for name, value in generator.items()}, **self.student_loss(student, teachers.logits.detach())}
        self.generator_optimizer.zero_grad(set_to_none=True)
        self.student_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()  # no term reaches both networks
        self.generator_optimizer.step()
        self.student_optimizer.step()
        return terms
