"""CMI: contrastive model inversion, images that differ from all earlier ones (Fang et al., IJCAI 2021).

Paper: https://arxiv.org/abs/2105.08584

One epoch is one round:

    1. the generator G is drawn anew; labels y and z ~ N(0, I). Adam on (G, z), with x the global view of G(z):
           L = a_bn R_BN(T, x) + a_ce CE(T(x), y) - a_adv 1[argmax S = argmax T] KL(T(x) || S(x)) + a_cr L_cr
    2. the batch G(z) of the lowest loss joins the pool, and its features the memory bank
    3. ``student_steps`` steps of the student on views of the pool: L_S = T^2 KL(T(x) || S(x)), T = 20

L_cr is InfoNCE: the features of the local view of an image (the means of the teacher's stage maps, through a small head)
must be nearest to those of its own global view, among the images of the batch and those of earlier rounds in the bank. The
mean over the batch and the mean over the bank's images are added. Gradients pass through the local views; the head learns
with G, and is not drawn anew. A global view is a random crop of the padded image, a local one an enlarged part of at least
a quarter of it, both mirrored or not.

The first ``pre_rounds`` rounds only make images, without the adversarial term: the authors' pre-inverted data, for their
50,000 images.

The formulas are those of the authors' code, the weights those of its adversarial CIFAR-10 script, the student's steps of its
rate those of the first versions (later ones have a cosine), its temperature that of the present script. *Reconstruction*:
``pre_rounds`` in place of a file of images.

Deviations:

- Several teachers (the paper has one): CE is the mean over them weighted by w[k, y], R_BN the plain mean, and the features
  of all teachers stand side by side. Teachers whose stages cannot be found have none. Header k is compared with teacher k
  and imitates it, a student with one header the fused ensemble; one teacher is the paper's case.
- Features are the means of the last map of every resolution, at most four (the authors: of the inputs of four
  blocks for ResNet-34, of all BatchNorm layers for others).
- The generator is this project's (that of CDFKD-MFS) with the authors' output, a sigmoid whose pixels are normalised, and their epsilon of
  BatchNorm, 1e-5. Its weights are drawn as torch does, the authors' from N(0, 0.02^2), scales from N(1, 0.02^2): BatchNorm undoes the scale
  of all weights but the last ones, which torch draws as large.
- A generator is drawn anew in every round, so that none starts from an earlier one (``server.keep_generator``).
- ``augment="auto"`` mirrors colour images only. The pool keeps 8-bit pixels; it and the bank are bounded.
- The authors' bank is empty for one round at the moment when it is exactly full; this one is not.

R_BN covers BatchNorm1d layers too, where a network has them; authors look at BatchNorm2d alone.
A client must disclose its weights, including BatchNorm running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cdfkd_strategy import seeding
from cdfkd_strategy.config import require
from cdfkd_strategy.data.augmentation import AugmentName, RandomViews
from cdfkd_strategy.data.best_batch import BestBatch
from cdfkd_strategy.data.feature_bank import FeatureBank
from cdfkd_strategy.data.transfer_pool import TransferPool
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.losses.agreed_divergence import agreed_divergence
from cdfkd_strategy.losses.contrastive import ContrastiveHead, info_nce
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.losses.preset_labels import label_cross_entropy
from cdfkd_strategy.losses.statistics import batch_norm_loss
from cdfkd_strategy.models.generators import Generator, GeneratorConfig, build_generator
from cdfkd_strategy.models.modes import evaluating
from cdfkd_strategy.pool_distillation import PoolDistillation
from cdfkd_strategy.precision import full
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import multistep, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs, TeacherOutputs

BETAS = (0.5, 0.999)
"""Of Adam, for G and z."""


def _sigmoid_generator() -> GeneratorConfig:
    return GeneratorConfig(output="sigmoid", batch_norm_eps=1e-5)


@dataclass(frozen=True)
class CMIConfig:
    """Settings of `CMI`; the defaults are the authors' for CIFAR-10.

    Args:
        pre_rounds: epochs that only make images, without the adversarial term; 196 of 256 images make as many as CIFAR has.
        rounds: epochs that make images and train the student.
        inversion_steps: on G and z, per round.
        synthesis_batch: images per round.
        generator_lr: Adam, of G and z, and of the head.
        bn_weight: a_bn.
        first_layer_weight: rho_1, the weight of the first BatchNorm layer.
        label_weight: a_ce.
        adversarial_weight: a_adv.
        contrastive_weight: a_cr; 0 does without local views, head and bank.
        contrastive_temperature: of InfoNCE.
        head_width: numbers that the head gives.
        bank_size: images whose features are kept; beyond, the oldest leave it.
        negatives: images of the bank that take part in a step, at most.
        augment: what moves the views, see `RandomViews`; "none" leaves the contrastive term nothing to compare.
        padding: pixels by which a global view is shifted at most, either way.
        least_area: share of the image that a local view shows at least.
        pool_size: images in the pool; beyond, the oldest leave it.
        student_steps: per round.
        batch_size: images per student step.
        student_lr: SGD, with ``momentum`` and ``weight_decay``.
        student_milestones: rounds, not counting the first ``pre_rounds``, at which the student's rate is divided by 10.
        momentum: of SGD.
        weight_decay: of SGD.
        temperature: T of the student's loss.
        generator: latent width, size and output of G.
    """

    pre_rounds: int = 196
    rounds: int = 40
    inversion_steps: int = 200
    synthesis_batch: int = 256
    generator_lr: float = 1e-3
    bn_weight: float = 1.0
    first_layer_weight: float = 1.0
    label_weight: float = 0.5
    adversarial_weight: float = 0.5
    contrastive_weight: float = 0.8
    contrastive_temperature: float = 0.1
    head_width: int = 256
    bank_size: int = 40_960
    negatives: int = 4096
    augment: AugmentName = "auto"
    padding: int = 4
    least_area: float = 0.25
    pool_size: int = 61_000
    student_steps: int = 2000
    batch_size: int = 128
    student_lr: float = 0.1
    student_milestones: tuple[int, ...] = (25, 30, 35)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 20.0
    generator: GeneratorConfig = field(default_factory=_sigmoid_generator)

    def __post_init__(self) -> None:
        require(self, "method", "rounds", "inversion_steps", "head_width", "bank_size", "pool_size", "student_steps", least=1)
        require(self, "method", "synthesis_batch", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "student_milestones", "pre_rounds", "negatives", "padding", least=0)
        require(self, "method", "bn_weight", "first_layer_weight", "label_weight", "adversarial_weight", "contrastive_weight", "weight_decay", least=0)
        require(self, "method", "generator_lr", "student_lr", "temperature", "contrastive_temperature", above=0)
        require(self, "method", "momentum", least=0, below=1)
        require(self, "method", "least_area", above=0, most=1)

    @classmethod
    def toy(cls) -> CMIConfig:
        """The smallest setting that runs every stage, and overflows bank and pool."""
        return cls(
            pre_rounds=1,
            rounds=2,
            inversion_steps=4,
            synthesis_batch=32,
            generator_lr=0.01,
            head_width=8,
            bank_size=48,
            negatives=40,
            padding=1,
            pool_size=80,
            student_steps=6,
            batch_size=32,
            student_milestones=(1,),
            generator=GeneratorConfig(latent_dim=16, width=0.25, output="sigmoid"),
        )


@METHODS.register("cmi")
class CMI(Distiller):
    """CMI (https://arxiv.org/abs/2105.08584); see the module's docstring for the losses and the deviations.

    The student may have one header per teacher, or one for all. Samples come from the pool.

    Raises:
        ArchitectureError: no teacher's stages can be found, and ``contrastive_weight`` is above 0.
    """

    name = "cmi"
    students = ("single", "multi")
    generator_lasts = False
    status = "every loss tested; formulas of the authors' code"
    Config = CMIConfig
    needs = Needs(batch_norm=True)
    config: CMIConfig
    generator: Generator

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: CMIConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        width = self._feature_width() if config.contrastive_weight > 0 else 1
        self.generator = runtime.place(build_generator(image, config.generator))
        self.head = runtime.place(ContrastiveHead(width, config.head_width))
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), lr=config.generator_lr)
        self.student_optimizer = torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay)
        self.bank = FeatureBank(config.bank_size, 2 * width)
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
        """All rounds."""
        return self.config.pre_rounds + self.config.rounds

    def run_epoch(self, epoch: int) -> Metrics:
        """One round: a batch of images and, after ``pre_rounds``, ``student_steps`` steps on the pool."""
        round_ = epoch - self.config.pre_rounds
        terms = self._invert(adversarial=round_ >= 0)
        if round_ < 0:
            return terms
        set_rate(self.student_optimizer, self.config.student_lr * multistep(round_, self.config.student_milestones))
        return {**terms, "student/kl": self.distillation.epoch(self.config.student_steps)}

    def sample(self, count: int, rng: torch.Generator) -> Tensor | None:
        """Images of the pool, or None while it is empty."""
        return self.runtime.images(self.pool.draw(count, rng)) if len(self.pool) else None

    def image_loss(self, images: Tensor, labels: Tensor, *, adversarial: bool) -> tuple[LossTerms, Tensor]:
        """The weighted terms of L for generated images ``[B, channels, H, W]`` and their labels ``[B]``, and the features ``[B, 2 D]`` of their views."""
        config, contrastive = self.config, self.config.contrastive_weight > 0
        seen = self.runtime.images(self.views.crop(images))
        with self.runtime.autocast():
            teachers = self.teachers.observe(seen, maps=contrastive)
        terms = {
            "images/bn": config.bn_weight * batch_norm_loss(teachers.bn, config.first_layer_weight),
            "images/cross_entropy": config.label_weight * label_cross_entropy(teachers.logits, labels, self.teachers.weights),
        }
        if adversarial and config.adversarial_weight > 0:
            with evaluating(self.student), self.runtime.autocast():
                student = self.student(seen).logits
            target = head_targets(teachers.logits, self.teachers.weights, len(student))
            terms["images/adversarial"] = -config.adversarial_weight * agreed_divergence(student, target)
        if not contrastive:
            return terms, images.new_zeros(len(images), 0)
        with self.runtime.autocast():
            part = self.teachers.observe(self.runtime.images(self.views.zoom(images, config.least_area)), bn=False, maps=True)
        features = torch.cat([_stage_means(part), _stage_means(teachers)], dim=1)
        terms["images/contrastive"] = config.contrastive_weight * self._contrast(features)
        return terms, features

    def _contrast(self, features: Tensor) -> Tensor:
        """L_cr of the batch's features ``[B, 2 D]``, local then global, and those of the bank."""
        known = self.bank.draw(self.config.negatives, self.rng).to(features.device, non_blocking=True)
        local, whole = torch.cat([features, known]).chunk(2, dim=1)
        with self.runtime.autocast():
            queries = self.head(local)
            with torch.no_grad():
                keys = self.head(whole)
        losses = info_nce(queries, keys, self.config.contrastive_temperature)
        return losses[: len(features)].mean() + (losses[len(features) :].mean() if len(known) else 0.0)

    def _invert(self, *, adversarial: bool) -> Metrics:
        """Make one batch with a new G; its best images join the pool, their features the bank. The metrics are those of the best images."""
        config = self.config
        self._redraw()
        labels = torch.randint(self.image.num_classes, (config.synthesis_batch,), generator=self.rng).to(self.runtime.device)
        z = self.runtime.normal(config.synthesis_batch, config.generator.latent_dim, rng=self.rng).requires_grad_()
        parameters = [*self.generator.parameters(), z]
        optimizer = torch.optim.Adam(parameters, lr=config.generator_lr, betas=BETAS)
        learned = [*parameters, *self.head.parameters()] if config.contrastive_weight > 0 else parameters
        best = BestBatch()
        for _ in range(config.inversion_steps):
            with self.runtime.autocast():
                images = self.generator(z.clone())  # torch's FLOP counter cannot watch a module whose input is a leaf
            terms, features = self.image_loss(images, labels, adversarial=adversarial)
            values = torch.stack(list(terms.values()))
            best.offer(values.sum(), images, features, values)
            for parameter, gradient in zip(learned, torch.autograd.grad(values.sum(), learned), strict=True):
                parameter.grad = gradient
            optimizer.step()
            if config.contrastive_weight > 0:
                self.head_optimizer.step()
        best_images, best_features, best_values = best.kept
        self.pool.add(best_images)
        if config.contrastive_weight > 0:
            self.bank.add(best_features)
        return dict(zip(terms, best_values.tolist(), strict=True))

    def _redraw(self) -> None:
        """Give G the weights of a new one, from the method's own random numbers."""
        with seeding.seeded_scope("cmi", int(torch.randint(2**62, (1,), generator=self.rng))):
            self.generator.load_state_dict(build_generator(self.image, self.config.generator).state_dict())
        self.generator.train()

    @torch.no_grad()
    def _feature_width(self) -> int:
        images = self.runtime.images(torch.zeros(2, *self.image.shape))
        teachers = self.teachers.observe(images, bn=False, maps=True)
        if not any(teachers.maps):
            raise ArchitectureError(
                "no teacher has stage maps, which the contrastive term compares; accepted: at least one whose stages can be found (`models.stages`), "
                "or method.contrastive_weight=0"
            )
        return _stage_means(teachers).shape[1]


def _stage_means(teachers: TeacherOutputs) -> Tensor:
    """The means over positions of all maps of all teachers ``[B, D]``."""
    return torch.cat([full(maps).mean(dim=(2, 3)) for stages in teachers.maps for maps in stages], dim=1)
