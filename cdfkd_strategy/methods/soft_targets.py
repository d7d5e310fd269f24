"""Soft-targeted transfer set: soft targets from a normal distribution over a late feature layer, and images that match them (Zi Wang, AAAI 2021).

Paper: https://arxiv.org/abs/2104.04868

Layer FC-2 of the teacher, the linear one before its classifier, has the weights W [D, D_in] with rows w_i; H are the layers
behind it, f(x) its features before the classifier, T(x) = its logits.

(a) Images, round by round, all classes jointly:

        R_ij = <w_i, w_j> / (|w_i| |w_j|),   v ~ N(mu, sigma^2 R),   y = softmax( H(v) / tau_y )
        min_x  tau_x^2 KL( y || softmax(T(x) / tau_x) ) - lambda_a mean|f(x)|             (Adam, from noise)

(b) Distillation over all images: L_S = tau^2 KL( softmax(T(x) / tau) || softmax(S(x) / tau) )  (Adam).

v is drawn as mu + sigma W' g with g ~ N(0, I) and the rows of W' being those of W at length 1: its covariance is exactly
sigma^2 R, without a Cholesky factor of a matrix that may be singular. A network with one linear layer (a ResNet) has its
class rows as W, so that v are logits; ``layer="classes"`` asks for that in every network.

Known are the layer, R from its weights, the joint targets, that there is an activation loss, sigma (2.0 for CIFAR-10, 1.5 for
MNIST) and lambda_a (0.1 for AlexNet, 0.05 for LeNet-5). *Reconstruction* is what else there is, since the paper has no code:

- L_a is DAFL's, on the features before the last linear layer, as a mean over them (``activation_weight=0`` is without it; another
  layer or norm would ask for another lambda_a). The covariance is sigma^2 R, and a network with one linear layer has class rows as W.
- mu = 0 (``mu="bias"`` is the layer's bias); v is taken before the activation.
- tau_y = tau_x = 1: the logits of an image are H(v). With tau_x = 20, as ZSKD compares its targets with a tempered teacher, they
  would have to be 20 times as large, and clipped pixels end at 0 and 1 without reaching that; with tau_y = tau_x = 20 a faint
  pattern in noise is enough. Free pixels do reach it, before they are clipped. tau = 20, for the student, is ZSKD's.
  `simulations/LOG.md` has the trials on MNIST.
- x starts as N(mean, std) of real images' pixels, clipped to [0, 1]; ``start="uniform"`` is U(0, 1).
- The factor tau_x^2, so that lambda_a means the same at every tau_x.
- ``pixels="free"`` optimises x as `zskd` does with the same setting: from N(0, 1), with the term ``d/2 sum x^2``, and clipped at the end alone;
  ``pixels="held"`` the same, but clipped at the start and after every step, so that what is kept is what was optimised.
- Adam of rate 0.01 on pixels that are clipped to [0, 1] after every step, 1500 steps, 100 images a round, 40,000 images.
- The student learns what the teacher says of the final images, not y, shifted, and mirrored if they are in colour; Adam 1e-3 and 500
  epochs from ZSKD. ``least_area`` below 1 also enlarges parts of them: images seen as they are, or only shifted, it learns by heart.
- R makes classes correlated, and nothing balances them: the class histogram of y is among the metrics, and ``balance="reject"``
  keeps candidates so that all classes are as frequent as they can be. The default keeps them as they come, as the paper does.

These defaults are not what does best where steps are few: with 80 of them on MNIST, free pixels with tau_x = 20 and a decay of 0.4,
``image_lr`` 0.3, shifts, ``least_area`` 0.1 and a milestone at epoch 32 of 40 teach 97.4 %, clipped pixels with tau_x = 1, ``image_lr`` 0.05,
seen as they are, and no milestone 76.8 (study mnist_tuning, `soft_targets-lr03` and `soft_targets`; other settings are common to both).
What 1500 steps give has not been measured with either.

Ablations: ``mu``, ``sigma``, ``layer``, ``target_temperature``, ``image_temperature``, ``start``, ``pixels``, ``least_area``, ``balance``.

Several teachers (the paper has one) take turns: the targets and images of a round are those of one of them, and candidates
are kept with a probability proportional to the weight w[k, c] of teacher k for the target's class c, so that a teacher makes images of
classes it knows. In stage (b) header k imitates teacher k, and a student with one header imitates the fused ensemble.

A client must disclose its weights; BatchNorm statistics are not used as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy.config import require
from cdfkd_strategy.data.augmentation import AugmentName, RandomViews
from cdfkd_strategy.data.transfer_pool import TransferPool
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.image_optimisation import clipped, decay, free, optimise_pixels
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.models.feature_layer import LayerName, feature_layer, replay
from cdfkd_strategy.pool_distillation import PoolDistillation
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import multistep, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs

LEAST_WEIGHT = 1e-12
"""A candidate of a class that its teacher does not know is kept only if there are not enough others."""


@dataclass(frozen=True)
class SoftTargetsConfig:
    """Settings of `SoftTargets`; the defaults are those for CIFAR-10, where they are known.

    Args:
        layer: W, "fc2" or "classes".
        mu: mean of v, "zero" or the layer's "bias".
        sigma: standard deviation of v (1.5 for MNIST; 0.5 to 3 are reported to be fine).
        target_temperature: tau_y.
        image_temperature: tau_x, of the teacher that looks at the images of stage (a).
        start: of the pixels, "normal" (mean and standard deviation of real ones) or "uniform".
        temperature: tau, of stage (b).
        balance: "none" keeps targets as they come, "reject" makes classes as equally frequent as the candidates allow.
        candidates: targets drawn for every one that is kept.
        rounds: batches of images, one epoch each.
        image_steps: optimisation steps per round.
        image_batch: images per round.
        image_lr: Adam on pixels.
        pixels: "clipped" to [0, 1] after every step, "free" or "held", see above; the latter two ignore ``start``.
        pixel_decay: d, of free and held pixels.
        activation_weight: lambda_a (0.05 for LeNet-5).
        pool_size: images in the transfer set; beyond, the oldest leave it.
        epochs: epochs of stage (b).
        iterations: student steps per epoch; 625 of 64 images are one pass over 40,000.
        batch_size: images per student step.
        student_lr: Adam, default betas.
        student_milestones: epochs of stage (b), from its start, at which the student's rate is divided by 10.
        augment: how images of the pool are moved in every step of the student, see `RandomViews`; "none" does not zoom either.
        least_area: a view shows a part of its image of at least this share of the area, enlarged to the full size; 1, or ``augment="none"``, shows all of it.
    """

    layer: LayerName = "fc2"
    mu: Literal["zero", "bias"] = "zero"
    sigma: float = 2.0
    target_temperature: float = 1.0
    image_temperature: float = 1.0
    start: Literal["normal", "uniform"] = "normal"
    temperature: float = 20.0
    balance: Literal["none", "reject"] = "none"
    candidates: int = 4
    rounds: int = 400
    image_steps: int = 1500
    image_batch: int = 100
    image_lr: float = 0.01
    pixels: Literal["clipped", "free", "held"] = "clipped"
    pixel_decay: float = 1e-3
    activation_weight: float = 0.1
    pool_size: int = 40_000
    epochs: int = 500
    iterations: int = 625
    batch_size: int = 64
    student_lr: float = 1e-3
    student_milestones: tuple[int, ...] = ()
    augment: AugmentName = "auto"
    least_area: float = 1.0

    def __post_init__(self) -> None:
        require(self, "method", "candidates", "rounds", "image_steps", "image_batch", "pool_size", "epochs", "iterations", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "sigma", "target_temperature", "image_temperature", "image_lr", "student_lr", "temperature", above=0)
        require(self, "method", "student_milestones", "pixel_decay", "activation_weight", least=0)
        require(self, "method", "least_area", above=0, most=1)

    @classmethod
    def toy(cls) -> SoftTargetsConfig:
        """The smallest setting that runs every stage."""
        return cls(candidates=2, rounds=2, image_steps=6, image_batch=32, image_lr=0.05, pool_size=48, epochs=2, iterations=6, batch_size=32)


class Targets(NamedTuple):
    """What the images of a round are to be: ``logits [B, C]`` (H(v)), of the teacher number ``teacher``."""

    logits: Tensor
    teacher: int


@METHODS.register("soft_targets")
class SoftTargets(Distiller):
    """Soft-targeted transfer set synthesis (https://arxiv.org/abs/2104.04868); see the module's docstring for what of it is a reconstruction.

    The student may have one header per teacher, or one for all.
    """

    name = "soft_targets"
    students = ("single", "multi")
    generator_lasts = False
    status = "every loss tested; reconstruction in part"
    Config = SoftTargetsConfig
    needs = Needs(features=True)
    config: SoftTargetsConfig

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: SoftTargetsConfig,
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
        """One round of targets and their images (stage a), or ``iterations`` student steps (stage b)."""
        if epoch < self.config.rounds:
            return self._synthesise(self.targets(epoch))
        if epoch == self.config.rounds:
            self.distillation.ask_teachers()
        set_rate(self.student_optimizer, self.config.student_lr * multistep(epoch - self.config.rounds, self.config.student_milestones))
        return {"student/kl": self.distillation.epoch(self.config.iterations)}

    def sample(self, count: int, rng: torch.Generator) -> Tensor | None:
        """Images of the transfer set, or None while it is empty."""
        return self.runtime.images(self.pool.draw(count, rng)) if len(self.pool) else None

    def targets(self, round_: int) -> Targets:
        """The targets of a round: those candidates of its teacher that are kept."""
        counted = self.teachers.counted
        teacher = counted[round_ % len(counted)]
        logits = self.candidates(teacher, self.config.candidates * self.config.image_batch)
        classes = logits.argmax(-1)
        share = self.teachers.weights[teacher].double()[classes]
        if self.config.balance == "reject":
            share = share / torch.bincount(classes, minlength=self.image.num_classes)[classes]
        kept = torch.multinomial(share.clamp_min(LEAST_WEIGHT).cpu(), self.config.image_batch, generator=self.rng)
        return Targets(logits[kept.to(logits.device)], teacher)

    def candidates(self, teacher: int, count: int) -> Tensor:
        """``H(v)`` of so many draws of v from a teacher's distribution: ``[count, C]``, on the device."""
        net = self.teachers.nets[teacher]
        layer = feature_layer(net, self.image.num_classes, self.config.layer)
        rows = F.normalize(layer.weight.float(), dim=1)
        v = self.config.sigma * self.runtime.normal(count, layer.in_features, rng=self.rng).to(rows) @ rows.T
        if self.config.mu == "bias" and layer.bias is not None:
            v = v + layer.bias
        return replay(net, layer, v, self.image).float().to(self.runtime.device)

    def image_loss(self, pixels: Tensor, targets: Targets) -> LossTerms:
        """The weighted terms of stage (a) for ``pixels [B, channels, H, W]``."""
        said = self.teachers.only([targets.teacher]).observe(self.image.normalise(pixels), bn=False)
        assert said.features[0] is not None
        tau = self.config.image_temperature
        y = targets.logits * (tau / self.config.target_temperature)  # what T(x) must be, up to a constant
        terms = {
            "images/kl": kl_divergence(said.logits[0], y, tau),
            "images/activation": -self.config.activation_weight * said.features[0].abs().mean(),
        }
        if self.config.pixels != "clipped":
            terms["images/decay"] = decay(pixels, self.config.pixel_decay)
        return terms

    def _noise(self) -> Tensor:
        shape = (self.config.image_batch, *self.image.shape)
        if self.config.start == "uniform" and self.config.pixels == "clipped":
            return torch.rand(shape, generator=self.rng)
        noise = torch.randn(shape, generator=self.rng)
        return {"free": noise, "held": clipped(noise), "clipped": self.image.to_pixels(noise)}[self.config.pixels]

    def _synthesise(self, targets: Targets) -> Metrics:
        """Optimise one batch of images and add it to the transfer set; the metrics are those of the last step, and the balance of its targets."""
        config = self.config
        bounded = free if config.pixels == "free" else clipped
        pixels, terms = optimise_pixels(
            self.runtime.images(self._noise()), lambda pixels: self.image_loss(pixels, targets), steps=config.image_steps, lr=config.image_lr, bounded=bounded
        )
        images = self.image.normalise(clipped(pixels))
        self.pool.add(images)
        classes = targets.logits.argmax(-1)
        with torch.no_grad():
            said = self.teachers.only([targets.teacher])(images)[0].argmax(-1)
        found = {**terms, "images/agreement": (said == classes).float().mean(), **class_balance(classes, self.image.num_classes)}
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def class_balance(classes: Tensor, num_classes: int) -> LossTerms:
    """How balanced classes ``[B]`` are: the entropy of their histogram over ln C (1 is balanced), and the shares of the rarest and the most frequent class."""
    histogram = torch.bincount(classes, minlength=num_classes).float() / len(classes)
    entropy = torch.special.entr(histogram).sum() / torch.tensor(float(num_classes)).log().to(histogram.device)
    return {"targets/entropy": entropy, "targets/rarest": histogram.min(), "targets/commonest": histogram.max()}
