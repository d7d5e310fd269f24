"""The plain student: the classifier itself, with what a method asks of a student with one header."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.models.plain_student import PlainStudent, build_student
from cdfkd_strategy.seeding import seeded_scope
from cdfkd_strategy.student_io import load_student, save_student
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(1, 28, 28, 10)


@pytest.fixture
def student() -> PlainStudent:
    with seeded_scope("plain"):
        return PlainStudent("lenet_half_bn", IMAGE)


def test_it_is_the_classifier_of_its_name(student: PlainStudent) -> None:
    with seeded_scope("plain"):
        net = build_classifier("lenet_half_bn", IMAGE)
    assert sum(parameter.numel() for parameter in student.parameters()) == sum(parameter.numel() for parameter in net.parameters())
    images = torch.randn(3, *IMAGE.shape)
    logits, features = student.eval()(images)
    assert torch.equal(logits, net.eval()(images)[None])
    assert torch.equal(features[0], net.hidden(net.features(images).flatten(1)))  # type: ignore[operator]
    assert (student.heads, student.feature_width, features.shape) == (1, 42, (1, 3, 42))
    assert torch.allclose(student.linear(features[0]), logits[0])


def test_its_stages_share_weights_statistics_and_mode(student: PlainStudent) -> None:
    names = set(student.state_dict())
    images = torch.randn(4, *IMAGE.shape)
    maps = student.train().trunk_features(images)
    assert [tuple(map_.shape[1:]) for map_ in maps] == [(3, 28, 28), (8, 10, 10)]
    assert set(student.state_dict()) == names, "no parameter has a second name"
    assert len(list(student.parameters())) == len({id(parameter) for parameter in student.parameters()})
    norm = student.net.features[1]  # type: ignore[index]
    before = norm.running_mean.clone()
    student.trunk_features(images)
    assert not torch.equal(norm.running_mean, before), "train mode reaches the stages"
    student.eval()
    again = norm.running_mean.clone()
    student.trunk_features(images)
    assert torch.equal(norm.running_mean, again)
    sum(map_.sum() for map_ in student.trunk_features(images)).backward()  # type: ignore[union-attr]
    assert next(student.parameters()).grad is not None


def test_a_copy_has_stages_of_its_own(student: PlainStudent) -> None:
    student.trunk_features(torch.randn(2, *IMAGE.shape))
    other = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert float(other.eval().trunk_features(torch.ones(2, *IMAGE.shape))[0].detach().abs().max()) == 0
    assert float(student.eval().trunk_features(torch.ones(2, *IMAGE.shape))[0].detach().abs().max()) > 0


def test_on_disk_and_back(student: PlainStudent, tmp_path: Path) -> None:
    save_student(tmp_path, student)
    found = load_student(tmp_path)
    assert isinstance(found.student, PlainStudent)
    pixels = torch.rand(5, *IMAGE.shape)
    expected = student.eval()(IMAGE.normalise(pixels)).logits[0].log_softmax(-1)
    assert torch.allclose(found(pixels), expected, atol=1e-6)


def test_specs_build_their_own_kind(student: PlainStudent) -> None:
    assert isinstance(build_student(student.spec), PlainStudent)
    headers = MultiHeaderStudent("lenet_half_bn", 2, IMAGE)
    assert isinstance(build_student(headers.spec), MultiHeaderStudent)
    with pytest.raises(ArchitectureError, match="no headers"):
        student.spec.build()


def test_it_has_one_header(student: PlainStudent) -> None:
    assert student.only([0]) is student
    with pytest.raises(ConfigError, match=r"only\(\[1\]\)"):
        student.only([1])


def test_a_network_without_a_linear_classifier_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    squeeze = torch.nn.Sequential(torch.nn.Conv2d(1, 10, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    monkeypatch.setattr("cdfkd_strategy.models.plain_student.build_classifier", lambda *_: squeeze)
    with pytest.raises(ArchitectureError, match="'squeezenet' does not end in a linear layer that gives 10 classes"):
        PlainStudent("squeezenet", IMAGE)
