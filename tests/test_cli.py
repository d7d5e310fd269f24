"""The ``cdfkd`` command as a user meets it: what is printed, what is written, and the exit status."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cdfkd_strategy import cli, load_student
from cdfkd_strategy.checkpoint import load_tensors
from cdfkd_strategy.cli import running
from cdfkd_strategy.cli.showing import needs, status, students
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.data.datasets import DataConfig, load_data
from cdfkd_strategy.directory_lock import held, hold
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.methods import METHODS
from cdfkd_strategy.run_config import resolve
from cdfkd_strategy.summary import read_summary, validate
from tests.bench.tiny import VALUES
from tests.methods.remembering import Remembering

TINY_CLIENTS = [
    "clients.count=2",
    "clients.epochs=1",
    "clients.architectures=[small_cnn, small_cnn_gn]",
    "data.train_size=200",
    "data.test_size=60",
    "data.partition.alpha=1.0",
]
TINY_METHOD = [
    "method.epochs=2",
    "method.iterations=2",
    "method.student_steps=1",
    "method.batch_size=16",
    "method.generator.width=0.25",
    "method.generator.latent_dim=16",
]

Outcome = SimpleNamespace


def cdfkd(*arguments: object, capsys: pytest.CaptureFixture[str]) -> Outcome:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Outcome(status=status, out=captured.out, err=captured.err)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher directory, trained in this process."""
    out = tmp_path_factory.mktemp("teachers") / "t"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cdfkd_strategy.offline.usable_cores", lambda: 1)
        assert cli.main(["teachers", "digits", *TINY_CLIENTS, *TINY_METHOD, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def distilled(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of `cdfkd distill`."""
    out = tmp_path_factory.mktemp("distilled") / "run"
    assert cli.main(["distill", "--teachers", str(teachers), "--method", "cdfkd_mfs", "--student", "lenet_bn", "--out", str(out), "seed=3"]) == 0
    return out


# -- looking things up -------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys; from cdfkd_strategy.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    code += "print('heavy:', [name for name in ('torch', 'flwr', 'ray', 'matplotlib', 'sklearn', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "heavy: []" in done.stdout
    for command in ("run", "teachers", "distill", "bench", "methods", "config", "report"):
        assert f"\n    {command}" in done.stdout


def test_methods_lists_all_with_paper_and_disclosure(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = cdfkd("methods", capsys=capsys)
    assert outcome.status == 0
    for name in METHODS:
        assert name in outcome.out
    assert "https://arxiv.org/abs/2205.11845" in outcome.out
    assert "built in" in outcome.out
    assert "single, multi" in outcome.out
    assert needs(METHODS["cdfkd_mfs"]) == "the networks; uses, where they are: BatchNorm running statistics"
    assert needs(METHODS["deep_inversion"]) == "BatchNorm running statistics"
    assert needs(METHODS["rdskd"]) == "the networks"


def test_a_method_that_says_nothing_about_itself_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = type("Silent", (Remembering,), {"__module__": Remembering.__module__})
    assert (students(silent), status(silent)) == ("not stated", "not stated")
    monkeypatch.setattr(sys.modules[Remembering.__module__], "__doc__", "Something. Its schedule is a *reconstruction*.")
    assert status(silent) == "reconstruction, in part: see its docstring"
    stating = type("Stating", (Remembering,), {"students": ("multi", "single"), "status": "checked by hand"})
    assert (students(stating), status(stating)) == ("multi, single", "checked by hand")


THIRD_PARTY = {
    "elsewhere_method.py": '''
"""Elsewhere: does nothing, as (https://arxiv.org/abs/1234.56789) has it. A client discloses its weights."""
from dataclasses import dataclass
import torch
from cdfkd_strategy.distiller import Distiller

@dataclass(frozen=True)
class Nothing:
    steps: int = 1

class Elsewhere(Distiller):
    name = "elsewhere"
    Config = Nothing
    num_epochs = 1

    def run_epoch(self, epoch):
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.zero_()
        return {"zero": 0.0}
''',
    "elsewhere_kd-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: elsewhere-kd\nVersion: 1.2\n",
    "elsewhere_kd-1.2.dist-info/entry_points.txt": "[cdfkd_strategy.methods]\nelsewhere = elsewhere_method:Elsewhere\n",
    "elsewhere_kd-1.2.dist-info/top_level.txt": "elsewhere_method\n",
}
"""A method in a distribution of its own, as pip would have installed it."""


BROKEN = {
    "broken_method.py": "import a_package_that_is_not_there\n",
    "odd_method.py": "from cdfkd_strategy.methods.rdskd import RDSKD as Other\nNumber = 7\n",
    "broken_kd-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: broken-kd\nVersion: 0.1\n",
    "broken_kd-0.1.dist-info/entry_points.txt": (
        "[cdfkd_strategy.methods]\nbroken = broken_method:Broken\nnumber = odd_method:Number\nother = odd_method:Other\nmissing = odd_method:Missing\n"
    ),
}
"""One that cannot be imported, names what is no method, and a method under another name."""


def install(files: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Put a distribution into a folder; gives the environment of a Python that finds it."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[1])])}


def test_a_method_of_another_distribution_trains_a_student_and_is_a_row_of_a_bench(tmp_path: Path, teachers: Path) -> None:
    """The rows of a bench run in processes that are started anew."""
    environment = install(THIRD_PARTY, tmp_path)
    shared = {"config": {"base": "digits", "data": {"train_size": 100, "test_size": 40}, "clients": {"count": 2, "epochs": 1}}}
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump({"study": "theirs", "seeds": [1], **shared, "methods": {"theirs": {"name": "elsewhere"}}}))
    commands = (
        ["distill", "--teachers", str(teachers), "--method", "elsewhere", "--out", str(tmp_path / "run")],
        ["bench", str(tmp_path / "bench.yaml"), "--out", str(tmp_path / "bench")],
    )
    for command in commands:
        done = subprocess.run([sys.executable, "-m", "cdfkd_strategy", *command], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    student = load_tensors(tmp_path / "run" / "student.safetensors")
    assert not float(student["headers.0.classifier.weight"].abs().sum()), "its epoch was run"
    (row,) = csv.DictReader((tmp_path / "bench" / "table.csv").open(encoding="utf-8"))
    assert (row["method"], row["registered_as"], row["error"]) == ("theirs", "elsewhere", "")
    assert 0 < float(row["accuracy_last"]) < 0.3


def test_a_broken_distribution_takes_no_method_away(tmp_path: Path) -> None:
    environment = install(BROKEN, tmp_path)
    done = subprocess.run([sys.executable, "-m", "cdfkd_strategy", "methods"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "cdfkd_mfs" in done.stdout
    assert "Traceback" not in done.stderr
    reasons = {
        "broken": "broken_method:Broken of broken-kd cannot be used: ModuleNotFoundError: No module named 'a_package_that_is_not_there'",
        "number": "odd_method:Number of broken-kd cannot be used: ConfigError: it names 7; accepted: a subclass of Distiller",
        "other": "ConfigError: its class says name = 'rdskd'; accepted: the name of the entry point",
        "missing": "AttributeError: ",
    }
    for name, words in reasons.items():
        (line,) = [line for line in done.stderr.splitlines() if line.startswith(f"method '{name}' is left out, since ")]
        assert words in line


def test_a_method_of_another_distribution_is_listed_and_configured(tmp_path: Path) -> None:
    environment = install(THIRD_PARTY, tmp_path)
    code = "from cdfkd_strategy.cli import main\nmain(['methods'])\nmain(['config', 'digits', 'method.name=elsewhere'])\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    (row,) = [line for line in done.stdout.splitlines() if "│ elsewhere " in line]
    assert "https://arxiv.org/abs/1234.56789" in row
    text = " ".join(done.stdout.split())
    assert "elsewhere-kd" in text, "the distribution that it comes from"
    assert "not stated" in text
    assert yaml.safe_load(done.stdout.partition("consents\n")[2])["method"] == {"name": "elsewhere", "steps": 1}


def test_config_prints_what_resolves_to_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcome = cdfkd("config", "digits", "method.epochs=3", capsys=capsys)
    path = tmp_path / "printed.yaml"
    path.write_text(outcome.out, encoding="utf-8")
    assert to_dict(resolve(str(path))) == to_dict(resolve("digits", ["method.epochs=3"]))
    assert yaml.safe_load(outcome.out)["method"]["epochs"] == 3
    names = cdfkd("config", capsys=capsys).out
    assert "digits_mixed" in names.split()
    assert re.search(r"for `cdfkd bench`: .*\bmnist_methods\b", names)


# -- errors ------------------------------------------------------------------------------------------------------


def test_what_a_process_that_died_was_writing_does_not_count_as_a_run(tmp_path: Path) -> None:
    (tmp_path / ".state.json.7.tmp").write_text("{", encoding="utf-8")
    assert running.check_out(str(tmp_path), resume=False) == tmp_path.resolve()
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not empty; continue that run with --resume"):
        running.check_out(str(tmp_path), resume=False)


def test_errors_are_one_clear_line_and_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path, teachers: Path) -> None:
    full, missing = tmp_path / "full", tmp_path / "missing"
    full.mkdir()
    (full / "precious.txt").write_text("keep", encoding="utf-8")
    cases = [
        (["run", "digit", "--out", missing], "unknown configuration 'digit'; accepted: digits, "),
        (["run", "digits", "method.name=best", "--out", missing], "unknown method 'best'; accepted: cdfkd, cdfkd_mfs"),
        (["run", "digits", "method.epoch=1", "--out", missing], "unknown key method.epoch; accepted under method: "),
        (["run", "digits", "--out", full], "is not empty; continue that run with --resume, or name another directory"),
        (["run", "digits", "--out", missing, "--resume"], "there is no run directory"),
        (["teachers", "digits", "--out", full], "is not empty"),
        (["distill", "--teachers", full, "--out", missing], "holds no teachers.json"),
        (["distill", "--teachers", teachers, "--method", "best", "--out", missing], "unknown method 'best'"),
        (["distill", "--teachers", teachers, "data.partition.alpha=9", "--out", missing], "train others with `cdfkd teachers`"),
        (
            ["distill", "--teachers", teachers, "server.rounds=3", "--out", missing],
            "server.rounds=3: there are no rounds and no clients without Flower; accepted",
        ),
        (["teachers", "digits", "--out", full / "precious.txt" / "sub"], "cannot read or write: [Errno 20] Not a directory"),
        (["report", missing], "there is no directory"),
        (["report", full], "there is no summary.json in or below"),
    ]
    for arguments, words in cases:
        outcome = cdfkd(*arguments, capsys=capsys)
        assert outcome.status == 2, arguments
        assert outcome.err.startswith("cdfkd: error: "), outcome.err
        assert words in outcome.err
        assert outcome.err.count("\n") == 1, outcome.err
        assert not missing.exists(), f"{arguments} left something behind"
    assert [path.name for path in full.iterdir()] == ["precious.txt"]


def test_a_directory_in_which_another_process_works_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, teachers: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(VALUES), encoding="utf-8")
    bench = ["bench", tmp_path / "tiny.yaml", "--teachers", tmp_path / "homes"]
    cases = [(["teachers", "digits"], "out"), (["distill", "--teachers", teachers], "out"), (bench, "out"), (bench, "homes/one-seed4")]
    for arguments, name in cases:
        taken = tmp_path / name
        taken.mkdir(parents=True, exist_ok=True)
        handle = os.open(taken, os.O_RDONLY)  # not through `hold`, which lets the same process in
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            outcome = cdfkd(*arguments, "--out", tmp_path / "out", capsys=capsys)
        finally:
            os.close(handle)
        assert (outcome.status, list(taken.iterdir())) == (2, [])
        assert f"another process works in the directory {taken}; wait until it is done" in outcome.err


def test_a_directory_is_free_again_when_its_block_ends_and_stays_held_by_who_holds_it_for_good(tmp_path: Path) -> None:
    def free() -> bool:
        handle = os.open(tmp_path / "out", os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        return True

    with held(tmp_path / "out"):
        with held(tmp_path / "out"):
            pass
        assert not free()
    assert free()
    hold(tmp_path / "out")
    with held(tmp_path / "out"):
        pass
    assert not free()


@pytest.mark.parametrize(
    "arguments", [["run", "digits", "--bogus", "--out", "x"], ["run", "digits"], ["methods", "a=1"], ["run", "digits", "--out", "x", "words"], []]
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: cdfkd" in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(running, "run", seen.append)
    assert cli.main(["run", "digits", "seed=1", "--out", "x", "method.epochs=2", "seed=4"]) == 0
    assert seen[0].overrides == ["seed=1", "method.epochs=2", "seed=4"]


def test_interrupting_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run", interrupted)
    outcome = cdfkd("run", "digits", "--out", "x", capsys=capsys)
    assert outcome.status == 130
    assert "--resume" in outcome.err


# -- teachers and distill ----------------------------------------------------------------------------------------


def test_teachers_directory_describes_itself(teachers: Path) -> None:
    index = json.loads((teachers / "teachers.json").read_text(encoding="utf-8"))
    assert [(entry["key"], entry["arch"]) for entry in index["teachers"]] == [("0", "small_cnn"), ("1", "small_cnn_gn")]
    assert [sum(row) for row in index["oracle"]["label_counts"]] == [entry["num_samples"] for entry in index["teachers"]]
    assert index["config"]["clients"]["count"] == 2


def test_distill_writes_a_whole_run_directory(distilled: Path) -> None:
    summary = read_summary(distilled)
    validate(summary)
    assert (summary["finished"], summary["stopped_by"], summary["seed"]) == (True, "schedule", 3)
    (record,) = summary["rounds"]
    found = record["accuracy"]
    assert len(found["teachers"]) == len(found["student_heads"]) == 2
    assert all(
        found[key] is not None for key in ("ensemble_uniform", "ensemble_estimated", "ensemble_oracle", "student_mean", "student_merged", "student_attention")
    )
    assert [found[key] for key in ("fedavg", "student_single")] == [None] * 2, "two architectures, one round"
    assert record["seconds"]["clients"] is None
    assert record["bytes"] == {"up": None, "down": None}
    assert summary["config"]["student"]["backbone"] == "lenet_bn"
    assert summary["runtime"]["device"]
    with (distilled / "losses.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert float(rows[-1]["test/student_merged"]) == pytest.approx(found["student_merged"], abs=1e-5)


def test_the_accuracy_is_that_of_the_student_on_disk(distilled: Path, teachers: Path) -> None:
    summary = read_summary(distilled)
    data = load_data(DataConfig(train_size=200, test_size=60), 0)  # the teachers' seed, not the distillation's
    right = (load_student(distilled)(data.x_test.float() / 255).argmax(-1) == data.y_test).double().mean()
    assert summary["rounds"][0]["accuracy"]["student_merged"] == float(right)


def test_pictures_are_small(distilled: Path) -> None:
    for name in ("accuracy", "losses", "synthetic", "labels", "confusion"):
        picture = distilled / f"{name}.png"
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert 2_000 < picture.stat().st_size < 200_000, picture


def test_distill_again_gives_the_same_student_and_resume_changes_nothing(
    distilled: Path, teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sha(directory: Path) -> str:
        return hashlib.sha256((directory / "student.safetensors").read_bytes()).hexdigest()

    command = ["distill", "--teachers", teachers, "--method", "cdfkd_mfs", "--student", "lenet_bn", "seed=3"]
    assert cdfkd(*command, "--out", tmp_path / "again", capsys=capsys).status == 0
    assert sha(tmp_path / "again") == sha(distilled)
    outcome = cdfkd(*command, "--out", tmp_path / "again", "--resume", capsys=capsys)
    assert outcome.status == 0
    assert "is finished" in outcome.err
    assert sha(tmp_path / "again") == sha(distilled)
    other = cdfkd(*command, "method.epochs=5", "--out", tmp_path / "again", "--resume", capsys=capsys)
    assert other.status == 2
    assert "method.epochs=2, not 5" in other.err


def test_a_run_stopped_by_max_seconds_goes_on_when_that_is_raised(distilled: Path, teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def start(*arguments: str) -> Outcome:
        command = ["distill", "--teachers", teachers, "--method", "cdfkd_mfs", "--student", "lenet_bn", "--out", tmp_path / "run"]
        return cdfkd(*command, "seed=3", *arguments, capsys=capsys)

    assert "stopped by engine.max_seconds" in start("engine.max_seconds=0").out
    assert (read_summary(tmp_path / "run")["stopped_by"], len((tmp_path / "run" / "losses.csv").read_text().splitlines())) == ("max_seconds", 1 + 1)
    again = start("engine.max_seconds=0", "--resume")
    assert "is finished: engine.max_seconds=0.0 stopped it after" in again.err
    assert "raise that above them to go on" in again.err
    assert len((tmp_path / "run" / "losses.csv").read_text().splitlines()) == 1 + 1
    longer = start("engine.max_seconds=1000", "--resume")
    assert "which is raised: going on" in longer.err
    summary = read_summary(tmp_path / "run")
    assert (summary["finished"], summary["stopped_by"], len(summary["rounds"])) == (True, "schedule", 1)
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == (distilled / "student.safetensors").read_bytes()
    assert "is finished\n" in start("--resume").err


def test_report_prints_the_table_and_keeps_the_result(distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = cdfkd("report", distilled, "--keep", tmp_path, capsys=capsys)
    assert outcome.status == 0
    merged = read_summary(distilled)["rounds"][0]["accuracy"]["student_merged"]
    (row,) = [line for line in outcome.out.splitlines() if "student, merged" in line]
    assert f" {100 * merged:.1f} " in row
    (fedavg,) = [line for line in outcome.out.splitlines() if "FedAvg" in line]
    assert " - " in fedavg
    assert str(distilled / "summary.json") in outcome.out
    assert str(distilled / "synthetic.png") in outcome.out
    kept = tmp_path / "digits" / "default-seed3"
    assert read_summary(kept) == read_summary(distilled)
    assert "| default | 1 | 1 |" in cdfkd("report", tmp_path, capsys=capsys).out


def test_without_the_data_set_there_are_no_accuracies(
    teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cdfkd_strategy import offline, pictures
    from cdfkd_strategy.errors import DataError

    def gone(*_: object) -> None:
        raise DataError("the images are elsewhere")

    monkeypatch.setattr(offline, "load_data", gone)
    monkeypatch.setattr(pictures, "load_data", gone)
    outcome = cdfkd("distill", "--teachers", teachers, "method.epochs=1", "--out", tmp_path / "run", capsys=capsys)
    assert outcome.status == 0
    assert "no accuracies: the images are elsewhere" in outcome.err
    accuracy = read_summary(tmp_path / "run")["rounds"][0]["accuracy"]
    assert set(accuracy.values()) == {None}
    assert load_student(tmp_path / "run").weights.shape == (2, 10)


def test_run_without_matplotlib_still_gives_results(distilled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = cdfkd("report", distilled, capsys=capsys)
    assert outcome.status == 0
    assert 'pip install "cdfkd-strategy[simulation]"' in outcome.err
    assert "student, merged" in outcome.out
    assert "picture:" not in outcome.out


# -- run ---------------------------------------------------------------------------------------------------------


def test_run_hands_the_resolved_configuration_to_the_simulation(
    tmp_path: Path, distilled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    simulation = SimpleNamespace(simulate=lambda config, out, *, resume: calls.append((config, out, resume)))
    monkeypatch.setitem(sys.modules, "cdfkd_strategy.flower.simulation", simulation)
    monkeypatch.setattr(running, "show_run", lambda out: print("shown", out))
    assert cdfkd("run", "digits", "method.epochs=2", "--out", tmp_path / "new", capsys=capsys).out == f"shown {tmp_path / 'new'}\n"
    (tmp_path / "begun").mkdir()
    cdfkd("run", "digits", "--out", tmp_path / "begun", "--resume", capsys=capsys)
    assert [(config.method["epochs"], out, resume) for config, out, resume in calls] == [
        (2, tmp_path / "new", False),
        (resolve("digits").method["epochs"], tmp_path / "begun", True),
    ]
