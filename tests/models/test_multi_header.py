"""The student: golden counts, the encoder chain against functional calls written by hand, any backbone, any K and C."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.errors import ArchitectureError, ConfigError, UnknownNameError
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.multi_header import MultiHeaderStudent, StudentSpec, with_maps
from cdfkd_strategy.seeding import seeded_scope
from cdfkd_strategy.types import ImageSpec

TINY = ImageSpec(1, 8, 8, 4)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("backbone", "px", "counts", "feature_width"),
    [
        ("resnet18", 32, (13_454_410, 13_500_580, 18_025_566, 18_164_076), 512),
        ("resnet34", 32, (23_562_570, 23_608_740, 28_133_726, 28_272_236), 512),
        ("resnet18", 128, (13_462_090, 13_508_260, 18_033_246, 18_171_756), 512),
        ("resnet34", 224, (23_570_250, 23_616_420, 28_141_406, 28_279_916), 512),
        ("wrn16_1", 32, (212_954, 218_804, 290_286, 307_836), 64),
        ("wrn16_2", 32, (834_522, 846_132, 1_123_310, 1_158_140), 128),
        ("wrn40_2", 32, (2_386_394, 2_398_004, 2_675_182, 2_710_012), 128),
    ],
)
def test_parameters_are_those_of_the_authors_students(backbone, px, counts, feature_width):
    with torch.device("meta"):
        students = [MultiHeaderStudent(backbone, heads, ImageSpec(3, px, px, classes)) for heads in (1, 3) for classes in (10, 100)]
    assert tuple(count(student) for student in students) == counts
    assert {student.feature_width for student in students} == {feature_width}
    assert {student.spec.max_width for student in students} == {None}


def test_a_header_has_the_papers_encoders():
    with torch.device("meta"):
        header = MultiHeaderStudent("resnet18", 1, ImageSpec(3, 32, 32, 10)).headers[0]
    widths = [(encoder[0].in_channels, encoder[5].out_channels) for encoder in header.encoders]
    assert widths == [(64, 128), (256, 256), (512, 512), (1024, 512)]


def reference_encoder(x: Tensor, state: dict[str, Tensor], prefix: str) -> Tensor:
    """Depthwise 3x3 stride 2 -> 1x1 -> BN -> ReLU -> depthwise 3x3 -> 1x1 -> BN -> ReLU, with batch statistics."""
    weights = [value for key, value in state.items() if key.startswith(prefix) and key.endswith("weight") and value.dim() == 4]
    norms = [key[: -len("running_mean")] for key in state if key.startswith(prefix) and key.endswith("running_mean")]
    for half, stride in ((0, 2), (1, 1)):
        depthwise, pointwise = weights[2 * half : 2 * half + 2]
        x = F.conv2d(x, depthwise, None, stride, 1, groups=x.shape[1])
        x = torch.einsum("oi,bihw->bohw", pointwise[:, :, 0, 0], x)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        scale, shift = (state[norms[half] + name].view(1, -1, 1, 1) for name in ("weight", "bias"))
        x = ((x - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)
    return x


def test_the_chain_of_encoders_equals_functional_calls_written_by_hand():
    torch.manual_seed(0)
    student = MultiHeaderStudent("wrn16_1", 2, ImageSpec(3, 16, 16, 5)).double().train()
    for parameter in student.headers.parameters():
        nn.init.uniform_(parameter, -0.5, 0.7)
    state = student.state_dict()
    x = torch.randn(4, 3, 16, 16, dtype=torch.double)
    maps = student.trunk_features(x)
    logits, features = student(x)
    assert logits.shape == (2, 4, 5)
    assert features.shape == (2, 4, 64)
    for k in range(2):
        a = reference_encoder(maps[0], state, f"headers.{k}.encoders.0.")
        for s in (1, 2):
            a = reference_encoder(torch.cat([maps[s], a], 1), state, f"headers.{k}.encoders.{s}.")
        assert a.shape == (4, 64, 2, 2), "every encoder halves the resolution: 16 -> 8 -> 4 -> 2"
        f = a.mean((2, 3))
        torch.testing.assert_close(features[k], f)
        torch.testing.assert_close(logits[k], f @ state[f"headers.{k}.classifier.weight"].T + state[f"headers.{k}.classifier.bias"])


@pytest.mark.parametrize(
    ("backbone", "px"),
    [
        ("resnet50", 32),
        ("regnet_y_400mf", 64),
        ("mobilenet_v2", 32),
        ("mobilenet_v3_small", 64),
        ("efficientnet_b0", 32),
        ("vgg11_bn", 32),
    ],
)
def test_torchvision_families_with_two_heads_and_one_channel(backbone, px):
    image = ImageSpec(1, px, px, 3)
    student = MultiHeaderStudent(backbone, 2, image)
    assert student.feature_width == student.spec.max_width == 256
    assert max(student.widths) <= 256
    outputs = student(torch.randn(2, *image.shape))
    assert outputs.logits.shape == (2, 2, 3)
    assert outputs.features.shape == (2, 2, 256)
    (outputs.logits.square().mean() + outputs.features.mean()).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in student.parameters())


@pytest.mark.parametrize("backbone", ["small_cnn", "small_cnn_gn", "lenet", "lenet_bn", "resnet8", "wrn16_1"])
@pytest.mark.parametrize(("channels", "px"), [(1, 8), (1, 28), (3, 32)])
def test_small_backbones(backbone, channels, px):
    image = ImageSpec(channels, px, px, 2)
    student = MultiHeaderStudent(backbone, 2, image)
    outputs = student(torch.randn(3, *image.shape))
    assert outputs.logits.shape == (2, 3, 2)
    assert outputs.features.shape == (2, 3, student.feature_width)


@pytest.mark.parametrize("heads", [1, 2, 5, 11])
@pytest.mark.parametrize("classes", [2, 7, 101])
def test_any_number_of_heads_and_classes(heads, classes):
    student = MultiHeaderStudent("small_cnn", heads, ImageSpec(1, 8, 12, classes))
    assert student(torch.randn(2, 1, 8, 12)).logits.shape == (heads, 2, classes)
    assert student.heads == len(student.headers) == heads
    per_head = count(student.headers[0])
    assert count(student) == count(student.trunk) + heads * per_head


def test_heads_are_private_and_the_trunk_is_shared():
    student = MultiHeaderStudent("resnet8", 3, TINY)
    student(torch.randn(4, 1, 8, 8)).logits[1].square().sum().backward()
    touched = [any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in header.parameters()) for header in student.headers]
    assert touched == [False, True, False]
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in student.trunk.parameters() if parameter.dim() == 4)


def test_the_gradient_keeps_the_layout_of_the_maps():
    student = MultiHeaderStudent("small_cnn", 2, ImageSpec(1, 28, 28, 10)).to(memory_format=torch.channels_last)
    layouts = []

    def at_the_last_map(_module, _inputs, output):
        output.register_hook(lambda gradient: layouts.append(gradient.is_contiguous(memory_format=torch.channels_last)))

    for header in student.headers:
        header.encoders[-1].register_forward_hook(at_the_last_map)
    student(torch.rand(3, 1, 28, 28).to(memory_format=torch.channels_last)).logits.sum().backward()
    assert layouts == [True, True]


def test_an_odd_size_pools_the_previous_encoder_to_the_stage():
    student = MultiHeaderStudent("small_cnn", 1, ImageSpec(1, 30, 30, 4))
    assert student.trunk.sizes == ((30, 30), (15, 15), (7, 7)), "encoders give 15 and ceil(15 / 2) = 8"
    assert student(torch.randn(2, 1, 30, 30)).logits.shape == (1, 2, 4)


@pytest.mark.parametrize(("max_width", "widths"), [("auto", (16, 32, 64)), (None, (16, 32, 64)), (20, (16, 20, 20))])
def test_max_width_narrows_wider_stages_in_the_shared_part(max_width, widths):
    student = MultiHeaderStudent("resnet8", 2, TINY, max_width=max_width)
    assert student.widths == widths
    assert tuple(here.shape[1] for here in student.trunk_features(torch.randn(2, 1, 8, 8))) == widths
    assert [type(part) for part in student.narrow] == [nn.Identity if width in (16, 32, 64) else nn.Conv2d for width in widths]


@pytest.mark.parametrize("heads", [1, 2, 3, 5])
def test_with_heads_keeps_the_old_heads_bit_for_bit(heads):
    student = MultiHeaderStudent("small_cnn", 3, TINY)
    student(torch.randn(8, 1, 8, 8))
    student.eval()
    other = student.with_heads(heads)
    x = torch.randn(5, 1, 8, 8)
    kept = min(heads, 3)
    assert torch.equal(student(x).logits[:kept], other(x).logits[:kept])
    assert other(x).logits.shape[0] == other.heads == other.spec.heads == heads
    assert student.heads == student.spec.heads == 3
    assert not any(part.training for part in other.modules())
    fresh = MultiHeaderStudent("small_cnn", heads, TINY).state_dict()
    assert list(other.state_dict()) == list(fresh), "the names in the state dict must not depend on the history"
    mine = {parameter.data_ptr() for parameter in student.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in other.parameters()}


def test_with_heads_initialises_new_heads_afresh():
    student = MultiHeaderStudent("small_cnn", 1, TINY).double()
    other = student.with_heads(3)
    first, second, third = (header.classifier.weight for header in other.headers)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert third.dtype == torch.double


def test_some_heads_are_the_students_own():
    student = MultiHeaderStudent("small_cnn", 3, TINY)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    some = student.only([2, 0])
    assert (some.heads, some.spec.heads, student.heads) == (2, 2, 3)
    assert student.only(range(3)) is student
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(some.eval()(x).logits, student.eval()(x).logits[[2, 0]])
    some.train()
    assert not student.headers[1].training
    optimizer = torch.optim.SGD(some.parameters(), lr=0.1)
    some(x).logits.square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[1] for name in changed if name.startswith("headers.")} == {"0", "2"}
    assert any(name.startswith("trunk.") for name in changed)
    theirs = {"headers.0": "headers.2", "headers.1": "headers.0"}
    some.load_state_dict({name: before[theirs.get(name[:9], name[:9]) + name[9:]] for name in some.state_dict()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    with pytest.raises(ConfigError, match=r"only\(\[\]\) leaves a student without heads"):
        student.only([])


def test_names_in_the_state_dict_are_stable():
    names = set(MultiHeaderStudent("resnet18", 1, TINY).state_dict())
    assert {"trunk.net.conv1.weight", "trunk.net.layer4.1.bn2.running_var", "headers.0.encoders.3.5.weight", "headers.0.classifier.bias"} <= names


def test_a_spec_survives_json_and_rebuilds_the_student():
    student = MultiHeaderStudent("resnet8", 2, ImageSpec(3, 16, 16, 4, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)), max_width=24)
    spec = bind(StudentSpec, json.loads(json.dumps(to_dict(student.spec))))
    assert spec == student.spec
    again = spec.build()
    again.load_state_dict(student.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(student.eval()(x).logits, again.eval()(x).logits)


def test_the_same_seed_gives_the_same_student():
    states = []
    for _ in range(2):
        with seeded_scope("student", 3):
            states.append(MultiHeaderStudent("small_cnn", 2, TINY).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_module_of_the_users_is_copied_with_its_weights():
    backbone = build_classifier("resnet8", TINY)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    student = MultiHeaderStudent(backbone, 2, TINY)
    assert torch.equal(student.state_dict()["trunk.net.stem.0.weight"], backbone.stem[0].weight)
    student(torch.randn(4, 1, 8, 8)).logits.sum().backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    with pytest.raises(ArchitectureError, match="own module <ResNet8> cannot be built from its spec"):
        student.spec.build()


def test_what_is_not_accepted_says_so():
    with pytest.raises(ConfigError, match="0 heads; accepted: at least 1"):
        MultiHeaderStudent("small_cnn", 0, TINY)
    with pytest.raises(ConfigError, match=r"max_width is 0; accepted: 'auto', None"):
        MultiHeaderStudent("small_cnn", 1, TINY, max_width=0)
    with pytest.raises(ConfigError, match=r"with_heads\(0\)"):
        MultiHeaderStudent("small_cnn", 1, TINY).with_heads(0)
    with pytest.raises(UnknownNameError, match="unknown architecture 'cnn'"):
        MultiHeaderStudent("cnn", 1, TINY)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("max_width", ["auto", 20])
def test_observing_gives_the_same_bits_and_the_trunks_maps(heads, max_width):
    """In train mode, where the batch counts, with narrowed stages and without: one pass, and the maps are those before the narrowing."""
    with seeded_scope("observed"):
        student, other = (MultiHeaderStudent("resnet8", heads, TINY, max_width=max_width).train() for _ in range(2))
    other.load_state_dict(student.state_dict())
    x = torch.randn(4, 1, 8, 8)
    outputs, (observed, maps) = other(x), student.observe(x)
    assert torch.equal(observed.logits, outputs.logits)
    assert torch.equal(observed.features, outputs.features)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(student.state_dict().values(), other.state_dict().values(), strict=True))
    assert [tuple(here.shape) for here in maps] == [(4, 16, 8, 8), (4, 32, 4, 4), (4, 64, 2, 2)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(maps, other.trunk(x), strict=True))
    maps[0].sum().backward()
    assert all(parameter.grad is not None for parameter in student.trunk.net.get_submodule("stem").parameters())
    with torch.autocast("cpu", torch.bfloat16):
        low, maps = student.observe(x)
    assert {here.dtype for here in maps} == {torch.bfloat16}
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(low.logits.sum(), maps)), "they are what the logits are computed from"


def test_headers_may_see_the_deepest_stages_only():
    """With one stage there is one encoder per header, c_S -> c_S, and the trunk is the whole one."""
    built = []
    for stages in (4, 1):
        with seeded_scope("stages"):
            built.append(MultiHeaderStudent("resnet8", 2, TINY, stages=stages))
    every, last = built
    assert [len(header.encoders) for header in every.headers] == [3, 3]
    assert [len(header.encoders) for header in last.headers] == [1, 1]
    assert torch.equal(last.trunk(torch.ones(2, 1, 8, 8))[0], every.trunk(torch.ones(2, 1, 8, 8))[-1])
    assert (last.widths, every.widths) == ((64,), (16, 32, 64))
    assert last.spec.build().state_dict().keys() == last.state_dict().keys() != every.state_dict().keys()
    with pytest.raises(ConfigError, match="see 0 stages"):
        MultiHeaderStudent("resnet8", 2, TINY, stages=0)


def test_a_student_without_maps_is_a_clear_error():
    student = MultiHeaderStudent("small_cnn", 1, TINY)
    assert with_maps(student) is student
    with pytest.raises(ArchitectureError, match=r"the student Linear gives no stage maps.*accepted: MultiHeaderStudent"):
        with_maps(nn.Linear(3, 2))
