"""A server that dies at any moment continues to the same student, and asks nobody twice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

from cdfkd_strategy.errors import CheckpointError
from cdfkd_strategy.flower import distillation
from cdfkd_strategy.flower.run_state import RunDirectory
from cdfkd_strategy.flower.strategy import CDFKDStrategy
from cdfkd_strategy.flower.uploads import Uploads
from cdfkd_strategy.methods.cdfkd_mfs import CDFKDMFS
from cdfkd_strategy.student_io import load_student
from tests.flower.memory_grid import FIRST_NODE, Killed, MemoryGrid, echo_app, tiny_strategy

ROUNDS = 2
APPS = [echo_app(teacher={"arch": "lenet"})] * 2 + [echo_app(teacher={"arch": "lenet_bn"})]


def start(run_dir: Path, *, resume: bool = False, first_node: int = FIRST_NODE, rounds: int = ROUNDS, **choices: Any) -> tuple[CDFKDStrategy, MemoryGrid, Any]:
    grid = MemoryGrid(APPS, first_node=first_node)
    strategy = tiny_strategy(run_dir=run_dir, resume=resume, architectures=["lenet", "lenet_bn"], **choices)
    result = strategy.start(grid, num_rounds=rounds, timeout=5, evaluate_fn=lambda number, arrays: MetricRecord({"arrays": float(len(arrays)) + number}))
    return strategy, grid, result


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "student.safetensors").read_bytes()).hexdigest()


class Moments:
    """Counts the moments at which state or files change, and kills the server at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed: list[str] = []
        self.fatal: int | None = None
        for owner, name in (
            (Uploads, "put"),
            (Uploads, "remove"),
            (RunDirectory, "save"),
            (RunDirectory, "clear_distillation"),
            (CDFKDMFS, "_student_step"),
            (CDFKDMFS, "_generator_step"),
            (distillation, "save_student"),
        ):
            monkeypatch.setattr(owner, name, self._around(name, getattr(owner, name)))
        engine = sys.modules["cdfkd_strategy.engine"]
        monkeypatch.setattr(engine, "save_state", self._around("checkpoint", engine.save_state))

    def _around(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._pass(f"before {name}")
            result = original(*args, **kwargs)
            self._pass(f"after {name}")
            return result

        return wrapped

    def _pass(self, moment: str) -> None:
        self.passed.append(moment)
        if len(self.passed) == self.fatal:
            raise Killed(moment)

    def arm(self, number: int | None) -> None:
        self.passed.clear()
        self.fatal = number


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Moments:
    return Moments(monkeypatch)


def test_killed_at_seeded_moments_the_resumed_run_gives_the_same_student_and_asks_nobody_twice(tmp_path: Path, moments: Moments) -> None:
    whole, _, expected = start(tmp_path / "whole")
    total = len(moments.passed)
    kinds = {moment.split()[1] for moment in moments.passed}
    assert kinds == {"put", "save", "clear_distillation", "_student_step", "_generator_step", "save_student", "checkpoint"}
    for number in sorted(random.Random(0).sample(range(1, total + 1), 10)):
        run_dir = tmp_path / str(number)
        moments.arm(number)
        with pytest.raises(Killed):
            start(run_dir)
        moments.arm(None)
        stored = {path.stem: json.loads(path.read_text())["round"] for path in (run_dir / "uploads").glob("*.json")} if (run_dir / "uploads").exists() else {}
        strategy, grid, result = start(run_dir, resume=True, first_node=FIRST_NODE * 3)
        assert digest(run_dir) == digest(tmp_path / "whole"), number
        asked = [(content["config"]["server-round"], str(partition)) for content, partition in zip(grid.contents("train"), grid.asked("train"), strict=True)]
        assert len(asked) == len(set(asked))
        assert not {(last, key) for key, last in stored.items()} & set(asked), number
        assert {key: array.data for key, array in result.arrays.items()} == {key: array.data for key, array in expected.arrays.items()}
        assert result.evaluate_metrics_serverapp == expected.evaluate_metrics_serverapp
        assert result.train_metrics_clientapp == expected.train_metrics_clientapp
        assert strategy.generator is not None
        assert [record.bytes["up"] for record in strategy.rounds] == [record.bytes["up"] for record in whole.rounds]


@pytest.mark.parametrize(("moment", "train"), [("after put", [1, 2]), ("before save_student", []), ("after save_student", [])])
def test_each_phase_continues_where_it_stopped(moment: str, train: list[int], tmp_path: Path, moments: Moments) -> None:
    start(tmp_path / "whole", rounds=1)
    number = moments.passed.index(moment) + 1
    moments.arm(number)
    with pytest.raises(Killed):
        start(tmp_path / "run", rounds=1)
    moments.arm(None)
    _, grid, _ = start(tmp_path / "run", resume=True, rounds=1)
    assert grid.asked("train") == train
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_killed_between_distillation_and_evaluation_only_evaluates(tmp_path: Path, moments: Moments) -> None:
    class Mourning(Exception): ...

    def failing(number: int, arrays: ArrayRecord) -> MetricRecord:
        raise Mourning

    start(tmp_path / "whole", rounds=1)
    with pytest.raises(Mourning):
        tiny_strategy(run_dir=tmp_path / "run", architectures=["lenet", "lenet_bn"]).start(MemoryGrid(APPS), num_rounds=1, timeout=5, evaluate_fn=failing)
    moments.arm(None)
    strategy, grid, result = start(tmp_path / "run", resume=True, rounds=1)
    assert grid.asked("train") == []
    assert "before _student_step" not in moments.passed
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert result.evaluate_metrics_serverapp[1]["arrays"] == len(result.arrays) + 1
    assert strategy.teachers is not None
    assert strategy.generator is not None


def test_a_finished_run_is_read_back_and_can_be_prolonged(tmp_path: Path, moments: Moments) -> None:
    start(tmp_path / "long", rounds=3)
    start(tmp_path / "run", rounds=2)
    moments.arm(None)
    strategy, grid, result = start(tmp_path / "run", resume=True, rounds=2)
    assert grid.log == []
    assert "before _student_step" not in moments.passed
    assert sorted(result.evaluate_metrics_serverapp) == [1, 2]
    assert strategy.student is not None
    _, grid, _ = start(tmp_path / "run", resume=True, rounds=3, first_node=7 * FIRST_NODE)
    assert grid.asked("train") == [0, 1, 2]
    assert digest(tmp_path / "run") == digest(tmp_path / "long")
    assert [path.name for path in sorted((tmp_path / "run").glob("losses*"))] == ["losses-round1.csv", "losses-round2.csv", "losses.csv"]


def test_a_single_header_is_restored(tmp_path: Path, moments: Moments) -> None:
    choices = {"broadcast": "single", "single_steps": 2}
    start(tmp_path / "whole", **choices)
    whole = (tmp_path / "whole" / "student-single.safetensors").read_bytes()
    moments.arm(len(moments.passed) - 30)
    with pytest.raises(Killed):
        start(tmp_path / "run", **choices)
    moments.arm(None)
    strategy, _, _ = start(tmp_path / "run", resume=True, **choices)
    assert strategy.single is not None
    assert (tmp_path / "run" / "student-single.safetensors").read_bytes() == whole


def test_the_run_directory_holds_a_loadable_student_and_nothing_unbounded(tmp_path: Path) -> None:
    strategy, _, _ = start(tmp_path, rounds=3)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        *(f"uploads/{key}.{kind}" for key in "012" for kind in ("json", "safetensors")),
        *(f"checkpoint{kind}/state.{end}" for kind in ("", ".previous") for end in ("json", "safetensors")),
        *("state.json", "student.json", "student.safetensors", "generator.safetensors", "losses.csv", "losses-round1.csv", "losses-round2.csv"),
    }
    assert strategy.teachers is not None
    assert load_student(tmp_path).weights.numpy() == pytest.approx(strategy.teachers.weights.numpy(), abs=1e-6)


def test_a_directory_that_is_not_empty_needs_resume(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty; continue it with resume=True"):
        tiny_strategy(run_dir=tmp_path)


@pytest.mark.parametrize(
    ("choices", "name"),
    [({"seed": 1}, "seed"), ({"weights": "uniform"}, "weights"), ({"method_config": {"epochs": 3}}, "method_config"), ({"student": "lenet"}, "student")],
)
def test_other_settings_cannot_continue_a_run(choices: dict[str, Any], name: str, tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    with pytest.raises(CheckpointError, match=f"was started with another {name}"):
        start(tmp_path, resume=True, rounds=2, **choices)


def test_another_train_configuration_or_initialisation_cannot_continue_a_run(tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    strategy = tiny_strategy(run_dir=tmp_path, resume=True, architectures=["lenet", "lenet_bn"])
    with pytest.raises(CheckpointError, match="train_config"):
        strategy.start(MemoryGrid(APPS), num_rounds=2, train_config=ConfigRecord({"lr": 1.0}))


def test_a_changed_upload_is_noticed(tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    first, second = tmp_path / "uploads" / "0.safetensors", tmp_path / "uploads" / "1.safetensors"
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="not those that were uploaded"):
        start(tmp_path, resume=True, rounds=2)
    first.write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"0.safetensors is not an upload of this run"):
        start(tmp_path, resume=True, rounds=2)
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError):
        start(tmp_path, resume=True, rounds=2)


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import tests.flower.conftest
from tests.flower import test_resume
where, module, owner, name, count = sys.argv[1:]
target = getattr(__import__(module, fromlist=["x"]), owner)
original, left = getattr(target, name), [int(count)]
def dying(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(target, name, dying)
test_resume.start(Path(where), rounds=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "owner", "name", "count", "asked"),
    [
        ("cdfkd_strategy.flower.uploads", "Uploads", "put", 3, [2]),
        ("cdfkd_strategy.methods.cdfkd_mfs", "CDFKDMFS", "_student_step", 3, []),
        ("cdfkd_strategy.flower.session", "Session", "finish_round", 1, []),
    ],
)
def test_sigkill(module: str, owner: str, name: str, count: int, asked: list[int], repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), module, owner, name, str(count)]
    died = subprocess.run(command, cwd=repository, env=os.environ | {"PYTHONPATH": str(repository)}, capture_output=True, text=True, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    _, grid, _ = start(tmp_path / "run", resume=True, rounds=1)
    start(tmp_path / "whole", rounds=1)
    assert grid.asked("train") == asked
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
