"""A bench's configuration: rows, cells, seeds, and errors before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cdfkd_strategy.bench.config import ROW_KEYS, BenchConfig, resolve_bench
from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.errors import ConfigError, UnknownNameError
from cdfkd_strategy.methods import METHODS
from cdfkd_strategy.run_config import bench_names, config_names
from tests.bench.tiny import VALUES, tiny


def test_runs_are_all_rows_of_all_cells_seed_by_seed() -> None:
    runs = tiny("seeds=[7, 8]").runs
    expected = [("one", "rdskd"), ("two", "rdskd"), ("two", "mfs")]
    assert [(run.cell, run.row, run.seed) for run in runs] == [(*pair, seed) for seed in (7, 8) for pair in expected]
    assert [str(run.path) for run in runs[:2]] == ["one/rdskd-seed7", "two/rdskd-seed7"]
    for run in runs:
        config = run.config
        assert (config.study, config.cell, config.seed) == ("tiny", run.cell, run.seed)
        assert config.clients.count == (2 if run.cell == "two" else 1)
        assert (config.student.backbone, config.student.heads) == (("lenet_bn", "per_teacher") if run.row == "mfs" else ("lenet_half", "plain"))
        assert config.student.init == "random", "what a row does not say is the bench's"
    assert (runs[0].config.method["generator_epochs"], runs[2].config.method["student_steps"]) == (2, 3)


def test_rows_of_a_cell_share_their_teachers() -> None:
    runs = tiny().runs
    assert [run.teachers for run in runs] == ["one-seed4", "two-seed4", "two-seed4"]
    first, second = (to_dict(run.config) for run in runs[1:])
    assert all(first[part] == second[part] for part in ("data", "clients", "server"))


def test_a_row_may_be_like_another_one() -> None:
    bench = tiny(methods={**VALUES["methods"], "more": {"like": "mfs", "student_steps": 4, "generator": {"latent_dim": 5}}})
    mfs, more = (run for run in bench.runs if run.row in ("mfs", "more"))
    assert (mfs.cell, more.cell, more.config.student) == ("two", "two", mfs.config.student)
    different = {key: value for key, value in more.config.method.items() if value != mfs.config.method[key]}
    assert different == {"student_steps": 4, "generator": {**mfs.config.method["generator"], "latent_dim": 5}}
    with pytest.raises(ConfigError, match=r"methods.last.like is 'more'; accepted: a row that says everything itself: rdskd, mfs"):
        tiny(methods={**VALUES["methods"], "more": {"like": "mfs"}, "last": {"like": "more"}})


def test_only_some_rows() -> None:
    assert [run.row for run in tiny("only=[mfs]").runs] == ["mfs"]
    with pytest.raises(ConfigError, match="only names the rows dafl; accepted: rdskd, mfs"):
        tiny("only=[mfs, dafl]")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["methods.rdskd.epoch=3"], "row 'rdskd' in cell 'one': unknown key method.epoch; accepted under method: generator_epochs"),
        (["methods.rdskd.name=best"], "row 'rdskd' in cell 'one': unknown method 'best'"),
        (["methods.mfs.student.backbone=resnet9"], "unknown architecture 'resnet9'"),
        (["methods.mfs.student.heads=two"], "student.heads is 'two'"),
        (["methods.mfs.cells=[three]"], "methods.mfs.cells is ['three']; accepted: a list of one, two"),
        (["methods.mfs.like=best"], "methods.mfs.like is 'best'; accepted: a row that says everything itself: rdskd"),
        (["methods.mfs.published=[98.2, 98.9]"], "methods.mfs.published is [98.2, 98.9]; accepted: [student, teacher], accuracies from 0 to 1"),
        (["methods.mfs.published=0.98"], "methods.mfs.published is 0.98"),
        (["methods.mfs=cdfkd_mfs"], "methods.mfs is 'cdfkd_mfs'; accepted: a mapping"),
        (["cells.two.clients.cuont=3"], "row 'rdskd' in cell 'two': unknown key clients.cuont"),
        (["config.clients.architectures=[lenet6]"], "unknown architecture 'lenet6'"),
        (["seeds=[]"], "seeds is empty"),
        (["seed=3"], "unknown key seed; accepted under the top level: study, config, methods, seeds"),
    ],
)
def test_a_broken_bench_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(*overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["a/b", "a.b", "", "a b"])
def test_names_that_cannot_be_files_or_keys_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a row or cell is named"):
        tiny(methods={name: VALUES["methods"]["rdskd"]})


def test_no_method_has_a_setting_that_a_row_keeps_for_itself() -> None:
    for name in METHODS:
        assert not set(to_dict(METHODS[name].Config())) & set(ROW_KEYS), name


def test_a_file_may_build_on_a_run_configuration_and_on_another_bench(tmp_path: Path) -> None:
    def write(name: str, values: Any) -> Path:
        (tmp_path / name).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return tmp_path / name

    write("common.yaml", VALUES["config"])
    first = write("first.yaml", {**VALUES, "config": {"base": "common", "clients": {"epochs": 3}}})
    second = write("second.yaml", {"base": "first", "study": "more", "methods": {"rdskd": {"batch_size": 16}, "other": {"name": "rdskd", "cells": ["one"]}}})
    found = resolve_bench(str(first))
    assert to_dict(found.runs[0].config) == to_dict(tiny("config.clients.epochs=3").runs[0].config)
    more = resolve_bench(str(second), ["seeds=[1]"])
    assert [run.row for run in more.runs] == ["rdskd", "other", "rdskd", "mfs"]
    assert (more.runs[0].config.method["batch_size"], more.runs[0].config.method["iterations"], more.runs[0].config.study) == (16, 2, "more")


def test_benches_are_no_run_configurations() -> None:
    assert not [name for name in config_names() if name.startswith("bench/")]
    with pytest.raises(UnknownNameError, match="unknown bench 'nothing'; accepted: ablation, "):
        resolve_bench("nothing")


@pytest.mark.parametrize("name", bench_names())
def test_every_shipped_bench_binds(name: str) -> None:
    bench = resolve_bench(name)
    assert bench.study == name
    assert {run.row for run in bench.runs} == set(bench.methods)
    assert bind(BenchConfig, {**to_dict(bench), "only": []}).runs == bench.runs


def test_a_bench_anywhere_may_stand_on_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": "mnist_methods", "study": "mine", "seeds": [5]}), encoding="utf-8")
    mine, shipped = resolve_bench(str(tmp_path / "mine.yaml")), resolve_bench("mnist_methods")
    assert (mine.study, mine.seeds) == ("mine", (5,))
    assert mine.methods == shipped.methods
