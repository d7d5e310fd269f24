"""However teachers are computed, they say the same: folded, in bfloat16, a few at a time, twice."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cdfkd_strategy import teacher_forms
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.seeding import seeded_scope
from cdfkd_strategy.teacher_forms import TeacherForms
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from cdfkd_strategy.types import ImageSpec
from tests.broken_folding import fold_without_bias

IMAGE = ImageSpec(3, 32, 32, 5)
FOLDED = Runtime(fold=True)


def ensemble(*names: str) -> TeacherEnsemble:
    """Networks whose BatchNorm layers have seen something."""
    with seeded_scope("forms"):
        nets = [build_classifier(name, IMAGE) for name in names]
        for part in (part for net in nets for part in net.modules() if isinstance(part, nn.BatchNorm2d)):
            part.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.3)
    return TeacherEnsemble(nets, image=IMAGE)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def norms(net: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in net.modules())


def cosine(one: Tensor | None, other: Tensor | None) -> float:
    assert one is not None
    assert other is not None
    return float(F.cosine_similarity(one.flatten() / one.norm(), other.flatten() / other.norm(), dim=0))


@pytest.mark.parametrize(
    ("name", "left"), [("small_cnn", 0), ("lenet_bn", 0), ("resnet8", 0), ("wrn16_1", 7), ("mobilenet_v2", 0), ("vgg11_bn", 0), ("lenet", 0)]
)
def test_folded_teachers_give_the_same_logits_features_and_gradients(name: str, left: int, images: Tensor) -> None:
    teachers = ensemble(name)
    hashed = state_hash(teachers.state_dict())
    plain, again = images.clone().requires_grad_(), images.clone().requires_grad_()
    expected = teachers.observe(plain, bn=False)
    expected.logits.square().sum().backward()
    with teachers.prepared(FOLDED):
        assert norms(teachers._forms.get(teachers.nets[0], observed=False).net) == left
        found = teachers.observe(again, bn=False)
        found.logits.square().sum().backward()
        assert torch.allclose(teachers(images), expected.logits, rtol=1e-3, atol=1e-4)
    assert torch.allclose(found.logits, expected.logits, rtol=1e-3, atol=1e-4)
    assert found.features[0] is not None
    assert torch.allclose(found.features[0], expected.features[0], rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]
    assert cosine(again.grad, plain.grad) > 0.9999
    assert state_hash(teachers.state_dict()) == hashed


def test_what_looks_at_batch_norm_gets_the_unfolded_network(images: Tensor) -> None:
    teachers = ensemble("small_cnn")
    expected = teachers.observe(images)
    with teachers.prepared(FOLDED):
        found = teachers.observe(images)
    assert found.bn[0] is not None
    assert torch.allclose(found.bn[0], expected.bn[0], rtol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["small_cnn", "mobilenet_v2"])
def test_bfloat16_is_close_and_handed_out_in_float32(name: str, images: Tensor) -> None:
    teachers = ensemble(name)
    expected = teachers.observe(images)
    runtime = Runtime(fold=True, precision="bfloat16")
    with teachers.prepared(runtime):
        with runtime.autocast():  # as in a method
            outputs = teachers.observe(images), teachers.observe(images, bn=False)
        assert norms(teachers._forms.get(teachers.nets[0], observed=False).net) == 0, "folded"
        for found in outputs:
            assert found.logits.dtype == found.features[0].dtype == torch.float32  # type: ignore[union-attr]
            assert (found.logits - expected.logits).norm() < 0.05 * expected.logits.norm()
        weights = [part.weight for part in teachers._forms.get(teachers.nets[0], observed=False).net.modules() if isinstance(part, nn.Conv2d)]
        assert all((weight.dtype == torch.bfloat16) is (weight.shape[1] > 1) for weight in weights)  # depthwise ones are not
    assert all(parameter.dtype == torch.float32 for parameter in teachers.parameters())
    assert torch.allclose(teachers.observe(images).logits, expected.logits, rtol=1e-3, atol=1e-5)


class Branching(nn.Module):
    """Looks at its input: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_classifier("small_cnn", IMAGE)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images) if images.mean() < 100 else self.inner(-images)


def test_a_step_with_some_of_the_teachers_copies_no_list_to_the_device() -> None:
    """Indexing the weights with a list would make every step wait for a GPU."""

    class Watch(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    teachers = TeacherEnsemble([build_classifier("lenet", IMAGE) for _ in range(4)], torch.rand(4, 5), image=IMAGE)
    with Watch():
        some = teachers.drawn([3, 1])
    assert Watch.names
    assert not [name for name in Watch.names if "index" in name or "_local_scalar_dense" in name]
    expected = teachers.weights[[3, 1]] / teachers.weights[[3, 1]].sum(0)
    torch.testing.assert_close(some.weights, expected)


@pytest.mark.parametrize("maps", [False, True])
def test_teachers_that_gave_way_take_no_memory(maps: bool, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those whose stages were traced, and not only after Python has looked for circles, which the memory of a GPU does not make it do."""
    teachers, copies = ensemble(*["small_cnn"] * 5), list[weakref.ref[nn.Module]]()
    placed = TeacherForms._placed

    def watched(self: TeacherForms, net: nn.Module) -> teacher_forms.Form:
        form = placed(self, net)
        copies.append(weakref.ref(next(part for part in form.net.modules() if isinstance(part, nn.Conv2d))))
        return form

    monkeypatch.setattr(TeacherForms, "_placed", watched)
    gc.collect()
    gc.disable()
    try:
        with teachers.prepared(FOLDED, 2), torch.no_grad():
            for _ in range(3):
                assert len(teachers.observe(images, maps=maps).maps[0]) == (3 if maps else 0)
                assert sum(copy() is not None for copy in copies) == 2
    finally:
        gc.enable()
    assert len(copies) == 15


@pytest.mark.parametrize("resident", [0, 2])
def test_a_network_that_cannot_be_traced_is_computed_as_it_is_and_said_once(resident: int, images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    teachers = TeacherEnsemble([Branching()], image=IMAGE)
    expected = teachers(images)
    with caplog.at_level(logging.INFO), teachers.prepared(FOLDED, resident):
        for _ in range(2):
            assert torch.allclose(teachers(images), expected, rtol=1e-4, atol=1e-5)
    assert [record.getMessage() for record in caplog.records if "Branching is computed as it is" in record.getMessage()] != []
    assert len(caplog.records) == 1


def test_a_folded_network_that_says_something_else_is_not_used(images: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    teachers = ensemble("small_cnn")
    expected = teachers(images)
    monkeypatch.setattr(teacher_forms, "fold_batch_norm", fold_without_bias)
    with caplog.at_level(logging.INFO), teachers.prepared(FOLDED):
        assert torch.allclose(teachers(images), expected, rtol=1e-4, atol=1e-5)
    assert "is off by" in caplog.text


def test_folding_is_judged_in_float32_on_gpus_that_prefer_tf32(images: Tensor) -> None:
    """Rounding to 10 bits alone is as large as what the comparison is to find."""
    teachers, seen = ensemble("small_cnn"), []

    def look(*_: object) -> None:
        seen.append(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]

    teachers.nets[0].register_forward_hook(look)
    with teachers.prepared(FOLDED), torch.no_grad():
        teachers(images)
    assert seen == ["ieee"], "the original is asked once, to be compared with the folded copy"


@pytest.mark.parametrize("resident", [0, 1])
def test_class_weights_are_on_the_device_inside_and_beside_the_networks_afterwards(resident: int, images: Tensor) -> None:
    """With copies of some only, the networks never leave the CPU, and the ensemble can be asked there when the distillation is over."""
    teachers = ensemble("small_cnn", "lenet_bn")
    expected, elsewhere = teachers.fused(images), Runtime(device="meta" if resident else "cpu")
    with teachers.prepared(elsewhere, resident):
        assert teachers.weights.device.type == elsewhere.device
    assert torch.allclose(teachers.fused(images), expected)


def test_no_more_than_the_resident_teachers_have_copies(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = ensemble("small_cnn", "small_cnn", "lenet_bn", "small_cnn")
    expected = teachers.observe(images)
    made: list[nn.Module] = []
    place = TeacherForms._placed
    monkeypatch.setattr(TeacherForms, "_placed", lambda self, net: made.append(net) or place(self, net))
    with teachers.prepared(FOLDED, resident=2):
        forms = teachers._forms
        for _ in range(2):
            assert torch.allclose(teachers(images), expected.logits, rtol=1e-3, atol=1e-4)
            assert len(forms._kept) == 2
        assert len(made) == 8  # in turn, none of them is there when it is needed again
        some = teachers.only([2, 3])
        for _ in range(3):
            assert torch.allclose(some(images), expected.logits[2:], rtol=1e-3, atol=1e-4)
        assert len(made) == 8  # these two still were
        assert torch.allclose(teachers.observe(images).bn[1], expected.bn[1], rtol=1e-4)  # type: ignore[arg-type]
        assert len(forms._kept) == 2


def test_copies_are_folded_only_where_they_stay(images: Tensor) -> None:
    """Folding takes four times as long as copying and saves a tenth of a forward pass; a copy with BatchNorm serves those who look at it too."""
    teachers = ensemble("small_cnn", "small_cnn")
    for resident, left in ((0, 0), (4, 0), (3, norms(teachers.nets[0])), (2, norms(teachers.nets[0]))):
        with teachers.prepared(FOLDED, resident):
            teachers(images), teachers.observe(images)
            assert norms(teachers._forms.get(teachers.nets[0], observed=False).net) == left
            assert len(teachers._forms._kept) == (2 if resident in (0, 2, 3) else 4)


def test_recomputed_teachers_give_the_same_gradients_and_keep_no_activations(images: Tensor) -> None:
    teachers = ensemble("small_cnn", "small_cnn", "small_cnn")

    def gradient(runtime: Runtime) -> tuple[Tensor, int]:
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        inputs = images.clone().requires_grad_()
        with teachers.prepared(runtime), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            outputs = teachers.observe(inputs)
            total = outputs.logits.square().sum() + sum(distances.sum() for distances in outputs.bn if distances is not None)
            at_most = kept
            (found,) = torch.autograd.grad(total, inputs)
        return found, at_most

    plain, much = gradient(Runtime())
    again, little = gradient(Runtime(recompute=True))
    assert torch.allclose(again, plain, rtol=1e-4, atol=1e-6)
    assert little < much / 20


# -- the maps of the stages ----------------------------------------------------------------------------------------

EVERY_FORM = {
    "folded": Runtime(fold=True),
    "bfloat16": Runtime(fold=True, precision="bfloat16"),
    "recomputed": Runtime(recompute=True),
    "all": Runtime(fold=True, precision="bfloat16", recompute=True),
}


@pytest.mark.parametrize("bn", [False, True], ids=["folded", "observed"])
@pytest.mark.parametrize("resident", [0, 1])
@pytest.mark.parametrize("runtime", EVERY_FORM.values(), ids=EVERY_FORM.keys())
def test_maps_and_their_gradients_are_the_same_in_every_form(runtime: Runtime, resident: int, bn: bool, images: Tensor) -> None:
    teachers = ensemble("small_cnn", "resnet8")
    half = runtime.precision == "bfloat16"
    plain, again = images.clone().requires_grad_(), images.clone().requires_grad_()

    def total(maps: tuple[tuple[Tensor, ...], ...]) -> Tensor:
        return torch.stack([here.float().square().mean() for stages in maps for here in stages]).sum()

    expected = teachers.observe(plain, bn=bn, maps=True)
    total(expected.maps).backward()
    with teachers.prepared(runtime, resident):
        found = teachers.observe(again, bn=bn, maps=True)
        reached = torch.autograd.grad(found.logits.float().sum(), [here for stages in found.maps for here in stages], retain_graph=True)
        total(found.maps).backward()
        assert (teachers.observe(images, bn=False, maps=True).maps[0][0] - expected.maps[0][0]).norm() < 0.02 * expected.maps[0][0].norm()
    for mine, theirs in zip(found.maps, expected.maps, strict=True):
        assert [here.shape for here in mine] == [here.shape for here in theirs]
        assert {here.dtype for here in mine} == {torch.bfloat16 if half else torch.float32}
        assert all((one - other).norm() < (0.03 if half else 1e-4) * other.norm() for one, other in zip(mine, theirs, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in reached), "the logits are computed from the maps that are given"
    assert cosine(again.grad, plain.grad) > (0.98 if half else 0.9999)
    assert torch.allclose(found.logits, expected.logits, rtol=1e-3, atol=1e-4) or half
    assert all((mine is None) is not bn for mine in found.bn)


@pytest.mark.parametrize("name", ["lenet_bn", "wrn16_1", "mobilenet_v2"])
def test_a_folded_network_has_the_stages_of_the_original(name: str, images: Tensor) -> None:
    teachers = ensemble(name)
    expected = teachers.observe(images, bn=False, maps=True).maps[0]
    with teachers.prepared(FOLDED):
        form, staged = teachers._forms.staged(teachers.nets[0], observed=False)
        assert staged is not None
        assert form.net is teachers._forms.get(teachers.nets[0], observed=False).net is not teachers.nets[0]
        for mine, theirs in zip(teachers.observe(images, bn=False, maps=True).maps[0], expected, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_a_folded_network_with_other_stages_gives_way_to_the_plain_one(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = ensemble("small_cnn")
    expected = teachers.observe(images, bn=False, maps=True)
    find = teacher_forms.with_stages
    monkeypatch.setattr(teacher_forms, "with_stages", lambda net, image: find(net, image, 4 if net is teachers.nets[0] else 2))
    with teachers.prepared(FOLDED):
        assert teachers._forms.staged(teachers.nets[0], observed=False)[0].net is teachers.nets[0]
        found = teachers.observe(images, bn=False, maps=True)
    assert torch.allclose(found.features[0], expected.features[0], rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert [here.shape for here in found.maps[0]] == [here.shape for here in expected.maps[0]]


def test_forms_are_dropped_at_the_end_and_kept_by_a_part_of_the_ensemble() -> None:
    teachers = ensemble("small_cnn", "lenet")
    before = teachers._forms
    with teachers.prepared(FOLDED):
        assert isinstance(teachers._forms, TeacherForms)
        assert teachers._forms is not before
        assert teachers.only([1])._forms is teachers._forms
    assert teachers._forms is before
