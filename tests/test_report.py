"""Result tables: numbers from summaries, between markers, and never typed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from cdfkd_strategy.errors import CDFKDError
from cdfkd_strategy.report import collect, find_results, rewrite_tables, spread, study_table, with_tables
from cdfkd_strategy.run_config import from_values
from cdfkd_strategy.summary import SummaryWriter, read_summary


def run(directory: Path, cell: str, seed: int, merged: float, *, finish: bool = True, **accuracy: Any) -> Path:
    writer = SummaryWriter(directory, from_values({"study": "s", "cell": cell, "seed": seed}))
    for number, value in ((1, 0.1), (2, merged)):
        found = {"student_merged": value, "student_attention": 0.45, "fedavg": 0.25, "teachers": [0.2, 0.3], **accuracy}
        writer.round(number, found, seconds={"distill": 60.0}, runtime={"device": "cpu"})
    if finish:
        writer.finish("schedule")
    return directory


@pytest.fixture
def results(tmp_path: Path) -> Path:
    run(tmp_path / "s" / "a-seed0", "a", 0, 0.5)
    run(tmp_path / "s" / "a-seed1", "a", 1, 0.6)
    run(tmp_path / "s" / "b-seed0", "b", 0, 0.7, fedavg=None)
    run(tmp_path / "s" / "b-seed1", "b", 1, 0.9, finish=False)
    return tmp_path


def test_a_cell_is_the_mean_and_deviation_of_the_last_round(results: Path) -> None:
    table = study_table(find_results(results), "s")
    row_a, row_b = (next(line for line in table.splitlines() if line.startswith(f"| {cell} ")) for cell in "ab")
    deviation = statistics.stdev([50.0, 60.0])
    cells = [cell.strip() for cell in row_a.strip("|").split("|")]
    assert cells == ["a", "2", "2", "30.0 ± 0.0", "25.0 ± 0.0", "-", "-", "-", "-", "45.0 ± 0.0", f"55.0 ± {deviation:.1f}", "120 s"]
    assert [cell.strip() for cell in row_b.strip("|").split("|")][:5] == ["b", "1", "2", "30.0", "-"], "one finished seed, and no FedAvg"
    assert "90.0" not in table, "an unfinished run is not a result"
    assert "last round" in table
    assert " cores" in table


def test_runs_of_other_settings_in_one_cell_are_named(results: Path) -> None:
    assert "differ in more" not in study_table(find_results(results), "s")
    writer = SummaryWriter(results / "s" / "a-seed2", from_values({"study": "s", "cell": "a", "seed": 2, "clients": {"epochs": 77}}))
    writer.round(1, {"student_merged": 0.5, "teachers": [0.2]}, seconds={"distill": 1.0}, runtime={"device": "cpu"})
    writer.finish("schedule")
    assert "**The runs of a differ in more than their seeds: run the older ones anew.**" in study_table(find_results(results), "s")


def test_cells_of_several_rounds_show_every_round(results: Path) -> None:
    run(results / "s" / "c-seed0", "c", 0, 0.8, student_merged=None)
    lines = study_table(find_results(results), "s").splitlines()
    below = lines[lines.index("| merged student of | round 1 | round 2 |") :]
    assert below[2:5] == [f"| a | 10.0 ± 0.0 | 55.0 ± {statistics.stdev([50.0, 60.0]):.1f} |", "| b | 10.0 | 70.0 |", "| c | - | - |"]


def test_one_round_needs_no_second_table(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path / "d-seed0", from_values({"study": "s", "cell": "d"}))
    writer.round(1, {"student_merged": 0.5, "teachers": [0.2]}, seconds={"distill": 1.0}, runtime={"device": "cpu"})
    writer.finish("schedule")
    assert "round 1" not in study_table(find_results(tmp_path), "s")


def test_a_missing_value_in_one_seed_leaves_no_mean() -> None:
    assert spread([0.5, None]) == "-"
    assert spread([None]) == "-"
    assert spread([0.5]) == "50.0"


def test_tables_replace_what_is_between_the_markers(results: Path, tmp_path: Path) -> None:
    text = "before\n<!-- results: s -->\nold\n<!-- end of results -->\nbetween\n<!-- results: none -->\n<!-- end of results -->\nafter\n"
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    summaries = find_results(results)
    assert rewrite_tables(path, summaries)
    assert not rewrite_tables(path, summaries), "a second time changes nothing"
    written = path.read_text(encoding="utf-8")
    assert "old" not in written
    assert study_table(summaries, "s") in written
    assert "No results of this study are committed yet." in written
    assert [written.count(word) for word in ("before", "between", "after")] == [1, 1, 1]
    assert with_tables(text, summaries) == written


def test_a_file_without_markers_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text("nothing\n", encoding="utf-8")
    with pytest.raises(CDFKDError, match="results: STUDY"):
        rewrite_tables(tmp_path / "x.md", [])
    with pytest.raises(CDFKDError, match="cannot read"):
        rewrite_tables(tmp_path / "y.md", [])


def test_collect_keeps_finished_runs_by_study_cell_and_seed(results: Path, tmp_path: Path) -> None:
    target = collect(results / "s" / "a-seed1", tmp_path / "kept")
    assert target == tmp_path / "kept" / "s" / "a-seed1" / "summary.json"
    assert read_summary(target.parent) == read_summary(results / "s" / "a-seed1")
    with pytest.raises(CDFKDError, match="not finished"):
        collect(results / "s" / "b-seed1", tmp_path / "kept")
