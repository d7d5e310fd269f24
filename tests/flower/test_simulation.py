"""Flower's real simulation, with Ray, end to end; and what is said where Ray is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cdfkd_strategy.config import to_dict
from cdfkd_strategy.errors import ConfigError, MissingExtraError
from cdfkd_strategy.flower.apps import serve
from cdfkd_strategy.flower.simulation import simulate
from cdfkd_strategy.summary import read_summary
from tests.flower.memory_grid import project_grid, tiny_config

SCRIPT = """
import json, sys
from pathlib import Path
from cdfkd_strategy.flower.simulation import simulate
from cdfkd_strategy.run_config import from_values
if __name__ == "__main__":
    simulate(from_values(json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_simulation_gives_the_same_student_as_the_in_memory_grid(repository: Path, tmp_path: Path) -> None:
    import json

    config = tiny_config(server={"rounds": 2, "node_wait": 30.0, "timeout": 200.0}, clients={"architectures": ["lenet_bn", "lenet"]})
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), json.dumps(to_dict(config)), str(tmp_path / "ray")]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deprecated" not in done.stderr
    serve(project_grid(config), config, tmp_path / "memory", resume=False)
    ray, memory = (tmp_path / name for name in ("ray", "memory"))
    assert (ray / "student.safetensors").read_bytes() == (memory / "student.safetensors").read_bytes()
    one, two = (read_summary(path) for path in (ray, memory))
    assert one["finished"]
    assert [record["accuracy"] for record in one["rounds"]] == [record["accuracy"] for record in two["rounds"]]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "ray" else find(name, package))
    with pytest.raises(MissingExtraError, match=r'pip install "cdfkd-strategy\[simulation\]"'):
        simulate(tiny_config(), tmp_path)


def test_a_device_that_is_not_there_is_said_before_ray_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flwr.simulation.run_simulation", lambda *_, **__: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match=r"engine\.device is 'cuda:77'"):
        simulate(tiny_config(engine={"device": "cuda:77"}), tmp_path)
