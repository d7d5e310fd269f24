"""The student's part of methods that first make images and then distil: random batches of a pool, whose targets the teachers are asked for once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdfkd_strategy.data.augmentation import RandomViews
from cdfkd_strategy.data.transfer_pool import TransferPool
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.losses.head_targets import head_targets
from cdfkd_strategy.models.modes import evaluating
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble

MAX_LABEL_BYTES = 2**28
"""What the teachers say of the pool is kept if it takes no more than this; 50,000 images of 100 classes and 10 headers take 200 MB."""


class PoolDistillation:
    """``L_S = T^2 KL(T(x) || S(x))`` on random batches of a pool (Hinton et al., https://arxiv.org/abs/1503.02531).

    Header k imitates teacher k, and a student with one header imitates the ensemble fused with the class weights. It has no
    state of its own: pool and optimiser are a method's attributes, and saved with it.

    Args:
        pool: the images; what the teachers say of them is kept beside them.
        teachers: the frozen ensemble.
        student: gives `StudentOutputs`; trained in place.
        optimizer: of the student.
        batch_size: images per step.
        temperature: T.
        rng: a CPU generator; draws the batches.
        runtime: device, layout and precision.
        views: gives other views of the images in every step, of which the teachers are asked anew; None (or "none") shows the images as they are.
        least_area: below 1, a view shows a part of its image of at least this share of the area, enlarged.
    """

    def __init__(
        self,
        pool: TransferPool,
        teachers: TeacherEnsemble,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: int,
        temperature: float,
        rng: torch.Generator,
        runtime: Runtime,
        views: RandomViews | None = None,
        least_area: float = 1.0,
    ) -> None:
        self.pool, self.teachers, self.student, self.optimizer = pool, teachers, student, optimizer
        self.batch_size, self.temperature, self.rng, self.runtime = batch_size, temperature, rng, runtime
        self.views = None if views is None or views.augment == "none" else views
        self.least_area = least_area

    def ask_teachers(self) -> None:
        """Ask the teachers once for every image of the pool; in every step, where views are seen or the answers take too much memory."""
        if self.views is not None:
            return
        with evaluating(self.student), torch.no_grad():
            heads = len(self.student(self.runtime.images(self.pool.at(torch.zeros(2, dtype=torch.long)))).logits)
        if len(self.pool) * heads * self.pool.image.num_classes * 4 <= MAX_LABEL_BYTES:
            self.pool.label(lambda images: self._targets(images, heads).transpose(0, 1), self.batch_size)

    def epoch(self, steps: int) -> float:
        """So many steps in train mode; the mean loss (one host sync)."""
        self.student.train()
        total = torch.zeros((), device=self.runtime.device)
        for _ in range(steps):
            total += self._step()
        return float(total / steps)

    @torch.no_grad()
    def _targets(self, images: Tensor, heads: int) -> Tensor:
        """What the student's headers should say of images ``[B, channels, H, W]``: ``[heads, B, C]``."""
        return head_targets(self.teachers(self.runtime.images(images)), self.teachers.weights, heads)

    def _seen(self, views: RandomViews, images: Tensor) -> Tensor:
        moved = views.crop(images)
        return views.zoom(moved, self.least_area) if self.least_area < 1 else moved

    def _step(self) -> Tensor:
        positions = self.pool.choose(self.batch_size, self.rng)
        images = self.runtime.images(self.pool.at(positions))
        if self.views is not None:
            images = self.runtime.images(self._seen(self.views, images))
        stored = self.pool.logits if self.views is None else None
        known = None if stored is None else stored[positions].transpose(0, 1).to(images.device, non_blocking=True)
        with self.runtime.autocast():
            student = self.student(images).logits
        target = self._targets(images, len(student)) if known is None else known
        loss = kl_divergence(student, target, self.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()
