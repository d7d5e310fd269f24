"""`flwr run` on this repository, from an empty directory, with a Flower home and a SuperLink of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdfkd_strategy.summary import read_summary

OVERRIDES = (
    "clients.count=2 clients.epochs=1 clients.architectures=[lenet_bn] student.backbone=lenet_bn "
    "method.epochs=1 method.iterations=2 method.batch_size=16 method.generator.width=0.125"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_with(text: str) -> list[int]:
    """Ids of the processes whose command line or environment has this text (Linux)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                whole = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:  # it has ended, or is not ours
                continue
            if text.encode() in whole:
                found.append(int(folder.name))
    return found


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of `flwr`; the SuperLink that it leaves behind is ended afterwards."""
    home = tmp_path / "flower-home"
    home.mkdir()
    programs = str(Path(sys.executable).parent)
    settings = {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": programs + os.pathsep + os.environ["PATH"],
    }
    yield {**os.environ, **settings}
    for process in processes_with(f"FLWR_HOME={home}"):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


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
