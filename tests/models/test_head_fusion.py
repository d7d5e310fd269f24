"""Fusion of heads against python loops in double, attention, and the student as one classifier."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdfkd_strategy.errors import ConfigError, DataError
from cdfkd_strategy.models.head_fusion import FusedStudent, HeadAttention, class_weights, fit_head_attention, fuse
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.types import ImageSpec, StudentOutputs

TINY = ImageSpec(1, 8, 8, 3, mean=(0.3,), std=(0.2,))


def log_softmax(values: list[float]) -> list[float]:
    top = max(values)
    total = math.log(sum(math.exp(value - top) for value in values)) + top
    return [value - total for value in values]


def loop_fuse(logits: Tensor, weights: Tensor) -> Tensor:
    heads, batch, classes = logits.shape
    rows = []
    for b in range(batch):
        members = [log_softmax(logits[k, b].tolist()) for k in range(heads)]
        pooled = [sum(float(weights[k, c]) * members[k][c] for k in range(heads)) for c in range(classes)]
        rows.append(log_softmax(pooled))
    return torch.tensor(rows, dtype=torch.double)


@pytest.mark.parametrize(("heads", "batch", "classes"), [(1, 2, 2), (3, 4, 5), (5, 1, 11)])
def test_fuse_equals_loops(heads, batch, classes):
    logits = 5 * torch.randn(heads, batch, classes, dtype=torch.double)
    weights = class_weights(torch.rand(heads, classes, dtype=torch.double), heads, classes)
    fused = fuse(logits, weights)
    torch.testing.assert_close(fused, loop_fuse(logits, weights))
    torch.testing.assert_close(fused.exp().sum(1), torch.ones(batch, dtype=torch.double))


def test_fuse_by_hand():
    logits = torch.tensor([[[math.log(0.8), math.log(0.2)]], [[math.log(0.5), math.log(0.5)]]])
    weights = torch.tensor([[0.5, 1.0], [0.5, 0.0]])
    a, b = math.sqrt(0.8 * 0.5), 0.2
    torch.testing.assert_close(fuse(logits, weights).exp(), torch.tensor([[a / (a + b), b / (a + b)]]))


def test_fuse_of_one_head_is_its_log_softmax_and_ignores_shifts():
    logits = torch.randn(3, 4, 5, dtype=torch.double)
    torch.testing.assert_close(fuse(logits[:1], torch.ones(1, 5, dtype=torch.double)), F.log_softmax(logits[0], 1))
    weights = class_weights(None, 3, 5)
    shifts = 100 * torch.randn(3, 4, 1, dtype=torch.double)
    torch.testing.assert_close(fuse(logits + shifts, weights), fuse(logits, weights))


def test_fuse_gradients():
    logits = torch.randn(3, 2, 4, dtype=torch.double, requires_grad=True)
    weights = class_weights(torch.rand(3, 4, dtype=torch.double), 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(fuse, (logits, weights))


def test_fuse_raises_half_precision_and_survives_extreme_logits():
    weights = class_weights([1.0, 0.0], 2, 3)
    logits = torch.tensor([[[200.0, 0.0, -200.0]], [[-60000.0, 60000.0, 0.0]]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        fused = fuse(logits.to(dtype), weights)
        assert fused.dtype == torch.float32
        torch.testing.assert_close(fused, torch.tensor([[0.0, -200.0, -400.0]]), atol=0, rtol=1e-2)


def test_fuse_refuses_shapes_that_do_not_belong_together():
    with pytest.raises(ConfigError, match=r"logits \[2, 4, 3\] with weights \[3, 2\]"):
        fuse(torch.zeros(2, 4, 3), torch.ones(3, 2))


def test_class_weights_broadcast_and_normalise():
    torch.testing.assert_close(class_weights([1, 3], 2, 3), torch.tensor([[0.25] * 3, [0.75] * 3]))
    torch.testing.assert_close(class_weights(None, 4, 2), torch.full((4, 2), 0.25))
    counts = torch.tensor([[10, 0], [30, 7]])
    torch.testing.assert_close(class_weights(counts, 2, 2), torch.tensor([[0.25, 0.0], [0.75, 1.0]]))
    square = torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    torch.testing.assert_close(class_weights(square, 2, 2).sum(0), torch.ones(2))
    assert torch.equal(square, torch.tensor([[1.0, 3.0], [1.0, 1.0]])), "the input was changed"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -0.1], "negative or non-finite"),
        ([1.0, math.nan], "negative or non-finite"),
        ([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]], r"classes \[1\] are 0 for all 2 teachers"),
        ([1.0, 1.0, 1.0], r"shape \[3\]; accepted: \[K\] = \[2\] or \[K, C\] = \[2, 3\]"),
        ([[1.0, 1.0]], r"shape \[1, 2\]"),
    ],
)
def test_class_weights_that_are_not_accepted_say_so(weights, message):
    with pytest.raises(ConfigError, match=message):
        class_weights(weights, 2, 3)


def test_attention_equals_loops():
    attention = HeadAttention(4).double()
    nn.init.normal_(attention.score.weight)
    nn.init.normal_(attention.score.bias)
    logits = torch.randn(3, 2, 4, dtype=torch.double)
    w, bias = attention.score.weight[0].tolist(), attention.score.bias.item()
    for b in range(2):
        scores = [math.exp(sum(w[c] * float(logits[k, b, c]) for c in range(4)) + bias) for k in range(3)]
        expected = [sum(scores[k] / sum(scores) * float(logits[k, b, c]) for k in range(3)) for c in range(4)]
        torch.testing.assert_close(attention(logits)[b], torch.tensor(expected, dtype=torch.double))


def test_attention_starts_as_the_mean_has_c_plus_one_parameters_and_draws_nothing():
    state = torch.random.get_rng_state()
    attention = HeadAttention(7)
    assert torch.equal(state, torch.random.get_rng_state())
    assert sum(parameter.numel() for parameter in attention.parameters()) == 8
    logits = torch.randn(3, 5, 7)
    torch.testing.assert_close(attention(logits), logits.mean(0))


class LoudAndQuiet(nn.Module):
    """Two heads for images that show their label in a corner: one is loud and always wrong, the other right but quiet."""

    def __init__(self) -> None:
        super().__init__()
        self.seen_training: list[bool] = []

    def forward(self, x: Tensor) -> StudentOutputs:
        self.seen_training.append(self.training)
        right = F.one_hot(x[:, 0, 0, 0].long(), 3).float()
        wrong = torch.tensor([0.0, 0.0, 4.0]).expand(len(x), 3)
        return StudentOutputs(torch.stack([wrong, right]), torch.zeros(2, len(x), 1))


def labelled_images() -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(0))
    return labels.float().view(-1, 1, 1, 1).repeat(1, 1, 8, 8) + 0.1 * torch.rand(60, 1, 8, 8), labels


def test_fitting_attention_learns_which_head_to_trust():
    (images, labels), student = labelled_images(), LoudAndQuiet()
    attention = fit_head_attention(student, images, labels, epochs=30, batch_size=20, lr=0.1, rng=torch.Generator().manual_seed(0))
    assert student.seen_training == [False] * 3, "one pass of three batches in eval mode, no more"
    assert student.training
    logits = student(images).logits
    assert not (HeadAttention(3)(logits).argmax(1) == labels).any()
    assert (attention(logits).argmax(1) == labels).all()


def test_fitting_attention_is_deterministic_and_leaves_the_student_as_it_was():
    (images, labels), student = labelled_images(), MultiHeaderStudent("small_cnn", 2, TINY)
    student.trunk.eval()
    modes = [part.training for part in student.modules()]
    before = {key: value.clone() for key, value in student.state_dict().items()}
    state = torch.random.get_rng_state()
    fits = [fit_head_attention(student, images, labels, epochs=3, batch_size=16, rng=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(fits[0].score.weight, fits[1].score.weight)
    assert not torch.equal(fits[0].score.weight, fits[2].score.weight)
    assert not fits[0].training
    assert not fits[0].score.weight.requires_grad
    assert modes == [part.training for part in student.modules()]
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())


def test_one_step_of_the_fit_is_adam_on_the_cross_entropy():
    torch.manual_seed(0)
    (images, labels), student = labelled_images(), MultiHeaderStudent("small_cnn", 2, TINY)
    fitted = fit_head_attention(student, images, labels, epochs=1, batch_size=60, lr=0.05, rng=torch.Generator())
    with torch.no_grad():
        logits = student.eval()(images).logits
    weight = torch.zeros(3, requires_grad=True)
    alpha = torch.softmax(logits @ weight, 0)[..., None]
    F.cross_entropy((alpha * logits).sum(0), labels).backward()
    assert weight.grad is not None
    torch.testing.assert_close(fitted.score.weight[0], -0.05 * weight.grad / (weight.grad.abs() + 1e-8))


@pytest.mark.parametrize(("images", "labels"), [(0, 0), (3, 2)])
def test_attention_without_labelled_samples_is_a_clear_error(images, labels):
    student = MultiHeaderStudent("small_cnn", 2, TINY)
    with pytest.raises(DataError, match=f"got {images} images"):
        fit_head_attention(student, torch.zeros(images, 1, 8, 8), torch.zeros(labels, dtype=torch.long), rng=torch.Generator())


def test_a_fused_student_takes_pixels_and_gives_log_probabilities():
    student = MultiHeaderStudent("small_cnn", 2, TINY)
    student(torch.randn(16, 1, 8, 8))
    pixels, weights = torch.rand(5, 1, 8, 8), torch.rand(2, 3)
    fused = FusedStudent(student, weights)
    output = fused(pixels)
    student.eval()
    expected = loop_fuse(student((pixels - 0.3) / 0.2).logits.detach(), weights / weights.sum(0))
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    uniform = FusedStudent(student)(pixels)
    torch.testing.assert_close(uniform, F.log_softmax(F.log_softmax(student((pixels - 0.3) / 0.2).logits, 2).mean(0), 1))


def test_a_fused_student_stays_in_eval_mode_and_does_not_disturb_training():
    student = MultiHeaderStudent("small_cnn", 2, TINY).train()
    fused = FusedStudent(student)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    first = fused(torch.rand(4, 1, 8, 8))
    assert student.training
    assert all(part.training for part in student.modules()), "a student in training must come back in train mode"
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    assert first.shape == (4, 3)
    assert not any(part.training for part in fused.train().modules())


def test_a_fused_student_with_attention_gives_its_logits():
    student = MultiHeaderStudent("small_cnn", 2, TINY).eval()
    attention = HeadAttention(3)
    nn.init.normal_(attention.score.weight)
    pixels = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(FusedStudent(student, attention=attention)(pixels), attention(student(TINY.normalise(pixels)).logits))
    with pytest.raises(ConfigError, match="weights and attention"):
        FusedStudent(student, torch.ones(2), attention)


@pytest.mark.parametrize("pixels", [torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8), torch.zeros(1, 8, 8)])
def test_a_fused_student_refuses_what_is_not_pixels(pixels):
    fused = FusedStudent(MultiHeaderStudent("small_cnn", 1, TINY))
    with pytest.raises(DataError, match=r"accepted: floating point in \[0, 1\], \[B, 1, 8, 8\]"):
        fused(pixels)
