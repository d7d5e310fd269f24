"""bfloat16 is chosen by measurement and used for networks only: losses, statistics, weights and what is handed out stay in float32."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy import precision
from cdfkd_strategy.losses.divergence import feature_l1, kl_divergence, logit_l1, mean_logit_l1
from cdfkd_strategy.losses.statistics import batch_norm_distance
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.models.head_fusion import fuse
from cdfkd_strategy.precision import FullConv2d, as_it_was, full, in_full, keep_depthwise_full, measured_precision
from cdfkd_strategy.runtime import Runtime
from tests.methods.trained_teachers import DIGITS, tiny_student

HALF = Runtime(precision="bfloat16")


@pytest.mark.parametrize(("gain", "chosen"), [(0.3, "float32"), (1.4, "float32"), (1.6, "bfloat16"), (8.0, "bfloat16")])
def test_bfloat16_is_taken_where_it_is_measured_to_be_faster(gain: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "convolution_gain", lambda _: gain)
    measured_precision.cache_clear()
    try:
        assert measured_precision("cpu") == chosen
        assert Runtime.auto("cpu").precision == chosen
        assert Runtime.auto("cpu", "float32").precision == "float32"
        assert Runtime.auto("cpu", "bfloat16").precision == "bfloat16"
    finally:
        measured_precision.cache_clear()


def test_the_measurement_is_a_ratio_of_times_and_leaves_no_team_of_threads() -> None:
    """A second team in a process, beside that of the thread that distils, would slow both down."""
    program = """
import os, torch
from cdfkd_strategy.runtime import Runtime
torch.set_num_threads(4)
before = len(os.listdir("/proc/self/task"))
assert Runtime.auto("cpu").threads == 4
print(len(os.listdir("/proc/self/task")) - before)
torch.ones(2**20).exp()
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert precision.convolution_gain("cpu", repeats=1) > 0
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PATH": ""}
    found = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True).stdout.split()
    assert found == ["0", "3"]


def test_half_precision_is_raised_and_nothing_else() -> None:
    double = torch.ones(1, dtype=torch.float64)
    assert full(double) is double
    assert full(torch.ones(1).bfloat16()).dtype == full(torch.ones(1).half()).dtype == torch.float32
    with HALF.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        with in_full(torch.ones(1)):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with Runtime().autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_weights_that_an_optimiser_moved_inside_the_block_are_the_new_ones() -> None:
    layer = nn.Linear(4, 4, bias=False)
    images = torch.eye(4)
    with HALF.autocast():
        before = layer(images)
        with torch.no_grad():
            layer.weight.add_(1.0)
        after = layer(images)
    assert torch.allclose(after - before, torch.ones(4, 4).bfloat16(), atol=0.02)


def test_depthwise_convolutions_stay_in_float32_and_become_ordinary_again() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1))
    names, copied = list(net.state_dict()), copy.deepcopy(net)
    images = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    changed = keep_depthwise_full(net)
    assert [type(part) for part in net] == [FullConv2d, nn.Conv2d, nn.Conv2d, nn.Conv2d]
    assert list(net.state_dict()) == names
    with HALF.autocast():
        assert net[0](images).dtype == torch.float32
        assert net(images).dtype == torch.bfloat16
    assert torch.equal(net(images), copied(images))
    as_it_was(changed)
    assert [type(part) for part in net] == [nn.Conv2d] * 4


def test_a_student_is_changed_while_it_computes_only() -> None:
    student = tiny_student(2)
    before = [type(part) for part in student.modules()]
    assert FullConv2d not in before
    with pytest.raises(KeyboardInterrupt), HALF.computing(student):
        raise KeyboardInterrupt
    assert [type(part) for part in student.modules()] == before
    with HALF.computing(student) as computing:
        assert computing is student
        assert any(isinstance(part, FullConv2d) for part in student.modules())
    assert [type(part) for part in student.modules()] == before
    with Runtime().computing(student):
        assert [type(part) for part in student.modules()] == before


def test_networks_hand_out_float32() -> None:
    student, generator = tiny_student(2), build_generator(DIGITS, GeneratorConfig(latent_dim=8, width=0.25))
    with HALF.autocast():
        images = generator(torch.randn(4, 8))
        outputs = student(images)
    assert images.dtype == outputs.logits.dtype == outputs.features.dtype == torch.float32


def test_losses_of_half_precision_are_those_of_the_same_numbers_in_float32() -> None:
    draw = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 5, 3, generator=draw).bfloat16(), torch.randn(2, 5, 3, generator=draw).bfloat16()
    weights = torch.full((2, 3), 0.5)
    for loss in (logit_l1, mean_logit_l1, kl_divergence, lambda s, t: feature_l1(s, list(t))):
        found = loss(student, teacher)
        assert found.dtype == torch.float32
        assert torch.equal(found, loss(student.float(), teacher.float()))
    with HALF.autocast():
        assert torch.equal(fuse(student, weights), fuse(student.float(), weights))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_statistics_are_computed_in_float32_under_autocast(layout: torch.memory_format) -> None:
    norm = nn.BatchNorm2d(8)
    nn.init.constant_(norm.running_mean, 99.0)  # type: ignore[arg-type]
    maps = (100 + torch.randn(16, 8, 6, 6, generator=torch.Generator().manual_seed(2))).bfloat16().to(memory_format=layout)
    exact = batch_norm_distance(norm.double(), maps.double())
    with HALF.autocast():
        found = batch_norm_distance(norm.float(), maps)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=1e-5)


def test_float32_is_float32_whatever_the_caller_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings of today's torch, which a caller may have changed, and with those of older ones."""
    products: Any = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("high")
    try:
        with precision.all_digits():
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    older, products = SimpleNamespace(allow_tf32=True), SimpleNamespace(allow_tf32=False)
    monkeypatch.setattr(torch, "backends", SimpleNamespace(cudnn=older, cuda=SimpleNamespace(matmul=products)))
    with precision.all_digits():
        assert (older.allow_tf32, products.allow_tf32) == (False, False)
    assert (older.allow_tf32, products.allow_tf32) == (True, False)


def test_on_a_gpu_many_calls_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One alone would be waited for longer than it computes."""
    timed: list[tuple[int, torch.dtype]] = []

    def seconds(run: Callable[[], object], device: str) -> float:
        run()
        timed.append((len(calls), calls[-1][0].dtype))
        calls.clear()
        return 1.0

    calls: list[tuple[Tensor, Tensor]] = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: ones(size, device="meta"))
    monkeypatch.setattr(F, "conv2d", lambda images, kernel, padding: calls.append((images, kernel)))
    monkeypatch.setattr(precision, "seconds", seconds)
    assert precision.convolution_gain("cuda", repeats=1) == 1.0
    assert timed == [(20, torch.float32), (20, torch.bfloat16)] * 2
