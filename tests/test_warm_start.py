"""The first student: fresh headers, and a trunk that is the mean of the teachers of its own architecture."""

from __future__ import annotations

import pytest
import torch

from cdfkd_strategy.averaging import average_state
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.seeding import seeded_scope
from cdfkd_strategy.teachers import TeacherEnsemble, TeacherSpec
from cdfkd_strategy.types import ImageSpec
from cdfkd_strategy.warm_start import chosen_student, first_student

IMAGE = ImageSpec(1, 8, 8, 3)


def ensemble(*archs: str, samples: tuple[int, ...]) -> TeacherEnsemble:
    with seeded_scope("warm start"):
        models = [build_classifier(arch, IMAGE) for arch in archs]
    specs = [TeacherSpec(str(k), arch, size) for k, (arch, size) in enumerate(zip(archs, samples, strict=True))]
    return TeacherEnsemble(models, image=IMAGE, specs=specs)


@pytest.mark.parametrize("backbone", ["small_cnn", "wrn16_1"])
def test_the_trunk_is_the_weighted_mean_of_its_own_architecture(backbone: str) -> None:
    teachers = ensemble(backbone, "lenet", backbone, samples=(10, 500, 30))
    trunk = first_student(backbone, teachers, seed=0).trunk.net.state_dict()
    one, two = teachers.nets[0].state_dict(), teachers.nets[2].state_dict()
    assert len(trunk) > 10
    for name, value in trunk.items():
        expected = one[name] if not value.is_floating_point() else 0.25 * one[name] + 0.75 * two[name]
        assert torch.allclose(value, expected, atol=1e-6), name


def test_headers_are_those_of_a_random_student() -> None:
    teachers = ensemble("small_cnn", "small_cnn", samples=(1, 1))
    average, random = first_student("small_cnn", teachers, seed=3), first_student("small_cnn", teachers, init="random", seed=3)
    for mine, theirs in zip(average.headers.parameters(), random.headers.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(average.trunk.parameters(), random.trunk.parameters(), strict=True))


def test_without_a_teacher_of_its_architecture_it_is_random() -> None:
    teachers = ensemble("lenet", "resnet8", samples=(5, 5))
    average, random = first_student("small_cnn", teachers, seed=3), first_student("small_cnn", teachers, init="random", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(average.state_dict().values(), random.state_dict().values(), strict=True))
    assert average.heads == 2


def test_unknown_sample_counts_weigh_the_same_and_unknown_starts_are_refused() -> None:
    teachers = ensemble("lenet", "lenet", samples=(0, 7))
    mean = average_state(list(teachers.nets), [0, 7])
    name = "classifier.weight" if "classifier.weight" in mean else next(name for name, value in mean.items() if value.is_floating_point())
    expected = (teachers.nets[0].state_dict()[name] + teachers.nets[1].state_dict()[name]) / 2
    assert torch.allclose(mean[name], expected, atol=1e-6)
    with pytest.raises(ConfigError, match="accepted: 'average', 'random'"):
        first_student("lenet", teachers, init="pretrained", seed=0)  # type: ignore[arg-type]


def test_all_kinds_of_students_of_a_seed_begin_alike() -> None:
    teachers = ensemble("lenet", "resnet8", samples=(5, 5))
    heads, one, plain = (chosen_student(kind, "small_cnn", teachers, init="random", seed=3) for kind in ("per_teacher", "one", "plain"))
    assert (heads.heads, one.heads, plain.heads) == (2, 1, 1)
    full = heads.state_dict()
    assert len(one.state_dict()) < len(full)
    assert all(torch.equal(tensor, full[name]) for name, tensor in one.state_dict().items())
    shared = [name for name in full if name.startswith("trunk.net.") and full[name].dim() == 4]
    assert len(shared) == 3
    assert all(torch.equal(full[name], plain.state_dict()[name.removeprefix("trunk.")]) for name in shared), "the convolutions of all three are the same"
    other = chosen_student("plain", "small_cnn", teachers, seed=4)
    assert not torch.equal(next(other.parameters()), next(plain.parameters()))
