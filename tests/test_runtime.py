"""What bits depend on besides the seed: threads, device and kernels are set inside a scope, and put back afterwards."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from cdfkd_strategy import seeding
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.runtime import Runtime

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


def settings() -> dict[str, Any]:
    """Everything global that a scope may touch."""
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    return {
        "threads": torch.get_num_threads(),
        "enabled": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": cudnn.benchmark,
        "deterministic": cudnn.deterministic,
        "fill": memory.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "workspace": os.environ.get(VARIABLE),
        "convolutions": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "products": torch.backends.cuda.matmul.fp32_precision,  # type: ignore[attr-defined]
    }


@pytest.fixture
def contest(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of a caller who lets cuDNN choose the fastest kernel."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv(VARIABLE, raising=False)
    return settings()


def test_on_cuda_the_scope_takes_deterministic_kernels_and_restores_what_was_set(contest: dict[str, Any]) -> None:
    inside = {"enabled": True, "warn_only": True, "benchmark": False, "deterministic": True, "fill": False, "workspace": ":4096:8"}
    inside |= {"convolutions": "ieee", "products": "ieee"}
    assert contest["convolutions"] == "tf32", "torch's own choice, which is not float32"
    with Runtime(device="cuda:0", threads=3).scope():
        assert settings() == {"threads": 3, **inside}
    assert settings() == contest
    with pytest.raises(KeyboardInterrupt), Runtime(device="cuda").scope():
        raise KeyboardInterrupt
    assert settings() == contest


def test_on_the_cpu_the_scope_sets_threads_only(contest: dict[str, Any]) -> None:
    with Runtime(device="cpu", threads=3).scope():
        assert settings() == {**contest, "threads": 3}
    assert settings() == contest
    with seeding.threads(2), Runtime(device="cpu", threads=0).scope():
        assert torch.get_num_threads() == 2


def test_a_caller_for_whom_nondeterminism_is_an_error_keeps_it_so(contest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":16:8")
    torch.use_deterministic_algorithms(True)
    before = settings()
    try:
        with seeding.deterministic_kernels():
            assert {name: settings()[name] for name in ("enabled", "warn_only", "fill", "workspace")} == {
                "enabled": True, "warn_only": False, "fill": before["fill"], "workspace": ":16:8",
            }  # fmt: skip
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)
    assert {**settings(), "workspace": None} == contest


@pytest.mark.parametrize(
    ("device", "count", "there"), [("cpu", 0, True), ("cuda", 0, False), ("cuda", 1, True), ("cuda:0", 1, True), ("cuda:1", 1, False), ("cuda:1", 2, True)]
)
def test_a_device_is_available_or_not(device: str, count: int, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert Runtime(device=device).is_available is there


def test_a_runtime_survives_a_round_trip_and_refuses_unknown_keys() -> None:
    runtime = Runtime(device="cuda:1", channels_last=False, threads=4)
    assert Runtime.from_dict(runtime.to_dict()) == runtime
    with pytest.raises(ConfigError, match=r"runtime.dtype; accepted under runtime: device, channels_last, threads"):
        Runtime.from_dict({"dtype": "half"})
