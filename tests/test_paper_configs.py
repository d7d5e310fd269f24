"""The papers' own experiments as configurations: they bind, their networks fit together, and one iteration of them runs.

A file that is added to ``simulations/configs/paper`` is tested here without a further line.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cdfkd_strategy import seeding
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.engine import distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.methods import get_method
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.models.plain_student import PlainStudent, Student
from cdfkd_strategy.run_config import RunConfig, resolve
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec

PAPER = Path(__file__).resolve().parents[1] / "simulations" / "configs" / "paper"
FILES = sorted(PAPER.rglob("*.yaml"))

ONCE = {"epochs": 1, "iterations": 1, "rounds": 1, "image_steps": 1, "generator_epochs": 1, "student_epochs": 1, "student_steps": 1, "steps": 1}
ONCE |= {"inversion_steps": 1, "inner_steps": 1, "warm_up": 0, "pre_rounds": 0}
"""Settings that say how much is done, if a method has them."""

every_file = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


def test_the_experiments_of_the_seeds_are_there() -> None:
    assert len(FILES) == 17
    names = [path.stem for path in FILES]
    assert sum(name.startswith("cdfkd_mfs-") for name in names) == 7
    assert sum(name.startswith("rdskd-") for name in names) == 3
    assert sum(name.startswith("soft_targets-") for name in names) == 3
    assert sum(name.startswith("cgdd-") for name in names) == 4


def test_what_is_not_known_of_an_experiment_is_called_a_reconstruction() -> None:
    uncertain = [path for path in FILES if path.stem.startswith(("soft_targets-", "cgdd-"))]
    assert not [path.stem for path in uncertain if "*Reconstruction*" not in path.read_text(encoding="utf-8")]


def image_of(config: RunConfig) -> ImageSpec:
    assert config.data.image is not None, "an experiment says what its images are like, so that it can be checked without them"
    return config.data.image


def build(config: RunConfig, heads: int) -> Student:
    image, student = image_of(config), config.student
    if student.heads == "plain":
        return PlainStudent(student.backbone, image)
    return MultiHeaderStudent(student.backbone, heads if student.heads == "per_teacher" else 1, image, max_width=student.max_width)


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@every_file
def test_it_is_the_setting_of_the_papers_and_not_of_a_federation(path: Path) -> None:
    config = resolve(str(path))
    assert (config.study, config.cell) == ("paper", path.stem)
    assert config.data.partition.name == "replicated"
    assert (config.data.local_test, config.server.weights, config.student.init) == (0.0, "uniform", "random")
    assert config.clients.count == 1 or config.clients.init == "own"
    assert not config.clients.milestones or max(config.clients.milestones) < config.clients.epochs
    name, method = config.method_config()
    assert path.stem.startswith(f"{name}-")
    for key, value in to_dict(method).items():
        if key.endswith("milestones"):
            assert not value or max(value) < getattr(method, key.replace("milestones", "epochs"), getattr(method, "epochs", math.inf)), key


@pytest.mark.parametrize(
    ("name", "local", "distillation", "weights"),
    [
        ("cifar100-resnet34-resnet18", (200, 128, (80, 120)), (300, 50, 256, (100, 200)), (0.2, 5.0)),
        ("cifar100-wrn40_2-wrn16_1", (200, 128, (80, 120)), (300, 50, 256, (100, 200)), (0.0, 5.0)),
        ("cifar100-wrn40_2-wrn16_2", (200, 128, (80, 120)), (300, 50, 256, (100, 200)), (0.2, 5.0)),
        ("cifar100-wrn40_2-resnet18", (200, 128, (80, 120)), (300, 50, 256, (100, 200)), (0.0, 5.0)),
        ("cifar100-resnet18-wrn40_2", (200, 128, (80, 120)), (300, 50, 256, (100, 200)), (0.0, 5.0)),
        ("caltech101-resnet34-resnet18", (200, 64, (80, 120)), (300, 50, 64, (100, 200)), (0.2, 5.0)),
        ("mini_imagenet-resnet34-resnet18", (100, 64, (50, 80)), (100, 750, 64, (30, 60, 90)), (0.05, 1.0)),
    ],
)
def test_cdfkd_mfs_has_the_schedules_and_weights_of_the_authors_scripts(name: str, local: Any, distillation: Any, weights: Any) -> None:
    """Teachers: epochs, batch, milestones; distillation: epochs, iterations, batch, milestones; w_f and w_e. The rest is the same everywhere."""
    config = resolve(str(PAPER / f"cdfkd_mfs-{name}.yaml"))
    clients, method = config.clients, config.method_config()[1]
    assert (clients.epochs, clients.batch_size, clients.milestones) == local
    assert (clients.count, clients.lr, clients.momentum, clients.weight_decay, clients.augment) == (3, 0.1, 0.9, 5e-4, "crop_flip")
    assert (method.epochs, method.iterations, method.batch_size, method.milestones) == distillation
    assert (method.feature_weight, method.ensemble_weight) == weights
    assert (method.mode, method.student_steps, method.generator_steps, method.bn_weight, method.first_layer_weight) == ("paper", 5, 1, 0.1, 5.0)
    assert (method.student_lr, method.generator_lr, method.generator.latent_dim) == (0.1, 1e-3, 256)


@every_file
def test_its_networks_fit_together_on_the_meta_device(path: Path) -> None:
    """No memory and no arithmetic: shapes alone."""
    config = resolve(str(path))
    image, clients = image_of(config), config.clients
    _, method = config.method_config()
    with torch.device("meta"):
        teachers = [build_classifier(clients.architecture(k), image).eval() for k in range(clients.count)]
        student = build(config, clients.count).eval()
        batch = torch.empty(2, *image.shape)
        if isinstance(getattr(method, "generator", None), GeneratorConfig):
            generator = build_generator(image, method.generator).eval()
            batch = generator(torch.empty(2, method.generator.latent_dim))
            assert batch.shape == (2, *image.shape)
        outputs = student(batch)
        assert outputs.logits.shape == (student.heads, 2, image.num_classes)
        assert outputs.features.shape == (student.heads, 2, student.feature_width)
        assert all(teacher(batch).shape == (2, image.num_classes) for teacher in teachers)
        if getattr(method, "feature_weight", 0.0) > 0:
            widths = {[part for part in teacher.modules() if isinstance(part, nn.Linear)][-1].in_features for teacher in teachers}
            assert widths == {student.feature_width}, "features of another width cannot be compared"


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [
        ("cdfkd_mfs-cifar100-resnet34-resnet18", 21_328_292, 18_164_076),
        ("cdfkd_mfs-cifar100-wrn40_2-wrn16_1", 2_255_156, 307_836),
        ("cdfkd_mfs-cifar100-wrn40_2-wrn16_2", 2_255_156, 1_158_140),
        ("cdfkd_mfs-cifar100-wrn40_2-resnet18", 2_255_156, 18_164_076),
        ("cdfkd_mfs-cifar100-resnet18-wrn40_2", 11_220_132, 2_710_012),
        ("cdfkd_mfs-mini_imagenet-resnet34-resnet18", 21_335_972, 18_171_756),
        ("rdskd-cifar10-resnet34-resnet18", 21_282_122, 11_173_962),
        ("rdskd-svhn-wrn40_2-wrn16_1", 2_243_546, 175_066),
        ("rdskd-mnist-lenet-lenet_half", 61_706, 15_738),
        ("soft_targets-mnist-lenet-lenet_half", 61_706, 15_738),
        ("soft_targets-cifar10-alexnet-alexnet_half", 2_115_018, 530_666),
        ("soft_targets-cifar10-resnet34-resnet18", 21_282_122, 11_173_962),
        ("cgdd-cifar100-resnet34-resnet18", 21_328_292, 11_220_132),
    ],
)
def test_networks_have_the_authors_numbers_of_parameters(name: str, teacher: int, student: int) -> None:
    config = resolve(str(PAPER / f"{name}.yaml"))
    with torch.device("meta"):
        found = count(build_classifier(config.clients.architecture(0), image_of(config))), count(build(config, config.clients.count))
    assert found == (teacher, student)


def shortened(method: Any, batch: int | None) -> Any:
    """One iteration of everything; with a batch, of so few images (or as few as the method accepts)."""
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    changes: dict[str, Any] = {name: value for name, value in ONCE.items() if name in fields}
    changes |= {name: () for name in fields if name.endswith("milestones")}
    if "iterations" in fields and hasattr(method, "student_milestones"):
        changes["iterations"] = 2
    if fields.get("blocks", 1) > 1:  # images and student in turns: once each
        changes |= dict.fromkeys(("rounds", "epochs"), fields["blocks"])
    if batch is not None:
        changes |= {name: batch for name in ("batch_size", "image_batch", "synthesis_batch", "pool_size") if name in fields}
    return dataclasses.replace(method, **changes)


def one_iteration(path: Path, batch: int | None, device: str) -> None:
    config = resolve(str(path))
    image, clients = image_of(config), config.clients
    name, method = config.method_config()
    with seeding.seeded_scope("paper"):
        teachers = TeacherEnsemble([build_classifier(clients.architecture(k), image) for k in range(clients.count)], image=image)
        student = build(config, clients.count)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    try:
        short = shortened(method, batch)
    except ValueError:
        short = shortened(method, 4)  # RDSKD compares two halves
    engine = EngineConfig(device=device, precision="float32", watch_images=0, progress=False)
    result = distill(teachers, student, get_method(name), config=short, engine=engine)
    assert all(math.isfinite(value) for row in result.history for value in row.values())
    assert any(not torch.equal(value.cpu(), before[key]) for key, value in student.state_dict().items())


@every_file
def test_one_iteration_at_a_batch_of_two(path: Path) -> None:
    one_iteration(path, 2, "cpu")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@every_file
def test_one_iteration_at_the_full_batch(path: Path) -> None:
    one_iteration(path, None, "cuda")
