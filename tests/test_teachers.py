"""The ensemble is frozen for good, and what it observes equals an independent computation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cdfkd_strategy.errors import ArchitectureError, ConfigError
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.seeding import seeded_scope
from cdfkd_strategy.teachers import TeacherEnsemble, TeacherSpec, state_hash
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(1, 8, 8, 3)


def ensemble(*names: str, weights: torch.Tensor | None = None) -> TeacherEnsemble:
    with seeded_scope("teachers"):
        models = [build_classifier(name, IMAGE) for name in names]
        for model in models:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.running_mean.normal_()  # type: ignore[union-attr]
                    module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return TeacherEnsemble(models, weights, image=IMAGE)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_logits_are_stacked_teacher_first(images: torch.Tensor) -> None:
    teachers = ensemble("small_cnn", "lenet")
    logits = teachers(images)
    assert logits.shape == (2, 5, 3)
    for k, net in enumerate(teachers.nets):
        assert torch.equal(logits[k], net(images))


def test_fused_is_the_weighted_sum_of_log_probabilities(images: torch.Tensor) -> None:
    weights = torch.tensor([[1.0, 3.0, 0.0], [1.0, 1.0, 2.0]])
    teachers = ensemble("small_cnn", "lenet", weights=weights)
    assert torch.allclose(teachers.weights, torch.tensor([[0.5, 0.75, 0.0], [0.5, 0.25, 1.0]]))
    logs = [F.log_softmax(net(images), 1) for net in teachers.nets]
    pooled = torch.stack([sum(teachers.weights[k, c] * logs[k][:, c] for k in range(2)) for c in range(3)], 1)  # type: ignore[misc]
    assert torch.allclose(teachers.fused(images), F.log_softmax(pooled, 1), atol=1e-6)


def test_teachers_without_a_weight_do_not_count(images: torch.Tensor) -> None:
    teachers = ensemble("small_cnn", "lenet", "lenet_bn")
    assert teachers.counted == [0, 1, 2]
    assert teachers.only([0, 1, 2]) is teachers
    teachers.weights.copy_(torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 1.0]]))
    assert teachers.counted == [0, 2]
    some = teachers.only(teachers.counted)
    assert torch.equal(some.weights, teachers.weights[[0, 2]])
    assert some.specs == (teachers.specs[0], teachers.specs[2])
    assert some.nets[1] is teachers.nets[2]
    assert torch.equal(some(images), teachers(images)[[0, 2]])
    assert torch.allclose(some.fused(images), teachers.fused(images), atol=1e-6)

    everyone, theirs = list(teachers.nets), teachers.weights.clone()
    one = teachers.drawn([2])
    assert torch.equal(one.weights, torch.ones(1, 3))
    assert not any(part.training for part in one.train().modules())
    assert list(teachers.nets) == everyone
    assert torch.equal(teachers.weights, theirs)
    with pytest.raises(ArchitectureError, match="0 teachers; accepted: at least one"):
        teachers.only([])


def test_teachers_stay_frozen(images: torch.Tensor) -> None:
    teachers = ensemble("small_cnn", "small_cnn")
    before = [state_hash(net.state_dict()) for net in teachers.nets]
    assert not teachers.training
    teachers.train()
    inputs = images.requires_grad_()
    outputs = teachers.observe(inputs)
    (outputs.logits.sum() + sum(bn.sum() for bn in outputs.bn if bn is not None)).backward()
    assert inputs.grad is not None
    assert inputs.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teachers.parameters())
    assert not any(module.training for module in teachers.modules())
    assert [state_hash(net.state_dict()) for net in teachers.nets] == before


@pytest.mark.parametrize(("name", "layers"), [("small_cnn", 3), ("lenet_bn", 4)])
def test_observe_equals_a_layer_by_layer_computation(name: str, layers: int, images: torch.Tensor) -> None:
    teachers = ensemble(name)
    net = teachers.nets[0]
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == layers
    inputs: dict[int, torch.Tensor] = {}
    handles = [norm.register_forward_hook(lambda module, args, output, at=at: inputs.__setitem__(at, args[0])) for at, norm in enumerate(norms)]
    logits = net(images)
    for handle in handles:
        handle.remove()
    expected = []
    for at, norm in enumerate(norms):
        columns = inputs[at].transpose(0, 1).flatten(1)  # of a hidden layer of lenet_bn, one value per image
        mean, variance = columns.mean(1), ((columns - columns.mean(1, keepdim=True)) ** 2).mean(1)
        expected.append((mean - norm.running_mean).norm() + (variance - norm.running_var).norm())  # type: ignore[operator]
    outputs = teachers.observe(images)
    assert torch.equal(outputs.logits[0], logits)
    assert outputs.bn[0] is not None
    assert torch.allclose(outputs.bn[0], torch.stack(expected), rtol=1e-5)
    assert [shift.shape for shift in outputs.shifts[0]] == [(2, norm.num_features) for norm in norms]
    assert torch.allclose(outputs.shifts[0][-1], torch.stack([mean - norm.running_mean, variance - norm.running_var]), atol=1e-5)  # type: ignore[operator]
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    assert outputs.features[0] is not None
    assert torch.allclose(linear(outputs.features[0]), logits)


def test_observe_measures_with_the_distance_it_is_given(images: torch.Tensor) -> None:
    outputs = ensemble("small_cnn").observe(images, distance=lambda norm, shift: torch.tensor(float(norm.num_features * shift.shape[0])))
    norms = [module for module in ensemble("small_cnn").nets[0].modules() if isinstance(module, nn.BatchNorm2d)]
    assert outputs.bn[0] is not None
    assert outputs.bn[0].tolist() == [norm.num_features * 2 for norm in norms]


def test_observe_leaves_no_hooks_and_can_skip_the_statistics(images: torch.Tensor) -> None:
    teachers = ensemble("small_cnn", "small_cnn_gn")
    outputs = teachers.observe(images, bn=False)
    assert outputs.bn == (None, None)
    assert outputs.shifts == ((), ())
    assert teachers.observe(images).bn[1] is None
    assert teachers.has_batch_norm == (True, False)
    assert teachers.has_features == (True, True)
    assert not any(module._forward_pre_hooks for module in teachers.modules())


def test_observe_gives_the_stage_maps_on_request(images: torch.Tensor) -> None:
    teachers = ensemble("small_cnn", "lenet", "resnet8")
    plain, asked = teachers.observe(images), teachers.observe(images, maps=True)
    assert plain.maps == ((), (), ())
    assert torch.equal(asked.logits, plain.logits)
    for mine, theirs in zip((*asked.features, asked.bn[0], asked.bn[2]), (*plain.features, plain.bn[0], plain.bn[2]), strict=True):
        assert mine is not None
        assert torch.equal(mine, theirs)  # type: ignore[arg-type]
    assert [[tuple(here.shape[1:]) for here in maps] for maps in asked.maps] == [
        [(32, 8, 8), (64, 4, 4), (128, 2, 2)], [(6, 8, 8), (16, 4, 4)], [(16, 8, 8), (32, 4, 4), (64, 2, 2)]
    ]  # fmt: skip
    assert torch.equal(asked.maps[0][1], teachers.nets[0][:7](images)), "the output of the second convolution's ReLU"  # type: ignore[index]
    assert not any(module._forward_pre_hooks for module in teachers.modules())


def test_a_teacher_that_cannot_be_traced_has_no_maps_and_the_others_have(images: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ensemble("small_cnn").nets[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) if x.mean() < 100 else self.inner(-x)

    teachers = TeacherEnsemble([Branching(), *ensemble("small_cnn").nets], image=IMAGE)
    with caplog.at_level("INFO"):
        for _ in range(2):
            outputs = teachers.observe(images, maps=True)
    assert [len(maps) for maps in outputs.maps] == [0, 3]
    assert torch.equal(outputs.logits, teachers(images))
    assert len([record for record in caplog.records if "Branching has no stage maps" in record.getMessage()]) == 1


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="0 teachers"):
        TeacherEnsemble([], image=IMAGE)
    with pytest.raises(ArchitectureError, match="1 teachers but 2 specs"):
        TeacherEnsemble([nn.Linear(1, 1)], image=IMAGE, specs=[TeacherSpec("0", "x"), TeacherSpec("1", "x")])
    with pytest.raises(ConfigError):
        ensemble("lenet", weights=torch.ones(2))


def test_state_hash_sees_every_bit() -> None:
    state = {"a": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    assert state_hash(state) == state_hash(dict(reversed(state.items())))
    assert state_hash(state) != state_hash({**state, "a": torch.tensor([1.0, 2.0000002])})
    assert state_hash(state) != state_hash({**state, "a": torch.tensor([[1.0, 2.0]])})
    assert state_hash({"a": torch.zeros(1)}) != state_hash({"a": torch.zeros(1, dtype=torch.int32)})
