"""CGDD: conditional generative data-free knowledge distillation (Yu et al., 2021).

Paper: https://arxiv.org/abs/2112.15358

A generator G(z, y) is told the class y that its image shall show. The student S imitates the teacher T's answers and its
attention maps, and learns y as if it were a true label; G also looks for images on which S differs from T.

What follows is a *reconstruction*: only the abstracts of two versions and no code were at hand. Sure are the preset labels
as input of G and as labels of S, the transfer of attention (v1; "feature maps" in v4), and the adversarial frame. The
formulas are this project's. With y uniform, f the teacher's features before its classifier, R_BN the distance from its
BatchNorm statistics, pbar the batch mean of softmax(T(x)), and Q_l the channel mean of the squared maps of stage l:

    L_G = a_0 CE(T(x), y) - a_1 mean|f(x)| + a_2 R_BN(T) + a_3 sum_c pbar_c ln pbar_c - a_4 D(T(x), S(x))      (Adam)
    L_S = D(T(x), S(x)) + b_1 CE(S(x), y) [argmax T(x) = y] + b_2 sum_l mean( (Q_l^S/||Q_l^S|| - Q_l^T/||Q_l^T||)^2 )   (SGD)

Five student steps on fresh batches, then one generator step; both rates along a cosine to 0. Choices, and what switches them:

- D is t^2 KL(T(x)/t || S(x)/t), in L_G with t = 1; ``discrepancy="l1"`` is mean|T(x) - S(x)| of the logits, as in CDFKD-MFS, which
  in trials on MNIST was a little better, with attention of weight 10 (`simulations/LOG.md`).
- y enters as one more map beside those that z becomes (`models.conditional_generator`); every batch has all classes
  equally often, up to one image. ``preset_weight=0`` leaves y without meaning: an unconditional generator.
- T does not always see y in the image, and CE to y then teaches what T does not say: the label counts where T agrees.
  ``mask_labels=False`` lets it count everywhere; ``label_weight=0`` leaves it out.
- Knowledge of the maps is attention transfer as ZSKT's code has it, the mean of the squared difference (`losses.attention`);
  ``attention_weight=0`` leaves it out, and any student will do.
- ``adversarial_weight=0`` is a generator that ignores the student; ``activation_weight`` and ``bn_weight`` are DAFL's and
  DeepInversion's terms; ``balance_weight`` is 0, because preset labels are balanced already.
- a_0 is small: with 1 the images are those that T is surest of, one kind per class, and S learns little from them
  (`simulations/LOG.md`). The other weights and the schedule are starting values: a_1 as in DAFL for CIFAR-100, a_2 as in CMI,
  the schedule CDFKD-MFS's with a cosine.

The claim that images show their preset classes, and all classes equally, can be read from every epoch:
``images/label_agreement`` is the share of the student's images with argmax T(x) = y, ``images/class_balance`` the entropy of
the classes argmax T(x) over the epoch divided by ln C, 1 if all are equally frequent. T is the fused ensemble in both.

Several teachers (the paper has one): CE in L_G is weighted by w[k, y], so that a teacher answers for the classes it knows; the
activation and BatchNorm terms are means over the teachers that have features or BatchNorm; attention is the mean over the
teachers whose stages torch.fx can find, with stages of other resolutions pooled; pbar and the mask belong to the fused
ensemble. Header k imitates teacher k, and a student with one header the fused ensemble; its CE is that of the fused headers.

R_BN covers BatchNorm1d layers too, where a network has them; authors look at BatchNorm2d alone.
A client must disclose its weights, including BatchNorm running statistics (unless ``bn_weight`` is 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy.config import require
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.losses.attention import attention_loss
from cdfkd_strategy.losses.class_balance import negative_class_entropy
from cdfkd_strategy.losses.dafl import activation_loss
from cdfkd_strategy.losses.divergence import kl_divergence, logit_l1
from cdfkd_strategy.losses.head_targets import head_targets, mean_logits
from cdfkd_strategy.losses.preset_labels import label_cross_entropy
from cdfkd_strategy.losses.statistics import batch_norm_loss
from cdfkd_strategy.models.conditional_generator import build_conditional_generator
from cdfkd_strategy.models.generators import GeneratorConfig, sampling
from cdfkd_strategy.models.head_fusion import fuse, header_weights
from cdfkd_strategy.models.multi_header import with_maps
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import cosine, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.term_means import TermMeans
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs, TeacherOutputs


@dataclass(frozen=True)
class CGDDConfig:
    """Settings of `CGDD`; none of them is known from the paper.

    Args:
        epochs: passes of ``iterations``.
        iterations: rounds of student and generator steps per epoch.
        student_steps: student steps per iteration, each on a fresh batch.
        generator_steps: generator steps per iteration.
        batch_size: synthetic images per step.
        preset_weight: a_0, of the teachers' cross entropy with the preset labels.
        activation_weight: a_1; teachers without features are left out of the term.
        bn_weight: a_2; teachers without BatchNorm are left out of the term.
        first_layer_weight: rho_1, the weight of the first BatchNorm layer.
        balance_weight: a_3.
        adversarial_weight: a_4.
        discrepancy: D, "kl" or "l1".
        temperature: t of the student's KL; that of the generator is at 1. L1 has none.
        label_weight: b_1, of the student's cross entropy with the preset labels.
        mask_labels: count it only where the fused teachers see the preset label.
        attention_weight: b_2; 0 compares no maps, and any student will do.
        student_lr: SGD, with ``momentum`` and ``weight_decay``, to 0 along a cosine.
        momentum: of SGD.
        weight_decay: of SGD.
        generator_lr: Adam, default betas, to 0 along a cosine.
        generator: latent width and size of G.
    """

    epochs: int = 300
    iterations: int = 50
    student_steps: int = 5
    generator_steps: int = 1
    batch_size: int = 256
    preset_weight: float = 0.1
    activation_weight: float = 0.1
    bn_weight: float = 1.0
    first_layer_weight: float = 1.0
    balance_weight: float = 0.0
    adversarial_weight: float = 1.0
    discrepancy: Literal["kl", "l1"] = "kl"
    temperature: float = 1.0
    label_weight: float = 0.1
    mask_labels: bool = True
    attention_weight: float = 100.0
    student_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    generator_lr: float = 1e-3
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "iterations", "student_steps", "generator_steps", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "preset_weight", "activation_weight", "bn_weight", "first_layer_weight", "balance_weight", "adversarial_weight", least=0)
        require(self, "method", "label_weight", "attention_weight", "weight_decay", least=0)
        require(self, "method", "generator_lr", "student_lr", "temperature", above=0)
        require(self, "method", "momentum", least=0, below=1)

    @classmethod
    def toy(cls) -> CGDDConfig:
        """The smallest setting that runs every stage."""
        return cls(
            epochs=2, iterations=3, student_steps=2, batch_size=32, balance_weight=0.1, student_lr=0.05, generator=GeneratorConfig(latent_dim=16, width=0.25)
        )


@METHODS.register("cgdd")
class CGDD(Distiller):
    """CGDD (https://arxiv.org/abs/2112.15358); see the module's docstring for the losses and what is reconstructed.

    The student may have one header per teacher, or one for all.

    Raises:
        ArchitectureError: attention has a weight, and the student gives no stage maps.
    """

    name = "cgdd"
    students = ("single", "multi")
    status = "every loss tested; reconstruction"
    Config = CGDDConfig
    uses = Needs(batch_norm=True)
    config: CGDDConfig
    generator: nn.Module

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: CGDDConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        if config.attention_weight > 0:
            with_maps(student)
        self.generator = runtime.place(build_conditional_generator(image, config.generator))
        self.student_optimizer = torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr)

    @property
    def num_epochs(self) -> int:
        """``config.epochs``."""
        return self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """``iterations`` times: ``student_steps`` on fresh batches, then ``generator_steps``."""
        config = self.config
        self.generator.train()
        self.student.train()
        means = TermMeans()
        classes = torch.zeros(self.image.num_classes, device=self.runtime.device)
        for iteration in range(config.iterations):
            factor = cosine(epoch * config.iterations + iteration, config.epochs * config.iterations)
            set_rate(self.student_optimizer, config.student_lr * factor)
            set_rate(self.generator_optimizer, config.generator_lr * factor)
            for _ in range(config.student_steps):
                means.add(self._student_step(classes))
            for _ in range(config.generator_steps):
                means.add(self._generator_step())
        means.add({"images/class_balance": torch.special.entr(classes / classes.sum()).sum() / math.log(len(classes))})
        return means.means()  # the epoch's only host sync

    def sample(self, count: int, rng: torch.Generator) -> Tensor | None:
        """Images of all classes in turn, from a random one."""
        with sampling(self.generator):
            return self._draw(count, rng)[0]

    def _draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images, and their preset labels ``[B]``: all classes in turn, from a random one."""
        z = self.runtime.normal(count, self.config.generator.latent_dim, rng=rng)
        first = torch.randint(self.image.num_classes, (1,), generator=rng)
        labels = ((torch.arange(count) + first) % self.image.num_classes).to(self.runtime.device, non_blocking=True)
        return self.runtime.images(self.generator(z, labels)), labels

    # -- losses ------------------------------------------------------------------------------------------------

    def discrepancy(self, student: Tensor, teachers: Tensor, temperature: float = 1.0) -> Tensor:
        """D of logits ``[heads, B, C]`` and ``[K, B, C]``."""
        weights = self.teachers.weights
        if self.config.discrepancy == "l1":
            return logit_l1(student, head_targets(teachers, weights, len(student), mean_logits))
        return kl_divergence(student, head_targets(teachers, weights, len(student)), temperature)

    def generator_loss(self, student: Tensor, teachers: TeacherOutputs, labels: Tensor) -> LossTerms:
        """The weighted terms of L_G; student logits ``[heads, B, C]``, preset labels ``[B]``. Gradients pass through teachers and student."""
        config, weights = self.config, self.teachers.weights
        terms = {
            "generator/preset": config.preset_weight * label_cross_entropy(teachers.logits, labels, weights),
            "generator/adversarial": -config.adversarial_weight * self.discrepancy(student, teachers.logits),
        }
        if config.activation_weight > 0 and any(features is not None for features in teachers.features):
            terms["generator/activation"] = config.activation_weight * activation_loss(teachers.features)
        if config.bn_weight > 0 and any(distances is not None for distances in teachers.bn):
            terms["generator/bn"] = config.bn_weight * batch_norm_loss(teachers.bn, config.first_layer_weight)
        if config.balance_weight > 0:
            terms["generator/balance"] = config.balance_weight * negative_class_entropy(fuse(teachers.logits, weights))
        return terms

    def student_loss(self, student: Tensor, maps: tuple[Tensor, ...], teachers: TeacherOutputs, labels: Tensor, agree: Tensor) -> LossTerms:
        """The weighted terms of L_S; ``agree [B]`` is 1 where the fused teachers see the preset label, and 0 elsewhere."""
        config, weights = self.config, self.teachers.weights
        terms = {f"student/{config.discrepancy}": self.discrepancy(student, teachers.logits, config.temperature)}
        if config.label_weight > 0:
            fused = fuse(student, header_weights(weights, len(student)))
            nll = F.nll_loss(fused, labels, reduction="none")
            terms["student/label"] = config.label_weight * (nll * agree if config.mask_labels else nll).mean()
        if config.attention_weight > 0:
            terms["student/attention"] = config.attention_weight * attention_loss(maps, teachers.maps)
        return terms

    # -- steps -------------------------------------------------------------------------------------------------

    def _student_step(self, classes: Tensor) -> LossTerms:
        """One step on a fresh batch; counts in ``classes [C]`` what the fused teachers see in it."""
        compare = self.config.attention_weight > 0
        with self.runtime.autocast():
            with torch.no_grad():
                images, labels = self._draw(self.config.batch_size, self.rng)
                teachers = self.teachers.observe(images, bn=False, maps=compare)
            student, maps = with_maps(self.student).observe(images) if compare else (self.student(images), ())
        seen = fuse(teachers.logits, self.teachers.weights).argmax(-1)
        classes += F.one_hot(seen, len(classes)).sum(0)
        agree = (seen == labels).float()
        terms = self.student_loss(student.logits, maps, teachers, labels, agree)
        self.student_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self.student_optimizer.step()
        return {**terms, "images/label_agreement": agree.mean()}

    def _generator_step(self) -> LossTerms:
        with self.runtime.autocast():
            images, labels = self._draw(self.config.batch_size, self.rng)
            teachers = self.teachers.observe(images, bn=self.config.bn_weight > 0)
            student = self.student(images).logits
        terms = self.generator_loss(student, teachers, labels)
        parameters = list(self.generator.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(torch.stack(list(terms.values())).sum(), parameters), strict=True):
            parameter.grad = gradient
        self.generator_optimizer.step()
        return terms
