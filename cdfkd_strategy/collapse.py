"""The collapse watch: an adversarial game can fail silently, so every epoch a small synthetic batch is looked at."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch

from cdfkd_strategy import seeding
from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.losses.statistics import batch_norm_loss
from cdfkd_strategy.models.head_fusion import fuse, header_weights
from cdfkd_strategy.models.modes import evaluating
from cdfkd_strategy.types import Metrics

logger = logging.getLogger(__name__)

MIN_ENTROPY = 0.5
"""Class entropy of the synthetic batch, as a fraction of ln C, below which the generator has lost classes."""
DISTANCE = "watch/student_teacher_l1"
"""The term in which the watch keeps the L1 distance of student and teachers."""
MAX_GROWTH = 4.0
"""Student-teacher L1 over its smallest value so far, above which the generator outruns the student."""


class CollapseWatch:
    """Looks at a method's synthetic images after every epoch and warns, once per kind, saying what to change.

    The images come from a generator of their own and leave the method's state untouched. No test data is used.

    Args:
        distiller: the running method.
        count: images per look; 0 turns the watch off.
        seed: of the looks.
        history: what the epochs so far gave, of a run that goes on.
    """

    def __init__(self, distiller: Distiller, count: int, seed: int, history: Iterable[Mapping[str, float]] = ()) -> None:
        self._distiller, self._count, self._seed = distiller, count, seed
        self._smallest = min((row[DISTANCE] for row in history if DISTANCE in row), default=math.inf)
        self._warned: set[str] = set()

    @torch.no_grad()
    def look(self, epoch: int) -> Metrics:
        """``watch/student_teacher_l1`` (L1 distance of fused probabilities, 0 to 2), ``watch/class_entropy`` (nats), ``watch/bn``."""
        distiller = self._distiller
        if self._count < 2:
            return {}
        images = distiller.sample(self._count, seeding.generator("watch", self._seed, epoch))
        if images is None:
            return {}
        teachers, weights = distiller.teachers.observe(images), distiller.teachers.weights
        with evaluating(distiller.student):
            student = distiller.student(images).logits
        target = fuse(teachers.logits, weights)
        mine = fuse(student, header_weights(weights, len(student)))
        classes = target.exp().mean(0)
        found = {
            DISTANCE: float((mine.exp() - target.exp()).abs().sum(-1).mean()),
            "watch/class_entropy": float(torch.special.entr(classes).sum()),
        }
        if any(distances is not None for distances in teachers.bn):
            found["watch/bn"] = float(batch_norm_loss(teachers.bn, 1.0))
        self._warn(epoch, found[DISTANCE], found["watch/class_entropy"], math.log(classes.numel()))
        return found

    def _warn(self, epoch: int, distance: float, entropy: float, most: float) -> None:
        if entropy < MIN_ENTROPY * most:
            message = "epoch %d: the synthetic batch covers few classes (entropy %.2f of %.2f nats): %s"
            self._once("entropy", message, epoch + 1, entropy, most, self._advice(balance_weight="raise", generator_lr="lower"))
        if epoch > 0 and distance > MAX_GROWTH * max(self._smallest, 0.05):
            message = "epoch %d: the student falls behind the synthetic images (distance %.2f, was %.2f): %s"
            self._once("distance", message, epoch + 1, distance, self._smallest, self._advice(generator_lr="lower", student_steps="raise"))
        self._smallest = min(self._smallest, distance)

    def _advice(self, **changes: str) -> str:
        """What to change, of the settings that this method has."""
        return " or ".join(f"{what} method.{name}" for name, what in changes.items() if hasattr(self._distiller.config, name)) or "change the method's settings"

    def _once(self, kind: str, message: str, *values: float | str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message, *values)
