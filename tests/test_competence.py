"""Competence estimates find who knows what from weights alone; formulas against independent computations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from cdfkd_strategy import competence
from cdfkd_strategy.competence import weights_of
from cdfkd_strategy.errors import NeedsError, UnknownNameError
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.head_fusion import fuse
from cdfkd_strategy.seeding import generator, seeded_scope
from cdfkd_strategy.teachers import TeacherEnsemble, TeacherSpec
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(1, 8, 8, 4)


def trained_on(classes: tuple[int, ...], name: str, seed: int) -> nn.Module:
    """A net trained on images of which each class is a bright quadrant, from ``classes`` only."""
    with seeded_scope("competence", seed):
        model = build_classifier(name, IMAGE)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        for _ in range(40):
            labels = torch.tensor(classes)[torch.randint(len(classes), (32,))]
            images = torch.randn(32, 1, 8, 8) * 0.3
            for at, label in enumerate(labels.tolist()):
                row, column = divmod(label, 2)
                images[at, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 2
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model


@pytest.mark.parametrize("arch", ["small_cnn", "small_cnn_gn", "lenet"])
def test_auto_gives_every_class_to_the_teacher_that_has_seen_it(arch: str) -> None:
    teachers = TeacherEnsemble([trained_on((0, 1), arch, 0), trained_on((2, 3), arch, 1)], image=IMAGE)
    weights = competence.estimate(teachers, IMAGE, generator("test"))
    assert torch.allclose(weights.sum(0), torch.ones(4))
    assert weights.argmax(0).tolist() == [0, 0, 1, 1]
    assert weights.max(0).values.min() > 0.7


def test_row_norm_is_the_fourth_power_of_the_row_length() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    linear = net[1]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[0, :2] = torch.tensor([3.0, 4.0])
        linear.weight[1, 5] = 2.0
    score = competence.row_norm_score(net, 1, generator("unused"))
    assert score is not None
    assert score.tolist() == pytest.approx([625.0, 16.0])


def test_auto_is_the_geometric_mean_of_two_estimates_of_the_class_counts() -> None:
    norm, linear = nn.BatchNorm1d(2), nn.Linear(2, 2)
    with torch.no_grad():
        norm.weight.zero_()  # every drawn feature is relu(beta) = (1, 0)
        norm.bias.copy_(torch.tensor([1.0, -1.0]))
        linear.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        linear.bias.zero_()
    frequency = 1 / (1 + math.exp(-3.0))
    expected = [math.sqrt(90 * frequency * 25), math.sqrt(90 * (1 - frequency) * 4)]
    score = competence.auto_score(nn.Sequential(norm, linear), 90, generator("x"))
    assert score is not None
    assert score.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("counts", "expected"), [((100, 400), 1 / 3), ((0, 400), 1 / 2)])
def test_auto_weighs_by_the_root_of_the_sample_counts_if_all_are_known(counts: tuple[int, int], expected: float) -> None:
    with seeded_scope("counts"):
        net = build_classifier("small_cnn", IMAGE)
    specs = [TeacherSpec(str(k), "small_cnn", count) for k, count in enumerate(counts)]
    teachers = TeacherEnsemble([net, copy.deepcopy(net)], image=IMAGE, specs=specs)
    assert competence.estimate(teachers, IMAGE, generator("test"))[0].mean().item() == pytest.approx(expected, abs=0.02)


def test_a_teacher_of_one_class_does_not_own_it_alone() -> None:
    """It is sure of its class on every image; the others must be able to contradict it."""
    nets = [trained_on((0,), "small_cnn", 0), trained_on((0, 1, 2, 3), "small_cnn", 1)]
    teachers = TeacherEnsemble(nets, image=IMAGE)
    weights = competence.estimate(teachers, IMAGE, generator("test"))
    assert weights[0, 0] > 0.5
    images = torch.zeros(4, 1, 8, 8)
    for label in range(4):
        row, column = divmod(label, 2)
        images[label, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 2
    with torch.no_grad():
        assert fuse(teachers(images), weights).argmax(1).tolist() == [0, 1, 2, 3]


def test_norm_features_converge_to_the_expected_softmax() -> None:
    norm, linear = nn.BatchNorm1d(1), nn.Linear(1, 2)
    with torch.no_grad():
        norm.weight.fill_(-0.5)  # the sign of gamma does not matter
        norm.bias.fill_(0.3)
        linear.weight[:, 0] = torch.tensor([2.0, -1.0])
        linear.bias.zero_()
    score = competence.norm_feature_score(nn.Sequential(norm, linear), 1, generator("samples"))
    grid = torch.linspace(-6, 6, 20001, dtype=torch.double)
    density = torch.exp(-(grid**2) / 2)
    share = torch.sigmoid(3 * torch.relu(0.3 + 0.5 * grid))
    expected = float((density * share).sum() / density.sum())
    assert score is not None
    assert score[0].item() == pytest.approx(expected, abs=0.01)
    assert score.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_norm_features_needs_a_layer_as_wide_as_the_classifier() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.Linear(5, 2))
    assert competence.norm_feature_score(net, 1, generator("x")) is None
    assert competence.auto_score(net, 1, generator("x")) is not None


def test_the_same_seed_gives_the_same_weights() -> None:
    teachers = TeacherEnsemble([trained_on((0, 1), "small_cnn", 0), trained_on((1, 2), "small_cnn", 1)], image=IMAGE)
    assert torch.equal(competence.estimate(teachers, IMAGE, generator(1)), competence.estimate(teachers, IMAGE, generator(1)))


def test_unusable_teachers_and_names_are_clear_errors() -> None:
    teachers = TeacherEnsemble([nn.Sequential(nn.Flatten(), nn.Identity())], image=IMAGE)
    with pytest.raises(NeedsError, match=r"row_norm.*teachers 0.*uniform"):
        competence.estimate(teachers, IMAGE, generator("x"), "row_norm")
    assert competence.estimate(teachers, IMAGE, generator("x"), "uniform").tolist() == [[1.0] * 4]
    squeeze = TeacherEnsemble([nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Unflatten(1, (7, 1)), nn.Conv1d(7, 4, 1), nn.Flatten())], image=IMAGE)
    assert squeeze.has_features == (False,)
    for name in ("auto", "row_norm"):
        with pytest.raises(NeedsError, match="networks that end in a linear layer with one output per class"):
            competence.estimate(squeeze, IMAGE, generator("x"), name)
    with pytest.raises(UnknownNameError, match=r"accepted: auto, norm_features, row_norm, uniform"):
        competence.estimate(teachers, IMAGE, generator("x"), "label_counts")


def test_teachers_with_and_without_a_normalisation_layer_are_on_one_scale() -> None:
    with seeded_scope("scale"):
        nets = [build_classifier("small_cnn", IMAGE), build_classifier("small_cnn", IMAGE)]
        for module in nets[1].modules():  # the same net, but without a layer whose affine parameters could be read
            if isinstance(module, nn.BatchNorm2d):
                module.affine = False
        nets[1].load_state_dict(nets[0].state_dict())
    weights = competence.estimate(TeacherEnsemble(nets, image=IMAGE), IMAGE, generator("test"))
    assert 0.4 < weights[0].mean() < 0.6


def test_weights_of_share_an_unseen_class_equally() -> None:
    weights = weights_of(torch.tensor([[3, 0, 1], [1, 0, 0]]))
    assert torch.allclose(weights, torch.tensor([[0.75, 0.5, 1.0], [0.25, 0.5, 0.0]]))


def test_teachers_that_are_not_live_have_no_weight() -> None:
    weights = weights_of(torch.tensor([[3, 0, 1], [1, 0, 0], [5, 7, 9]]), [True, True, False])
    assert torch.allclose(weights, torch.tensor([[0.75, 0.5, 1.0], [0.25, 0.5, 0.0], [0.0, 0.0, 0.0]]))


def test_features_are_those_of_the_last_layer_that_is_as_wide_as_the_classifiers_input() -> None:
    first, last, linear = nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.Linear(2, 2)
    for layer, bias in ((first, [5.0, 5.0]), (last, [1.0, -1.0])):
        nn.init.zeros_(layer.weight)
        layer.bias.data.copy_(torch.tensor(bias))
    expected = linear(torch.tensor([1.0, 0.0])).softmax(-1)
    torch.testing.assert_close(competence.norm_feature_score(nn.Sequential(first, last, linear), 1, generator("test")), expected)
