"""Result tables, generated from committed ``summary.json`` files and never typed."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cdfkd_strategy.bench.table import entries, markdown_table, mixed_note
from cdfkd_strategy.checkpoint import write_json, write_text
from cdfkd_strategy.errors import CDFKDError
from cdfkd_strategy.metrics.spread import spread
from cdfkd_strategy.provenance import machine_words, short_commit
from cdfkd_strategy.summary import BENCH, FILE_NAME, discloses_counts, origins, read_summary, same_settings

Summary = Mapping[str, Any]

MARKED = re.compile(r"(<!-- results: (?P<study>[\w.-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
"""Where a Markdown file wants the table of a study."""


def _best_teacher(accuracy: Mapping[str, Any]) -> float | None:
    return max((value for value in accuracy["teachers"] or [] if value is not None), default=None)


COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None]], ...] = (
    ("best teacher", _best_teacher),
    ("one-shot FedAvg", lambda accuracy: accuracy["fedavg"]),
    ("ensemble, uniform", lambda accuracy: accuracy["ensemble_uniform"]),
    ("ensemble, estimated", lambda accuracy: accuracy["ensemble_estimated"]),
    ("ensemble, oracle", lambda accuracy: accuracy["ensemble_oracle"]),
    ("student, mean", lambda accuracy: accuracy["student_mean"]),
    ("student, attention", lambda accuracy: accuracy["student_attention"]),
    ("**student, merged**", lambda accuracy: accuracy["student_merged"]),
)


def find_results(directory: Path) -> list[dict[str, Any]]:
    """The summaries of all finished runs in and below a folder, and of those that failed in a bench, in the order study, cell, row, seed."""
    summaries = [read_summary(path.parent) for path in sorted(directory.rglob(FILE_NAME))]
    results = [item for item in summaries if (item["finished"] and item["rounds"]) or item.get(BENCH, {}).get("error")]
    return sorted(results, key=lambda item: (item["study"], item["cell"], item.get(BENCH, {}).get("row", ""), item["seed"]))


def collect(run_dir: Path, results: Path) -> Path:
    """Copy the summary of a finished run to ``results/<study>/<cell>-seed<n>/summary.json``, where committed results live.

    A run of a bench, failed ones too, goes to ``results/<study>/<cell>/<row>-seed<n>``.

    Raises:
        CDFKDError: the run is missing or not finished.
    """
    summary = read_summary(run_dir)
    if not summary["finished"] and not summary.get(BENCH, {}).get("error"):
        raise CDFKDError(f"the run in {run_dir} is not finished; continue it with --resume before its result is kept")
    return put(summary, results)


def put(summary: Summary, results: Path) -> Path:
    """Write a summary to where `collect` has its copy."""
    record = summary.get(BENCH, {})
    name = f"{summary['cell']}/{record['row']}" if record else summary["cell"]
    target = results / summary["study"] / f"{name}-seed{summary['seed']}"
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / FILE_NAME, dict(summary))
    return target / FILE_NAME


def markdown_report(summaries: Sequence[Summary]) -> str:
    """The tables of all studies."""
    studies = dict.fromkeys(item["study"] for item in summaries)
    return "\n".join(f"## {study}\n\n{study_table(summaries, study)}" for study in studies)


def study_table(summaries: Sequence[Summary], study: str) -> str:
    """A study as Markdown, of a bench in its own form: a row per cell, the mean and standard deviation over seeds of the last round, and where it was measured.

    Cells of several rounds have a row in a second table: the merged student after every round.
    """
    mine = [item for item in summaries if item["study"] == study]
    if not mine:
        return "No results of this study are committed yet.\n"
    if any(BENCH in item for item in mine):
        return markdown_table(entries(mine))
    cells = {cell: [item for item in mine if item["cell"] == cell] for cell in dict.fromkeys(item["cell"] for item in mine)}
    head = ["cell", "seeds", "rounds", *(title for title, _ in COLUMNS), "distillation"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(_row(cell, runs))} |" for cell, runs in cells.items()]
    starts = [(item, origin) for item in mine for origin in origins(item)]
    hardware = dict.fromkeys(machine_words(origin["hardware"], item["runtime"]) for item, origin in starts)
    commits = dict.fromkeys(short_commit(origin["commit"]) for _, origin in starts)
    note = (
        "Accuracy on the global test set in %, last round and last epoch, mean ± standard deviation over seeds; distillation in seconds per run. "
        f"Measured on {'; '.join(hardware)}. Commit {', '.join(commits)}."
    )
    opted = dict.fromkeys(item["cell"] for item in mine if discloses_counts(item))
    if opted:
        note += f" In {', '.join(opted)} clients disclosed their label counts, and the weights called estimated come from them."
    note += mixed_note({cell: runs for cell, runs in cells.items() if not same_settings(runs)})
    return "\n".join([*lines, "", note, "", *_after_each_round(cells)])


def _after_each_round(cells: Mapping[str, Sequence[Summary]]) -> list[str]:
    """The merged student of the cells of several rounds, a column per round; no lines if there is no such cell."""
    several = {cell: runs for cell, runs in cells.items() if max(len(run["rounds"]) for run in runs) > 1}
    if not several:
        return []
    last = max(len(run["rounds"]) for runs in several.values() for run in runs)
    head = ["merged student of", *(f"round {number}" for number in range(1, last + 1))]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for cell, runs in several.items():
        found = [{record["round"]: record["accuracy"]["student_merged"] for record in run["rounds"]} for run in runs]
        values = [spread([accuracy.get(number) for accuracy in found]) for number in range(1, last + 1)]
        lines.append(f"| {' | '.join([cell, *values])} |")
    return [*lines, ""]


def _row(cell: str, runs: Sequence[Summary]) -> list[str]:
    last = [run["rounds"][-1]["accuracy"] for run in runs]
    values = [spread([pick(accuracy) for accuracy in last]) for _, pick in COLUMNS]
    seconds = [sum(record["seconds"]["distill"] or 0.0 for record in run["rounds"]) for run in runs]
    rounds = "/".join(dict.fromkeys(str(run["rounds"][-1]["round"]) for run in runs))
    return [cell, str(len(runs)), rounds, *values, f"{statistics.fmean(seconds):.0f} s"]


def with_tables(text: str, summaries: Sequence[Summary]) -> str:
    """Markdown with the tables between its markers replaced.

    A table stands between ``<!-- results: STUDY -->`` and ``<!-- end of results -->``.
    """
    return MARKED.sub(lambda match: f"{match.group(1)}{study_table(summaries, match.group('study'))}{match.group(3)}", text)


def rewrite_tables(path: Path, summaries: Sequence[Summary]) -> bool:
    """Replace the tables of a Markdown file in place; says whether anything changed.

    Raises:
        CDFKDError: the file is missing, or has no markers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CDFKDError(f"cannot read {path}: {error.strerror}") from error
    if not MARKED.search(text):
        raise CDFKDError(f"{path} has no place for a table; accepted: <!-- results: STUDY --> and <!-- end of results --> on lines of their own")
    changed = with_tables(text, summaries)
    if changed != text:
        write_text(path, changed)
    return changed != text
