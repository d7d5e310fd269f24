"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

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
        values = [record["accuracy"][key] for record in rounds]
        if any(value is not None for value in values) or key in ("fedavg", "student_merged"):
            table.add_row(label, *map(percent, values), style="bold" if key == "student_merged" else "")
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
