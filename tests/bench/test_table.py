"""The table of a bench: numbers from summaries, means over seeds, failures, and teachers that are the same."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import pytest

from cdfkd_strategy import cli
from cdfkd_strategy.bench.record import BenchRecord
from cdfkd_strategy.bench.table import COLUMNS, csv_table, entries, markdown_table, write_tables
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.errors import CDFKDError, MissingExtraError
from cdfkd_strategy.report import collect, find_results, markdown_report, put, with_tables
from cdfkd_strategy.run_config import from_values
from cdfkd_strategy.summary import SummaryWriter, read_summary

REQUIRED = (
    "cell,method,seed,teacher,ensemble_uniform,ensemble_oracle,accuracy_last,accuracy_best,agreement,seconds,student_steps,generator_steps,"
    "peak_memory_mb,bytes_up,bytes_down"
)


def run(directory: Path, row: str, seed: int, merged: float, *, attention: float | None = None, config: dict[str, Any] | None = None, **record: Any) -> Path:
    writer = SummaryWriter(directory, from_values({"study": "s", "cell": "c", "seed": seed, **(config or {})}))
    if "error" not in record:
        accuracy = {"teachers": [0.8, 0.9], "ensemble_uniform": 0.91, "ensemble_estimated": 0.92, "ensemble_oracle": 0.93, "student_merged": merged}
        if attention is not None:
            accuracy["student_attention"] = attention
        writer.round(1, accuracy, seconds={"distill": 99.0}, peak_memory_mb=300.0 + seed, runtime={"device": "cpu"})
        writer.finish("schedule")
        more = {"agreement": 0.7, "accuracy_best": 0.88, "best_epoch": 3, "class_entropy": 2.25, "bytes_up": 10, "bytes_down": 20}
        record = {"seconds": 12.0 + seed, "student_steps": 50, "generator_steps": 10, "curve": ((1.0, 0.2), (2.0, merged)), **more, **record}
    writer.add_bench(to_dict(BenchRecord(row, "rdskd", **{"teachers": (f"{seed}a", f"{seed}b"), **record})))
    return directory


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, merged in ((0, 0.85), (1, 0.87)):
        run(tmp_path / f"x{seed}", "good", seed, merged, published=(0.9, 0.925))
    run(tmp_path / "y0", "half", 0, 0.5)
    run(tmp_path / "y1", "half", 1, 0.0, error="it became NaN\nand more")
    return tmp_path


def test_the_csv_has_a_row_per_run_and_fractions(runs: Path) -> None:
    assert ",".join(COLUMNS).startswith(REQUIRED)
    rows = list(csv.DictReader(io.StringIO(csv_table(entries(find_results(runs))))))
    assert [(row["cell"], row["method"], row["seed"]) for row in rows] == [("c", "good", "0"), ("c", "good", "1"), ("c", "half", "0"), ("c", "half", "1")]
    first = rows[0]
    assert [float(first[name]) for name in ("teacher", "ensemble_uniform", "ensemble_oracle", "accuracy_last", "accuracy_best")] == [
        0.85,
        0.91,
        0.93,
        0.85,
        0.88,
    ]
    assert float(first["gap"]) == pytest.approx(0.92 - 0.85)
    assert [row["published_gap"] for row in rows] == ["0.025", "0.025", "", ""]
    assert [first[name] for name in ("seconds", "student_steps", "generator_steps", "peak_memory_mb")] == ["12.0", "50", "10", "300.0"]
    assert [first[name] for name in ("bytes_up", "bytes_down", "best_epoch", "registered_as", "teachers_sha256")] == ["10", "20", "3", "rdskd", "0a 0b"]
    assert rows[3]["error"] == "it became NaN\nand more"
    assert rows[3]["accuracy_last"] == rows[3]["teacher"] == rows[3]["seconds"] == ""


def test_markdown_has_means_over_seeds_and_says_what_failed(runs: Path) -> None:
    text = markdown_table(entries(find_results(runs)))
    cells = {line.split("|")[2].strip(): [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| c ")}
    deviation = statistics.stdev([85.0, 87.0])
    assert cells["good"][2:6] == ["2", "85.00 ± 0.00", "92.00 ± 0.00", f"**86.00 ± {deviation:.2f}**"]
    assert cells["good"][6:10] == [f"6.00 ± {deviation:.2f}", "2.50", "70.00 ± 0.00", "88.00 ± 0.00"]
    assert cells["good"][10:] == ["12", "50", "10", "300", "2.25"]
    assert [*cells["half"][2:6], cells["half"][7]] == ["1 of 2", "85.00", "92.00", "**50.00**", "-"]
    assert "best epoch (selected on test)" in text
    assert "- half in c, seed 1: it became NaN and more" in text
    assert "Failed" not in markdown_table(entries(find_results(runs / "x0")))


def test_a_table_of_held_out_images_does_not_speak_of_the_test_set(runs: Path) -> None:
    assert "on the global test set in %" in markdown_table(entries(find_results(runs)))
    run(runs / "held", "held", 0, 0.8, config={"data": {"validation_size": 100}})
    text = markdown_table(entries(find_results(runs / "held")))
    assert "on training images that no client holds in %" in text
    assert "best epoch (selected on them)" in text
    assert "test" not in text


def test_attention_over_headers_has_a_column_where_there_is_any(runs: Path) -> None:
    assert "attention" not in markdown_table(entries(find_results(runs)))
    for seed, attention in ((0, 0.75), (1, 0.5)):
        run(runs / f"heads{seed}", "heads", seed, 0.8, attention=attention)
    text = markdown_table(entries(find_results(runs)))
    cells = {line.split("|")[2].strip(): [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| c")}
    assert cells["method"][5:8] == ["**last epoch**", "by attention", "gap"]
    assert cells["heads"][5:8] == ["**80.00 ± 0.00**", f"62.50 ± {statistics.stdev([75.0, 50.0]):.2f}", "12.00 ± 0.00"]
    assert cells["good"][6] == "-"
    assert "fused by attention that clients fitted" in text


def test_runs_of_other_settings_in_one_row_are_named(runs: Path) -> None:
    assert "differ in more than their seeds" not in markdown_table(entries(find_results(runs)))
    run(runs / "z0", "longer", 0, 0.8, config={"clients": {"num_cpus": 2}})
    run(runs / "z1", "longer", 1, 0.9, config={"engine": {"threads": 1}})
    assert "differ in more than their seeds" not in markdown_table(entries(find_results(runs))), "where it ran makes no difference"
    run(runs / "z2", "longer", 2, 0.9, config={"method": {"name": "cdfkd_mfs", "epochs": 7}})
    assert "**The runs of c longer differ in more than their seeds: run the older ones anew.**" in markdown_table(entries(find_results(runs)))


def test_a_bench_may_have_columns_of_its_own(runs: Path) -> None:
    for seed, agreement in ((0, 0.5), (1, 0.75)):
        run(runs / f"more{seed}", "more", seed, 0.5, metrics={"images/label_agreement": agreement, "student/kl": 0.1})
    found = entries(find_results(runs))
    rows = {(row["method"], row["seed"]): row for row in csv.DictReader(io.StringIO(csv_table(found)))}
    assert list(rows["more", "0"]) == [*COLUMNS, "images/label_agreement", "student/kl"]
    assert [rows["more", seed]["images/label_agreement"] for seed in "01"] == ["0.5", "0.75"]
    assert rows["good", "0"]["images/label_agreement"] == "", "a method without such a term"
    lines = {line.split("|")[2].strip(): line for line in markdown_table(found).splitlines() if line.startswith("| c ")}
    assert lines["more"].endswith("| 2.25 | 0.625 | 0.100 |")
    assert lines["good"].endswith("| 2.25 | - | - |")
    assert markdown_table(found).splitlines()[0].endswith("| class entropy | images/label_agreement | student/kl |")


def test_rows_on_other_teachers_are_not_compared(runs: Path) -> None:
    run(runs / "z", "other", 1, 0.9, teachers=("1a", "2b"))
    with pytest.raises(CDFKDError, match=r"rows of s/c, seed 1, were not made on the same teachers"):
        entries(find_results(runs))


def test_results_are_kept_by_cell_and_row_and_reported_like_the_others(runs: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    targets = [collect(path.parent, kept) for path in sorted(runs.glob("[xy]*/summary.json"))]
    assert [str(path.parent.relative_to(kept)) for path in targets] == ["s/c/good-seed0", "s/c/good-seed1", "s/c/half-seed0", "s/c/half-seed1"]
    assert read_summary(kept / "s/c/half-seed1")["bench"]["error"].startswith("it became")
    table = markdown_table(entries(find_results(kept)))
    assert table in markdown_report(find_results(kept))
    assert table in with_tables("<!-- results: s -->\n<!-- end of results -->\n", find_results(kept))


def test_the_command_writes_the_tables_of_all_benches_anew(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    for summary in find_results(runs):
        put(summary, results)
    assert cli.main(["report", str(results)]) == 0
    assert not list(results.rglob("table.csv"))
    assert cli.main(["report", str(results), "--tables"]) == 0
    (folder,) = results.iterdir()
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"table.csv", "table.md", "accuracy_seconds.png"}
    assert f"written:  {folder / 'accuracy_seconds.png'}" in capsys.readouterr().out
    before = (folder / "table.csv").read_bytes()
    assert cli.main(["report", str(folder), "--tables"]) == 0
    assert (folder / "table.csv").read_bytes() == before, "the folder of one study will do"


def test_files_are_written_with_and_without_matplotlib(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_tables(tmp_path / "out", find_results(runs))
    assert [path.name for path in written] == ["table.csv", "table.md", "accuracy_seconds.png"]
    assert written[2].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in write_tables(tmp_path / "text", find_results(runs), picture=False)] == ["table.csv", "table.md"]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError):
        write_tables(tmp_path / "less", find_results(runs))
    assert (tmp_path / "less" / "table.csv").read_bytes() == written[0].read_bytes()


def test_the_picture_has_a_line_per_run_that_ends_at_its_last_epoch(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[list[float], list[float], str | None]] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **how: (drawn.append((list(x), list(y), how.get("label"))), plot(self, x, y, **how))[1])
    write_tables(tmp_path / "out", find_results(runs))
    assert [item for item in drawn if len(item[0]) == 2] == [([1.0, 2.0], [20.0, 100 * last], None) for last in (0.85, 0.87, 0.5)]
    assert [item for item in drawn if len(item[0]) == 1] == [([2.0], [85.0], "good"), ([2.0], [87.0], None), ([2.0], [50.0], "half")]
