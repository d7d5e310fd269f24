"""MAD: momentum adversarial distillation, against the student's forgetting (Do et al., NeurIPS 2022).

Paper: https://arxiv.org/abs/2209.10359

A generator G that is trained against the student changes its images with every step, and the student forgets what it
learned from earlier ones. A second generator Gm follows G as an exponential moving average and stands for its past:

    L_S = KL(T(x) || S(x)) + lambda KL(T(xm) || S(xm)),   x = G(z), xm = Gm(z'), z, z' ~ N(0, I)
    L_G = -KL(T(x) || S(x)) + w_bn R_BN(T, x)
    after every generator step:  Gm <- alpha Gm + (1 - alpha) G,   alpha = 0.95

The idea, alpha and the two terms of L_S are the paper's. The rest of it is a *reconstruction*, because the paper's body
could not be read and its authors published no code; where a choice has a setting, that is its ablation:

- L_G and temperature: the paper's baseline without Gm is adversarial belief matching, hence the divergence at
  ``temperature`` 1. R_BN holds G to images that the teachers know, with the weight of CDFKD-MFS (``bn_weight``; 0 is
  without); unlike there, its first layer counts no more than the others (``first_layer_weight``).
- lambda is 1 (``ema_weight``; 0 is the baseline, and then Gm is not sampled).
- The average covers G's parameters and its BatchNorm buffers. Gm is sampled in train mode like G, from the statistics
  of its own batch, so that the images of both are standardised alike. x and xm pass the student as one batch of 2 B. None
  of this has a setting, nor has KL as the divergence.
- Steps, batch size, rates and their schedule are those of the adversarial method of CDFKD-MFS's authors.

Not here: the class-conditional generator for data sets with many classes.

Several teachers (the paper has one): header k imitates teacher k, and a student with one header imitates the ensemble
fused with the teachers' class weights; the divergence is the mean over the headers, in L_G with the opposite sign. R_BN
is the mean over the teachers that have BatchNorm. One teacher is the paper's case.

R_BN covers BatchNorm1d layers too, where a network has them; authors look at BatchNorm2d alone.
A client must disclose its weights, including BatchNorm running statistics (unless ``bn_weight`` is 0).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cdfkd_strategy.config import require
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.losses.statistics import batch_norm_loss
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import ScheduleName, factor, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.term_means import TermMeans
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs


@dataclass(frozen=True)
class MADConfig:
    """Settings of `MAD`.

    Args:
        epochs: passes of ``iterations``.
        iterations: rounds of student and generator steps per epoch.
        student_steps: student steps per iteration, each on fresh images of both generators.
        generator_steps: generator steps per iteration.
        batch_size: images of each generator per step.
        ema_decay: alpha, of the moving average over generator steps.
        ema_weight: lambda, the weight of the moving average's images; 0 does without them.
        temperature: T of the divergences.
        bn_weight: w_bn; teachers without BatchNorm are left out of the term.
        first_layer_weight: rho_1, the weight of the first BatchNorm layer.
        student_lr: SGD, with ``momentum`` and ``weight_decay``.
        momentum: of SGD.
        weight_decay: of SGD.
        generator_lr: Adam, default betas.
        schedule: "multistep" (x0.1 at ``milestones``, in epochs), "cosine" (to 0, per iteration) or "constant", for both.
        milestones: epochs at which both rates are divided by 10.
        generator: latent width and size of G.
    """

    epochs: int = 300
    iterations: int = 50
    student_steps: int = 5
    generator_steps: int = 1
    batch_size: int = 256
    ema_decay: float = 0.95
    ema_weight: float = 1.0
    temperature: float = 1.0
    bn_weight: float = 0.1
    first_layer_weight: float = 1.0
    student_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    generator_lr: float = 1e-3
    schedule: ScheduleName = "multistep"
    milestones: tuple[int, ...] = (100, 200)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "iterations", "student_steps", "generator_steps", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "milestones", "ema_weight", "bn_weight", "first_layer_weight", "weight_decay", least=0)
        require(self, "method", "generator_lr", "student_lr", "temperature", above=0)
        require(self, "method", "momentum", "ema_decay", least=0, below=1)

    @classmethod
    def toy(cls) -> MADConfig:
        """The smallest setting that runs every stage."""
        return cls(
            epochs=2, iterations=3, student_steps=2, batch_size=16, schedule="cosine", student_lr=0.05, generator=GeneratorConfig(latent_dim=16, width=0.25)
        )


@METHODS.register("mad")
class MAD(Distiller):
    """MAD (https://arxiv.org/abs/2209.10359); see the module's docstring for the losses and what is reconstructed.

    The student may have one header per teacher, or one for all.

    Attributes:
        ema_generator: Gm.
    """

    name = "mad"
    students = ("single", "multi")
    status = "every loss tested; reconstruction in part"
    Config = MADConfig
    uses = Needs(batch_norm=True)
    config: MADConfig
    generator: nn.Module

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: MADConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        self.generator = runtime.place(build_generator(image, config.generator))
        self.ema_generator = copy.deepcopy(self.generator).requires_grad_(False)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr)
        self.student_optimizer = torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay)

    def start_generator(self, state: Mapping[str, Tensor]) -> None:
        """Fill the generator and its moving average."""
        super().start_generator(state)
        self.ema_generator.load_state_dict(state)

    @property
    def num_epochs(self) -> int:
        """``config.epochs``."""
        return self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """``iterations`` times: ``student_steps`` on fresh images of both generators, then ``generator_steps``."""
        config = self.config
        for network in (self.student, self.generator, self.ema_generator):
            network.train()
        means = TermMeans()
        for iteration in range(config.iterations):
            self._set_rates(epoch, iteration)
            for step, count in ((self.student_step, config.student_steps), (self.generator_step, config.generator_steps)):
                for _ in range(count):
                    means.add(step())
        return means.means()  # the epoch's only host sync

    def _set_rates(self, epoch: int, iteration: int) -> None:
        config = self.config
        share = factor(config.schedule, epoch, iteration, epochs=config.epochs, iterations=config.iterations, milestones=config.milestones)
        set_rate(self.student_optimizer, config.student_lr * share)
        set_rate(self.generator_optimizer, config.generator_lr * share)

    def _draw(self, generator: nn.Module) -> Tensor:
        z = self.runtime.normal(self.config.batch_size, self.config.generator.latent_dim, rng=self.rng)
        return self.runtime.images(generator(z))

    def student_step(self) -> LossTerms:
        """One step of the student on fresh images of both generators; gives the terms of L_S."""
        config = self.config
        with self.runtime.autocast():
            with torch.no_grad():
                images = self._draw(self.generator)
                if config.ema_weight > 0:
                    images = torch.cat([images, self._draw(self.ema_generator)])
                teachers = self.teachers(images)
            student = self.student(images).logits
        target = head_targets(teachers, self.teachers.weights, len(student))
        now, past = slice(config.batch_size), slice(config.batch_size, None)
        terms = {"student/kl": kl_divergence(student[:, now], target[:, now], config.temperature)}
        if config.ema_weight > 0:
            terms["student/ema_kl"] = config.ema_weight * kl_divergence(student[:, past], target[:, past], config.temperature)
        self.student_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self.student_optimizer.step()
        return terms

    def generator_step(self) -> LossTerms:
        """One step of the generator, and of the average that follows it; gives the terms of L_G."""
        config = self.config
        with self.runtime.autocast():
            images = self._draw(self.generator)
            teachers = self.teachers.observe(images, bn=config.bn_weight > 0)
            student = self.student(images).logits
        target = head_targets(teachers.logits, self.teachers.weights, len(student))
        terms = {"generator/adversarial": -kl_divergence(student, target, config.temperature)}
        if config.bn_weight > 0 and any(distances is not None for distances in teachers.bn):
            terms["generator/bn"] = config.bn_weight * batch_norm_loss(teachers.bn, config.first_layer_weight)
        parameters = list(self.generator.parameters())
        gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.generator_optimizer.step()
        self._follow()
        return terms

    @torch.no_grad()
    def _follow(self) -> None:
        """``Gm <- alpha Gm + (1 - alpha) G``, parameters and buffers; counters are copied."""
        latest = self.generator.state_dict()
        for name, average in self.ema_generator.state_dict().items():
            if average.is_floating_point():
                average.lerp_(latest[name], 1 - self.config.ema_decay)
            else:
                average.copy_(latest[name])
