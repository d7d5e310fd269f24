"""The contract of ``summary.json``: exact keys, null instead of NaN, whole at every moment, and where the result came from."""

from __future__ import annotations

import copy
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdfkd_strategy import provenance
from cdfkd_strategy.data.datasets import DataConfig
from cdfkd_strategy.errors import CDFKDError, CheckpointError
from cdfkd_strategy.report import study_table
from cdfkd_strategy.run_config import RunConfig, from_values
from cdfkd_strategy.summary import SummaryWriter, check_same_config, read_summary, validate
from cdfkd_strategy.types import ImageSpec

SECONDS = {"clients": 1.5, "distill": 20.0, "evaluate": 0.5}


def accuracy(merged: float = 0.5) -> dict[str, Any]:
    return {"teachers": [0.25, 0.5], "student_merged": merged, "student_heads": [0.4, 0.45]}


def written(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text(encoding="utf-8"))


def finished(directory: Path) -> dict[str, Any]:
    writer = SummaryWriter(directory, RunConfig())
    writer.round(1, accuracy(), seconds=SECONDS, traffic={"up": 10, "down": 20}, peak_memory_mb=100.0, runtime={"device": "cpu"})
    writer.finish("schedule")
    return written(directory)


def test_the_keys_are_the_agreed_ones(tmp_path: Path) -> None:
    values = finished(tmp_path)
    assert list(values) == ["study", "cell", "seed", "commit", "hardware", "versions", "config", "runtime", "finished", "stopped_by", "rounds"]
    (record,) = values["rounds"]
    assert list(record) == ["round", "accuracy", "seconds", "bytes", "peak_memory_mb"]
    assert set(record["accuracy"]) == {
        "teachers", "fedavg", "ensemble_uniform", "ensemble_estimated", "ensemble_oracle",
        "student_heads", "student_mean", "student_merged", "student_single", "student_attention",
    }  # fmt: skip
    assert record["accuracy"]["fedavg"] is None
    assert record["accuracy"]["teachers"] == [0.25, 0.5]
    assert record["seconds"] == SECONDS
    assert record["bytes"] == {"up": 10, "down": 20}
    assert values["config"]["method"]["name"] == "cdfkd_mfs"
    assert set(values["versions"]) >= {"python", "torch", "torchvision", "flwr", "numpy"}
    assert (values["finished"], values["stopped_by"]) == (True, "schedule")


def test_a_killed_run_leaves_what_it_has_done(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path, RunConfig())
    assert (written(tmp_path)["finished"], written(tmp_path)["rounds"]) == (False, [])
    writer.round(1, accuracy(), seconds=SECONDS)
    assert (written(tmp_path)["finished"], len(written(tmp_path)["rounds"]), written(tmp_path)["stopped_by"]) == (False, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"], "a temporary file was left"


def test_resume_keeps_the_rounds_and_repeats_a_broken_one(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path, RunConfig())
    for number in (1, 2):
        writer.round(number, accuracy(number / 10), seconds=SECONDS, runtime={"device": "cpu"})
    again = SummaryWriter(tmp_path, RunConfig(), resume=True)
    assert [record["round"] for record in again.values["rounds"]] == [1, 2]
    assert again.values["runtime"] == {"device": "cpu"}
    again.round(2, accuracy(0.9), seconds=SECONDS)
    assert [record["accuracy"]["student_merged"] for record in written(tmp_path)["rounds"]] == [0.1, 0.9]
    SummaryWriter(tmp_path, RunConfig())
    assert written(tmp_path)["rounds"] == [], "without resume a run starts afresh"


class Here:
    """What a start says of the place where it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commit, self.cpu, self.torch = "first", "fast", "2.4"
        monkeypatch.setattr("cdfkd_strategy.summary.commit", lambda: self.commit)
        monkeypatch.setattr("cdfkd_strategy.summary.hardware", lambda: {"cpu": self.cpu})
        monkeypatch.setattr("cdfkd_strategy.summary.versions", lambda: {"torch": self.torch})


def test_a_start_that_computes_no_round_leaves_a_finished_summary_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Here(monkeypatch)
    before = finished(tmp_path)
    here.commit, here.cpu, here.torch = "second", "slow", "2.5"
    longer = from_values({"engine": {"max_seconds": 900}})
    writer = SummaryWriter(tmp_path, longer, resume=True)
    assert not written(tmp_path)["finished"], "until it is known that nothing is left to do"
    writer.finish("schedule")
    assert written(tmp_path) == before


def test_a_run_continued_elsewhere_names_where_it_began_and_where_it_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Here(monkeypatch)
    SummaryWriter(tmp_path, RunConfig()).round(1, accuracy(), seconds=SECONDS)
    SummaryWriter(tmp_path, RunConfig(), resume=True)
    assert "continued" not in written(tmp_path), "the same place"
    here.commit = "second"
    SummaryWriter(tmp_path, RunConfig(), resume=True)  # dies without a round: it may have computed a part of one
    here.cpu = "slow"
    SummaryWriter(tmp_path, RunConfig(), resume=True)
    here.commit, here.cpu, here.torch = "first", "fast", "2.5"
    longer = from_values({"engine": {"max_seconds": 900}})
    writer = SummaryWriter(tmp_path, longer, resume=True)
    writer.round(2, accuracy(), seconds=SECONDS)
    writer.finish("schedule")
    values = read_summary(tmp_path)
    assert (values["commit"], values["hardware"], values["versions"]) == ("first", {"cpu": "fast"}, {"torch": "2.4"})
    assert values["continued"] == [
        {"commit": "second", "hardware": {"cpu": "fast"}, "versions": {"torch": "2.4"}},
        {"commit": "second", "hardware": {"cpu": "slow"}, "versions": {"torch": "2.4"}},
        {"commit": "first", "hardware": {"cpu": "fast"}, "versions": {"torch": "2.5"}},
    ]
    assert values["config"]["engine"]["max_seconds"] == 900
    assert "Measured on fast, None cores; slow, None cores. Commit first, second.\n" in study_table([values], values["study"])


def test_resume_with_another_configuration_says_which_key(tmp_path: Path) -> None:
    SummaryWriter(tmp_path, from_values({"data": {"partition": {"alpha": 0.1}}}))
    with pytest.raises(CheckpointError, match=r"data\.partition\.alpha=0\.1, not 0\.7"):
        SummaryWriter(tmp_path, from_values({"data": {"partition": {"alpha": 0.7}}}), resume=True)
    SummaryWriter(tmp_path, from_values({"data": {"partition": {"alpha": 0.1}}, "engine": {"max_seconds": 5}}), resume=True)


def test_a_run_of_a_version_that_lacked_a_setting_is_the_same_run_with_its_default(tmp_path: Path) -> None:
    config = RunConfig(seed=7)
    SummaryWriter(tmp_path, config)
    before = json.loads((tmp_path / "summary.json").read_text())
    del before["config"]["data"]["image"], before["config"]["server"]["min_available_nodes"]
    check_same_config(before["config"], config)
    with pytest.raises(CheckpointError, match=r"data\.image=None"):
        check_same_config(before["config"], RunConfig(seed=7, data=DataConfig(image=ImageSpec(1, 8, 8, 10))))
    before["config"]["data"]["colour"] = "blue"  # a setting that is no more
    with pytest.raises(CheckpointError, match="data"):
        check_same_config(before["config"], config)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path, broken: float) -> None:
    writer = SummaryWriter(tmp_path, RunConfig())
    writer.round(1, {"fedavg": broken, "teachers": [0.5, broken]}, seconds={"distill": broken}, peak_memory_mb=broken)
    (record,) = written(tmp_path)["rounds"]
    assert record["accuracy"]["fedavg"] is None
    assert record["accuracy"]["teachers"] == [0.5, None]
    assert record["seconds"]["distill"] is None
    assert record["peak_memory_mb"] is None
    assert "NaN" not in (tmp_path / "summary.json").read_text(encoding="utf-8")


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        node: Any = values
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.pop("runtime"), "exactly study"),
        (_set("extra", to=1), "exactly study"),
        (_set("seed", to=True), "seed is True"),
        (_set("rounds", 0, "accuracy", "fedavg", to=93.2), "fedavg is 93.2; accepted: a fraction"),
        (_set("rounds", 0, "accuracy", "fedavg", to=-0.1), "fedavg is -0.1"),
        (_set("rounds", 0, "accuracy", "teachers", to=0.5), "a list of fractions"),
        (_set("rounds", 0, "accuracy", "student", to=0.5), "exactly teachers"),
        (_set("rounds", 0, "round", to=0), "an integer from 1"),
        (_set("rounds", 0, "seconds", "total", to=1), "exactly clients"),
        (_set("rounds", 0, "bytes", "up", to=-1), "bytes.up"),
        (_set("rounds", 0, "bytes", to=None), "a mapping"),
        (_set("stopped_by", to="user"), "stopped_by"),
        (_set("continued", to={}), "continued is {}; accepted: a list"),
        (_set("continued", to=[{"commit": None}]), "continued[0] has the keys commit"),
        (_set("continued", to=[{"commit": 1, "hardware": {}, "versions": {}}]), "continued[0].commit is 1"),
        (_set("stopped_by", to=None), "null exactly while unfinished"),
        (_set("hardware", "memory_gb", to=math.nan), "NaN"),
    ],
)
def test_validate_finds_what_breaks_the_contract(tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    values = finished(tmp_path)
    validate(values)
    broken = copy.deepcopy(values)
    change(broken)
    with pytest.raises(CDFKDError) as caught:
        validate(broken)
    assert words in str(caught.value)


def test_an_accuracy_in_per_cent_is_not_written(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path, RunConfig())
    with pytest.raises(CDFKDError, match="a fraction between 0 and 1"):
        writer.round(1, {"fedavg": 69.5}, seconds=SECONDS)
    assert written(tmp_path)["rounds"] == []


def test_reading_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(CDFKDError, match=r"no .*summary\.json"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(CDFKDError, match=r"cannot read .*summary\.json"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CDFKDError, match=r"summary\.json: the summary has the keys"):
        read_summary(tmp_path)


def _git(tree: Path, *arguments: str) -> str:
    command = ["git", "-C", str(tree), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_marked_dirty_by_sources_and_not_by_results(tmp_path: Path) -> None:
    assert provenance.commit(tmp_path) is None, "not a checkout"
    _git(tmp_path, "init", "-q")
    assert provenance.commit(tmp_path) is None, "no commit yet"
    source = tmp_path / "cdfkd_strategy" / "engine.py"
    source.parent.mkdir()
    source.write_text("one\n", encoding="utf-8")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "first")
    head = _git(tmp_path, "rev-parse", "HEAD")
    results = tmp_path / "simulations" / "results"
    results.mkdir(parents=True)
    (results / "summary.json").write_text("{}", encoding="utf-8")
    assert provenance.commit(tmp_path) == head
    source.write_text("two\n", encoding="utf-8")
    assert provenance.commit(tmp_path) == f"{head}-dirty"


@pytest.mark.parametrize("name", ["calibrate.py", "calibration/fashion_mnist.yaml"])
def test_an_edited_calibration_is_a_dirty_commit(tmp_path: Path, repository: Path, name: str) -> None:
    assert (repository / "simulations" / name).exists()
    file = tmp_path / "simulations" / name
    file.parent.mkdir(parents=True)
    file.write_text("one\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").touch()
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "first")
    assert provenance.commit(tmp_path) == _git(tmp_path, "rev-parse", "HEAD")
    file.write_text("two\n", encoding="utf-8")
    assert str(provenance.commit(tmp_path)).endswith("-dirty")


def test_hardware_and_memory_are_known() -> None:
    found = provenance.hardware()
    assert found["cores"] >= 1
    assert found["memory_gb"] > 0
    assert found["cpu"]
    assert 10 < provenance.peak_memory_mb() < 1e6


CPUINFO = "processor\t: 0\nmodel name\t: Some Processor\nflags\t\t: fpu avx512_bf16{more}\nbogomips\t: 4600.00\n"


@pytest.mark.parametrize(("more", "name"), [("", "Some Processor"), (" amx_tile amx_bf16", "Some Processor with AMX")])
def test_a_matrix_unit_belongs_to_the_processors_name(more: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: CPUINFO.format(more=more))
    assert provenance.hardware()["cpu"] == name


def test_a_machine_that_does_not_name_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert provenance.hardware()["cpu"]


def test_the_package_and_the_project_agree_on_the_version(repository: Path) -> None:
    import tomllib

    from cdfkd_strategy import __version__

    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__
