"""`flwr run` on this repository, from an empty directory, with a Flower home and a SuperLink of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdfkd_strategy.summary import read_summary
from tests.flower.flower_processes import end_all, environment_of

OVERRIDES = (
    "clients.count=2 clients.epochs=1 clients.architectures=[lenet_bn] student.backbone=lenet_bn "
    "method.epochs=1 method.iterations=2 method.batch_size=16 method.generator.width=0.125"
)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of `flwr`; the SuperLink that it leaves behind is ended afterwards."""
    home = tmp_path / "flower-home"
    yield environment_of(home)
    end_all(home)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the SuperLink that Flower leaves behind is found through /proc")
def test_flwr_run_completes(environment: dict[str, str], repository: Path, tmp_path: Path) -> None:
    empty, out = tmp_path / "empty", tmp_path / "run"
    empty.mkdir()

    def flwr(*arguments: str) -> str:
        command = ["flwr", *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    federation = "num-supernodes=2 client-resources-num-cpus=1"
    log = flwr("run", str(repository), "--stream", "--federation-config", federation, "--run-config", f'overrides="{OVERRIDES}" out="{out}"')
    runs = json.loads(flwr("list", "--format", "json"))["runs"]
    assert [run["status"] for run in runs] == ["finished:completed"], log
    summary = read_summary(out)
    assert summary["finished"]
    assert len(summary["rounds"][0]["accuracy"]["teachers"]) == 2
