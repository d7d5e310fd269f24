"""A bench runs every row on the same teachers, goes on after failures and interruptions, and runs nothing twice."""

from __future__ import annotations

import csv
import logging
import math
import multiprocessing
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cdfkd_strategy import cli, offline
from cdfkd_strategy.bench import running
from cdfkd_strategy.bench.config import BenchRun
from cdfkd_strategy.bench.record import class_entropy, read_done, record_of
from cdfkd_strategy.bench.running import in_own_process, in_this_process, run_bench
from cdfkd_strategy.checkpoint import write_json
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.errors import CDFKDError, CheckpointError, ConfigError
from cdfkd_strategy.methods.rdskd import RDSKD
from cdfkd_strategy.provenance import peak_memory_mb
from cdfkd_strategy.report import put
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.student_io import load_student
from cdfkd_strategy.summary import read_summary
from cdfkd_strategy.teacher_directory import load_teachers
from cdfkd_strategy.types import Metrics
from tests.bench.tiny import VALUES, tiny
from tests.methods.trained_teachers import DIGITS, trained_ensemble


class Started:
    """Runs rows in this process and remembers which."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def __call__(self, run: BenchRun, home: Path, directory: Path) -> None:
        self.rows.append(str(run.path))
        in_this_process(run, home, directory)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "usable_cores", lambda: 1)
        summaries = run_bench(tiny(), out, start=in_this_process)
    assert [summary["cell"] for summary in summaries] == ["one", "two", "two"]
    return out


def test_the_record_of_a_run_against_its_files(done: Path) -> None:
    summary = read_summary(done / "two" / "mfs-seed4")
    record = record_of(summary)
    assert record is not None
    teachers = load_teachers(done / "teachers" / "two-seed4")
    assert record.teachers == tuple(spec.sha256 for spec in teachers.specs)
    assert len(set(record.teachers)) == 2
    assert record.published == (0.91, 0.92)
    assert (record.row, record.method, record.error) == ("mfs", "cdfkd_mfs", None)
    assert (record.student_steps, record.generator_steps) == (2 * 2 * 3, 2 * 2)
    with (done / "two" / "mfs-seed4" / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert record.seconds == pytest.approx(sum(float(row["seconds"]) for row in rows), abs=1e-3)
    watched = [float(row["test/student_merged"]) for row in rows]
    assert [point[1] for point in record.curve] == pytest.approx(watched)
    assert record.accuracy_best == pytest.approx(max(watched))
    assert record.best_epoch == 1 + watched.index(max(watched))
    data = load_data(tiny().runs[0].config.data, 4)
    pixels = data.x_test.float() / 255
    student = load_student(done / "two" / "mfs-seed4")
    with torch.no_grad():
        ensemble = sum(net(data.image.normalise(pixels)).log_softmax(-1) for net in teachers.models)
    assert isinstance(ensemble, torch.Tensor)
    same = (student(pixels).argmax(-1) == ensemble.argmax(-1)).double().mean()
    assert record.agreement == pytest.approx(float(same))
    said = student(pixels).argmax(-1)
    assert record.recall == pytest.approx([float((said[data.y_test == label] == label).double().mean()) for label in range(10)], abs=1e-6)
    bytes_of_one = sum(tensor.nbytes for tensor in teachers.models[0].state_dict().values())
    assert record.bytes_up == 2 * bytes_of_one
    assert record.bytes_down == 2 * sum(tensor.nbytes for tensor in student.student.state_dict().values())


def test_rows_have_the_same_teachers_and_students_of_their_own(done: Path) -> None:
    first, second = (record_of(read_summary(done / "two" / f"{row}-seed4")) for row in ("rdskd", "mfs"))
    assert first is not None
    assert second is not None
    assert first.teachers == second.teachers
    assert (first.student_steps, first.generator_steps) == (4, 4)
    assert load_student(done / "two" / "rdskd-seed4").student.heads == 1
    assert load_student(done / "two" / "mfs-seed4").student.heads == 2
    found = read_summary(done / "one" / "rdskd-seed4")["rounds"][0]["accuracy"]
    assert found["teachers"] == [found["ensemble_uniform"]] == [found["ensemble_oracle"]], "one centralised teacher"


def test_a_column_of_the_bench_is_the_term_of_the_last_epoch_that_has_it(tmp_path: Path, done: Path) -> None:
    bench = tiny("only=[rdskd]", "cells={one: {}}", "metrics=[generator/one_hot, student/kl, images/none]")
    (summary,) = run_bench(bench, tmp_path, teachers=done / "teachers")
    with (tmp_path / "one" / "rdskd-seed4" / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    record = record_of(summary)
    assert record is not None
    assert list(record.metrics) == ["generator/one_hot", "student/kl"]
    assert record.metrics["generator/one_hot"] == pytest.approx(float(rows[1]["generator/one_hot"])), "epochs 1 and 2 train the generator"
    assert record.metrics["student/kl"] == pytest.approx(float(rows[3]["student/kl"]))


def test_class_entropy_is_that_of_a_histogram() -> None:
    teachers = trained_ensemble(2)
    images = torch.randn(512, *DIGITS.shape, generator=torch.Generator().manual_seed(1))
    found = class_entropy(SimpleNamespace(runtime=Runtime(threads=1), sample=lambda count, rng: images[:count]), teachers, 0)  # type: ignore[arg-type]
    counts = [0] * 10
    for label in (teachers(images).log_softmax(-1).sum(0)).argmax(-1).tolist():
        counts[label] += 1
    assert found == pytest.approx(-sum(n / 512 * math.log(n / 512) for n in counts if n), abs=1e-9)
    assert class_entropy(SimpleNamespace(runtime=Runtime(threads=1), sample=lambda count, rng: None), teachers, 0) is None  # type: ignore[arg-type]


def test_nothing_is_run_twice_and_a_new_row_is_run_alone(done: Path) -> None:
    started = Started()
    before = (done / "two" / "mfs-seed4" / "summary.json").read_bytes()
    run_bench(tiny(), done, start=started)
    assert started.rows == []
    rows = {**VALUES["methods"], "again": {**VALUES["methods"]["rdskd"], "temperature": 4.0, "cells": ["one"]}}
    run_bench(tiny(methods=rows), done, start=started)
    assert started.rows == ["one/again-seed4"]
    assert (done / "two" / "mfs-seed4" / "summary.json").read_bytes() == before


def test_a_changed_row_and_changed_teachers_are_refused_before_anything_runs(done: Path, tmp_path: Path) -> None:
    started = Started()
    with pytest.raises(CheckpointError, match=r"row 'mfs' in cell 'two': .*method\.epochs=2, not 3; give a changed row another name, or remove .*mfs-seed4"):
        run_bench(tiny("methods.mfs.epochs=3", "seeds=[5, 4]"), done, start=started)
    with pytest.raises(CheckpointError, match=r"one-seed4 were made with clients\.epochs=1, not 2; name another directory"):
        run_bench(tiny("config.clients.epochs=2"), tmp_path / "other", teachers=done / "teachers", start=started)
    assert started.rows == []
    assert not (tmp_path / "other").exists()


def test_teachers_elsewhere_are_used(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "write_teachers", pytest.fail)
    (summary,) = run_bench(tiny("only=[mfs]", "config.clients.device=cuda"), tmp_path / "out", teachers=done / "teachers", start=in_this_process)
    first, again = record_of(read_summary(done / "two" / "mfs-seed4")), record_of(summary)
    assert first is not None
    assert again is not None
    assert again.teachers == first.teachers
    assert (tmp_path / "out/two/mfs-seed4/student.safetensors").read_bytes() == (done / "two/mfs-seed4/student.safetensors").read_bytes()


def test_what_is_kept_with_results_is_not_run_again_elsewhere(done: Path, tmp_path: Path) -> None:
    kept, started = [read_summary(done / run.path) for run in tiny().runs], Started()
    teachers = done / "teachers"
    summaries = run_bench(tiny(), tmp_path / "all", teachers=teachers, start=started, kept=kept)
    assert started.rows == []
    assert summaries == kept
    bench = tiny("methods.mfs.epochs=3", "cells={two: {clients: {count: 2}}}")
    changed = run_bench(bench, tmp_path / "changed", teachers=teachers, start=started, kept=kept)
    assert started.rows == ["two/mfs-seed4"]
    assert (changed[0], changed[1]["config"]["method"]["epochs"]) == (kept[1], 3)
    for difference in ({"stopped_by": "max_seconds"}, {"bench": {**kept[2]["bench"], "error": "there was no memory"}}):
        run_bench(tiny("only=[mfs]"), tmp_path / next(iter(difference)), teachers=teachers, start=started, kept=[*kept[:2], {**kept[2], **difference}])
    assert started.rows == ["two/mfs-seed4"] * 3, "neither one that was cut off nor one that failed is taken"


def test_results_on_other_teachers_are_refused_before_rows_are_run(done: Path, tmp_path: Path) -> None:
    kept, started = [read_summary(done / run.path) for run in tiny().runs], Started()
    kept[1]["bench"]["teachers"] = ["another"]
    with pytest.raises(CheckpointError, match=r"row 'rdskd' in cell 'two', seed 4, has a result on other teachers than those in .*two-seed4; name"):
        run_bench(tiny(), tmp_path, teachers=done / "teachers", start=started, kept=kept)
    assert started.rows == []


def test_rows_of_this_bench_on_other_teachers_are_refused_before_rows_are_run(done: Path, tmp_path: Path) -> None:
    """As after ``--teachers`` with the directory of another training: settings, cell and seed are the same, and the bits are not."""
    bench, started = tiny("only=[rdskd]", "cells={one: {}}"), Started()
    run_bench(bench, tmp_path, teachers=done / "teachers", start=started)
    path = tmp_path / "one" / "rdskd-seed4"
    summary = read_summary(path)
    summary["bench"]["teachers"] = ["another"]
    write_json(path / "summary.json", summary)
    rows = {"rdskd": VALUES["methods"]["rdskd"], "again": {**VALUES["methods"]["rdskd"], "temperature": 4.0}}
    for kept in ([], [read_summary(done / "one" / "rdskd-seed4")]):
        with pytest.raises(CDFKDError, match=r"has a result on other teachers than those in .*one-seed4"):
            run_bench(tiny("cells={one: {}}", methods=rows), tmp_path, teachers=done / "teachers", start=started, kept=kept)
    assert started.rows == ["one/rdskd-seed4"]


def test_results_are_not_replaced_by_those_on_other_teachers(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "tiny.yaml", VALUES)
    for run in tiny().runs:
        put(read_summary(done / run.path), tmp_path / "results")
    path = tmp_path / "results" / "tiny" / "one" / "rdskd-seed4"
    summary = read_summary(path)
    summary["bench"]["teachers"] = ["another"]
    write_json(path / "summary.json", summary)
    command = ["bench", str(tmp_path / "tiny.yaml"), "--out", str(done), "--resume", "--keep", str(tmp_path / "results")]
    assert cli.main(command) == 2
    assert "other teachers" in capsys.readouterr().err.replace("not made on the same teachers", "other teachers")
    assert read_summary(path)["bench"]["teachers"] == ["another"]


def test_columns_that_a_bench_gets_later_are_filled_without_running_anything(done: Path) -> None:
    started = Started()
    bench = tiny("metrics=[student/kl, images/none]", "methods.rdskd.published=[0.5, 0.75]")
    summaries = run_bench(bench, done, start=started)
    assert started.rows == []
    with (done / "one" / "rdskd-seed4" / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [record for summary in summaries if (record := record_of(summary)) is not None and record.row == "rdskd"]
    assert found[0].metrics == {"student/kl": pytest.approx(float(rows[3]["student/kl"]))}
    assert [record.published for record in found] == [(0.5, 0.75)] * 2
    kept = run_bench(bench, done.parent / "elsewhere", teachers=done / "teachers", start=started, kept=[read_summary(done / run.path) for run in tiny().runs])
    assert started.rows == []
    assert kept[0]["bench"]["published"] == [0.5, 0.75]


def test_a_table_has_the_rows_that_only_leaves_out(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "tiny.yaml", VALUES)
    monkeypatch.setattr(running, "in_own_process", in_this_process)
    command = ["bench", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--teachers", str(done / "teachers")]
    assert cli.main([*command, "--only", "mfs"]) == 0
    assert cli.main([*command, "--only", "rdskd", "--resume"]) == 0
    assert "| mfs |" not in capsys.readouterr().out.split("written:")[-3], "what this start shows is what it was asked for"
    with (tmp_path / "out" / "table.csv").open(encoding="utf-8") as file:
        assert [(row["cell"], row["method"]) for row in csv.DictReader(file)] == [("one", "rdskd"), ("two", "rdskd"), ("two", "mfs")]


def test_an_interrupted_bench_continues_within_the_row(done: Path, tmp_path: Path) -> None:
    bench, run_epoch = tiny("only=[rdskd]", "cells={one: {}}"), RDSKD.run_epoch

    def interrupted(self: RDSKD, epoch: int) -> Metrics:
        if epoch == 3:
            raise KeyboardInterrupt
        return run_epoch(self, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RDSKD, "run_epoch", interrupted)
        patch.setattr(offline, "usable_cores", lambda: 1)
        with pytest.raises(KeyboardInterrupt):
            run_bench(bench, tmp_path, start=in_this_process)
    assert read_done(tmp_path / "one" / "rdskd-seed4", bench.runs[0]) is None
    epochs: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RDSKD, "run_epoch", lambda self, epoch: (epochs.append(epoch), run_epoch(self, epoch))[1])
        (summary,) = run_bench(bench, tmp_path, start=in_this_process)
    assert epochs == [3]
    record = record_of(summary)
    assert record is not None
    assert (record.student_steps, record.generator_steps, len(record.curve)) == (4, 4, 4), "those before the interruption count"
    assert (tmp_path / "one/rdskd-seed4/student.safetensors").read_bytes() == (done / "one/rdskd-seed4/student.safetensors").read_bytes()


def test_a_row_that_fails_is_a_result_and_the_others_go_on(done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: dict[str, Any] = {
        "needs": {"name": "deep_inversion", "cells": ["one"]},  # a teacher without BatchNorm
        "diverges": {**VALUES["methods"]["rdskd"], "student_lr": 1e30, "cells": ["one"]},
        "heads": {**VALUES["methods"]["mfs"], "student": {"heads": "plain"}},
        "mfs": VALUES["methods"]["mfs"],
    }
    bench, started = tiny(methods=rows), Started()
    with caplog.at_level(logging.WARNING, "cdfkd_strategy"):
        summaries = run_bench(bench, tmp_path, teachers=done / "teachers", start=started)
    records = [record_of(summary) for summary in summaries]
    errors = {record.row: record.error for record in records if record is not None}
    assert "needs BatchNorm running statistics, which teachers 0 do not have" in str(errors["needs"])
    assert "became NaN or infinite" in str(errors["diverges"])
    assert "a student with 1 headers for 2 teachers" in str(errors["heads"])
    assert errors["mfs"] is None
    assert "diverges in one, seed 4 failed" in caplog.text
    assert not any(record.died for record in records if record is not None)
    run_bench(bench, tmp_path, teachers=done / "teachers", start=started)
    assert len(started.rows) == 4, "an error that will come again is not tried again"


def test_an_error_in_a_method_is_a_result_too(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(self: RDSKD, epoch: int) -> Metrics:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(RDSKD, "run_epoch", broken)
    (summary,) = run_bench(tiny("only=[rdskd]", "cells={one: {}}"), tmp_path, teachers=done / "teachers", start=in_this_process)
    assert summary["bench"]["error"] == "ZeroDivisionError: by zero"
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("no memory"), torch.cuda.OutOfMemoryError("no memory")], ids=repr)
def test_what_may_pass_is_tried_again(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(self: RDSKD, epoch: int) -> Metrics:
        raise error

    bench, started = tiny("only=[rdskd]", "cells={one: {}}"), Started()
    with monkeypatch.context() as patch:
        patch.setattr(RDSKD, "run_epoch", broken)
        (summary,) = run_bench(bench, tmp_path, teachers=done / "teachers", start=started)
    assert str(error) in summary["bench"]["error"]
    (summary,) = run_bench(bench, tmp_path, teachers=done / "teachers", start=started)
    assert len(started.rows) == 2
    assert summary["bench"]["error"] is None


def test_a_process_that_dies_is_a_result_and_is_tried_again(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(start=lambda: None, join=lambda: None, is_alive=lambda: False, exitcode=-9)
    monkeypatch.setattr(running.multiprocessing, "get_context", lambda kind: SimpleNamespace(Process=lambda **how: process))
    bench = tiny("only=[rdskd]", "cells={one: {}}")
    (summary,) = run_bench(bench, tmp_path, teachers=done / "teachers", start=in_own_process)
    assert "died with exit code -9" in summary["bench"]["error"]
    started = Started()
    (summary,) = run_bench(bench, tmp_path, teachers=done / "teachers", start=started)
    assert started.rows == ["one/rdskd-seed4"]
    assert summary["finished"]
    assert summary["bench"]["error"] is None


def test_a_process_that_dies_after_its_result_leaves_it(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny("only=[rdskd]", "cells={one: {}}")
    (run,) = bench.runs
    work = partial(in_this_process, run, done / "teachers" / run.teachers, tmp_path / run.path)
    process = SimpleNamespace(start=work, join=lambda: None, is_alive=lambda: False, exitcode=-15)
    monkeypatch.setattr(running.multiprocessing, "get_context", lambda kind: SimpleNamespace(Process=lambda **how: process))
    (summary,) = run_bench(bench, tmp_path, teachers=done / "teachers", start=in_own_process)
    assert (summary["bench"]["error"], summary["bench"]["died"]) == (None, False)
    assert summary["bench"]["student_steps"] > 0


def test_the_command_runs_rows_in_processes_of_their_own(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "tiny.yaml", VALUES)
    command = ["bench", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--teachers", str(done / "teachers"), "--only", "mfs"]
    ballast = torch.ones(2**28)  # 1 GiB that only this process has
    assert cli.main([*command, "--keep", str(tmp_path / "results")]) == 0
    del ballast
    printed = capsys.readouterr().out
    assert "| two | mfs | 1 |" in printed
    result = tmp_path / "results" / "tiny"
    assert f"written:  {result / 'table.csv'}" in printed
    (row,) = csv.DictReader((result / "table.csv").open(encoding="utf-8"))
    kept = read_summary(result / "two" / "mfs-seed4")
    assert float(row["accuracy_last"]) == pytest.approx(kept["rounds"][0]["accuracy"]["student_merged"], abs=1e-6)
    assert float(row["accuracy_attention"]) == pytest.approx(kept["rounds"][0]["accuracy"]["student_attention"], abs=1e-6)
    assert 100 < float(row["peak_memory_mb"]) < peak_memory_mb() - 500, "the memory of this process is not in it"
    assert (kept["hardware"]["cores"], kept["config"]["method"]["name"]) == (read_summary(done / "two/mfs-seed4")["hardware"]["cores"], "cdfkd_mfs")
    assert (tmp_path / "out/two/mfs-seed4/student.safetensors").read_bytes() == (done / "two/mfs-seed4/student.safetensors").read_bytes()
    assert cli.main([*command]) == 2
    assert "is not empty; continue that run with --resume" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert "| two | mfs | 1 |" in capsys.readouterr().out


def test_the_command_keeps_every_result_when_it_comes(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def start(run: BenchRun, home: Path, directory: Path) -> None:
        if run.row == "mfs":
            raise KeyboardInterrupt
        in_this_process(run, home, directory)

    write_json(tmp_path / "tiny.yaml", VALUES)
    results = tmp_path / "results"
    command = ["bench", str(tmp_path / "tiny.yaml"), "--teachers", str(done / "teachers"), "--keep", str(results)]
    with monkeypatch.context() as patch:
        patch.setattr(running, "in_own_process", start)
        assert cli.main([*command, "--out", str(tmp_path / "out")]) == cli.INTERRUPTED
    assert sorted(path.parent.name for path in results.rglob("summary.json")) == ["rdskd-seed4", "rdskd-seed4"]
    assert len(list(csv.DictReader((results / "tiny" / "table.csv").open(encoding="utf-8")))) == 2
    started = Started()
    monkeypatch.setattr(running, "in_own_process", started)
    assert cli.main([*command, "--out", str(tmp_path / "elsewhere")]) == 0
    assert started.rows == ["two/mfs-seed4"], "another directory goes on from the results"
    assert len(list(csv.DictReader((results / "tiny" / "table.csv").open(encoding="utf-8")))) == 3
    assert "| two | rdskd | 1 |" in capsys.readouterr().out


TWO_ROWS = {"two": VALUES["cells"]["two"]}


def test_rows_side_by_side_are_those_of_one_after_the_other(done: Path, tmp_path: Path) -> None:
    neighbours = threading.Barrier(2)
    seen: list[int] = []

    def start(run: BenchRun, home: Path, directory: Path) -> None:
        neighbours.wait(timeout=60)  # broken, and an error, unless two rows are at it at the same time
        in_own_process(run, home, directory)

    bench = tiny(cells=TWO_ROWS)
    summaries = run_bench(bench, tmp_path, teachers=done / "teachers", jobs=2, start=start, on_done=lambda found: seen.append(len(found)))
    assert [summary["bench"]["row"] for summary in summaries] == ["rdskd", "mfs"]
    assert seen == [1, 2]
    for run in bench.runs:
        assert (tmp_path / run.path / "student.safetensors").read_bytes() == (done / run.path / "student.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="jobs is 0; accepted: at least 1"):
        run_bench(bench, tmp_path, jobs=0)


def sleeps(*_: object) -> None:
    time.sleep(600)


def test_an_interrupted_bench_leaves_no_process_behind(done: Path, tmp_path: Path) -> None:
    started = threading.Event()

    def start(run: BenchRun, home: Path, directory: Path) -> None:
        if run.row == "mfs":
            started.wait(60)
            raise KeyboardInterrupt
        process = multiprocessing.get_context("spawn").Process(target=sleeps, daemon=True)
        process.start()
        started.set()
        process.join()

    with pytest.raises(KeyboardInterrupt):
        run_bench(tiny(cells=TWO_ROWS), tmp_path, teachers=done / "teachers", jobs=2, start=start)
    assert started.is_set()
    assert multiprocessing.active_children() == []


def test_the_rows_of_a_killed_bench_end_with_it(done: Path, tmp_path: Path) -> None:
    endless = {**VALUES, "cells": TWO_ROWS, "methods": {"rdskd": {**VALUES["methods"]["rdskd"], "student_epochs": 10**6}}}
    write_json(tmp_path / "endless.yaml", endless)
    command = ["bench", str(tmp_path / "endless.yaml"), "--out", str(tmp_path / "out"), "--teachers", str(done / "teachers")]
    bench = subprocess.Popen([sys.executable, "-m", "cdfkd_strategy", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    losses = tmp_path / "out" / "two" / "rdskd-seed4" / "losses.csv"
    until = time.monotonic() + 60
    while not losses.exists() and time.monotonic() < until:
        time.sleep(0.1)
    bench.kill()
    said, _ = bench.communicate(timeout=20)  # the row's process has the same standard output: this ends when both have
    assert losses.exists(), said.decode()
