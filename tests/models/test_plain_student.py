"""The plain student: the classifier itself, with what a method asks of a student with one header."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.multi_header import MultiHeaderStudent, with_maps
from cdfkd_strategy.models.plain_student import PlainStudent, build_student
from cdfkd_strategy.models.stages import find_stages
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


def test_observing_gives_the_same_bits_and_the_maps_of_the_stages(student: PlainStudent) -> None:
    other = copy.deepcopy(student)
    images = torch.randn(4, *IMAGE.shape)
    for training in (True, False):
        outputs, (observed, maps) = other.train(training)(images), student.train(training).observe(images)
        assert torch.equal(observed.logits, outputs.logits)
        assert torch.equal(observed.features, outputs.features)
        assert [tuple(here.shape[1:]) for here in maps] == [(3, 28, 28), (8, 10, 10)]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(student.state_dict().values(), other.state_dict().values(), strict=True))
        trunk = find_stages(copy.deepcopy(student.net), IMAGE).train(training)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(maps, trunk(images), strict=True))
    assert set(student.state_dict()) == set(other.state_dict()), "no parameter has a second name"
    assert len(list(student.parameters())) == len(list(other.parameters()))
    maps[0].sum().backward()
    assert next(student.parameters()).grad is not None
    assert with_maps(student) is student


def test_a_copy_has_stages_of_its_own(student: PlainStudent) -> None:
    images = torch.ones(2, *IMAGE.shape)
    student.eval().observe(images)
    other = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert float(other.observe(images)[1][0].detach().abs().max()) == 0
    assert float(student.observe(images)[1][0].detach().abs().max()) > 0


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


def test_functional_dropout_is_not_lost_where_maps_are_asked_for(student: PlainStudent, monkeypatch: pytest.MonkeyPatch) -> None:
    net = student.net
    hidden = net.hidden
    monkeypatch.setattr(type(net), "forward", lambda self, x: self.classifier(F.dropout(hidden(self.features(x).flatten(1)), training=self.training)))
    images = torch.randn(4, *IMAGE.shape)
    for training in (True, False, True):
        student.train(training)
        with seeded_scope("dropped"):
            plain = student(images)
        with seeded_scope("dropped"):
            observed, _ = student.observe(images)
        assert torch.equal(observed.logits, plain.logits)
        assert torch.equal(student.observe(images)[0].logits, student.observe(images)[0].logits) is not training
