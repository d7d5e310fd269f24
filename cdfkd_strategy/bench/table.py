"""The table of a bench, from the summaries of its runs: CSV with a row per run, Markdown with a row per method, and a picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cdfkd_strategy.bench.record import ENTROPY_IMAGES, BenchRecord, record_of
from cdfkd_strategy.checkpoint import write_text
from cdfkd_strategy.errors import CDFKDError, MissingExtraError
from cdfkd_strategy.metrics.spread import spread
from cdfkd_strategy.provenance import machine_words, short_commit
from cdfkd_strategy.summary import origins, same_settings

Summary = Mapping[str, Any]

TABLE, MARKDOWN, PICTURE = "table.csv", "table.md", "accuracy_seconds.png"

COLUMNS = (
    "cell", "method", "seed", "teacher", "ensemble_uniform", "ensemble_oracle", "accuracy_last", "accuracy_best", "agreement", "seconds",
    "student_steps", "generator_steps", "peak_memory_mb", "bytes_up", "bytes_down",
    "ensemble_estimated", "gap", "published_gap", "accuracy_attention", "best_epoch", "class_entropy", "registered_as", "teachers_sha256", "commit", "error",
)  # fmt: skip
"""Of the CSV. ``method`` is the row's name, ``teacher`` the mean of the teachers, ``gap`` what ``accuracy_last`` lacks to ``ensemble_estimated``
(the ensemble with the weights of the run; of one teacher, the teacher), ``published_gap`` the same in the method's paper; ``accuracy_attention`` has
the headers fused by attention that clients fitted on images of theirs; ``accuracy_best`` is
selected on the test images. Accuracies are fractions. A bench's own columns (``metrics``) follow, under the names of the terms."""


class Entry(NamedTuple):
    """One run of a bench."""

    summary: Summary
    record: BenchRecord
    accuracy: Mapping[str, Any]

    @property
    def place(self) -> tuple[str, str]:
        """Cell and row."""
        return self.summary["cell"], self.record.row

    @property
    def teacher(self) -> float | None:
        """The mean accuracy of the teachers."""
        known = [value for value in self.accuracy.get("teachers") or [] if value is not None]
        return statistics.fmean(known) if known else None

    @property
    def gap(self) -> float | None:
        """What the student lacks to the ensemble."""
        last, reference = self.accuracy.get("student_merged"), self.accuracy.get("ensemble_estimated")
        return None if last is None or reference is None else reference - last

    @property
    def attention(self) -> float | None:
        """The accuracy of the student with its headers fused by attention, if it has several."""
        return self.accuracy.get("student_attention")

    @property
    def published_gap(self) -> float | None:
        """What the student lacks to the teacher in the method's paper."""
        return self.record.published[1] - self.record.published[0] if self.record.published else None


def entries(summaries: Sequence[Summary]) -> list[Entry]:
    """The runs of benches among some summaries.

    Raises:
        CDFKDError: runs of one cell and seed were made on different teachers.
    """
    found = []
    teachers: dict[tuple[str, str, int], tuple[str, ...]] = {}
    for summary in summaries:
        record = record_of(summary)
        if record is None:
            continue
        key = (summary["study"], summary["cell"], summary["seed"])
        if record.teachers and teachers.setdefault(key, record.teachers) != record.teachers:
            raise CDFKDError(f"the rows of {'/'.join(map(str, key[:2]))}, seed {key[2]}, were not made on the same teachers; run the older ones anew")
        finished = record.error is None and summary["rounds"]
        found.append(Entry(summary, record, summary["rounds"][-1]["accuracy"] if finished else {}))
    return found


def own_columns(runs: Sequence[Entry]) -> list[str]:
    """The metrics that benches asked for, in the order in which they come."""
    return list(dict.fromkeys(name for run in runs for name in run.record.metrics))


def csv_table(runs: Sequence[Entry]) -> str:
    """A row per run, in the order in which they come."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *own_columns(runs)], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        writer.writerow({key: round(value, 6) if isinstance(value, float) else value for key, value in _values(run).items()})
    return text.getvalue()


def _values(run: Entry) -> dict[str, Any]:
    summary, record, accuracy = run
    own = {name: getattr(record, name) for name in COLUMNS if hasattr(record, name)}
    shared = {name: accuracy.get(name) for name in ("ensemble_uniform", "ensemble_oracle", "ensemble_estimated")}
    return {
        **own,
        **shared,
        **record.metrics,
        "cell": summary["cell"],
        "method": record.row,
        "seed": summary["seed"],
        "teacher": run.teacher,
        "accuracy_last": accuracy.get("student_merged"),
        "accuracy_attention": run.attention,
        "peak_memory_mb": summary["rounds"][-1]["peak_memory_mb"] if accuracy else None,
        "gap": run.gap,
        "published_gap": run.published_gap,
        "registered_as": record.method,
        "teachers_sha256": " ".join(record.teachers),
        "commit": summary["commit"],
    }


def markdown_table(runs: Sequence[Entry]) -> str:
    """A row per cell and method, the mean and standard deviation over its seeds, and where it was measured."""
    attention = ["by attention"] if any(run.attention is not None for run in runs) else []
    held_out = any(run.summary["config"]["data"].get("validation_size") for run in runs)
    judge, selected = ("training images that no client holds", "them") if held_out else ("the global test set", "test")
    head = [
        "cell", "method", "seeds", "teacher", "ensemble", "**last epoch**", *attention, "gap", "published gap", "agreement",
        f"best epoch (selected on {selected})", "seconds", "student steps", "generator steps", "peak memory", "class entropy", *(extra := own_columns(runs)),
    ]  # fmt: skip
    places = {place: [run for run in runs if run.place == place] for place in dict.fromkeys(run.place for run in runs)}
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(_row(place, some, extra, attention=bool(attention)))} |" for place, some in places.items()]
    machines = dict.fromkeys(machine_words(origin["hardware"], run.summary["runtime"]) for run in runs for origin in origins(run.summary))
    commits = dict.fromkeys(short_commit(origin["commit"]) for run in runs for origin in origins(run.summary))
    note = (
        f"Accuracy, gap and agreement on {judge} in %, mean ± standard deviation over seeds. Teacher: mean of the teachers; ensemble: with the "
        f"weights of the run; {'by attention: its headers fused by attention that clients fitted on images of theirs; ' if attention else ''}"
        "gap: what the last epoch lacks to the ensemble; published gap: in the method's paper, with its networks, teacher and budget; "
        "agreement: images to which student and ensemble give the same class. Seconds "
        "without evaluation. Generator steps are all optimiser steps that are not the student's. Peak memory in MB, of a process of its own. Class entropy "
        f"(nats, at most ln C) of the ensemble's classes of {ENTROPY_IMAGES} synthetic images. Measured on {'; '.join(machines)}. Commit {', '.join(commits)}."
    )
    note += mixed_note(" ".join(place) for place, some in places.items() if not same_settings([run.summary for run in some]))
    return "\n".join([*lines, "", note, "", *_failures(runs)])


def mixed_note(rows: Iterable[str]) -> str:
    """What a caption says of rows whose runs are not of the same settings; nothing if there are none."""
    named = ", ".join(rows)
    return f" **The runs of {named} differ in more than their seeds: run the older ones anew.**" if named else ""


def _row(place: tuple[str, str], runs: Sequence[Entry], extra: Sequence[str], *, attention: bool) -> list[str]:
    good = [run for run in runs if run.accuracy]
    seeds = str(len(runs)) if len(good) == len(runs) else f"{len(good)} of {len(runs)}"
    names = ("agreement", "accuracy_best", "seconds", "student_steps", "generator_steps", "class_entropy")
    of = {name: [getattr(run.record, name) for run in good] for name in names}
    memory = [run.summary["rounds"][-1]["peak_memory_mb"] for run in good]
    return [
        *place,
        seeds,
        spread([run.teacher for run in good], 2),
        spread([run.accuracy["ensemble_estimated"] for run in good], 2),
        f"**{spread([run.accuracy['student_merged'] for run in good], 2)}**",
        *([spread([run.attention for run in good], 2)] if attention else []),
        spread([run.gap for run in good], 2),
        _mean([None if run.published_gap is None else 100 * run.published_gap for run in good], ".2f"),
        *(spread(of[name], 2) for name in ("agreement", "accuracy_best")),
        *(_mean(of[name]) for name in ("seconds", "student_steps", "generator_steps")),
        _mean(memory),
        _mean(of["class_entropy"], ".2f"),
        *(_mean([run.record.metrics.get(name) for run in good], ".3f") for name in extra),
    ]


def _mean(values: Sequence[float | None], form: str = ".0f") -> str:
    known = [value for value in values if value is not None]
    return format(statistics.fmean(known), form) if known and len(known) == len(values) else "-"


def _failures(runs: Sequence[Entry]) -> list[str]:
    """What went wrong, a line per run; no lines if nothing did."""
    lines = [f"- {run.place[1]} in {run.place[0]}, seed {run.summary['seed']}: {' '.join(run.record.error.split())}" for run in runs if run.record.error]
    return ["Failed:", "", *lines, ""] if lines else []


def draw(runs: Sequence[Entry], path: Path) -> Path:
    """Accuracy against seconds, a colour per row and a line per seed, which ends at the last epoch; a panel per cell.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing pictures", "simulation") from error
    cells, rows = (list(dict.fromkeys(run.place[index] for run in runs)) for index in (0, 1))
    figure = Figure(figsize=(2.0 + 5.0 * len(cells), 4.5), dpi=100, layout="constrained")
    for axes, cell in zip(figure.subplots(1, len(cells), squeeze=False)[0], cells, strict=True):
        mine = [run for run in runs if run.place[0] == cell]
        for number, row in enumerate(rows):
            curves = [run.record.curve for run in mine if run.place[1] == row and run.record.curve]
            for index, curve in enumerate(curves):
                seconds, accuracies = zip(*curve, strict=True)
                colour, label = colormaps["tab20"](number % 20), row if index == 0 else None
                axes.plot(seconds, [100 * value for value in accuracies], color=colour, linewidth=0.8)
                axes.plot(seconds[-1:], [100 * accuracies[-1]], color=colour, marker="o", linestyle="", label=label)
        known = [100 * run.teacher for run in mine if run.teacher is not None]
        if known:
            axes.axhline(statistics.fmean(known), color="black", linestyle="--", linewidth=1, label="teacher, mean")
        axes.set(xlabel="seconds of distillation", ylabel="accuracy on the global test set (%)", title=cell, xscale="log")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Software": None})
    return path


def write_tables(directory: Path, summaries: Sequence[Summary], *, picture: bool = True) -> list[Path]:
    """Write table and picture of one study into a directory.

    Raises:
        MissingExtraError: matplotlib is not installed (the tables are written all the same).
    """
    directory.mkdir(parents=True, exist_ok=True)
    runs = entries(summaries)
    written = [directory / TABLE, directory / MARKDOWN]
    write_text(written[0], csv_table(runs))
    write_text(written[1], markdown_table(runs) + "\n")
    if picture and any(run.record.curve for run in runs):
        written.append(draw(runs, directory / PICTURE))
    return written
