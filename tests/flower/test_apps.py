"""The two apps: configuration from Flower's run configuration, run directory, summary, several rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from cdfkd_strategy.config import to_dict
from cdfkd_strategy.errors import CheckpointError, ConfigError
from cdfkd_strategy.flower.apps import from_run_config, make_client_app, make_server_app, serve
from cdfkd_strategy.flower.simulation import backend
from cdfkd_strategy.student_io import load_student
from cdfkd_strategy.summary import read_summary
from tests.flower.memory_grid import MemoryGrid, project_grid, tiny_config


def test_the_app_files_only_assign(repository: Path) -> None:
    import clients.client_app
    import server.server_app

    assert isinstance(server.server_app.app, ServerApp)
    assert isinstance(clients.client_app.app, ClientApp)
    for name in ("server/server_app.py", "clients/client_app.py"):
        assert len((repository / name).read_text().splitlines()) < 10


def test_a_run_writes_its_directory(tmp_path: Path) -> None:
    config = tiny_config(server={"rounds": 2, "node_wait": 0.2}, clients={"architectures": ["lenet_bn", "lenet"]})
    serve(project_grid(config), config, tmp_path / "run", resume=False)
    summary = read_summary(tmp_path / "run")
    assert summary["finished"]
    assert summary["stopped_by"] == "schedule"
    assert [record["round"] for record in summary["rounds"]] == [1, 2]
    for record in summary["rounds"]:
        assert len(record["accuracy"]["teachers"]) == len(record["accuracy"]["student_heads"]) == 3
        assert record["accuracy"]["student_attention"] is not None
        assert record["accuracy"]["student_single"] is None
        assert record["bytes"]["up"] > 0
        assert record["seconds"]["distill"] > 0
    assert load_student(tmp_path / "run").student.heads == 3


def test_two_runs_of_one_seed_have_the_same_accuracies_and_another_seed_has_not(tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        config = tiny_config() if seed == 0 else tiny_config_of_seed(seed)
        grid = project_grid(config, order=sorted if name == "one" else lambda ids: sorted(ids, reverse=True))
        serve(grid, config, tmp_path / name, resume=False)
        found.append((read_summary(tmp_path / name)["rounds"][0]["accuracy"], (tmp_path / name / "student.safetensors").read_bytes()))
    assert found[0] == found[1]
    assert found[0][1] != found[2][1]


def tiny_config_of_seed(seed: int) -> object:
    import dataclasses

    return dataclasses.replace(tiny_config(), seed=seed)


def test_an_interrupted_run_keeps_the_rounds_of_its_summary(tmp_path: Path) -> None:
    one, two = tiny_config(server={"rounds": 2, "node_wait": 0.2}), tmp_path / "run"
    grid = project_grid(one)
    grid.dead = set()

    def edit(node: int, reply: object) -> object:
        if len(grid.asked("evaluate")) > 3:  # round 2
            raise KeyboardInterrupt
        return reply

    grid.edit = edit  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        serve(grid, one, two, resume=False)
    assert not read_summary(two)["finished"]
    with pytest.raises(CheckpointError, match="not empty"):
        serve(project_grid(one), one, two, resume=False)
    again = project_grid(one, first_node=77_000_000)
    serve(again, one, two, resume=True)
    assert again.asked("train") == []
    summary = read_summary(two)
    assert summary["finished"]
    assert [record["round"] for record in summary["rounds"]] == [1, 2]


def test_the_apps_take_flowers_run_configuration(tmp_path: Path) -> None:
    config = tiny_config()
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(to_dict(config)))
    grid = MemoryGrid([make_client_app()] * 3)
    values = {"config": str(path), "overrides": "method.epochs=1 server.fraction_evaluate=0.0", "out": str(tmp_path / "run")}
    make_server_app()(grid, Context(1, 0, {}, RecordDict(), values))
    summary = read_summary(tmp_path / "run")
    assert summary["config"]["method"]["epochs"] == 1
    assert grid.asked("evaluate") == []
    assert list((tmp_path / "run").glob("*.png"))


def test_run_configuration_errors() -> None:
    with pytest.raises(ConfigError, match="out is 'runs/1'; accepted: an absolute path"):
        from_run_config({"config": "digits", "overrides": "", "out": "runs/1"})
    with pytest.raises(ConfigError, match="nonesuch"):
        from_run_config({"config": "nonesuch"})


def test_a_client_gets_as_many_cores_as_it_was_promised() -> None:
    assert backend(tiny_config())["client_resources"] == {"num_cpus": 1, "num_gpus": 0.0}
    with pytest.raises(ConfigError, match="num_cpus is 100000; accepted on this machine: at most"):
        backend(tiny_config(clients={"num_cpus": 100_000}))


def test_flower_is_told_to_be_quiet_before_it_is_imported(repository: Path) -> None:
    code = (
        "import sys, os; import cdfkd_strategy.flower as f; assert 'flwr' not in sys.modules; "
        "print(*(os.environ[k] for k in ('FLWR_TELEMETRY_ENABLED', 'FLWR_DISABLE_UPDATE_CHECK', "
        "'FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION', 'RAY_USAGE_STATS_ENABLED')))"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "RAY_"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, env=bare, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "1", "0"]
