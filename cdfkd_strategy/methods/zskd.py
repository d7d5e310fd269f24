"""ZSKD: data impressions from Dirichlet targets that follow the similarity of classes (Nayak et al., ICML 2019).

Paper: https://arxiv.org/abs/1905.08114

W [C, D] are the rows of the teacher's classifier, w_c the row of class c, T(x) its logits.

(a) Impressions, round by round, for every class k in turn and every beta of {1, 0.1} in turn:

        C_kj = <w_k, w_j> / (|w_k| |w_j|), every row brought to [0, 1] by its smallest and largest entry
        y ~ Dirichlet( beta C_k + 1e-4 )
        min_x  CE( y, softmax(T(x) / tau) ),  tau = 20                                    (Adam, from x ~ U(0, 1))

    After every step the whole batch is stretched to [0, 1] (``pixels="stretched"``, the default, as in the authors' code, which is for CIFAR).
    ``pixels="free"``: x ~ N(0, 1), the term ``d/2 sum x^2`` per image is added, and only the last x is clipped to [0, 1]. That is how a public
    reproduction has MNIST (a *reconstruction*: the paper's own code for it is not public). Stretched images of digits are grey without black.
    Half of the free values end outside [0, 1], so that the clipped images are no longer what the teacher was asked for; ``pixels="held"``
    is the same, but clipped at the start and after every step (ours).
(b) Distillation over all impressions: L_S = tau^2 KL( softmax(T(x) / tau) || softmax(S(x) / tau) )  (Adam).

A small beta gives targets that are nearly one-hot, beta = 1 softer ones. The metrics have the share of targets whose largest
entry is another class than k.

Two bugs of the authors' code:

- It brings C to [0, 1] as a whole, and its sampler every row of beta C once more, so that beta = 0.1 is beta = 1 and all targets are soft
  ones. In the paper, as summaries of it quote, it is the rows of C, before beta: ``mode="paper"``, the default; ``mode="code"`` does the
  same as the code.
- It draws new noise once per class and beta only, so that all batches but the first start from the images before them. Here every
  round starts from noise, in both modes.

Deviations:

- Several teachers (the paper has one): C is the mean of the teachers' similarities, and CE the mean of their cross entropies, row k of C and an
  image of class k with the class weights w[., k]. In stage (b) header k imitates teacher k, and a student with one header
  imitates the fused ensemble; one teacher is the paper's case.
- A round has all classes and betas in turn, and not one of each. The impressions are stored as bytes.
- The student's images are shifted, and mirrored if they are in colour, and the teachers see them as the student does. The paper also scales
  and rotates them: ``least_area`` below 1 enlarges parts of them, which smooths free pixels (and loses with stretched ones), and nothing
  rotates them. Its rate and epochs are the authors' code's.

A client must disclose its weights; BatchNorm statistics are not used as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy import seeding
from cdfkd_strategy.config import require
from cdfkd_strategy.data.augmentation import AugmentName, RandomViews
from cdfkd_strategy.data.transfer_pool import TransferPool
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.image_optimisation import clipped, decay, free, optimise_pixels, stretched
from cdfkd_strategy.models.feature_layer import feature_layer
from cdfkd_strategy.pool_distillation import PoolDistillation
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import multistep, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs

LEAST_CONCENTRATION = 1e-4
"""Added to every concentration, as in the authors' code: the least similar class has 0, which no Dirichlet distribution takes."""


@dataclass(frozen=True)
class ZSKDConfig:
    """Settings of `ZSKD`; the defaults are the authors' for CIFAR-10.

    Args:
        mode: "paper", or "code" with C brought to [0, 1] as a whole, and then every row of beta C.
        betas: scales of the concentrations, in turn.
        temperature: tau, in both stages.
        rounds: batches of impressions, one epoch each.
        image_steps: optimisation steps per round.
        image_batch: images per round.
        image_lr: Adam on pixels in [0, 1]; 3.0 is what the reproduction has for free ones.
        pixels: "stretched", "free" or "held", see above.
        pixel_decay: d, of free and held pixels.
        pool_size: impressions that are kept; beyond, the oldest go.
        epochs: epochs of stage (b).
        iterations: student steps per epoch; 625 of 64 images are one pass over 40,000.
        batch_size: images per student step.
        student_lr: Adam, default betas.
        student_milestones: epochs of stage (b), from its start, at which the student's rate is divided by 10.
        augment: how images of the pool are moved in every step of the student, see `RandomViews`; "none" does not zoom either.
        least_area: a view shows a part of its image of at least this share of the area, enlarged to the full size; 1, or ``augment="none"``, shows all of it.
    """

    mode: Literal["paper", "code"] = "paper"
    betas: tuple[float, ...] = (1.0, 0.1)
    temperature: float = 20.0
    rounds: int = 400
    image_steps: int = 1500
    image_batch: int = 100
    image_lr: float = 1e-3
    pixels: Literal["stretched", "free", "held"] = "stretched"
    pixel_decay: float = 1e-3
    pool_size: int = 40_000
    epochs: int = 500
    iterations: int = 625
    batch_size: int = 64
    student_lr: float = 1e-3
    student_milestones: tuple[int, ...] = ()
    augment: AugmentName = "auto"
    least_area: float = 1.0

    def __post_init__(self) -> None:
        require(self, "method", "rounds", "image_steps", "image_batch", "pool_size", "epochs", "iterations", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "image_lr", "student_lr", "temperature", above=0)
        require(self, "method", "student_milestones", "pixel_decay", least=0)
        require(self, "method", "least_area", above=0, most=1)
        require(self, "method", "betas", above=0)
        if not self.betas:
            raise ConfigError("method.betas is empty; accepted: one or more positive numbers")

    @classmethod
    def toy(cls) -> ZSKDConfig:
        """The smallest setting that runs every stage."""
        return cls(rounds=2, image_steps=6, image_batch=32, image_lr=0.05, pool_size=48, epochs=2, iterations=6, batch_size=32)


class Targets(NamedTuple):
    """``probabilities [B, C]`` (y) of the images of a round, and the class ``labels [B]`` that each was drawn for."""

    probabilities: Tensor
    labels: Tensor


@METHODS.register("zskd")
class ZSKD(Distiller):
    """Zero-shot knowledge distillation (https://arxiv.org/abs/1905.08114); see the module's docstring for the losses and the deviations.

    The student may have one header per teacher, or one for all.
    """

    name = "zskd"
    students = ("single", "multi")
    generator_lasts = False
    status = "every loss tested; formulas of the authors' code"
    Config = ZSKDConfig
    needs = Needs(features=True)
    config: ZSKDConfig

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: ZSKDConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        self.pool = TransferPool(config.pool_size, image)
        self.student_optimizer = torch.optim.Adam(student.parameters(), lr=config.student_lr)
        self.distillation = PoolDistillation(
            self.pool,
            teachers,
            student,
            self.student_optimizer,
            batch_size=config.batch_size,
            temperature=config.temperature,
            rng=rng,
            runtime=runtime,
            views=RandomViews(image, config.augment, None, rng),
            least_area=config.least_area,
        )

    @property
    def num_epochs(self) -> int:
        """Rounds of image optimisation, and epochs of distillation."""
        return self.config.rounds + self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """One round of impressions (stage a), or ``iterations`` student steps (stage b)."""
        if epoch < self.config.rounds:
            return self._impress(self.targets(epoch))
        if epoch == self.config.rounds:
            self.distillation.ask_teachers()
        set_rate(self.student_optimizer, self.config.student_lr * multistep(epoch - self.config.rounds, self.config.student_milestones))
        return {"student/kl": self.distillation.epoch(self.config.iterations)}

    def sample(self, count: int, rng: torch.Generator) -> Tensor | None:
        """Impressions, or None before there are any."""
        return self.runtime.images(self.pool.draw(count, rng)) if len(self.pool) else None

    def similarity(self) -> Tensor:
        """The class similarity ``[C, C]``, on the CPU, every row (mode "code": the whole) in [0, 1]: of all teachers, row c with their weights for class c."""
        found = torch.zeros(self.image.num_classes, self.image.num_classes, dtype=torch.float64)
        for net, weights in zip(self.teachers.nets, self.teachers.weights.cpu(), strict=True):
            rows = F.normalize(feature_layer(net, self.image.num_classes, "classes").weight.cpu().double(), dim=1)
            found += weights[:, None] * (rows @ rows.T)
        return _from_0_to_1(found) if self.config.mode == "code" else torch.stack([_from_0_to_1(row) for row in found])

    def concentrations(self, labels: Tensor, betas: Tensor) -> Tensor:
        """Of the Dirichlet distributions of images for ``labels [B]`` with ``betas [B]``: ``[B, C]``, on the CPU."""
        scaled = betas[:, None] * self.similarity()[labels]
        if self.config.mode == "code":
            scaled = torch.stack([_from_0_to_1(row) for row in scaled])
        return scaled + LEAST_CONCENTRATION

    def targets(self, round_: int) -> Targets:
        """The targets of a round: all classes in turn, and after each turn the next beta, going on where the round before stopped."""
        config, classes = self.config, self.image.num_classes
        place = torch.arange(round_ * config.image_batch, (round_ + 1) * config.image_batch)
        labels = place % classes
        betas = torch.tensor(config.betas, dtype=torch.float64)[place // classes % len(config.betas)]
        with seeding.seeded_scope("zskd", int(torch.randint(2**62, (), generator=self.rng))):  # torch's Dirichlet takes no generator
            y = torch.distributions.Dirichlet(self.concentrations(labels, betas)).sample()
        return Targets(y.float().to(self.runtime.device), labels.to(self.runtime.device))

    def image_loss(self, pixels: Tensor, targets: Targets) -> LossTerms:
        """The terms of stage (a) for ``pixels [B, channels, H, W]``: the cross entropy, and the decay of free or held pixels."""
        logits = self.teachers(self.image.normalise(pixels))
        entropies = -(targets.probabilities * F.log_softmax(logits.float() / self.config.temperature, dim=-1)).sum(-1)
        terms = {"images/cross_entropy": (self.teachers.weights[:, targets.labels] * entropies).sum(0).mean()}
        if self.config.pixels != "stretched":
            terms["images/decay"] = decay(pixels, self.config.pixel_decay)
        return terms

    def _impress(self, targets: Targets) -> Metrics:
        """Optimise one batch of impressions and add it to the pool; the metrics are those of the last step, and how the classes came out."""
        config = self.config
        draw, bounded = {"stretched": (torch.rand, stretched), "free": (torch.randn, free), "held": (torch.randn, clipped)}[config.pixels]
        noise = self.runtime.images(draw(config.image_batch, *self.image.shape, generator=self.rng))
        start = clipped(noise) if config.pixels == "held" else noise
        pixels, terms = optimise_pixels(start, lambda pixels: self.image_loss(pixels, targets), steps=config.image_steps, lr=config.image_lr, bounded=bounded)
        images = self.image.normalise(clipped(pixels))
        self.pool.add(images)
        wanted = targets.probabilities.argmax(-1)
        with torch.no_grad():
            said = self.teachers.fused(images).argmax(-1)
        found = {**terms, "images/agreement": (said == wanted).float().mean(), "targets/other_class": (wanted != targets.labels).float().mean()}
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def _from_0_to_1(values: Tensor) -> Tensor:
    """Shifted and scaled so that the smallest value is 0 and the largest 1."""
    low, high = values.aminmax()
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
