"""The two apps: configuration from Flower's run configuration, run directory, summary, several rounds."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from cdfkd_strategy.checkpoint import write_json
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.errors import CheckpointError, ConfigError
from cdfkd_strategy.flower.apps import from_run_config, make_client_app, make_server_app, serve
from cdfkd_strategy.flower.simulation import backend, simulate
from cdfkd_strategy.student_io import load_student
from cdfkd_strategy.summary import read_summary
from tests.flower.memory_grid import Killed, MemoryGrid, project_grid, tiny_config


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


@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"heads": "one"}},
        {"student": {"heads": "plain"}},
        {"clients": {"init": "own"}},
        {"clients": {"device": "cuda"}},
        {"server": {"transfer_set": "images.safetensors"}},
    ],
)
def test_settings_without_a_meaning_between_server_and_clients_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    (section,) = changes
    config = tiny_config(**changes)
    with pytest.raises(ConfigError, match=rf"{section}\.\w+ is \S+; accepted with Flower: "):
        serve(project_grid(config), config, tmp_path / "run", resume=False)
    with pytest.raises(ConfigError, match="accepted with Flower"):
        simulate(config, tmp_path / "run")


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


class Deaths:
    """Kills the server at one of the moments at which ``state.json`` or ``summary.json`` is written, before or after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moments: list[str] = []
        self.fatal: int | None = None
        for module in ("cdfkd_strategy.flower.run_state", "cdfkd_strategy.summary"):
            monkeypatch.setattr(f"{module}.write_json", self._write)

    def _write(self, path: Path, value: Any) -> None:
        self._pass(f"before {path.name}")
        write_json(path, value)
        self._pass(f"after {path.name}")

    def _pass(self, moment: str) -> None:
        self.moments.append(moment)
        if len(self.moments) == self.fatal:
            raise Killed(moment)


def test_killed_between_any_two_files_the_next_start_of_the_app_finishes_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdfkd_strategy.flower.apps._draw", lambda *_: None)
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(to_dict(tiny_config(data={"train_size": 90}, server={"node_wait": 0.2, "fraction_evaluate": 0.0}))))
    deaths = Deaths(monkeypatch)

    def start(out: Path) -> dict[str, Any]:
        values = {"config": str(path), "overrides": "method.epochs=1", "out": str(out)}
        make_server_app()(MemoryGrid([make_client_app()] * 3), Context(1, 0, {}, RecordDict(), values))
        return read_summary(out)

    expected = start(tmp_path / "whole")
    total, after = len(deaths.moments), [number for number, moment in enumerate(deaths.moments, 1) if moment.startswith("after")]
    assert deaths.moments[0] == "before state.json"  # without it a start finds a directory that is not empty, and nothing to continue
    assert deaths.moments[-3:] == ["after state.json", "before summary.json", "after summary.json"]
    for number in (1, *after):
        out = tmp_path / str(number)
        deaths.moments, deaths.fatal = [], number
        with pytest.raises(Killed) as death:
            start(out)
        deaths.fatal = None
        if (out / "summary.json").exists():
            finished = read_summary(out)["finished"]
            assert finished == (number == total), death.value
            state = json.loads((out / "state.json").read_text())
            assert not finished or state["phase"] == "evaluated"
            if state["phase"] == "evaluated":
                assert len(read_summary(out)["rounds"]) == 1, "a round that is over has its accuracies"
        summary = start(out)
        assert summary["finished"], death.value
        assert [record["accuracy"] for record in summary["rounds"]] == [record["accuracy"] for record in expected["rounds"]], death.value
        assert (out / "student.safetensors").read_bytes() == (tmp_path / "whole" / "student.safetensors").read_bytes()


def test_a_directory_in_which_nothing_was_begun_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that died before its first file, once more with ``resume``; and it may die there again."""
    config = tiny_config(data={"train_size": 90}, server={"node_wait": 0.2, "fraction_evaluate": 0.0})
    (tmp_path / ".state.json.7.tmp").write_text("{")
    deaths = Deaths(monkeypatch)
    deaths.fatal = 1
    with pytest.raises(Killed, match=r"before state\.json"):
        serve(project_grid(config), config, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == []
    deaths.fatal = None
    serve(project_grid(config), config, tmp_path, resume=True)
    assert read_summary(tmp_path)["finished"]


def test_a_finished_run_that_goes_on_is_unfinished_before_its_state_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tiny_config(engine={"max_seconds": 0.0}, server={"node_wait": 0.2, "fraction_evaluate": 0.0})
    serve(project_grid(short), short, tmp_path / "run", resume=False)
    assert read_summary(tmp_path / "run")["stopped_by"] == "max_seconds"
    long = dataclasses.replace(short, engine=dataclasses.replace(short.engine, max_seconds=None))
    deaths = Deaths(monkeypatch)
    deaths.fatal = 3  # the summary is the first file, and the state the second
    with pytest.raises(Killed, match=r"before state\.json"):
        serve(project_grid(long), long, tmp_path / "run", resume=True)
    assert not read_summary(tmp_path / "run")["finished"]
    deaths.fatal = None
    serve(project_grid(long), long, tmp_path / "run", resume=True)
    assert read_summary(tmp_path / "run")["stopped_by"] == "schedule"


def test_what_a_first_write_left_does_not_block_the_directory(tmp_path: Path) -> None:
    (tmp_path / ".state.json.77.tmp").write_text("{")
    config = tiny_config()
    serve(project_grid(config), config, tmp_path, resume=False)
    assert not (tmp_path / ".state.json.77.tmp").exists()


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
