"""CDFKD-MFS: collaborative data-free knowledge distillation via multi-level feature sharing (Hao et al., IEEE TMM 24, 2022).

Paper: https://arxiv.org/abs/2205.11845

A generator G and a student with one header per teacher play an asymmetric game: five student steps on fresh synthetic
batches x = G(z), z ~ N(0, I), then one generator step. With T_i, S_i the logits of teacher i and header i, f_i the
features before their last layer, N teachers and R_BN the distance from the teachers' BatchNorm statistics:

    L_S =  (1/N) sum_i mean|S_i - T_i|  +  w_f (1/N) sum_i E||f_i^S - f_i^T||_1  +  w_e mean|avg_i S_i - avg_i T_i|
    L_G =  (1/N) sum_i [ -mean|S_i - T_i| + w_bn R_BN(T_i) ],   the first BatchNorm layer weighted five times

Student: SGD; generator: Adam; both rates fall together. At inference the headers are averaged.

Deviations, all switchable:

- ``mode="fused"``, the default (``"auto"``) when the teachers' class weights w[k, c] are not uniform: the paper's
  ensemble term copies the uniform ensemble, which under label skew is far worse than the class-weighted one. It is replaced by
  ``w_fused KL(fuse(T, w) || fuse(S, w))``, the generator also seeks disagreement of the fused outputs, and is held to
  balanced classes, ``+ w_b sum_c pbar_c ln pbar_c`` with pbar the batch mean of the fused teacher.
- ``schedule="cosine"`` instead of the paper's two steps, for short budgets.
- ``feature_weight`` counts only teachers whose feature width is the student's (the paper sets it to 0 otherwise).
- ``teachers_per_step`` of the N teachers take part in a step, and the sums run over them: for many clients.
- ``student_optimizer="adam"``, ``schedule="one_cycle"`` and ``batches`` (images that are reused, replayed, or from an averaged
  generator): recipes for short budgets, compared in simulations/README.md (reused and replayed images in simulations/LOG.md).
- The authors' generator below 64 px has its BatchNorm's epsilon at 0.8 (an argument in the place of another), which is kept, because
  the published numbers are with it. Their logs swap the names of two terms.
- One header for several teachers is refused: the method is a header per teacher. With one teacher a plain classifier will do; nothing of
  multi-level sharing is left then, and without a feature term L_S is six times DFED's.
- Teacher weight gradients are never computed; BatchNorm statistics only in generator steps. Same mathematics.

R_BN covers BatchNorm1d layers too, where a network has them; authors look at BatchNorm2d alone.
A client must disclose its weights, including BatchNorm running statistics (unless ``bn_weight`` is 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cdfkd_strategy.config import require
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.losses.class_balance import negative_class_entropy
from cdfkd_strategy.losses.divergence import feature_l1, kl_divergence, logit_l1, mean_logit_l1
from cdfkd_strategy.losses.statistics import batch_norm_loss
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.models.head_fusion import fuse
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import ScheduleName, factor, one_cycle, set_momentum, set_rate
from cdfkd_strategy.synthetic_batches import BatchRecipe, SyntheticBatches
from cdfkd_strategy.teacher_draw import TeacherDraw
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.term_means import TermMeans
from cdfkd_strategy.types import ImageSpec, LossTerms, Metrics, Needs, StudentOutputs, TeacherOutputs


@dataclass(frozen=True)
class CDFKDMFSConfig:
    """Settings of `CDFKDMFS`; the defaults are the paper's for CIFAR-100.

    Args:
        mode: "paper" (L1 on mean logits), "fused" (KL on fused outputs), or "auto": fused unless weights are uniform.
        epochs: passes of ``iterations``.
        iterations: rounds of student and generator steps per epoch.
        student_steps: student steps per iteration, each on a fresh batch.
        generator_steps: generator steps per iteration.
        batch_size: synthetic images per step.
        feature_weight: w_f. 0.2 for CIFAR-100 and Caltech-101, 0.05 for mini-ImageNet.
        ensemble_weight: w_e of mode "paper". 5 for CIFAR-100 and Caltech-101, 1 for mini-ImageNet.
        bn_weight: w_bn; teachers without BatchNorm are left out of the term.
        first_layer_weight: rho_1, the weight of the first BatchNorm layer.
        head_weight: weight of the headers' L1 in the student's loss.
        fused_weight: w_fused of mode "fused", in both losses.
        balance_weight: w_b of mode "fused".
        student_optimizer: "sgd", as in the paper, or "adam".
        student_lr: of the student's optimiser; Adam wants about a thirtieth of what SGD does.
        momentum: of SGD; Adam's first beta.
        weight_decay: of SGD; Adam has none.
        generator_lr: Adam, default betas.
        schedule: "multistep" (x0.1 at ``milestones``, in epochs), "cosine" (to 0, per iteration) or "constant", for both; "one_cycle" (see
            `schedules.one_cycle`) warms the student's rate up while its momentum falls, and the generator's follows the cosine.
        milestones: epochs at which both rates are divided by 10.
        generator: latent width and size of G.
        teachers_per_step: m, the teachers (and headers) that take part in a step, see `TeacherDraw`; 0 is all. Not in the paper.
        batches: what the student's batches are made of, see `BatchRecipe`; the paper's are fresh images.
    """

    mode: Literal["auto", "paper", "fused"] = "auto"
    epochs: int = 300
    iterations: int = 50
    student_steps: int = 5
    generator_steps: int = 1
    batch_size: int = 256
    feature_weight: float = 0.2
    ensemble_weight: float = 5.0
    bn_weight: float = 0.1
    first_layer_weight: float = 5.0
    head_weight: float = 1.0
    fused_weight: float = 1.0
    balance_weight: float = 1.0
    student_optimizer: Literal["sgd", "adam"] = "sgd"
    student_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    generator_lr: float = 1e-3
    schedule: ScheduleName | Literal["one_cycle"] = "multistep"
    milestones: tuple[int, ...] = (100, 200)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    teachers_per_step: int = 0
    batches: BatchRecipe = field(default_factory=BatchRecipe)

    def __post_init__(self) -> None:
        require(self, "method", "epochs", "iterations", "student_steps", "generator_steps", least=1)
        require(self, "method", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "method", "milestones", "feature_weight", "ensemble_weight", "bn_weight", "first_layer_weight", "weight_decay", least=0)
        require(self, "method", "head_weight", "fused_weight", "balance_weight", least=0)
        require(self, "method", "generator_lr", "student_lr", above=0)
        require(self, "method", "momentum", least=0, below=1)
        require(self, "method", "teachers_per_step", least=0, why="0 draws all of them")

    @classmethod
    def toy(cls) -> CDFKDMFSConfig:
        """The smallest setting that runs every stage."""
        return cls(
            epochs=2, iterations=4, student_steps=3, batch_size=32, schedule="cosine", student_lr=0.05, generator=GeneratorConfig(latent_dim=16, width=0.25)
        )


class Batch(NamedTuple):
    """A student's batch: images ``[B, channels, H, W]``, what the teachers that take part say of them, their class weights, and their headers."""

    images: Tensor
    teachers: TeacherOutputs
    weights: Tensor
    headers: MultiHeaderStudent


@METHODS.register("cdfkd_mfs")
class CDFKDMFS(Distiller):
    """CDFKD-MFS (https://arxiv.org/abs/2205.11845); see the module's docstring for the losses and the deviations.

    Attributes:
        fused: is the fused-ensemble term in use (``mode``, resolved)?

    Raises:
        ArchitectureError: the student does not have one header per teacher.
    """

    name = "cdfkd_mfs"
    students = ("multi",)
    status = "every loss tested; formulas of the authors' code"
    Config = CDFKDMFSConfig
    uses = Needs(batch_norm=True)
    splits_batches = True
    student: MultiHeaderStudent
    config: CDFKDMFSConfig

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: MultiHeaderStudent,
        config: CDFKDMFSConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        if student.heads != len(teachers):
            raise ArchitectureError(f"a student with {student.heads} headers for {len(teachers)} teachers; cdfkd_mfs needs one header per teacher")
        self.fused = config.mode == "fused" or (config.mode == "auto" and not teachers.is_uniform)
        self.generator = runtime.place(build_generator(image, config.generator))
        at_once = self.teachers_at_once(config, len(teachers))
        self.student_draw, self.generator_draw = TeacherDraw(teachers.weights, at_once), TeacherDraw(teachers.weights, at_once)
        wanted = config.feature_weight > 0
        self.batches = SyntheticBatches(self.generator, config.batches, config.batch_size, len(teachers), runtime, features=wanted)
        self.student_optimizer = _student_optimizer(config, student)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr, fused=True)

    @classmethod
    def teachers_at_once(cls, config: CDFKDMFSConfig, teachers: int) -> int:
        """Those that are drawn for a step."""
        return min(config.teachers_per_step or teachers, teachers)

    def start_generator(self, state: Mapping[str, Tensor]) -> None:
        """Fill the generator, and its average where batches have one."""
        super().start_generator(state)
        self.batches.generator_started()

    @property
    def num_epochs(self) -> int:
        """``config.epochs``."""
        return self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        """``iterations`` times: ``student_steps`` on fresh batches, then ``generator_steps``."""
        self.student.train()
        assert self.generator is not None
        self.generator.train()
        means = TermMeans()
        for iteration in range(self.config.iterations):
            self._set_rates(epoch, iteration)
            for step in range(self.config.student_steps):
                if step % self.config.batches.reuse == 0:
                    batch = self.next_batch()
                means.add(self.student_step(batch), "student/")
            for _ in range(self.config.generator_steps):
                means.add(self.generator_step(), "generator/")
        return dict(sorted(means.means().items()))  # the epoch's only host sync

    def _set_rates(self, epoch: int, iteration: int) -> None:
        config, epochs, iterations = self.config, self.config.epochs, self.config.iterations
        named = "cosine" if config.schedule == "one_cycle" else config.schedule
        share = factor(named, epoch, iteration, epochs=epochs, iterations=iterations, milestones=config.milestones)
        set_rate(self.generator_optimizer, config.generator_lr * share)
        if config.schedule == "one_cycle":
            share, momentum = one_cycle(epoch * iterations + iteration, epochs * iterations, highest_momentum=config.momentum)
            set_momentum(self.student_optimizer, momentum)
        set_rate(self.student_optimizer, config.student_lr * share)

    def _draw(self) -> Tensor:
        assert self.generator is not None
        z = self.runtime.normal(self.config.batch_size, self.config.generator.latent_dim, rng=self.rng)
        return self.runtime.images(self.generator(z))

    def _participants(self, draw: TeacherDraw) -> tuple[list[int], TeacherEnsemble, MultiHeaderStudent]:
        """The teachers of a step, and the student with their headers. Student and generator have turns of their own, so that none is left out of either."""
        chosen = draw.next(self.rng)
        return chosen, self.teachers.drawn(chosen), self.student.only(chosen)

    @torch.no_grad()
    def next_batch(self) -> Batch:
        """New images for the student, with those who take part and what the teachers say."""
        chosen, ensemble, headers = self._participants(self.student_draw)
        with self.runtime.autocast():
            images, answers = self.batches.next(lambda fresh: ensemble.observe(fresh, bn=False), chosen, self.rng)
        return Batch(images, answers, ensemble.weights, headers)

    def student_step(self, batch: Batch | None = None) -> LossTerms:
        """One step of the student on a batch, a new one if none is given; gives the terms of L_S."""
        images, teachers, weights, headers = batch or self.next_batch()
        with self.runtime.autocast():
            student = headers(images)
        terms = self.student_loss(student, teachers, weights)
        self.student_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self.student_optimizer.step()
        return terms

    def generator_step(self) -> LossTerms:
        """One step of the generator; gives the terms of L_G."""
        _, ensemble, headers = self._participants(self.generator_draw)
        with self.runtime.autocast():
            images = self._draw()
            teachers = ensemble.observe(images, bn=self.config.bn_weight > 0)
            student = headers(images)
        terms = self.generator_loss(student, teachers, ensemble.weights)
        self.generator_optimizer.zero_grad(set_to_none=True)
        parameters = list(self.generator_optimizer.param_groups[0]["params"])
        gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.generator_optimizer.step()
        self.batches.generator_moved()
        return terms

    def student_loss(self, student: StudentOutputs, teachers: TeacherOutputs, weights: Tensor | None = None) -> LossTerms:
        """The weighted terms of L_S; logits ``[K, B, C]``, weights ``[K, C]`` (None is the ensemble's own)."""
        config, weights = self.config, self.teachers.weights if weights is None else weights
        terms = {"head_l1": config.head_weight * logit_l1(student.logits, teachers.logits)}
        if config.feature_weight > 0:
            terms["feature_l1"] = config.feature_weight * feature_l1(student.features, teachers.features)
        if self.fused:
            terms["fused_kl"] = config.fused_weight * kl_divergence(fuse(student.logits, weights), fuse(teachers.logits, weights))
        else:
            terms["ensemble_l1"] = config.ensemble_weight * mean_logit_l1(student.logits, teachers.logits)
        return terms

    def generator_loss(self, student: StudentOutputs, teachers: TeacherOutputs, weights: Tensor | None = None) -> LossTerms:
        """The weighted terms of L_G; gradients pass through teachers and student."""
        config, weights = self.config, self.teachers.weights if weights is None else weights
        terms = {"adversarial": -logit_l1(student.logits, teachers.logits)}
        if config.bn_weight > 0 and any(distances is not None for distances in teachers.bn):
            terms["bn"] = config.bn_weight * batch_norm_loss(teachers.bn, config.first_layer_weight)
        if self.fused:
            fused = fuse(teachers.logits, weights)
            terms["fused_adversarial"] = -config.fused_weight * kl_divergence(fuse(student.logits, weights), fused)
            terms["balance"] = config.balance_weight * negative_class_entropy(fused)
        return terms


def _student_optimizer(config: CDFKDMFSConfig, student: MultiHeaderStudent) -> torch.optim.Optimizer:
    if config.student_optimizer == "adam":
        optimizer = torch.optim.Adam(student.parameters(), lr=config.student_lr, betas=(config.momentum, 0.999), fused=True)
        _make_moments(optimizer)
        return optimizer
    return torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=config.momentum, weight_decay=config.weight_decay)


def _make_moments(optimizer: torch.optim.Adam) -> None:
    """Make all moments now. A step makes those of the headers that take part: they come to lie between activations, and memory grows by the gaps."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    made = [{"step": torch.zeros(()), **{name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}} for parameter in parameters]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(enumerate(made))})
