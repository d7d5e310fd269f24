"""The collapse watch warns once per kind, says what to change, and leaves the method's state alone."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from cdfkd_strategy.collapse import CollapseWatch
from cdfkd_strategy.engine import distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.methods.cdfkd_mfs import CDFKDMFS, CDFKDMFSConfig
from cdfkd_strategy.methods.deep_inversion import DeepInversionConfig
from cdfkd_strategy.methods.rdskd import RDSKDConfig
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.seeding import generator, seeded_scope
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(1, 8, 8, 4)


@pytest.fixture
def distiller() -> CDFKDMFS:
    with seeded_scope("collapse"):
        teachers = TeacherEnsemble([build_classifier("small_cnn", IMAGE)], image=IMAGE)
        student = MultiHeaderStudent("small_cnn", 1, IMAGE)
        return CDFKDMFS(teachers, student, CDFKDMFSConfig.toy(), image=IMAGE, rng=torch.Generator().manual_seed(0), runtime=Runtime())


def test_a_look_changes_nothing(distiller: CDFKDMFS) -> None:
    assert distiller.generator is not None
    before = (state_hash(distiller.student.state_dict()), state_hash(distiller.generator.state_dict()), distiller.rng.get_state())
    found = CollapseWatch(distiller, 16, seed=0).look(0)
    assert set(found) == {"watch/student_teacher_l1", "watch/class_entropy", "watch/bn"}
    assert 0 <= found["watch/student_teacher_l1"] <= 2
    assert 0 <= found["watch/class_entropy"] <= math.log(4) + 1e-6
    assert (state_hash(distiller.student.state_dict()), state_hash(distiller.generator.state_dict())) == before[:2]
    assert torch.equal(distiller.rng.get_state(), before[2])


def test_a_teacher_that_sees_one_class_only_is_warned_of_once(distiller: CDFKDMFS, caplog: pytest.LogCaptureFixture) -> None:
    linear = [module for module in distiller.teachers.nets[0].modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor([50.0, 0, 0, 0]))
    watch = CollapseWatch(distiller, 16, seed=0)
    with caplog.at_level(logging.WARNING):
        watch.look(0)
        watch.look(1)
    assert caplog.text.count("covers few classes") == 1
    assert "raise method.balance_weight or lower method.generator_lr" in caplog.text


def test_a_student_that_falls_behind_is_warned_of(distiller: CDFKDMFS, caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(distiller, 16, seed=0)
    with caplog.at_level(logging.WARNING):
        watch._warn(0, distance=0.1, entropy=1.3, most=1.386)
        watch._warn(1, distance=0.3, entropy=1.3, most=1.386)
        assert caplog.text == ""
        watch._warn(2, distance=0.5, entropy=1.3, most=1.386)
    assert "falls behind the synthetic images" in caplog.text
    assert "lower method.generator_lr or raise method.student_steps" in caplog.text


def test_a_run_that_goes_on_remembers_how_close_the_student_was(distiller: CDFKDMFS, caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(distiller, 16, 0, [{"watch/student_teacher_l1": value} for value in (0.4, 0.1, 0.2)] + [{"seconds": 1.0}])
    with caplog.at_level(logging.WARNING):
        watch._warn(4, distance=0.5, entropy=1.3, most=1.386)
    assert "falls behind the synthetic images (distance 0.50, was 0.10)" in caplog.text


def test_only_settings_that_the_method_has_are_advised(distiller: CDFKDMFS, caplog: pytest.LogCaptureFixture) -> None:
    distiller.config = DeepInversionConfig.toy()  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        CollapseWatch(distiller, 16, seed=0)._warn(0, distance=0.1, entropy=0.0, most=1.386)
    assert "change the method's settings" in caplog.text
    assert "generator_lr" not in caplog.text


def test_one_header_for_several_teachers_is_looked_at() -> None:
    with seeded_scope("collapse"):
        weights = torch.tensor([[1.0, 2, 3, 4], [4.0, 3, 2, 1], [1.0, 1, 1, 1]])
        teachers = TeacherEnsemble([build_classifier("small_cnn", IMAGE) for _ in range(3)], weights, image=IMAGE)
        result = distill(teachers, MultiHeaderStudent("small_cnn", 1, IMAGE), "rdskd", config=RDSKDConfig.toy(), engine=EngineConfig(watch_images=16))
    assert 0 <= result.history[-1]["watch/student_teacher_l1"] <= 2


def test_zero_images_turn_it_off(distiller: CDFKDMFS) -> None:
    assert CollapseWatch(distiller, 0, seed=0).look(0) == {}


def test_what_is_watched_is_what_its_names_say(distiller: CDFKDMFS) -> None:
    """The distance is summed over classes, the entropy that of the mean prediction, and R_BN that of all layers with weight 1."""
    found = CollapseWatch(distiller, 16, seed=3).look(2)
    images = distiller.sample(16, generator("watch", 3, 2))
    assert images is not None
    with torch.no_grad():
        teacher, student = distiller.teachers(images)[0].softmax(-1), distiller.student.eval()(images).logits[0].softmax(-1)
        (distances,) = distiller.teachers.observe(images).bn
    assert found["watch/student_teacher_l1"] == pytest.approx(float((student - teacher).abs().sum()) / 16, rel=1e-5)
    assert found["watch/class_entropy"] == pytest.approx(-sum(float(p) * math.log(float(p)) for p in teacher.mean(0)), rel=1e-5)
    assert distances is not None
    assert found["watch/bn"] == pytest.approx(float(distances.sum()), rel=1e-5)
