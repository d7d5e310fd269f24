"""What is said to be disclosed is what clients send, for every method, and declared label counts reach the method."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from flwr.app import Message, RecordDict

from cdfkd_strategy import cli
from cdfkd_strategy.data.client_share import train_label_counts
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.flower.apps import serve
from cdfkd_strategy.flower.disclosure import ALWAYS, OPTED_IN, disclosed
from cdfkd_strategy.types import Extras, Metrics, Needs
from tests.flower.memory_grid import project_grid, tiny_config, tiny_strategy

PARTS = ("all weights", "BatchNorm running statistics", "number of training examples", "architecture name", "partition id")


def uploads(weights: str) -> list[RecordDict]:
    """The train replies of this project's clients."""
    config = tiny_config(server={"weights": weights, "node_wait": 0.2})
    grid, replies = project_grid(config), list[Message]()
    grid.edit = lambda _, reply: (replies.append(reply), reply)[1]
    serve(grid, config, None, resume=False)
    return [reply.content for reply in replies if reply.metadata.message_type == "train"]


@pytest.mark.parametrize("weights", ["auto", "label_counts"])
def test_every_key_of_an_upload_is_in_the_list_and_nothing_else(weights: str) -> None:
    contents = uploads(weights)
    assert len(contents) == 3
    for content in contents:
        assert set(content) == {"arrays", "metrics", "teacher"}
        assert set(content["metrics"]) <= {"num-examples", "train-loss", "train-accuracy"}, "local training loss and accuracy"
        assert any("running_var" in name for name in content["arrays"]), "BatchNorm running statistics included"
        assert {"arrays", "metrics", "num-examples", *content["teacher"]} == {*ALWAYS, *(OPTED_IN if weights == "label_counts" else ())}


def rows(out: str) -> dict[str, str]:
    """Method name -> the words of its row in the table of `cdfkd methods`, without the box."""
    found: dict[str, list[list[str]]] = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells:
            found.setdefault(cells[0] or list(found)[-1], []).append(cells)
    return {name: " | ".join(" ".join(filter(None, column)) for column in zip(*lines, strict=True)) for name, lines in found.items()}


def test_the_table_of_methods_says_all_of_it_for_every_method(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["methods"]) == 0
    plain = capsys.readouterr().out
    found = rows(plain)
    assert set(found) == set(METHODS)
    for row in found.values():
        assert all(part in row for part in PARTS), row
        assert "label counts" not in row
    assert "label counts per class: only where server.weights=label_counts asks for them and the client consents" in plain
    monkeypatch.setattr(METHODS["cdfkd_mfs"], "needs", Needs(label_counts=True, features=True))
    assert cli.main(["methods"]) == 0
    changed = rows(capsys.readouterr().out)
    assert "number of classes; label counts per class | features before a last linear layer, label counts per class |" in changed["cdfkd_mfs"]
    assert changed["rdskd"] == found["rdskd"]


def test_the_strategy_lists_the_same() -> None:
    first, *others = tiny_strategy(fraction_evaluate=0.0).disclosures
    assert all(part in first for part in disclosed(label_counts=False))
    assert not others
    assert any("the method needs: BatchNorm running statistics" in line for line in tiny_strategy(method="deep_inversion", method_config=None).disclosures)


@dataclass(frozen=True)
class Nothing:
    """No settings."""


class Counting(Distiller):
    """Trains nothing, and remembers what came."""

    name = "counting"
    Config = Nothing
    seen: list[Extras] = []  # noqa: RUF012 - shared on purpose

    @property
    def num_epochs(self) -> int:
        return 1

    def run_epoch(self, epoch: int) -> Metrics:
        Counting.seen.append(self.extras)
        return {"epoch": float(epoch)}


@pytest.mark.parametrize("declares", [True, False])
def test_disclosed_counts_reach_a_method_that_declares_them(declares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Counting.seen.clear()
    monkeypatch.setattr(Counting, "needs", Needs(label_counts=declares))
    monkeypatch.setattr(METHODS, "_entries", {**METHODS._entries, "counting": Counting})
    config = dataclasses.replace(tiny_config(server={"weights": "label_counts", "node_wait": 0.2}), method={"name": "counting"})
    serve(project_grid(config), config, tmp_path, resume=False)
    truth = torch.as_tensor(train_label_counts(load_data(config.data, config.seed), config.data, 3, config.seed))
    assert Counting.seen
    for extras in Counting.seen:
        assert (extras.label_counts is not None) == declares
        assert extras.label_counts is None or torch.equal(extras.label_counts, truth)
    trained = len(Counting.seen)
    serve(project_grid(config), config, tmp_path, resume=True)
    assert len(Counting.seen) == trained, "a finished run is read back, with the same extras"
