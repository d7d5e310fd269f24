"""The table of labels: a row per client, a column per class, and a note where there are too many."""

from __future__ import annotations

import numpy as np
import pytest
from rich.table import Table

from cdfkd_strategy.cli.tables import MAX_CLASSES, MAX_CLIENTS, label_table, show


def printed(table: Table, capsys: pytest.CaptureFixture[str]) -> list[str]:
    show(table)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_every_count_and_both_totals(capsys: pytest.CaptureFixture[str]) -> None:
    table = label_table(np.array([[3, 0, 12], [0, 5, 1]]), ("cat", "[/dog]", "a very long name"))
    assert table.title is not None
    assert "as the simulation deals them" in str(table.title)
    assert table.caption is None
    lines = [line.split() for line in printed(table, capsys)]
    assert ["client", "cat", "[/dog]", "a", "very", "lon", "all"] in lines
    for row in (["0", "3", "0", "12", "15"], ["1", "0", "5", "1", "6"], ["all", "3", "5", "13", "21"]):
        assert row in lines


def test_many_clients_and_classes_are_cut_with_a_note_and_totals_over_all(capsys: pytest.CaptureFixture[str]) -> None:
    clients, classes = MAX_CLIENTS + 30, MAX_CLASSES + 88
    counts = np.ones((clients, classes), np.int64)
    lines = printed(label_table(counts, [str(name) for name in range(classes)]), capsys)
    assert f"shown: the first {MAX_CLIENTS} of {clients} clients and {MAX_CLASSES} of {classes} classes; totals are over all" in [
        line.strip() for line in lines
    ]
    rows = [line.split() for line in lines]
    assert [str(MAX_CLIENTS - 1), *["1"] * MAX_CLASSES, str(classes)] in rows
    assert ["all", *[str(clients)] * MAX_CLASSES, str(clients * classes)] in rows
    assert len(lines) < MAX_CLIENTS + 10
    assert all(len(line) <= 160 for line in lines)
    only = printed(label_table(counts[:, :3], ["a", "b", "c"]), capsys)
    assert f"shown: the first {MAX_CLIENTS} of {clients} clients; totals are over all" in " ".join(" ".join(only).split())
