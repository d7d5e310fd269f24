"""Distilling a teacher directory: its data stay the teachers', and label counts need the clients' consent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cdfkd_strategy import cli, offline
from cdfkd_strategy.checkpoint import load_state, save_state, save_tensors
from cdfkd_strategy.competence import weights_of
from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.distiller import METHODS
from cdfkd_strategy.errors import CheckpointError, ConfigError, NeedsError
from cdfkd_strategy.harness import Harness, confusion_matrix
from cdfkd_strategy.local_training import all_clients
from cdfkd_strategy.report import markdown_report
from cdfkd_strategy.run_config import RunConfig, from_values
from cdfkd_strategy.student_io import load_student
from cdfkd_strategy.summary import read_summary
from cdfkd_strategy.teacher_directory import INDEX, keep_teacher, load_teachers
from cdfkd_strategy.types import Needs

VALUES: dict[str, Any] = {
    "study": "s",
    "seed": 5,
    "data": {"name": "digits", "train_size": 200, "test_size": 60, "partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 20}},
    "clients": {"count": 2, "architectures": ["lenet_bn"], "epochs": 1},
    "student": {"backbone": "lenet_bn"},
    "method": {"name": "cdfkd_mfs", "epochs": 1, "iterations": 1, "student_steps": 1, "batch_size": 8, "generator": {"latent_dim": 4, "width": 0.05}},
    "engine": {"device": "cpu", "threads": 1, "watch_images": 0, "progress": False},
}


def train(out: Path, weights: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "usable_cores", lambda: 1)
        offline.write_teachers(from_values(VALUES, [f"server.weights={weights}"]), out)
    return out


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("plain") / "teachers", "auto")


@pytest.fixture(scope="module")
def opted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("opted") / "teachers", "label_counts")


def distil(teachers: Path, out: Path, *overrides: str) -> RunConfig:
    """`cdfkd distill`; the configuration as its run directory has it."""
    assert cli.main(["distill", "--teachers", str(teachers), "--out", str(out), *overrides]) == 0
    return bind(RunConfig, read_summary(out)["config"])


# -- seeds -------------------------------------------------------------------------------------------------------


def test_another_seed_of_the_distillation_leaves_partition_and_test_images_alone(
    teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def counted(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
        seen.append(float((predicted == labels).double().mean()))
        return confusion_matrix(predicted, labels, classes)

    monkeypatch.setattr("cdfkd_strategy.pictures.confusion_matrix", counted)
    monkeypatch.setattr("cdfkd_strategy.pictures._synthetic", lambda *_: None)  # the slow one
    mine, other = distil(teachers, tmp_path / "mine"), distil(teachers, tmp_path / "other", "seed=6")
    assert (mine.seed, mine.data.seed, other.seed, other.data.seed) == (5, None, 6, 5)
    truth = load_teachers(teachers).oracle_label_counts
    for config in (mine, other):
        data = load_data(config.data, config.seed)
        assert torch.equal(data.x_test, load_data(mine.data, 5).x_test)
        counts = Harness(config, data).label_counts
        assert counts is not None
        assert counts.tolist() == truth
    assert (tmp_path / "other" / "labels.png").read_bytes() == (tmp_path / "mine" / "labels.png").read_bytes()
    assert seen == [read_summary(tmp_path / name)["rounds"][0]["accuracy"]["student_merged"] for name in ("mine", "other")]
    assert (tmp_path / "other" / "student.safetensors").read_bytes() != (tmp_path / "mine" / "student.safetensors").read_bytes()
    assert truth is not None
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed.count(["1", *map(str, truth[1]), str(sum(truth[1]))]) == 2, "both runs print the teachers' partition"


def test_the_data_of_teachers_cannot_be_dealt_anew(teachers: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.seed=9: the teachers in .* were made with another value"):
        offline.plan(teachers, ["data.seed=9"])


def test_a_seed_of_the_data_goes_before_the_runs() -> None:
    fixed = from_values(VALUES, ["data.seed=5", "seed=6"])
    free = from_values(VALUES)
    assert torch.equal(load_data(fixed.data, 6).x_train, load_data(free.data, 5).x_train)
    deals = [Harness(config, load_data(config.data, config.seed)).label_counts for config in (fixed, free, from_values(VALUES, ["seed=6"]))]
    assert deals[0] is not None
    assert deals[0].tolist() == deals[1].tolist() != deals[2].tolist()  # type: ignore[union-attr]


def test_training_teachers_ends_with_the_table_of_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "usable_cores", lambda: 1)
    monkeypatch.setattr("cdfkd_strategy.pictures.load_data", pytest.fail)  # the images are at hand already
    (tmp_path / "config.yaml").write_text(json.dumps(VALUES), encoding="utf-8")
    assert cli.main(["teachers", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "teachers")]) == 0
    counts = load_teachers(tmp_path / "teachers").oracle_label_counts
    assert counts is not None
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["client", *map(str, range(10)), "all"] in lines
    assert all([str(client), *map(str, row), str(sum(row))] in lines for client, row in enumerate(counts))


def test_an_interrupted_training_goes_on(teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "usable_cores", lambda: 1)
    (tmp_path / "config.yaml").write_text(json.dumps(VALUES), encoding="utf-8")
    command = ["teachers", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "teachers")]
    trained: list[int] = []

    def job(work: Any) -> Any:
        if trained and not interrupted:
            raise KeyboardInterrupt
        trained.append(work.partition_id)
        return train_job(work)

    train_job, interrupted = all_clients._train_job, []
    monkeypatch.setattr(all_clients, "_train_job", job)
    assert cli.main(command) == cli.INTERRUPTED
    assert "--resume" in capsys.readouterr().err
    assert trained == [0]

    interrupted.append(True)
    assert cli.main(command) == cli.ERROR  # not empty
    assert cli.main([*command, "--resume", "clients.epochs=2"]) == cli.ERROR
    assert "were made with clients.epochs=1, not 2; name another directory" in capsys.readouterr().err
    assert cli.main([*command, "--resume", "clients.architectures=[lenet]"]) == cli.ERROR
    assert "were made with clients.architectures=['lenet_bn'], not ['lenet']" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert "1 of 2 teachers are in" in capsys.readouterr().err
    assert trained == [0, 1]
    for name in ("teacher-0.safetensors", "teacher-1.safetensors"):
        assert (tmp_path / "teachers" / name).read_bytes() == (teachers / name).read_bytes()
    assert load_teachers(tmp_path / "teachers").specs == load_teachers(teachers).specs

    assert cli.main([*command, "--resume"]) == 0  # finished
    assert "client" in capsys.readouterr().out
    assert cli.main([*command, "--resume", "seed=6"]) == cli.ERROR
    assert "were made with seed=5, not 6" in capsys.readouterr().err
    assert trained == [0, 1]


def test_an_interruption_before_the_index_is_written_costs_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "usable_cores", lambda: 1)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(offline, "write_index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            offline.write_teachers(from_values(VALUES), tmp_path)
    monkeypatch.setattr(all_clients, "_train_job", interrupted)
    offline.write_teachers(from_values(VALUES), tmp_path)
    assert len(load_teachers(tmp_path).models) == 2


def test_a_teacher_of_an_interrupted_training_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "usable_cores", lambda: 1)
    config = from_values(VALUES)
    (tmp_path / INDEX).touch()
    keep_teacher(tmp_path, 1, nn.Linear(2, 2), config=to_dict(config), stats={"num_examples": 3.0})
    assert not (tmp_path / INDEX).exists(), "a directory with an index is whole"
    with pytest.raises(CheckpointError, match=r"teacher-1\.safetensors does not hold a 'lenet_bn'"):
        offline.write_teachers(config, tmp_path)
    keep_teacher(tmp_path, 1, nn.Linear(2, 2), config=to_dict(config), stats={})
    with pytest.raises(CheckpointError, match=r"teacher-1\.safetensors does not say how its teacher was trained; remove it"):
        offline.write_teachers(config, tmp_path)
    save_tensors(tmp_path / "teacher-1.safetensors", {}, {"training": "[no JSON"})
    with pytest.raises(CheckpointError, match="does not say how"):
        offline.write_teachers(config, tmp_path)
    (tmp_path / "teacher-1.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"cannot read .*teacher-1\.safetensors"):
        offline.write_teachers(config, tmp_path)


# -- where it is computed ----------------------------------------------------------------------------------------


def test_class_weights_and_first_student_are_computed_where_the_run_began(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def watched(name: str) -> None:
        original = getattr(offline, name)

        def call(*arguments: Any, **named: Any) -> Any:
            seen.append((name, torch.get_num_threads()))
            return original(*arguments, **named)

        monkeypatch.setattr(offline, name, call)

    watched("estimate")
    watched("chosen_student")
    out = tmp_path / "run"
    begun = ["method.epochs=2", "engine.threads=2", "engine.max_seconds=0"]
    offline.distill_directory(offline.plan(teachers, begun), out)
    offline.distill_directory(offline.plan(teachers, ["method.epochs=2", "engine.threads=1"]), out, resume=True)
    assert seen == [("estimate", 2), ("chosen_student", 2)] * 2
    assert (read_summary(out)["stopped_by"], read_summary(out)["runtime"]["threads"]) == ("schedule", 2)
    assert torch.get_num_threads() == 1


def test_seconds_of_epochs_before_a_restart_count(teachers: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["method.epochs=2", "engine.max_seconds=0"]
    offline.distill_directory(offline.plan(teachers, settings), out)
    state = load_state(out / "checkpoint")
    state["history"][0]["seconds"] = 1000.0
    save_state(out / "checkpoint", state)
    offline.distill_directory(offline.plan(teachers, ["method.epochs=2"]), out, resume=True)
    assert 1000 < read_summary(out)["rounds"][0]["seconds"]["distill"] < 1100


# -- label counts ------------------------------------------------------------------------------------------------


def test_counts_that_nobody_disclosed_are_not_used(teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load_teachers(teachers)
    assert found.oracle_label_counts is not None
    assert found.label_counts is None
    with pytest.raises(ConfigError, match=r"did not disclose their label counts; accepted: auto, .*; or train teachers whose clients opt in"):
        offline.plan(teachers, ["server.weights=label_counts"])
    assert cli.main(["distill", "--teachers", str(teachers), "--out", str(tmp_path / "run"), "server.weights=label_counts"]) == 2
    assert not (tmp_path / "run").exists()
    plan = offline.plan(teachers, [])
    assert offline.extras_of(plan.teachers).tensors() == {}
    sneaked = plan._replace(config=from_values(plan.teachers.config, ["server.weights=label_counts"]))
    with pytest.raises(ConfigError, match="did not disclose"):
        offline.distill_directory(sneaked, tmp_path / "sneaked")
    assert "disclosed by every client" not in capsys.readouterr().out


def test_disclosed_counts_are_used_and_said_to_be(opted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdfkd_strategy.pictures.draw_pictures", lambda *_: [])
    config = distil(opted, tmp_path / "run")
    printed = capsys.readouterr()
    words = "disclosed by every client: its label counts per class (server.weights=label_counts)"
    assert words in printed.err
    assert words in printed.out
    assert "ensemble, disclosed label counts" in printed.out
    assert "ensemble, estimated" not in printed.out
    found = load_teachers(opted)
    assert found.label_counts == found.oracle_label_counts
    assert torch.equal(load_student(tmp_path / "run").weights, weights_of(torch.tensor(found.label_counts)))
    summary = read_summary(tmp_path / "run")
    assert summary["config"]["server"]["weights"] == config.server.weights == "label_counts"
    assert "In default clients disclosed their label counts" in markdown_report([summary])
    estimated = distil(opted, tmp_path / "estimated", "server.weights=auto")
    assert estimated.server.weights == "auto"
    assert "disclosed by every client" not in capsys.readouterr().out
    assert "disclosed" not in markdown_report([read_summary(tmp_path / "estimated")])


def test_a_method_that_needs_counts_is_refused_before_a_run_directory_is_made(
    teachers: Path, opted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS["cdfkd_mfs"], "needs", Needs(label_counts=True))
    with pytest.raises(NeedsError, match=r"needs label counts per class, .*train teachers whose clients disclose them \(server\.weights=label_counts\)"):
        offline.plan(teachers, [])
    assert cli.main(["distill", "--teachers", str(teachers), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
    counts = offline.extras_of(offline.plan(opted, ["server.weights=auto"]).teachers).label_counts
    assert counts is not None
    assert counts.tolist() == load_teachers(opted).label_counts
