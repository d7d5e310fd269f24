"""``losses.csv``: a distillation's history on disk, a row per epoch."""

from __future__ import annotations

import csv
import io
from pathlib import Path


def losses_csv(history: list[dict[str, float]]) -> str:
    """The history as CSV: a column per term, in order of first appearance; empty where an epoch does not have it."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: value if isinstance(value, int) else f"{value:.6g}" for key, value in row.items()} for row in history)
    return text.getvalue()


def read_losses(path: Path) -> list[dict[str, float]]:
    """The rows of a ``losses.csv``; empty fields are left out, and so is a missing file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
