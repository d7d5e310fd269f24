"""What is said to be disclosed is what clients send, for every method, and declared label counts reach the method."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from flwr.app import Message, RecordDict

from cdfkd_strategy import cli
from cdfkd_strategy.data.client_share import train_label_counts
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.distiller import METHODS
from cdfkd_strategy.flower.apps import serve
from cdfkd_strategy.flower.disclosure import ALWAYS, ATTENTION, EVALUATED, FAILED, LATER, OPTED_IN
from cdfkd_strategy.flower.strategy import CDFKDStrategy
from cdfkd_strategy.types import Needs
from tests.flower.memory_grid import project_grid, tiny_config, tiny_strategy
from tests.methods.remembering import Remembering

PARTS = (
    *("all weights", "BatchNorm running statistics", "number of training examples", "architecture name", "partition id"),
    *("from round 2 on: divergence of its teacher from the student", "if it evaluates: local accuracy of the student", "number of test examples"),
)


def replies_of(weights: str, broadcast: str = "heads") -> dict[tuple[str, str], list[RecordDict]]:
    """Everything that this project's clients answer in two rounds, by kind of message and round."""
    config = tiny_config(data={"train_size": 90}, clients={"count": 2}, server={"rounds": 2, "weights": weights, "broadcast": broadcast, "node_wait": 0.2})
    grid, found = project_grid(config), dict[tuple[str, str], list[RecordDict]]()

    def keep(_: int, reply: Message) -> Message:
        found.setdefault((reply.metadata.message_type, reply.metadata.group_id), []).append(reply.content)
        return reply

    grid.edit = keep
    serve(grid, config, None, resume=False)
    assert all(len(contents) == 2 for contents in found.values())
    return found


@pytest.mark.parametrize(("weights", "broadcast"), [("auto", "heads"), ("label_counts", "single")])
def test_every_key_of_every_reply_is_in_the_list_and_nothing_else(weights: str, broadcast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CDFKDStrategy.__init__.__kwdefaults__, "single_steps", 2)
    found = replies_of(weights, broadcast)
    assert sorted(found) == [("evaluate", "1"), ("evaluate", "2"), ("query.hello", "1"), ("train", "1"), ("train", "2")]
    for content in found["query.hello", "1"]:
        assert set(content) == {"teacher"}
        assert set(content["teacher"]) <= set(ALWAYS)
    for number in ("1", "2"):
        always = {*ALWAYS, *(OPTED_IN if weights == "label_counts" else ()), *(LATER if number == "2" else ())}
        for content in found["train", number]:
            assert set(content) == {"arrays", "metrics", "teacher"}
            assert any("running_var" in name for name in content["arrays"]), "BatchNorm running statistics included"
            assert {"arrays", *content["metrics"], *content["teacher"]} == always
        for content in found["evaluate", number]:
            assert set(content) == {"metrics", "attention"} if broadcast == "heads" else {"metrics"}
            assert set(content["metrics"]) == set(EVALUATED)
            assert broadcast == "single" or set(content["attention"]) == set(ATTENTION)


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
    assert not any("label counts" in row for row in found.values())
    (line,) = [line for line in plain.splitlines() if line.startswith("a client discloses, whatever the method: ")]
    assert all(part in line for part in PARTS), line
    assert "label counts" not in line
    assert "label counts per class: only where server.weights=label_counts asks for them and the client consents" in plain
    monkeypatch.setattr(METHODS["cdfkd_mfs"], "needs", Needs(label_counts=True, features=True))
    assert cli.main(["methods"]) == 0
    changed = rows(capsys.readouterr().out)
    assert "| features before a last linear layer, label counts per class; uses, where they are: BatchNorm running statistics |" in changed["cdfkd_mfs"]
    assert changed["rdskd"] == found["rdskd"]


def test_the_strategy_lists_the_same() -> None:
    first, *others = tiny_strategy(fraction_evaluate=0.0).disclosures
    assert all(part in first for part in ALWAYS.values())
    assert others == [f"a client that fails: {FAILED} (to the server)"]
    strategy = tiny_strategy()
    evaluated, _, student = strategy.disclosures[1:]
    assert all(part in evaluated for part in (*EVALUATED.values(), *ATTENTION.values()))
    assert "class weights of all clients (to every client that evaluates)" in student
    strategy.session.num_rounds = 2
    later, *_, student = strategy.disclosures[1:]
    assert all(part in later for part in LATER.values())
    assert "(to every client)" in student
    single = tiny_strategy(broadcast="single").disclosures
    assert not any(part in line for line in single for part in ATTENTION.values())
    assert any("the method needs: BatchNorm running statistics" in line for line in tiny_strategy(method="deep_inversion", method_config=None).disclosures)


@pytest.mark.parametrize("declares", [True, False])
def test_disclosed_counts_reach_a_method_that_declares_them(declares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Remembering.seen.clear()
    monkeypatch.setattr(Remembering, "needs", Needs(label_counts=declares))
    monkeypatch.setattr(METHODS, "_entries", {**METHODS._entries, "remembering": Remembering})
    config = dataclasses.replace(tiny_config(server={"weights": "label_counts", "node_wait": 0.2}), method={"name": "remembering"})
    serve(project_grid(config), config, tmp_path, resume=False)
    truth = torch.as_tensor(train_label_counts(load_data(config.data, config.seed), config.data, 3, config.seed))
    assert Remembering.seen
    for extras in Remembering.seen:
        assert (extras.label_counts is not None) == declares
        assert extras.label_counts is None or torch.equal(extras.label_counts, truth)
    trained = len(Remembering.seen)
    serve(project_grid(config), config, tmp_path, resume=True)
    assert len(Remembering.seen) == trained, "a finished run is read back, with the same extras"
