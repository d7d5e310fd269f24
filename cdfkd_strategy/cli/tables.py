"""Tables for the terminal, and those of benches for files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cdfkd_strategy.bench.table import write_tables
from cdfkd_strategy.errors import MissingExtraError
from cdfkd_strategy.summary import discloses_counts

logger = logging.getLogger(__name__)

ROWS = (
    ("fedavg", "one-shot FedAvg"),
    ("ensemble_uniform", "ensemble, uniform"),
    ("ensemble_estimated", "ensemble, estimated weights"),
    ("ensemble_oracle", "ensemble, oracle weights"),
    ("student_mean", "student, mean of headers"),
    ("student_merged", "student, merged"),
    ("student_single", "student, single header"),
    ("student_attention", "student, attention"),
)
"""Accuracy keys with one value, in the order of the table; lists come before the row that follows from them."""


MAX_CLIENTS, MAX_CLASSES, MAX_NAME = 20, 12, 10
"""Rows, columns, and characters of a class name in the table of labels."""


def label_table(counts: np.ndarray, class_names: Sequence[str]) -> Table:
    """Training samples per client and class, the first of each where there are many.

    Args:
        counts: ``[clients, C]``.
        class_names: ``C``.
    """
    clients, classes = counts.shape
    shown = counts[:MAX_CLIENTS, :MAX_CLASSES]
    limits = ((MAX_CLIENTS, clients, "clients"), (MAX_CLASSES, classes, "classes"))
    cut = " and ".join(f"{most} of {there} {what}" for most, there, what in limits if there > most)
    table = Table(
        title="training samples per client and class, as the simulation deals them",
        caption=f"shown: the first {cut}; totals are over all" if cut else None,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("client")
    for name in class_names[: shown.shape[1]]:
        table.add_column(escape(str(name)[:MAX_NAME]), justify="right")
    table.add_column("all", justify="right")
    for client, row in enumerate(shown):
        table.add_row(str(client), *map(_count, row), str(counts[client].sum()))
    table.add_row("all", *map(_count, counts.sum(0)[: shown.shape[1]]), str(counts.sum()), style="dim")
    return table


def _count(samples: int) -> str:
    return f"{samples}" if samples else "[dim]0[/dim]"


def run_table(summary: Mapping[str, Any]) -> Table:
    """Accuracies of a run, a column per round."""
    rounds = summary["rounds"]
    table = Table(title=f"{summary['study']}/{summary['cell']}, seed {summary['seed']}", title_justify="left")
    table.add_column("accuracy on the global test set, %")
    for record in rounds:
        table.add_column(f"round {record['round']}", justify="right")
    _list_rows(table, rounds, "teachers", "teacher of client")
    for key, label in ROWS:
        if key == "student_mean":
            _list_rows(table, rounds, "student_heads", "student, header")
        title = "ensemble, disclosed label counts" if key == "ensemble_estimated" and discloses_counts(summary) else label
        values = [record["accuracy"][key] for record in rounds]
        if any(value is not None for value in values) or key in ("fedavg", "student_merged"):
            table.add_row(title, *map(percent, values), style="bold" if key == "student_merged" else "")
    return table


def _list_rows(table: Table, rounds: list[Mapping[str, Any]], key: str, label: str) -> None:
    lists = [record["accuracy"][key] or [] for record in rounds]
    for index in range(max(map(len, lists), default=0)):
        table.add_row(f"{label} {index}", *(percent(values[index]) if index < len(values) else "-" for values in lists), style="dim")


def percent(value: float | None) -> str:
    """A fraction as per cent with one decimal; "-" where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def show(table: Table) -> None:
    """Print a table to standard output, at least as wide as it needs where that is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def write_and_say(directory: Path, summaries: list[dict[str, Any]]) -> None:
    """Tables and picture of a bench, and where they are."""
    try:
        written = write_tables(directory, summaries)
    except MissingExtraError as error:
        logger.info("no picture: %s", error)
        written = write_tables(directory, summaries, picture=False)
    for path in written:
        print(f"written:  {path}")
