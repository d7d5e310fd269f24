"""A test-only method with DENSE's schedule: it proves that the interface holds for one that throws its generator away.

DENSE (Zhang et al., NeurIPS 2022, https://arxiv.org/abs/2112.12371), of which only the schedule is kept. Every epoch:

    1. G is initialised anew and trained for a few steps, for fixed z and preset labels y:
       L_G = CE(T(x), y) + w_bn R_BN(T, x)
    2. the batch of the lowest loss is added to a capped pool
    3. the student imitates the fused teachers on the pool: L_S = KL(fuse(T) || fuse(S))

Nothing here is registered: the contract suite hands the class to `distill`, as another distribution could.
A client must disclose its weights, including BatchNorm running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy import seeding
from cdfkd_strategy.data.transfer_pool import TransferPool
from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.losses.statistics import batch_norm_loss
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.models.head_fusion import fuse
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import cosine, set_rate
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, Metrics, Needs


@dataclass(frozen=True)
class DenseLikeConfig:
    """DENSE's numbers where it has them."""

    epochs: int = 200
    generator_steps: int = 30
    student_steps: int = 400
    batch_size: int = 128
    pool_size: int = 10_000
    bn_weight: float = 1.0
    generator_lr: float = 1e-3
    student_lr: float = 0.01
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)

    @classmethod
    def toy(cls) -> DenseLikeConfig:
        """The smallest setting that runs every stage, and overflows the pool."""
        return cls(
            epochs=3,
            generator_steps=4,
            student_steps=3,
            batch_size=32,
            pool_size=80,
            bn_weight=0.1,
            generator_lr=0.01,
            student_lr=0.2,
            generator=GeneratorConfig(latent_dim=16, width=0.25),
        )


class DenseLike(Distiller):
    """DENSE's schedule (https://arxiv.org/abs/2112.12371); see the module's docstring."""

    name = "dense_like"
    generator_lasts = False
    Config = DenseLikeConfig
    needs = Needs(batch_norm=True)
    config: DenseLikeConfig

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module,
        config: DenseLikeConfig,
        *,
        image: ImageSpec,
        rng: torch.Generator,
        runtime: Runtime,
    ) -> None:
        super().__init__(teachers, student, config, image=image, rng=rng, runtime=runtime)
        self.generator: nn.Module = self._fresh_generator()
        self.pool = TransferPool(config.pool_size, image)
        self.student_optimizer = torch.optim.SGD(student.parameters(), lr=config.student_lr, momentum=0.9)

    @property
    def num_epochs(self) -> int:
        return self.config.epochs

    def run_epoch(self, epoch: int) -> Metrics:
        self.generator = self._fresh_generator()
        generator_loss = self._fill_pool(epoch)
        self.student.train()
        total = torch.zeros((), device=self.runtime.device)
        steps = self.config.student_steps
        for step in range(epoch * steps, (epoch + 1) * steps):
            set_rate(self.student_optimizer, self.config.student_lr * cosine(step, self.config.epochs * steps))
            total += self._student_step()
        return {"generator/best": float(generator_loss), "student/kl": float(total / steps)}

    def _fresh_generator(self) -> nn.Module:
        seed = int(torch.randint(2**62, (1,), generator=self.rng))
        with seeding.seeded_scope("dense_like", seed):
            return self.runtime.place(build_generator(self.image, self.config.generator))

    def _fill_pool(self, epoch: int) -> Tensor:
        config = self.config
        z = self.runtime.normal(config.batch_size, config.generator.latent_dim, rng=self.rng)
        start = epoch * config.batch_size
        labels = (torch.arange(start, start + config.batch_size) % self.image.num_classes).to(self.runtime.device)
        optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr)
        best, best_images = torch.full((), torch.inf, device=z.device), None
        for _ in range(config.generator_steps):
            images = self.runtime.images(self.generator(z))
            teachers = self.teachers.observe(images)
            loss = F.nll_loss(fuse(teachers.logits, self.teachers.weights), labels) + config.bn_weight * batch_norm_loss(teachers.bn)
            better = loss.detach() < best
            best = torch.where(better, loss.detach(), best)
            best_images = images.detach() if best_images is None else torch.where(better, images.detach(), best_images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert best_images is not None
        self.pool.add(best_images)
        return best

    def _student_step(self) -> Tensor:
        images = self.runtime.images(self.pool.draw(self.config.batch_size, self.rng))
        with torch.no_grad():
            target = self.teachers.fused(images)
        logits = self.student(images).logits
        mine = fuse(logits, self.teachers.weights if len(logits) == len(self.teachers) else torch.ones_like(self.teachers.weights[:1]))
        loss = kl_divergence(mine, target)
        self.student_optimizer.zero_grad()
        loss.backward()
        self.student_optimizer.step()
        return loss.detach()
