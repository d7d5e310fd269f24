"""FastDFKD: a meta-generator from which a few steps make the next batch of images (Fang et al., AAAI 2022).

Paper: https://arxiv.org/abs/2112.06253

Images share their features, so a generator that starts from what all batches have in common needs only k steps for the
next one (k = 2, 5 or 10 instead of the 500 of CMI). An epoch makes one batch and then distils:

    1. labels y and z ~ N(0, I); G' is a copy of the meta-generator G. k Adam steps on (G', z) of
           L = a_bn R_BN(T, x) + a_ce CE(T(x), y) - a_adv 1[argmax S = argmax T] KL(T(x) || S(x)),   x = view(G'(z))
       G gets the sum of the k gradients of G' as its own (first-order MAML), and makes one Adam step at k times the rate
    2. the batch G'(z) of the lowest loss joins the pool
    3. ``student_steps`` steps of the student on views of the pool: L_S = T^2 KL(T(x) || S(x)), T = 20

A view is a random crop of the padded image, mirrored or not. R_BN asks whether the batch together with those before it
has the teachers' statistics: it compares an average over rounds, in which the present batch counts 1 - m = 0.1
(`AveragedStatistics`). The first ``warm_up`` epochs only make images, without the adversarial term. Once, in the middle,
G's first layer is drawn anew.

The formulas and defaults are those of the authors' code (CIFAR, ResNet-34 to ResNet-18); whether the paper's text
differs could not be checked. Epochs are counted from 0 here: the adversarial term and the new first layer come one epoch later than theirs.

Known bugs of that code which are not here:

- The reset draws the scale of the first BatchNorm around 0 instead of 1, and in one version of the file its condition
  is true for every layer, so that it fails. Here the linear layer is drawn from N(0, 0.02^2), the scale from N(1, 0.02^2).
- The same repository builds its baselines ZSKT, DFAD and DFQ with the teacher as their student, so that their
  adversarial term is always 0: its numbers for them say nothing about those methods.

Deviations:

- Several teachers (the paper has one): CE is the mean over them weighted by w[k, y], R_BN the plain mean. Header k is
  compared with teacher k and imitates it, a student with one header the fused ensemble; one teacher is the paper's case.
- ``augment="auto"`` mirrors colour images only; ``pool_size`` is a bound, which the defaults do not reach.
- The generator is this project's (that of CDFKD-MFS) with the authors' output, a sigmoid whose pixels are normalised, and their epsilon
  of BatchNorm, 1e-5. The pool keeps 8-bit pixels.

R_BN covers BatchNorm1d layers too, where a network has them; authors look at BatchNorm2d alone.
A client must disclose its weights, including BatchNorm running statistics.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cdfkd_strategy.config import require
from cdfkd_strategy.data.augmentation import AugmentName, RandomViews
from cdfkd_strategy.data.best_batch import BestBatch
from cdfkd_strategy.data.transfer_pool import TransferPool
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.losses.agreed_divergence import agreed_divergence
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.losses.preset_labels import label_cross_entropy
from cdfkd_strategy.losses.statistics import AveragedStatistics, batch_norm_loss
from cdfkd_strategy.models.generators import Generator, GeneratorConfig, build_generator
from cdfkd_strategy.models.modes import evaluating
from cdfkd_strategy.pool_distillation import PoolDistillation
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import cosine, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs, TeacherOutputs

BETAS = (0.5, 0.999)
"""Of Adam, for the copies and for the meta-generator."""

RATES: tuple[tuple[int, float, float], ...] = ((2, 5e-3, 0.015), (5, 3e-3, 0.01), (10, 2e-3, 0.01))
"""The authors' k, and the rates of generator and z that go with it; another k takes those of the next larger one, or of the last."""

RESET_STD = 0.02
"""Of what the reset draws."""


def _sigmoid_generator() -> GeneratorConfig:
    return GeneratorConfig(output="sigmoid", batch_norm_eps=1e-5)


@dataclass(frozen=True)
class FastDFKDConfig:
    """Settings of `FastDFKD`; the defaults are the authors' Fast-10 for CIFAR.

    Args:
        epochs: all of them, warm-up included.
        warm_up: epochs that only make images, without the adversarial term.
        inner_steps: k.
        synthesis_batch: images per epoch.
        generator_lr: Adam, of the copy; the meta-generator's is k times as large. None is the authors' for this k.
        latent_lr: Adam, of z. None is the authors' for this k.
        bn_weight: a_bn.
        statistics_momentum: m; 0 asks every batch for the teachers' statistics.
        first_layer_weight: rho_1, the weight of the first BatchNorm layer.
        label_weight: a_ce.
        adversarial_weight: a_adv.
        reset_epoch: before it the first layer of G is drawn anew; None never.
        augment: what a view is, see `RandomViews`.
        padding: pixels by which a view is shifted at most, either way.
        pool_size: images in the pool; beyond, the oldest leave it.
        student_steps: per epoch.
        batch_size: images per student step.
        student_lr: SGD, with ``momentum`` and ``weight_decay``; falls to ``least_student_lr`` along a cosine, epoch by epoch, once the warm-up is over.
        least_student_lr: where the cosine ends.
        momentum: of SGD.
        weight_decay: of SGD.
        temperature: T of the student's loss.
        generator: latent width, size and output of G.
    """

    epochs: int = 220
    warm_up: int = 20
    inner_steps: int = 10
    synthesis_batch: int = 256
    generator_lr: float | None = None
    latent_lr: float | None = None
    bn_weight: float = 10.0
    statistics_momentum: float = 0.9
    first_layer_weight: float = 1.0
    label_weight: float = 0.5
    adversarial_weight: float = 1.33
    reset_epoch: int | None = 140
    augment: AugmentName = "auto"
    padding: int = 4
    pool_size: int = 60_000
    student_steps: int = 400
    batch_size: int = 256
    student_lr: float = 0.2
    least_student_lr: float = 2e-4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 20.0
    generator: GeneratorConfig = field(default_factory=_sigmoid_generator)

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "inner_steps", "pool_size", "student_steps", least=1)
        require(self, "method", "synthesis_batch", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "warm_up", "reset_epoch", "padding", "least_student_lr", least=0)
        require(self, "method", "bn_weight", "first_layer_weight", "label_weight", "adversarial_weight", "weight_decay", least=0)
        require(self, "method", "generator_lr", "latent_lr", "student_lr", "temperature", above=0)
        require(self, "method", "momentum", "statistics_momentum", least=0, below=1)
        if self.warm_up >= self.epochs:
            raise ConfigError(f"method.warm_up is {self.warm_up}; accepted: at least 0 and below method.epochs ({self.epochs})")

    @property
    def rates(self) -> tuple[float, float]:
        """The learning rates of the copy and of z: as given, or the authors' for this k."""
        _, generator, latent = next((row for row in RATES if row[0] >= self.inner_steps), RATES[-1])
        return (generator if self.generator_lr is None else self.generator_lr, latent if self.latent_lr is None else self.latent_lr)

    @classmethod
    def toy(cls) -> FastDFKDConfig:
        """The smallest setting that runs every stage."""
        return cls(
            epochs=3,
            warm_up=1,
            inner_steps=3,
            synthesis_batch=32,
            reset_epoch=2,
            padding=1,
            pool_size=80,
            student_steps=6,
            batch_size=32,
            student_lr=0.1,
            generator=GeneratorConfig(latent_dim=16, width=0.25, output="sigmoid"),
        )


@METHODS.register("fast_dfkd")
class FastDFKD(Distiller):
    """FastDFKD (https://arxiv.org/abs/2112.06253); see the module's docstring for the losses and the deviations.

    The student may have one header per teacher, or one for all. `generator` is the meta-generator; samples come from the pool.
    """

    name = "fast_dfkd"
    students = ("single", "multi")
    status = "every loss tested; formulas of the authors' code"
    Config = FastDFKDConfig
    needs = Needs(batch_norm=True)
    config: FastDFKDConfig
    generator: Generator

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: FastDFKDConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        self.generator = runtime.place(build_generator(image, config.generator))
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.rates[0] * config.inner_steps, betas=BETAS)
        self.student_optimizer = torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay)
        self.statistics = AveragedStatistics(config.statistics_momentum)
        self.pool = TransferPool(config.pool_size, image)
        self.views = RandomViews(image, config.augment, config.padding, rng)
        self.distillation = PoolDistillation(
            self.pool,
            teachers,
            student,
            self.student_optimizer,
            batch_size=config.batch_size,
            temperature=config.temperature,
            rng=rng,
            runtime=runtime,
            views=self.views,
        )

    @property
    def num_epochs(self) -> int:
        """``config.epochs``."""
        return self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """One batch of images from the meta-generator and, after the warm-up, ``student_steps`` steps on the pool."""
        config = self.config
        if epoch == config.reset_epoch:
            self._reset_first_layer()
        terms = self._synthesise(adversarial=epoch >= config.warm_up)
        if epoch < config.warm_up:
            return terms
        factor = cosine(epoch - config.warm_up, config.epochs - config.warm_up)
        set_rate(self.student_optimizer, config.least_student_lr + (config.student_lr - config.least_student_lr) * factor)
        return {**terms, "student/kl": self.distillation.epoch(config.student_steps)}

    def sample(self, count: int, rng: torch.Generator) -> Tensor | None:
        """Images of the pool, or None while it is empty."""
        return self.runtime.images(self.pool.draw(count, rng)) if len(self.pool) else None

    def image_loss(self, images: Tensor, teachers: TeacherOutputs, labels: Tensor, *, adversarial: bool) -> LossTerms:
        """The weighted terms of L for views ``[B, channels, H, W]``, what the teachers say of them, and their preset labels ``[B]``."""
        config = self.config
        terms = {
            "images/bn": config.bn_weight * batch_norm_loss(self.statistics.distances(teachers.shifts), config.first_layer_weight),
            "images/cross_entropy": config.label_weight * label_cross_entropy(teachers.logits, labels, self.teachers.weights),
        }
        if adversarial and config.adversarial_weight > 0:
            with evaluating(self.student), self.runtime.autocast():
                student = self.student(images).logits
            target = head_targets(teachers.logits, self.teachers.weights, len(student))
            terms["images/adversarial"] = -config.adversarial_weight * agreed_divergence(student, target)
        return terms

    def _synthesise(self, *, adversarial: bool) -> Metrics:
        """One round of k steps: the best images join the pool, and G makes its step; the metrics are those of the best images."""
        config, (generator_lr, latent_lr) = self.config, self.config.rates
        labels = torch.randint(self.image.num_classes, (config.synthesis_batch,), generator=self.rng).to(self.runtime.device)
        z = self.runtime.normal(config.synthesis_batch, config.generator.latent_dim, rng=self.rng).requires_grad_()
        self.generator_optimizer.zero_grad(set_to_none=True)
        copied = copy.deepcopy(self.generator).train()
        parameters = list(copied.parameters())
        groups: list[dict[str, Any]] = [{"params": parameters}, {"params": [z], "lr": latent_lr}]
        optimizer = torch.optim.Adam(groups, lr=generator_lr, betas=BETAS)
        best = BestBatch()
        for _ in range(config.inner_steps):
            with self.runtime.autocast():
                images = copied(z.clone())  # torch's FLOP counter cannot watch a module whose input is a leaf
            views = self.runtime.images(self.views.crop(images))
            with self.runtime.autocast():
                teachers = self.teachers.observe(views)
            terms = self.image_loss(views, teachers, labels, adversarial=adversarial)
            values = torch.stack(list(terms.values()))
            best.offer(values.sum(), images, values)
            *gradients, z.grad = torch.autograd.grad(values.sum(), [*parameters, z])
            for parameter, common, gradient in zip(parameters, self.generator.parameters(), gradients, strict=True):
                parameter.grad = gradient
                common.grad = gradient if common.grad is None else common.grad + gradient
            optimizer.step()
        self.generator_optimizer.step()
        self.statistics.add(teachers.shifts)
        best_images, best_values = best.kept
        self.pool.add(best_images)
        return dict(zip(terms, best_values.tolist(), strict=True))

    @torch.no_grad()
    def _reset_first_layer(self) -> None:
        linear, norm = self.generator.project, self.generator.body.get_submodule("0")
        assert isinstance(norm, nn.BatchNorm2d)
        for weight, mean in ((linear.weight, 0.0), (norm.weight, 1.0)):
            weight.copy_(mean + RESET_STD * self.runtime.normal(*weight.shape, rng=self.rng))
        linear.bias.zero_()
        norm.bias.zero_()
