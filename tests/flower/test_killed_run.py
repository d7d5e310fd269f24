"""`cdfkd run`, all of whose processes are killed in the middle of the distillation, resumes to the uninterrupted run's student."""

from __future__ import annotations

import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cdfkd_strategy.flower.apps import serve
from cdfkd_strategy.run_config import resolve
from cdfkd_strategy.summary import read_summary
from tests.flower.memory_grid import project_grid

EPOCHS = 20
SETTINGS = [
    *("data.train_size=150", "data.test_size=60", "data.partition.alpha=0.5", "data.partition.min_samples=20"),
    *("clients.count=2", "clients.architectures=[lenet_bn]", "clients.epochs=1", "server.fraction_evaluate=0", "student.backbone=lenet_bn"),
    *(f"method.epochs={EPOCHS}", "method.iterations=4", "method.student_steps=2", "method.batch_size=16"),
    *("method.generator.width=0.1", "method.generator.latent_dim=8"),
    *("engine.device=cpu", "engine.threads=1", "engine.precision=float32", "engine.watch_images=0", "engine.evaluate_every=0"),
]


def start(repository: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """`cdfkd run digits` in a session of its own, without pictures: they would take longer than the run."""
    code = "import sys; sys.modules['matplotlib.figure'] = None; from cdfkd_strategy.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "run", "digits", "--out", str(out), *SETTINGS, *options]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=out.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def family(pid: int) -> set[int]:
    """A process and everything below it, Ray's daemons and workers included, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it has just ended
        children.setdefault(parent, []).append(int(entry.parent.name))
    found, waiting = set[int](), [pid]
    while waiting:
        found.add(one := waiting.pop())
        waiting += [child for child in children.get(one, []) if child not in found]
    return found


def kill(pids: set[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def finished(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        kill(family(process.pid))
    assert process.returncode == 0, output
    return output


def epochs_done(out: Path) -> int:
    with (out / "losses.csv").open(encoding="utf-8") as file:
        return len(list(csv.DictReader(file)))


def digest(out: Path) -> str:
    return hashlib.sha256((out / "student.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the processes to kill are found in /proc")
def test_a_run_whose_processes_are_all_killed_resumes_to_the_same_student(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start(repository, out)
    try:
        deadline = time.monotonic() + 200
        while not (out / "checkpoint" / "state.json").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint in 200 s"
            time.sleep(0.01)
        everybody = family(process.pid)
    finally:
        kill(family(process.pid))
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(everybody) > 3, "Ray's processes were found too"
    done = epochs_done(out)
    assert 1 <= done < EPOCHS
    assert not read_summary(out)["finished"]
    assert not (out / "student.safetensors").exists()

    output = finished(start(repository, out, "--resume"))
    assert "phase 'distilling', with 2 stored uploads" in output
    assert "uploaded a lenet_bn" not in output, "no client was asked again"
    config = resolve("digits", SETTINGS)
    serve(project_grid(config), config, tmp_path / "whole", resume=False)  # what a simulation gives, bit for bit (test_simulation.py), without Ray
    assert read_summary(out)["finished"]
    assert epochs_done(out) == epochs_done(tmp_path / "whole") == EPOCHS
    assert digest(out) == digest(tmp_path / "whole")
