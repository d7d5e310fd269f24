"""SpaceshipNet: hidden features of a generator are exchanged, and the student must see a class where its teacher does (Yu et al., CVPR 2023).

Paper: "Data-Free Knowledge Distillation via Feature Exchange and Activation Region Constraint",
https://doi.org/10.1109/CVPR52729.2023.02324 (no arXiv number is known; its way of making images is that of CMI,
https://arxiv.org/abs/2105.08584, without the contrastive and the adversarial term)

An epoch makes one batch of hidden features, and then distils:

    1. z ~ N(0, I), labels y: all classes in turn. ``generator_steps`` of Adam, begun anew, on the generator G of
           L_G = a_ce CE(T(x), y) + a_bn R_BN(T, x),   x = view(G(z))
       The hidden features of G(z) at the lowest loss, after each of three layers, join a pool.
    2. ``student_steps`` times: features of one layer, drawn from the pool, and with ``exchange_probability`` exchanged: every
       image keeps a random half of its channels and takes the others from another image of the batch (CFE). What G in eval mode
       makes of them, moved and mirrored, is x:
           L_S = t^2/C KL(T(x) || S(x)) + b_1 sum_l |A_l^S - A_l^T|^2 + b_2 |H W A_L^S - H W A_L^T|^2   (SGD, cosine)
       with A_l the region of stage l that speaks for the class y' = argmax T(x) (Grad-CAM, `losses.activation_regions`), and
       |.|^2 the mean over positions and batch: multi-scale activation region consistency (mSARC). L is the last stage.

The formulas and defaults are those of the authors' code (ResNet-34 to ResNet-18 on CIFAR), read but not run; what the paper's text says
could not be compared. C in the first term comes from that code's mean over classes. G goes on learning from epoch to epoch, and old
features pass through its newest layers, as there.

*Reconstruction*, because networks here need not end in a mean over positions and a linear layer: the b_2 term of the authors compares the
class activation maps of all classes, made of the last layer's weights. Here it compares that of y', as H W times its gradient map. That is
the same map where the mean over positions follows the last stage, as in a ResNet; in a WideResNet BatchNorm and ReLU lie between them, the
authors take their map behind these, and this one is of what enters them. Its gradient too moves the maps only.

Several teachers (the paper has one) are a *reconstruction* as well: CE is weighted by w[k, y], R_BN is the plain mean. Header k imitates
teacher k, with y' the class that teacher k sees, and the region of its logit in the shared maps; the terms are means over the
headers. A student with one header imitates the fused ensemble, with y' its class, and the differences from the teachers' regions are
weighted by w[k, y']. Teachers whose stages cannot be found are left out of mSARC, and the weights of the others divided by
their sum. Stages are compared with the teacher's of the nearest
resolution, pooled to the smaller one.

Known bugs of the authors' code which are not here: one of its pools keeps a single row for all epochs, so that only the newest batch
is left in it; labels of exchanged features are halved as integers (nothing uses them).

Deviations: the pool is bounded (the authors' grows to 22 GB for CIFAR, with 0.4 MB per image). The generator is this project's
(that of CDFKD-MFS) with the authors' output, a sigmoid whose pixels are normalised, and their epsilon of BatchNorm, 1e-5; its and the
student's weights are drawn as elsewhere here (the authors: He's and Glorot's). ``augment="auto"`` mirrors colour images only.

R_BN covers BatchNorm1d layers too, where a network has them; authors look at BatchNorm2d alone.
A client must disclose its weights, including BatchNorm running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cdfkd_strategy.config import require
from cdfkd_strategy.data.augmentation import AugmentName, RandomViews
from cdfkd_strategy.data.best_batch import BestBatch
from cdfkd_strategy.data.hidden_features import HiddenFeatures
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.losses.activation_regions import activation_regions, class_activation_difference, multi_scale_difference
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.losses.preset_labels import label_cross_entropy
from cdfkd_strategy.losses.statistics import batch_norm_loss
from cdfkd_strategy.models.feature_exchange import exchange_channels, exchange_points, from_features, with_features
from cdfkd_strategy.models.generators import Generator, GeneratorConfig, build_generator
from cdfkd_strategy.models.head_fusion import fuse
from cdfkd_strategy.models.modes import evaluating
from cdfkd_strategy.models.multi_header import with_maps
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import cosine, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs, TeacherOutputs

BETAS = (0.5, 0.999)
"""Of Adam, for G."""

LAYERS = 3
"""Of G whose features are exchanged: the first ones, all that the generator for 8 to 32 pixels has."""


def _sigmoid_generator() -> GeneratorConfig:
    return GeneratorConfig(output="sigmoid", batch_norm_eps=1e-5)


@dataclass(frozen=True)
class SpaceshipNetConfig:
    """Settings of `SpaceshipNet`; the defaults are the authors' for CIFAR, but for ``pool_size``.

    Args:
        epochs: each makes one batch of features, and trains the student.
        generator_steps: per epoch.
        synthesis_batch: images whose features are made per epoch.
        generator_lr: Adam.
        label_weight: a_ce.
        bn_weight: a_bn.
        first_layer_weight: rho_1, the weight of the first BatchNorm layer.
        pool_size: images whose hidden features are kept; beyond, the oldest leave. At 32 x 32 pixels an image takes 0.4 MB.
        exchange_probability: of a student step with exchanged features; 0 is without CFE.
        augment: what moves the images, see `RandomViews`.
        padding: pixels by which an image is shifted at most, either way.
        student_steps: per epoch.
        batch_size: images per student step.
        student_lr: SGD, with ``momentum`` and ``weight_decay``; to 0 along a cosine, epoch by epoch.
        momentum: of SGD.
        weight_decay: of SGD.
        temperature: t.
        scales_weight: b_1, of the regions of all stages.
        cam_weight: b_2, of the class activation maps of the last stage. With both weights 0 any student will do.
        generator: latent width, size and output of G.
    """

    epochs: int = 200
    generator_steps: int = 200
    synthesis_batch: int = 256
    generator_lr: float = 1e-3
    label_weight: float = 0.5
    bn_weight: float = 1.0
    first_layer_weight: float = 1.0
    pool_size: int = 2560
    exchange_probability: float = 0.7
    augment: AugmentName = "auto"
    padding: int = 4
    student_steps: int = 2000
    batch_size: int = 256
    student_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 30.0
    scales_weight: float = 1.0
    cam_weight: float = 1.0
    generator: GeneratorConfig = field(default_factory=_sigmoid_generator)

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "generator_steps", "pool_size", "student_steps", least=1)
        require(self, "method", "synthesis_batch", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "padding", "label_weight", "bn_weight", "first_layer_weight", "scales_weight", "cam_weight", "weight_decay", least=0)
        require(self, "method", "exchange_probability", least=0, most=1)
        require(self, "method", "generator_lr", "student_lr", "temperature", above=0)
        require(self, "method", "momentum", least=0, below=1)

    @classmethod
    def toy(cls) -> SpaceshipNetConfig:
        """The smallest setting that runs every stage, and overflows the pool."""
        return cls(
            epochs=2,
            generator_steps=3,
            synthesis_batch=16,
            generator_lr=0.01,
            pool_size=24,
            padding=1,
            student_steps=4,
            batch_size=16,
            student_lr=0.02,
            generator=GeneratorConfig(latent_dim=16, width=0.25, output="sigmoid"),
        )


@METHODS.register("spaceshipnet")
class SpaceshipNet(Distiller):
    """SpaceshipNet (https://doi.org/10.1109/CVPR52729.2023.02324); see the module's docstring for the losses and what is reconstructed.

    The student may have one header per teacher, or one for all. Samples are what the student sees: images of exchanged features.

    Raises:
        ArchitectureError: mSARC has a weight, and the student gives no stage maps.
    """

    name = "spaceshipnet"
    students = ("single", "multi")
    status = "every loss tested; formulas of the authors' code, reconstruction in part"
    Config = SpaceshipNetConfig
    needs = Needs(batch_norm=True)
    config: SpaceshipNetConfig
    generator: Generator

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: SpaceshipNetConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        if self.compares_regions:
            with_maps(student)
        self.generator = runtime.place(build_generator(image, config.generator))
        self.points = exchange_points(self.generator)[:LAYERS]
        self.features = HiddenFeatures(config.pool_size, self._feature_shapes())
        self.views = RandomViews(image, config.augment, config.padding, rng)
        self.student_optimizer = torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay)

    @property
    def num_epochs(self) -> int:
        """``config.epochs``."""
        return self.config.epochs

    @property
    def compares_regions(self) -> bool:
        """Does mSARC have a weight?"""
        return self.config.scales_weight > 0 or self.config.cam_weight > 0

    def run_epoch(self, epoch: int) -> Metrics:
        """One batch of features, then ``student_steps`` on features of the pool. The metrics of the images are those of the best ones."""
        config = self.config
        set_rate(self.student_optimizer, config.student_lr * cosine(epoch, config.epochs))
        metrics = dict(self._synthesise())
        self.student.train()
        for _ in range(config.student_steps):
            for name, value in self._student_step().items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + value.detach() / config.student_steps
        return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))  # the epoch's only host sync

    def sample(self, count: int, rng: torch.Generator) -> Tensor | None:
        """What G makes of features of the pool, exchanged as for the student; None while there are none."""
        return self._draw(count, rng) if len(self.features) else None

    # -- images ------------------------------------------------------------------------------------------------

    def image_loss(self, teachers: TeacherOutputs, labels: Tensor) -> LossTerms:
        """The weighted terms of L_G for what the teachers say of the views, and the preset labels ``[B]``."""
        config = self.config
        return {
            "images/cross_entropy": config.label_weight * label_cross_entropy(teachers.logits, labels, self.teachers.weights),
            "images/bn": config.bn_weight * batch_norm_loss(teachers.bn, config.first_layer_weight),
        }

    def _synthesise(self) -> LossTerms:
        """Train G on one batch of z; the features of its best images join the pool. Gives the terms of these."""
        config = self.config
        labels = (torch.arange(config.synthesis_batch) % self.image.num_classes).to(self.runtime.device)
        z = self.runtime.normal(config.synthesis_batch, config.generator.latent_dim, rng=self.rng)
        self.generator.train()
        parameters = list(self.generator.parameters())
        optimizer = torch.optim.Adam(parameters, lr=config.generator_lr, betas=BETAS)
        best = BestBatch()
        for _ in range(config.generator_steps):
            with self.runtime.autocast():
                images, features = with_features(self.generator, z, self.points)
            seen = self.runtime.images(self.views.crop(images))
            with self.runtime.autocast():
                teachers = self.teachers.observe(seen)
            terms = self.image_loss(teachers, labels)
            values = torch.stack(list(terms.values()))
            best.offer(values.sum(), values, *features)
            for parameter, gradient in zip(parameters, torch.autograd.grad(values.sum(), parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
        best_values, *best_features = best.kept
        self.features.add(best_features)
        return dict(zip(terms, best_values, strict=True))

    @torch.no_grad()
    def _draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Images of one layer's features, with ``exchange_probability`` exchanged."""
        layer = int(torch.randint(len(self.points), (1,), generator=rng))
        features = self.features.draw(layer, count, rng)
        if float(torch.rand(1, generator=rng)) < self.config.exchange_probability:
            features = exchange_channels(features, rng)
        with evaluating(self.generator), self.runtime.autocast():
            return from_features(self.generator, self.runtime.images(features), self.points[layer])

    @torch.no_grad()
    def _feature_shapes(self) -> list[tuple[int, ...]]:
        z = torch.zeros(2, self.config.generator.latent_dim, device=self.runtime.device)
        with evaluating(self.generator):
            return [tuple(here.shape[1:]) for here in with_features(self.generator, z, self.points)[1]]

    # -- the student -------------------------------------------------------------------------------------------

    def student_loss(self, student: Tensor, maps: tuple[Tensor, ...], teachers: TeacherOutputs) -> LossTerms:
        """The weighted terms of L_S; student logits ``[heads, B, C]`` with their graph through the maps, and the teachers' likewise."""
        config = self.config
        target = head_targets(teachers.logits.detach(), self.teachers.weights, len(student))
        terms = {"student/kl": kl_divergence(student, target, config.temperature) / self.image.num_classes}
        if not (self.compares_regions and any(teachers.maps)):
            return terms
        scales, cams = self._region_differences(student, maps, teachers)
        return {**terms, "student/regions": config.scales_weight * scales, "student/cam": config.cam_weight * cams}

    def _region_differences(self, student: Tensor, maps: tuple[Tensor, ...], teachers: TeacherOutputs) -> tuple[Tensor, Tensor]:
        """The means of both differences over the batch, and over headers or, weighted, over the teachers of one header."""
        one_header = len(student) == 1
        weights, here = self.teachers.weights, [k for k, stages in enumerate(teachers.maps) if stages]
        fused = fuse(teachers.logits.detach(), weights).argmax(-1)
        mine = activation_regions(student[0], fused, maps) if one_header else ()
        shares = torch.stack([weights[k][fused] for k in here])
        shares = shares / shares.sum(0).clamp_min(torch.finfo(shares.dtype).tiny)
        scales, cams = [], []
        for position, k in enumerate(here):
            classes = fused if one_header else teachers.logits[k].detach().argmax(-1)
            own = mine if one_header else activation_regions(student[k], classes, maps)
            theirs = [region.detach() for region in activation_regions(teachers.logits[k], classes, teachers.maps[k])]
            share = shares[position] if one_header else 1 / len(here)
            scales.append((share * multi_scale_difference(own, theirs)).mean())
            cams.append((share * class_activation_difference(own, theirs)).mean())
        return torch.stack(scales).sum(), torch.stack(cams).sum()

    def _student_step(self) -> LossTerms:
        images = self.runtime.images(self.views.crop(self._draw(self.config.batch_size, self.rng)))
        with self.runtime.autocast():
            if self.compares_regions:
                asked = images.clone().requires_grad_()  # the teachers have no parameters that ask for gradients, and their maps need them
                teachers = self.teachers.observe(asked.clone(), bn=False, maps=True)  # cloned: torch's FLOP counter cannot watch a leaf
                student, maps = with_maps(self.student).observe(images)
            else:
                with torch.no_grad():
                    teachers = self.teachers.observe(images, bn=False)
                student, maps = self.student(images), ()
        terms = self.student_loss(student.logits, maps, teachers)
        self.student_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self.student_optimizer.step()
        return terms
