"""The benchmark of speed: what it counts, and what it writes, on a case that takes a second."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def speed(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with one tiny case, which writes into the test's folder."""
    monkeypatch.syspath_prepend(str(repository / "simulations" / "benchmarks"))
    import speed
    import speed_cases

    tiny = speed_cases.Case("tiny", "small_cnn", 2, "small_cnn", 8, speed_cases.DIGITS, width=0.25)
    for module in (speed, speed_cases):
        monkeypatch.setattr(module, "CASES", [tiny])
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    return speed


def test_work_is_counted(speed: ModuleType) -> None:
    left, right = torch.ones(10, 20), torch.ones(20, 30)
    counted = speed.count_work(lambda: [left @ right for _ in range(100_000 // 10)])
    assert counted["gflop"] == pytest.approx(1e4 * 2 * 10 * 20 * 30 / 1e9)
    assert counted["gbyte"] == pytest.approx(1e4 * 4 * (200 + 600 + 300) / 1e9, rel=0.1)


def test_the_result_has_what_is_promised(speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed, "peak_gflops", lambda *_: 100.0)
    child: list[Any] = []
    monkeypatch.setattr(speed, "subprocess", SimpleNamespace(run=lambda command, **_: child.append(command) or SimpleNamespace(stdout="12.5")))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--device", "cpu", "--repeats", "1"])
    speed.main()
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert {"machine", "commit", "hardware", "versions", "runtime", "bfloat16_gain", "repeats", "peak_gflops", "cases"} <= set(result)
    (case,) = result["cases"]
    assert {"name", "plain_s", "engine_s", "ratio", "gflop", "gbyte", "peak_fraction", "plain_mb", "engine_mb", "phases"} <= set(case)
    assert case["ratio"] == pytest.approx(case["plain_s"] / case["engine_s"], rel=0.02)
    assert case["plain_mb"] == 12.5
    assert [command[-1] for command in child] == ["plain", "engine"]
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize("path", ["plain", "engine"])
def test_memory_is_measured_after_the_work(speed: ModuleType, path: str) -> None:
    runtime = speed.EngineConfig(device="cpu", threads=1).runtime()
    assert speed.peak_memory(path, speed.CASES[0], runtime) > 100


def test_an_unknown_case_is_said(speed: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", "--cases", "huge"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "no case huge; there are tiny" in capsys.readouterr().err


def test_a_profile_adds_up(speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import where_time_goes

    monkeypatch.setattr(where_time_goes, "CASES", speed.CASES)
    monkeypatch.setattr(where_time_goes, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["where_time_goes.py", "--case", "tiny", "--iterations", "1", "--device", "cpu"])
    where_time_goes.main()
    table, picture = sorted(tmp_path.iterdir())
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=0.01)
    assert {"convolution", "batch norm", "optimisers"} <= {row["kind"] for row in rows}
    assert picture.read_bytes().startswith(b"\x89PNG")
