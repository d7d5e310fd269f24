"""The calibration script, end to end on a tiny federation: both tables, and nothing is done twice."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


def run(repository: Path, where: Path, what: str, *more: str, plan: str = "plan.yaml") -> subprocess.CompletedProcess[str]:
    script = repository / "simulations" / "calibrate.py"
    arguments = [str(where / plan), what, "--runs", str(where / "runs"), "--results", str(where / "results"), *more]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    return subprocess.run([sys.executable, str(script), *arguments], cwd=where, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_federations_are_held_out_compared_and_distilled_once(repository: Path, tmp_path: Path) -> None:
    base = tmp_path / "tiny.yaml"
    base.write_text(yaml.safe_dump({"base": "digits", "data": {"train_size": 200}, "clients": {"count": 2, "epochs": 1, "architectures": ["lenet_bn"]}}))
    toy = ["method.epochs=1", "method.iterations=1", "method.student_steps=1", "method.batch_size=8", "student.backbone=lenet_bn"]
    plan = {
        "name": "tiny",
        "validation_size": 100,
        "competence": [str(base)],
        "competence_seeds": {str(base): [5]},
        "distillation": [str(base)],
        "distillation_seeds": [5],
        "common": toy,
        "candidates": {"plain": [], "slow student": ["method.student_lr=0.001"]},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    done = run(repository, tmp_path, "competence")
    assert done.returncode == 0, done.stderr
    (teachers,) = (tmp_path / "runs").iterdir()
    assert json.loads((teachers / "teachers.json").read_text())["config"]["data"]["validation_size"] == 100
    rows = list(csv.DictReader((tmp_path / "results" / "tiny-competence.csv").open()))
    assert len(rows) == 5 * 5 * 4  # the grid of powers
    assert {row["feature_power"] for row in rows} >= {"0.0000", "1.0000"}, "row norms alone are in it"
    assert len({row["oracle"] for row in rows}) == 1
    assert all(0 <= float(row["estimated"]) <= 1 for row in rows)
    done = run(repository, tmp_path, "distillation")
    assert done.returncode == 0, done.stderr
    table = tmp_path / "results" / "tiny-distillation.csv"
    first = table.read_text()
    assert [row["candidate"] for row in csv.DictReader(first.splitlines())] == ["plain", "slow student"]
    again = run(repository, tmp_path, "distillation")
    assert "==" not in again.stdout  # nothing is distilled twice
    assert table.read_text() == first

    (tmp_path / "other.yaml").write_text(yaml.safe_dump(plan | {"name": "other", "candidates": {"quick student": ["method.student_lr=0.2"]}}))
    (tmp_path / "clash.yaml").write_text(yaml.safe_dump(plan | {"name": "clash", "candidates": {"plain": ["method.student_lr=0.2"]}}))
    assert run(repository, tmp_path, "distillation", plan="other.yaml").returncode == 0
    assert [row["candidate"] for row in csv.DictReader((tmp_path / "results" / "other-distillation.csv").open())] == ["quick student"]
    assert run(repository, tmp_path, "distillation").returncode == 0
    assert table.read_text() == first, "another plan's candidates on the same teachers are not this one's"
    clash = run(repository, tmp_path, "distillation", plan="clash.yaml")
    assert clash.returncode != 0
    assert "plain has a candidate of this name with other settings; give it another name" in clash.stderr

    (tmp_path / "runs").rename(tmp_path / "runs of another machine")
    assert run(repository, tmp_path, "distillation", "--threads", "1").returncode == 0
    assert not (tmp_path / "runs").exists()  # nothing to distil, and so no teachers either
    assert table.read_text() == first
    plan["candidates"] = {"plain": [], "slow student": ["method.student_lr=0.002"], "small": ["method.batch_size=4"]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    third = run(repository, tmp_path, "distillation")
    assert third.returncode == 0, third.stderr
    assert third.stdout.count("==") == 2  # the changed one, and the new one
    before, after = (list(csv.DictReader(text.splitlines())) for text in (first, table.read_text()))
    assert [row["candidate"] for row in after] == ["plain", "slow student", "small"]
    assert after[0] == before[0]
    assert "student_lr=0.002" in after[1]["overrides"]
