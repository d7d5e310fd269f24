"""What is timed: sizes of networks and batches, and both paths built from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from mfs_plain import PlainMFS

from cdfkd_strategy import seeding
from cdfkd_strategy.methods.cdfkd_mfs import CDFKDMFS, CDFKDMFSConfig
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.generators import Generator, GeneratorConfig
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec

CIFAR100 = ImageSpec(channels=3, height=32, width=32, num_classes=100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
DIGITS = ImageSpec(channels=1, height=8, width=8, num_classes=10, mean=(0.3,), std=(0.35,))
FASHION = ImageSpec(channels=1, height=28, width=28, num_classes=10, mean=(0.286,), std=(0.353,))


@dataclass(frozen=True)
class Case:
    """One timed setting.

    Args:
        name: as in the result file.
        teacher: architecture of all teachers.
        count: ``K``.
        student: the student's backbone.
        batch_size: images per step.
        image: input and classes.
        feature_weight: of the student's loss; 0 where widths differ.
        width: of the generator.
        cuda: timed on a GPU only.
    """

    name: str
    teacher: str
    count: int
    student: str
    batch_size: int
    image: ImageSpec = CIFAR100
    feature_weight: float = 0.2
    width: float = 1.0
    cuda: bool = False

    def config(self) -> CDFKDMFSConfig:
        """One iteration of five student steps and one generator step, with the paper's losses and constant rates."""
        return CDFKDMFSConfig(
            mode="paper",
            epochs=1,
            iterations=1,
            batch_size=self.batch_size,
            feature_weight=self.feature_weight,
            schedule="constant",
            milestones=(),
            generator=GeneratorConfig(width=self.width),
        )


CASES = [
    Case("wrn16_1_k3_b128", "wrn16_1", 3, "wrn16_1", 128),
    Case("resnet18_34_b32", "resnet34", 3, "resnet18", 32),
    Case("small_cnn_k5_b32", "small_cnn", 5, "small_cnn", 32, FASHION, width=0.5),
    Case("digits_k4_b128", "small_cnn", 4, "small_cnn", 128, DIGITS),
    Case("mfs_resnet34_b256_cuda", "resnet34", 3, "resnet18", 256, cuda=True),
]


@contextmanager
def engine_path(case: Case, runtime: Runtime, seed: int = 0) -> Iterator[CDFKDMFS]:
    """The product's path, as `distill` prepares it: teachers with random weights, and statistics of random images."""
    with seeding.seeded_scope("benchmark", seed):
        nets = [build_classifier(case.teacher, case.image).train() for _ in range(case.count)]
        with torch.no_grad():
            for net in nets:
                net(torch.randn(16, *case.image.shape))
        teachers = TeacherEnsemble(nets, image=case.image)
        student = MultiHeaderStudent(case.student, case.count, case.image)
        with teachers.prepared(runtime), runtime.computing(student):
            yield CDFKDMFS(teachers, student, case.config(), image=case.image, rng=seeding.generator("benchmark", seed), runtime=runtime)


def plain_path(case: Case, device: str, seed: int = 0) -> PlainMFS:
    """The plain path with the same initial weights, in the default layout."""
    with engine_path(case, Runtime(channels_last=False), seed) as built:
        assert isinstance(built.generator, Generator)
        return PlainMFS(
            [net.to(device) for net in built.teachers.nets],
            built.student.to(device),
            built.generator.to(device),
            case.config(),
            seeding.generator("benchmark", seed),
        )
