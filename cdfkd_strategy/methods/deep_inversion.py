"""DeepInversion: images from the teacher's BatchNorm statistics, then distillation over them (Yin et al., CVPR 2020).

Paper: https://arxiv.org/abs/1912.08795

(a) Images. A batch x starts as N(0, I) and is itself optimised (Adam), for preset class labels y and with a random
    jitter before every step:

        min_x  CE(T(x), y) + a_tv TV(x) + a_l2 ||x|| + a_bn R_BN(T, x)

    The images of the lowest loss are kept. Many such rounds fill a pool.
(b) Distillation. The student imitates the teacher on random batches of the pool: L_S = T^2 KL(T(x) || S(x)), SGD.

TV is the L2 total variation in four directions, R_BN the distance of the batch from the statistics that the BatchNorm
layers remember. One epoch of stage (a) is one round; the epochs of stage (b) follow.

Adaptive DeepInversion (``adaptive_weight`` a_c above 0, ``blocks`` above 1) adds a_c (1 - JS(T(x), S(x))) to the images'
loss, so that they show what the student does not know yet. Rounds and epochs are divided into ``blocks``, each of them (a)
then (b), and the student of one block is the opponent of the images of the next. *Reconstruction*: the alternation (the
authors' code has the term, but trains no student) and the weight for small images. The images of the first block have no
opponent, because an untrained student disagrees about everything. ``blocks`` without a weight is the ablation.

Two settings come from the authors: ``mode="paper"`` is what their CIFAR instructions call the parameters of the paper
(rate 0.05, a_tv 2.5e-5), ``mode="code"`` what the same page recommends for better images, and what CDFKD-MFS's authors
run as a baseline (rate 0.1, a_tv 1e-3). Both: a_bn 10, a_l2 0, 2000 steps, 256 images, jitter 2.

Deviations:

- Several teachers (the paper has one): CE and R_BN are means over the teachers; with class weights w[k, c] the mean of
  CE is weighted by w[k, y], so that a teacher answers for the classes it knows. In stage (b) header k imitates teacher
  k, and a student with one header imitates the fused ensemble; one teacher is the paper's case.
- Labels are balanced over the whole pool, not only within a round.
- The authors' code keeps the best images by reference, so that they go on changing; here they are copied.
- The pool holds 8-bit pixels, and images are clipped to [0, 1] in every step, as the authors do for ImageNet; with ``clip=False``,
  their way for CIFAR, only what is stored is clipped, and no longer has the statistics that it was optimised for (on MNIST,
  where the background is black, far from them). Images keep their normalisation, so that the teachers'
  statistics hold in stage (b) too (a known re-implementation stretches every batch to the full range instead).
- Stage (b) is that of CDFKD-MFS's baseline, with its crops and flips; ``augment="auto"`` mirrors colour images only. ``least_area``
  below 1 also enlarges parts of the images, which a student of few images would otherwise learn by heart.
- JS is the Jensen-Shannon divergence of the paper, at the code's temperature 3, and the mean over headers (or between the
  single header and the fused ensemble); the authors' code has another quantity there (`losses.competition`).
- Not here: the two-resolution schedule for 128 px and more.

R_BN covers BatchNorm1d layers too, where a network has them; authors look at BatchNorm2d alone.
A client must disclose its weights, including BatchNorm running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cdfkd_strategy.config import require
from cdfkd_strategy.data.augmentation import AugmentName, RandomViews
from cdfkd_strategy.data.best_batch import BestBatch
from cdfkd_strategy.data.transfer_pool import TransferPool
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.losses.competition import competition_loss
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.losses.image_prior import image_norm, jitter, total_variation
from cdfkd_strategy.losses.preset_labels import label_cross_entropy
from cdfkd_strategy.losses.statistics import batch_norm_loss
from cdfkd_strategy.models.modes import evaluating
from cdfkd_strategy.pool_distillation import PoolDistillation
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import multistep, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs

PRESETS: dict[str, tuple[float, float]] = {"code": (0.1, 1e-3), "paper": (0.05, 2.5e-5)}
"""Per mode: the images' learning rate, and the weight of the total variation."""


@dataclass(frozen=True)
class DeepInversionConfig:
    """Settings of `DeepInversion`; the defaults are those for CIFAR.

    Args:
        mode: which of the authors' two settings fills ``image_lr`` and ``tv_weight`` where they are None.
        rounds: batches of images, one epoch each; 196 of 256 images make as many as CIFAR has.
        image_steps: optimisation steps per round.
        image_batch: images per round.
        image_lr: Adam, default betas.
        tv_weight: a_tv.
        l2_weight: a_l2.
        bn_weight: a_bn.
        first_layer_weight: rho_1, the weight of the first BatchNorm layer.
        clip: bring the images back to pixels in [0, 1] at the start and after every step; False clips them once, when they are stored.
        jitter: pixels by which the batch is rolled at most, either way.
        adaptive_weight: a_c; 0 is DeepInversion. The authors' ImageNet setting is 0.2.
        adaptive_temperature: of both networks in JS.
        blocks: how often (a) and (b) alternate; divides ``rounds`` and ``epochs``, and is at least 2 if ``adaptive_weight`` is above 0.
        pool_size: images in the pool; beyond, the oldest leave it.
        epochs: epochs of stage (b).
        iterations: student steps per epoch; 391 of 128 images are one pass over 50,000.
        batch_size: images per student step.
        student_lr: SGD, with ``momentum`` and ``weight_decay``.
        momentum: of SGD.
        weight_decay: of SGD.
        student_milestones: epochs of stage (b), from its start, at which the student's rate is divided by 10.
        temperature: T of stage (b).
        augment: how images of the pool are moved in every step of the student, see `RandomViews`.
        least_area: a view shows a part of its image of at least this share of the area, enlarged to the full size; 1, or ``augment="none"``, shows all of it.
    """

    mode: Literal["code", "paper"] = "code"
    rounds: int = 196
    image_steps: int = 2000
    image_batch: int = 256
    image_lr: float | None = None
    tv_weight: float | None = None
    l2_weight: float = 0.0
    bn_weight: float = 10.0
    first_layer_weight: float = 1.0
    clip: bool = True
    jitter: int = 2
    adaptive_weight: float = 0.0
    adaptive_temperature: float = 3.0
    blocks: int = 1
    pool_size: int = 50_000
    epochs: int = 200
    iterations: int = 391
    batch_size: int = 128
    student_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    student_milestones: tuple[int, ...] = (80, 120)
    temperature: float = 1.0
    augment: AugmentName = "auto"
    least_area: float = 1.0

    def __post_init__(self) -> None:
        require(self, "method", "rounds", "image_steps", "pool_size", "epochs", "iterations", least=1)
        require(self, "method", "image_batch", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "student_milestones", "jitter", "adaptive_weight", "weight_decay", least=0)
        require(self, "method", "tv_weight", "l2_weight", "bn_weight", "first_layer_weight", least=0)
        require(self, "method", "image_lr", "student_lr", "temperature", "adaptive_temperature", above=0)
        require(self, "method", "momentum", least=0, below=1)
        require(self, "method", "least_area", above=0, most=1)
        if self.blocks < 1 or self.rounds % self.blocks or self.epochs % self.blocks:
            raise ConfigError(f"method.blocks is {self.blocks}; accepted: a divisor of method.rounds ({self.rounds}) and of method.epochs ({self.epochs})")
        if self.adaptive_weight > 0 and self.blocks == 1:
            raise ConfigError(
                f"method.adaptive_weight is {self.adaptive_weight} with method.blocks={self.blocks}; accepted: 0, "
                "or more with at least 2 blocks (the images of the first have no student to compete with)"
            )

    @property
    def resolved_image_lr(self) -> float:
        """``image_lr``, or the mode's."""
        return PRESETS[self.mode][0] if self.image_lr is None else self.image_lr

    @property
    def resolved_tv_weight(self) -> float:
        """``tv_weight``, or the mode's."""
        return PRESETS[self.mode][1] if self.tv_weight is None else self.tv_weight

    @classmethod
    def toy(cls) -> DeepInversionConfig:
        """The smallest setting that runs every stage."""
        return cls(
            rounds=2,
            image_steps=6,
            image_batch=32,
            jitter=1,
            pool_size=48,
            epochs=2,
            iterations=6,
            batch_size=32,
            student_milestones=(1,),
        )


@METHODS.register("deep_inversion")
class DeepInversion(Distiller):
    """DeepInversion (https://arxiv.org/abs/1912.08795); see the module's docstring for the losses and the deviations.

    The student may have one header per teacher, or one for all. `generator` stays None: the images are the pool.
    """

    name = "deep_inversion"
    students = ("single", "multi")
    generator_lasts = False
    status = "every loss tested; formulas of the authors' code"
    Config = DeepInversionConfig
    needs = Needs(batch_norm=True)
    config: DeepInversionConfig

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: DeepInversionConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        self.pool = TransferPool(config.pool_size, image)
        self.student_optimizer = torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay)
        self.competing = False
        self.distillation = PoolDistillation(
            self.pool,
            teachers,
            student,
            self.student_optimizer,
            batch_size=config.batch_size,
            temperature=config.temperature,
            rng=self.rng,
            runtime=runtime,
            views=RandomViews(image, config.augment, None, rng),
            least_area=config.least_area,
        )

    @property
    def num_epochs(self) -> int:
        """Rounds of image optimisation, and epochs of distillation."""
        return self.config.rounds + self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """One round of image optimisation (stage a), or ``iterations`` student steps (stage b)."""
        config = self.config
        rounds, epochs = config.rounds // config.blocks, config.epochs // config.blocks
        block, place = divmod(epoch, rounds + epochs)
        if place < rounds:
            self.competing = config.adaptive_weight > 0 and block > 0
            return self._invert(block * rounds + place)
        student_epoch = block * epochs + place - rounds
        set_rate(self.student_optimizer, config.student_lr * multistep(student_epoch, config.student_milestones))
        if place == rounds:
            self.distillation.ask_teachers()
        return {"student/kl": self.distillation.epoch(config.iterations)}

    def sample(self, count: int, rng: torch.Generator) -> Tensor | None:
        """Images of the pool, or None while it is empty."""
        return self.runtime.images(self.pool.draw(count, rng)) if len(self.pool) else None

    def labels(self, epoch: int) -> Tensor:
        """The preset classes ``[image_batch]`` of a round: all classes in turn, going on where the round before stopped."""
        start = epoch * self.config.image_batch
        return (torch.arange(start, start + self.config.image_batch) % self.image.num_classes).to(self.runtime.device)

    def image_loss(self, images: Tensor, labels: Tensor) -> LossTerms:
        """The weighted terms of stage (a) for normalised images ``[B, channels, H, W]`` and their preset labels ``[B]``."""
        config = self.config
        teachers = self.teachers.observe(images)
        terms = {
            "images/cross_entropy": label_cross_entropy(teachers.logits, labels, self.teachers.weights),
            "images/total_variation": config.resolved_tv_weight * total_variation(images),
            "images/l2": config.l2_weight * image_norm(images),
            "images/bn": config.bn_weight * batch_norm_loss(teachers.bn, config.first_layer_weight),
        }
        return {**terms, "images/competition": config.adaptive_weight * self._competition(images, teachers.logits)} if self.competing else terms

    def _competition(self, images: Tensor, teachers: Tensor) -> Tensor:
        """``1 - JS`` between the student, in eval mode, and teachers that said ``[K, B, C]`` of the images."""
        with self.runtime.autocast(), evaluating(self.student):
            student = self.student(images).logits
        return competition_loss(student, head_targets(teachers, self.teachers.weights, len(student)), self.config.adaptive_temperature)

    def _clipped(self, images: Tensor) -> Tensor:
        """The images, or with ``clip`` those nearest to them whose pixels are in [0, 1]."""
        return self.image.normalise(self.image.to_pixels(images)) if self.config.clip else images

    def _invert(self, round_: int) -> Metrics:
        """Optimise one batch of images and add the best ones to the pool; the metrics are those of the best step."""
        labels = self.labels(round_)
        noise = self.runtime.normal(self.config.image_batch, *self.image.shape, rng=self.rng)
        images = self.runtime.images(self._clipped(noise)).requires_grad_()
        optimizer = torch.optim.Adam([images], lr=self.config.resolved_image_lr)
        best = BestBatch()
        for _ in range(self.config.image_steps):
            terms = self.image_loss(jitter(images, self.config.jitter, self.rng), labels)
            values = torch.stack(list(terms.values()))
            best.offer(values.sum(), images, values)
            (images.grad,) = torch.autograd.grad(values.sum(), images)
            optimizer.step()
            if self.config.clip:
                with torch.no_grad():
                    images.copy_(self._clipped(images))
        best_images, best_values = best.kept
        self.pool.unlabel()
        self.pool.add(best_images)
        return dict(zip(terms, best_values.tolist(), strict=True))
