"""The experimenter's side of a run: it knows the global test set and the true partition, and the server must not.

Everything here is measurement. Nothing that it computes goes back into teachers, weights or distillation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cdfkd_strategy.averaging import fedavg
from cdfkd_strategy.competence import weights_of
from cdfkd_strategy.data.client_share import train_label_counts
from cdfkd_strategy.data.datasets import ImageData
from cdfkd_strategy.data.partition import OWN
from cdfkd_strategy.metrics.accuracy import accuracy, predict
from cdfkd_strategy.models.head_fusion import HeadAttention, class_weights, fuse, weighted
from cdfkd_strategy.models.modes import evaluating
from cdfkd_strategy.run_config import RunConfig
from cdfkd_strategy.summary import no_accuracy
from cdfkd_strategy.teachers import TeacherEnsemble


class Examination(NamedTuple):
    """``accuracy``: the keys of the summary's contract; ``confusion``: counts ``[C true, C predicted]`` of the merged student, or None.

    ``agreement``: the fraction of test images to which merged student and ensemble (with its weights) give the same class, or None.
    """

    accuracy: dict[str, Any]
    confusion: Tensor | None
    agreement: float | None = None


class Harness:
    """Evaluates teachers, ensembles and student on the global test set.

    Args:
        config: of the run.
        data: its data set; None in deployment, where there is no global test set and every accuracy is null.
    """

    def __init__(self, config: RunConfig, data: ImageData | None) -> None:
        self.config = config
        self.data = data
        self._counts: np.ndarray | None = None

    @property
    def label_counts(self) -> np.ndarray | None:
        """``[clients, C]`` training samples per client and class, from the partition itself; None without data, or if none was dealt."""
        if self._counts is None and self.data is not None and self.config.data.partition.name != OWN:
            self._counts = train_label_counts(self.data, self.config.data, self.config.clients.count, self.config.seed)
        return self._counts

    def oracle_weights(self, keys: Sequence[str]) -> Tensor | None:
        """``n_kc / sum_k n_kc`` of the teachers with these client keys, ``[K, C]``; None where a key names no partition."""
        found = [partition_of(key, self.config.clients.count) for key in keys]
        partitions = [partition for partition in found if partition is not None]
        if self.label_counts is None or len(partitions) < len(found):
            return None
        return weights_of(torch.from_numpy(self.label_counts[partitions]))

    def evaluate(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module | None,
        *,
        weights: Tensor | None = None,
        single: nn.Module | None = None,
        attention: HeadAttention | None = None,
    ) -> dict[str, Any]:
        """The accuracies of `examine` alone."""
        return self.examine(teachers, student, weights=weights, single=single, attention=attention).accuracy

    @torch.no_grad()
    def examine(
        self,
        teachers: TeacherEnsemble,
        student: nn.Module | None,
        *,
        weights: Tensor | None = None,
        single: nn.Module | None = None,
        attention: HeadAttention | None = None,
    ) -> Examination:
        """Evaluate one round; every network sees the test set once. Teachers and headers without a weight (too old) do not count: null.

        Args:
            teachers: the ensemble; its ``weights`` are the estimated ones, its specs' keys name the clients.
            student: gives `StudentOutputs`; None before there is one.
            weights: of the student's headers ``[heads, C]``; None is the teachers' own.
            single: a student with one header on the same trunk (broadcast "single").
            attention: over the student's headers.
        """
        found = no_accuracy()
        if self.data is None:
            return Examination(found, None)
        pixels, labels = self.data.x_test, self.data.y_test
        counted = teachers.counted
        live = teachers.only(counted)
        logits = predict(live, pixels, self.data.image, device=_device(live))
        found["teachers"] = _spread(counted, [accuracy(one, labels) for one in logits], len(teachers))
        average = fedavg(list(live.nets), live.specs)
        if average is not None:
            found["fedavg"] = accuracy(predict(average, pixels, self.data.image), labels)
        oracle = self.oracle_weights([spec.key for spec in live.specs])
        uniform = class_weights(None, len(live), self.data.image.num_classes)
        for name, table in (("uniform", uniform), ("estimated", live.weights.cpu()), ("oracle", oracle)):
            if table is not None:
                found[f"ensemble_{name}"] = accuracy(fuse(logits, table), labels)
        if student is None:
            return Examination(found, None)
        heads = self._student_logits(student, pixels)
        table = class_weights(teachers.weights if weights is None else weights, len(heads), self.data.image.num_classes).cpu()
        merged, counted = fuse(heads, table), weighted(table)
        found["student_heads"] = _spread(counted, [accuracy(heads[k], labels) for k in counted], len(heads))
        heads = heads[counted]
        found["student_mean"] = accuracy(heads.mean(0), labels)
        found["student_merged"] = accuracy(merged, labels)
        if attention is not None:
            found["student_attention"] = accuracy(attention(heads.to(_device(attention))), labels)
        if single is not None:
            found["student_single"] = accuracy(self._student_logits(single, pixels)[0], labels)
        agreement = accuracy(merged, fuse(logits, live.weights.cpu()).argmax(-1))
        return Examination(found, confusion_matrix(merged.argmax(-1), labels, self.data.image.num_classes), agreement)

    def watch(self, weights: Tensor) -> WatchStudent:
        """A callable for the engine's ``evaluate``: the student's accuracies while it is distilled, for curves only."""
        return WatchStudent(self, weights)

    def _student_logits(self, student: nn.Module, pixels: Tensor) -> Tensor:
        assert self.data is not None
        with evaluating(student):
            return predict(lambda images: student(images).logits, pixels, self.data.image, device=_device(student))


class WatchStudent:
    """``student -> {"test/student_merged", "test/student_mean"}``; nothing without a test set."""

    def __init__(self, harness: Harness, weights: Tensor) -> None:
        self._harness, self._weights = harness, weights

    @torch.no_grad()
    def __call__(self, student: nn.Module) -> Mapping[str, float]:
        """Evaluate the student in its present state."""
        data = self._harness.data
        if data is None:
            return {}
        heads = self._harness._student_logits(student, data.x_test)
        labels = data.y_test
        merged = fuse(heads, class_weights(self._weights, len(heads), data.image.num_classes).cpu())
        return {"test/student_merged": accuracy(merged, labels), "test/student_mean": accuracy(heads.mean(0), labels)}


def _spread(counted: Sequence[int], values: Sequence[float], total: int) -> list[float | None]:
    """The values at their places among ``total``; null at the others."""
    at = dict(zip(counted, values, strict=True))
    return [at.get(index) for index in range(total)]


def _device(module: nn.Module) -> str:
    tensor = next(module.parameters(), None)
    return "cpu" if tensor is None else str(tensor.device)


def partition_of(key: str, clients: int) -> int | None:
    """The partition that a client key names ("3", "client-3"), or None (a node id, say)."""
    digits = re.fullmatch(r"(?:[a-z]+-)?(\d+)", key)
    partition = int(digits.group(1)) if digits else clients
    return partition if partition < clients else None


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts ``[C true, C predicted]`` of predictions ``[N]`` and labels ``[N]``."""
    return torch.bincount(labels.long() * num_classes + predicted.long(), minlength=num_classes**2).view(num_classes, num_classes)
