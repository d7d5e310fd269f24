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

from cdfkd_strategy.offline import write_teachers
from cdfkd_strategy.run_config import resolve


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


@pytest.mark.parametrize(
    ("cpu", "name"),
    [("Intel(R) Xeon(R) Processor with AMX", "Intel-Xeon-Processor-with-AMX-2-threads"), ("AMD EPYC", "AMD-EPYC-2-threads"), ("x / y", "x-y-2-threads")],
)
def test_results_of_two_processors_never_share_a_file(cpu: str, name: str, speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "hardware", lambda: {"cpu": cpu})
    assert speed.machine_name(speed.Runtime(device="cpu", threads=2)) == name


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
    assert case["images_per_second"] == pytest.approx(6 * 8 / case["engine_s"], rel=0.02)
    assert case["schedule_hours"] == pytest.approx(case["engine_s"] * 300 * 50 / 3600, abs=0.01)
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
    table, about, picture = sorted(tmp_path.iterdir())
    assert {"commit", "hardware", "runtime", "versions"} <= set(json.loads(about.read_text()))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=0.01)
    assert {"convolution", "batch norm", "optimisers"} <= {row["kind"] for row in rows}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_profile_on_a_gpu_counts_kernels_once(speed: ModuleType) -> None:
    """Their time stands in the rows of the operations that started them, and in rows of their own."""
    import where_time_goes
    from torch.autograd import DeviceType

    rows = [("aten::cudnn_convolution", 3e6), ("aten::cudnn_batch_norm", 1e6), ("aten::cudnn_batch_norm_backward", 2e6), ("aten::conv2d", 0)]
    events = [SimpleNamespace(key=key, device_type=DeviceType.CPU, self_device_time_total=time, self_cpu_time_total=9e6) for key, time in rows]
    events.append(SimpleNamespace(key="sm90_xmma_fprop_kernel", device_type=DeviceType.CUDA, self_device_time_total=3e6, self_cpu_time_total=0))
    assert where_time_goes.seconds_by_kind(events, on_cuda=True) == {"convolution": 3, "batch norm": 1, "batch norm, gradients": 2}


RESULT = {
    "hardware": {"cpu": "A CPU", "gpu": "A GPU"}, "runtime": {"device": "cpu", "threads": 2, "precision": "bfloat16"}, "repeats": 5, "bfloat16_gain": 4.62,
    "peak_gflops": 2500.4, "commit": "0123456789abcdef",
    "cases": [
        {"name": "one", "plain_s": 6.0, "engine_s": 2.0, "ratio": 3.0, "gflop": 555.4, "peak_fraction": 0.112, "plain_mb": 1900.4, "engine_mb": 1700.0,
         "engine_float32_s": 2.5},
        {"name": "two", "plain_s": 1.0, "engine_s": 0.5, "ratio": 2.0, "gflop": 1.0, "peak_fraction": 0.1, "plain_mb": 10.0, "engine_mb": 11.0},
    ],
}  # fmt: skip


def test_tables_of_speed_come_from_the_results(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "simulations" / "benchmarks"))
    import speed_table

    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "box.json").write_text(json.dumps(RESULT))
    text = "<!-- speed: box -->\nold\n<!-- end of speed -->\n<!-- speed: other -->\nkept\n<!-- end of speed -->\n"
    found = speed_table.with_tables(text, tmp_path)
    assert "| one | 6.00 s | 2.00 s | **3.0** | 2.50 s | 555 | 11% | 1900 | 1700 |" in found
    assert "| two | 1.00 s | 0.50 s | **2.0** | - |" in found
    assert "A CPU, 2 threads" in found
    assert "Commit 0123456789." in found
    assert "old" not in found
    assert "kept" in found
    committed = (repository / "simulations" / "README.md").read_text(encoding="utf-8")
    assert speed_table.with_tables(committed, repository / "simulations" / "results") == committed, "run `make report`"


def test_other_tables_come_from_their_results(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "simulations" / "benchmarks"))
    import speed_table

    common = {"hardware": {"cpu": "A CPU", "cores": 2}, "rows": []}
    row = {"path": "plain 300", "target": 0.77, "commit": "0123456789abc"}
    rows = [{**row, "seed": seed, "seconds": seconds, "accuracy": found} for seed, seconds, found in ((0, 500.0, 0.78), (1, 520.0, 0.76))]
    many = {"teachers": 20, "per_step": 5, "iterations": 7, "seconds_per_iteration": 0.612, "accuracy": 0.5, "ensemble_estimated": 0.6, "student_mb": 11.0}
    many |= {"teachers_and_activations_mb": 100.4, "gradients_and_optimiser_mb": 22.0, "teacher_files_mb": 7.7, "commit": "0123456789abc"}
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "box-time-to-accuracy.json").write_text(json.dumps({**common, "rows": rows}))
    (tmp_path / "speed" / "box-many-teachers.json").write_text(json.dumps({**common, "rows": [many]}))
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "fast-distillation.csv").write_text(
        "candidate,seed,student_merged,commit_of_run\nslow,100,0.70,0123456789abc\nquick,101,0.75,0123456789abc\n"
        "slow,101,0.72,0123456789abc\nfast,100,0.71,0123456789abc\n"
    )
    kinds = {"time to accuracy": "box", "many teachers": "box", "recipes": "fast"}
    found = speed_table.with_tables("".join(f"<!-- {kind}: {name} -->\n<!-- end of {kind} -->\n" for kind, name in kinds.items()), tmp_path)
    assert "| plain 300 | 0, 1 | 510 ± 14 s | 77.0 ± 1.4 | 77.0 ± 0.0 | 1 of 2 |" in found
    assert "| 20 | 5 | 7 | 0.61 | 50.0 (ensemble 60.0) | 100 MB | 11 MB | 22 MB | 8 MB |" in found
    assert found.index("| fast | 71.0 | - |") < found.index("| slow | 70.0 | 72.0 |") < found.index("| quick | - | 75.0 |")


def test_memory_of_many_teachers_is_without_what_the_student_has(speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers that took no part in the last step have no gradients, and none may be taken off."""
    import many_teachers

    monkeypatch.setattr(many_teachers, "CELL", "digits")
    monkeypatch.setattr(many_teachers, "RUNS", tmp_path)
    monkeypatch.setattr(many_teachers, "RESIDENT", 2)
    seen: list[Any] = []
    measure = many_teachers.learner_bytes
    monkeypatch.setattr(many_teachers, "learner_bytes", lambda student: (seen.append(student), measure(student))[1])
    write_teachers(resolve("digits", ["clients.count=3", "clients.epochs=1", "data.train_size=200"]), tmp_path / "3-0")
    found = many_teachers.measured(3, 0, 1, 2)
    (student,) = seen
    with_gradients = sum(4 * parameter.numel() for parameter in student.parameters() if parameter.grad is not None)
    weights = sum(4 * parameter.numel() for parameter in student.parameters())
    assert 0 < with_gradients < weights
    assert found["gradients_and_optimiser_mb"] == round((with_gradients + 2 * weights) / 2**20, 1)
    assert found["student_mb"] == round(weights / 2**20, 1)
    assert found["runtime"]["fold"] is False, "two of three teachers stay on the device"
    assert 0 < found["teachers_and_activations_mb"] < 1000
    assert 0 < found["accuracy"] <= 1


def test_time_to_accuracy_stops_at_the_shortest_plain_run_that_suffices_and_repeats_nothing(
    speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time_to_accuracy as timed

    calls: list[Any] = []
    accuracies = {("product", 0): 0.8, ("product", 1): 0.8, (6, 0): 0.7, (12, 0): 0.8, (12, 1): 0.9}

    class Federation:
        target = 0.75

        def __init__(self, config: Any) -> None:
            self.config = config

        def merged(self, student: Any) -> float:
            return accuracies[student]

    def run(federation: Federation, how: Any, device: str = "cpu") -> tuple[Any, float]:
        key = ("product" if isinstance(how, list) else how, federation.config.seed)
        calls.append(key)
        return key, 1.25

    for name in ("product", "plain"):
        monkeypatch.setattr(timed, name, run)
    monkeypatch.setattr(timed, "Federation", Federation)
    monkeypatch.setattr(timed, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["time_to_accuracy.py", "--seeds", "0", "1", "--plain", "6", "12", "24"])
    for _ in range(2):
        timed.main()
    assert calls == [("product", 0), ("product", 1), (6, 0), (12, 0), (12, 1)]
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["path"], row["seed"], row["seconds"], row["accuracy"]) for row in rows][2] == ("plain 6", 0, 1.2, 0.7)


def test_both_paths_of_time_to_accuracy_train_a_student(speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time_to_accuracy as timed

    from cdfkd_strategy.run_config import resolve

    tiny = ["data.train_size=300", "clients.count=2", "clients.epochs=1", "method.batch_size=8", "method.epochs=1", "method.iterations=2"]
    tiny += ["method.generator={width: 0.25}", "engine.device=cpu", "clients.architectures=[small_cnn]", "student.backbone=small_cnn"]
    monkeypatch.setattr(timed, "CELL", "digits")
    monkeypatch.setattr(timed, "RUNS", tmp_path)
    federation = timed.Federation(resolve("digits", tiny))
    assert timed.product(federation, [*tiny, "student.stages=1"])[0].spec.stages == 1
    for student, seconds in (timed.product(federation, tiny), timed.plain(federation, 3, "cpu")):
        assert seconds > 0
        assert 0 <= federation.merged(student) <= 1
        first = federation.student()
        assert any(not torch.equal(one, other) for one, other in zip(first.parameters(), student.parameters(), strict=True))
    assert federation.target <= timed.SHARE
