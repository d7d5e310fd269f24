"""DAFL: data-free learning of student networks (Chen et al., ICCV 2019).

Paper: https://arxiv.org/abs/1904.01186

Generator and student learn at the same time, from the same batch x = G(z), z ~ N(0, I). With T(x) and S(x) the logits of
teacher and student, f(x) the teacher's features before its classifier, and pbar the batch mean of softmax(T(x)):

    L_G = oh CE(T(x), argmax T(x)) + ie sum_c pbar_c log pbar_c - a mean|f(x)|        (Adam)
    L_S = KL( softmax(T(x)) || softmax(S(x)) )                                        (SGD; MNIST: Adam)

The gradient of L_S ends at x: nothing pulls the generator to what the student gets wrong. The student's rate is divided by
10 twice, the generator's stays.

``mode="code"``, the default, takes log10 in the entropy, as the authors' code does, because the published weights belong to
it; ``mode="paper"`` takes the natural logarithm: the same as ``entropy_weight`` times 2.303. That the paper's text says so is
a *reconstruction*; whether it normalises its terms otherwise could not be checked; the formulas are those of the code.

Deviations:

- Several teachers (the paper has one): the terms of L_G are means over the teachers of the terms of each, and do not use
  class weights. Header k imitates teacher k, and a student with one header imitates the ensemble fused with the teachers'
  class weights; one teacher is the paper's case.
- f is the input of the last linear layer, as in the authors' ResNets; their LeNet-5 gives the 120 values behind its last
  convolution, two layers earlier, so that on LeNet the published ``activation_weight`` belongs to another layer.
- ``p log p`` of a class that underflows is NaN in the authors' code; here the batch mean is taken in log space.
- The last epoch counts; the authors keep the epoch that is best on test images.

The batch must be large: pbar is its mean, and DFAD's authors report 88.5 % on CIFAR-10 for DAFL with 256 images, against
92.2 % in its own paper. The authors normalise CIFAR-100 with the statistics of CIFAR-10; here every data set has its own.

A client must disclose its weights; the activation term needs teachers that end in a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from cdfkd_strategy.config import require
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.losses.class_balance import DIGITS_PER_NAT
from cdfkd_strategy.losses.dafl import dafl_terms
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import ScheduleName, factor, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.term_means import TermMeans
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs


def _cifar_generator() -> GeneratorConfig:
    return GeneratorConfig(latent_dim=1000)


@dataclass(frozen=True)
class DAFLConfig:
    """Settings of `DAFL`; the defaults are the authors' for CIFAR-10.

    Args:
        mode: "code" (entropy in digits, log10) or "paper" (in nats).
        epochs: passes of ``iterations``. MNIST: 200.
        iterations: steps of generator and student per epoch.
        batch_size: synthetic images per step. MNIST: 512.
        one_hot_weight: oh. MNIST: 1, CIFAR-100: 0.5.
        entropy_weight: ie. CIFAR-100: 20.
        activation_weight: a. MNIST and CIFAR-100: 0.1.
        generator_lr: Adam, default betas. MNIST: 0.2.
        student_optimizer: "sgd" (with ``momentum`` and ``weight_decay``) or "adam" (default betas, without). MNIST: adam.
        student_lr: of the student. MNIST: 2e-3.
        momentum: of SGD.
        weight_decay: of SGD.
        student_schedule: "multistep" (x0.1 at ``student_milestones``), "cosine" (to 0, per iteration) or "constant". The authors have the first.
        student_milestones: epochs at which the student's rate is divided by 10. MNIST: none.
        generator: latent width (MNIST: 100) and size of G.
    """

    mode: Literal["code", "paper"] = "code"
    epochs: int = 2000
    iterations: int = 120
    batch_size: int = 1024
    one_hot_weight: float = 0.05
    entropy_weight: float = 5.0
    activation_weight: float = 0.01
    generator_lr: float = 0.02
    student_optimizer: Literal["sgd", "adam"] = "sgd"
    student_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    student_schedule: ScheduleName = "multistep"
    student_milestones: tuple[int, ...] = (800, 1600)
    generator: GeneratorConfig = field(default_factory=_cifar_generator)

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "iterations", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "student_milestones", "one_hot_weight", "entropy_weight", "activation_weight", "weight_decay", least=0)
        require(self, "method", "generator_lr", "student_lr", above=0)
        require(self, "method", "momentum", least=0, below=1)

    @property
    def entropy_weight_in_nats(self) -> float:
        """``entropy_weight`` for an entropy with the natural logarithm."""
        return self.entropy_weight * (DIGITS_PER_NAT if self.mode == "code" else 1.0)

    @classmethod
    def toy(cls) -> DAFLConfig:
        """The smallest setting that runs every stage."""
        return cls(
            epochs=2,
            iterations=4,
            batch_size=32,
            one_hot_weight=1.0,
            activation_weight=0.1,
            student_milestones=(1,),
            generator=GeneratorConfig(latent_dim=16, width=0.25),
        )


@METHODS.register("dafl")
class DAFL(Distiller):
    """DAFL (https://arxiv.org/abs/1904.01186); see the module's docstring for the losses and the deviations.

    The student may have one header per teacher, or one for all.
    """

    name = "dafl"
    students = ("single", "multi")
    status = "every loss tested; formulas of the authors' code"
    Config = DAFLConfig
    needs = Needs(features=True)
    config: DAFLConfig
    generator: nn.Module

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: DAFLConfig,
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

    def step(self) -> LossTerms:
        """One step of both networks on the same fresh batch; gives the terms of L_G and L_S."""
        config = self.config
        z = self.runtime.normal(config.batch_size, config.generator.latent_dim, rng=self.rng)
        with self.runtime.autocast():
            images = self.runtime.images(self.generator(z))
            teachers = self.teachers.observe(images, bn=False)
            student = self.student(images.detach()).logits
        target = head_targets(teachers.logits.detach(), self.teachers.weights, len(student))
        generator = dafl_terms(teachers, config.one_hot_weight, config.entropy_weight_in_nats, config.activation_weight)
        terms = {**{f"generator/{name}": value for name, value in generator.items()}, "student/kl": kl_divergence(student, target)}
        self.generator_optimizer.zero_grad(set_to_none=True)
        self.student_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()  # no term reaches both networks
        self.generator_optimizer.step()
        self.student_optimizer.step()
        return terms
