"""A ClientApp that knows nothing of this project: the message contract of Flower's quickstart-pytorch, written anew."""

from __future__ import annotations

import logging
import sys
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from cdfkd_strategy import CDFKDStrategy, make_client_app, resolve
from cdfkd_strategy.types import ImageSpec
from tests.flower.memory_grid import TINY, VALUES, MemoryGrid, tiny_strategy
from tests.test_readme import block_with

CIFAR = ImageSpec(3, 32, 32, 10, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Net(nn.Module):
    """The quickstart's network: no BatchNorm, activations as functions, a reshape in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def images(partition_id: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(partition_id)
    return torch.randn(16, 3, 32, 32, generator=rng), torch.randint(10, (16,), generator=rng)


def client_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        model = Net()
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        pictures, labels = images(context.node_config["partition-id"])
        optimizer = torch.optim.Adam(model.parameters(), lr=msg.content["config"]["lr"])
        running_loss = 0.0
        for _ in range(context.run_config["local-epochs"]):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(pictures), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        metrics = MetricRecord({"train_loss": running_loss, "num-examples": len(labels)})
        return Message(content=RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=msg)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        model = Net()
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        pictures, labels = images(context.node_config["partition-id"])
        with torch.no_grad():
            logits = model(pictures)
        metrics = {"eval_loss": F.cross_entropy(logits, labels).item(), "eval_acc": (logits.argmax(1) == labels).float().mean().item(), "num-examples": 16}
        return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)

    return app


def quickstart_grid() -> MemoryGrid:
    grid = MemoryGrid([client_app()] * 2)
    for _, context in grid.nodes.values():
        context.run_config["local-epochs"] = 2
    return grid


def test_the_quickstart_client_works_unchanged_in_one_round_without_an_error(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    grid = quickstart_grid()
    torch.manual_seed(3)
    global_model = Net()
    strategy = CDFKDStrategy(CIFAR, architecture=Net, method_config=TINY)
    with caplog.at_level(logging.INFO, "flwr"):
        result = strategy.start(
            grid=grid, initial_arrays=ArrayRecord(global_model.state_dict()), train_config=ConfigRecord({"lr": 0.01}), num_rounds=1, timeout=20
        )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert {kind for kind, _, _ in grid.log} == {"train"}
    assert grid.contents("train")[0]["arrays"]["fc3.bias"].numpy() == pytest.approx(global_model.fc3.bias.detach().numpy())
    assert strategy.student is not None
    assert strategy.student.heads == 2
    assert set(result.arrays) == set(strategy.student.state_dict())
    assert result.train_metrics_clientapp[1]["train_loss"] > 0
    assert strategy.teachers is not None
    assert [spec.key for spec in strategy.teachers.specs] == [str(node) for node in grid.nodes]
    assert {spec.arch for spec in strategy.teachers.specs} == {"Net"}


def test_over_several_rounds_it_keeps_its_node_id_as_key_and_is_asked_to_train_only() -> None:
    grid = quickstart_grid()
    strategy = CDFKDStrategy(CIFAR, architecture=Net, method_config=TINY)
    strategy.start(grid, num_rounds=2, timeout=20, train_config=ConfigRecord({"lr": 0.01}))
    assert grid.asked("query.hello") == [0, 1]
    assert grid.asked("train") == [0, 1, 0, 1]
    assert grid.asked("evaluate") == []
    assert all("student" not in content for content in grid.contents("train"))
    trained = strategy.session.uploads.trained_in
    assert trained == {str(node): 2 for node in grid.nodes}


def test_the_readmes_server_app_is_one_for_these_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the quickstart's clients, and a method that takes no minutes."""
    example = block_with("ServerApp()", "python")
    assert "/absolute/run" in example
    monkeypatch.setitem(sys.modules, "task", SimpleNamespace(Net=Net))
    monkeypatch.setattr(CDFKDStrategy, "__init__", partialmethod(CDFKDStrategy.__init__, method_config=TINY))
    names: dict[str, Any] = {}
    exec(example.replace("/absolute/run", str(tmp_path / "run")), names)
    names["main"](quickstart_grid(), None)
    assert f"2 teachers in one student: {tmp_path}/run/student.safetensors" in capsys.readouterr().out
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_the_readmes_client_app_for_several_rounds_goes_with_a_strategy_that_was_made_by_hand(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(VALUES), encoding="utf-8")
    app = make_client_app(resolve(str(tmp_path / "run.yaml")))
    grid = MemoryGrid([app] * 3)
    strategy = tiny_strategy(architecture="lenet_bn")
    strategy.start(grid, num_rounds=2, timeout=20)
    assert grid.asked("train") == [0, 1, 2, 0, 1, 2]
    assert [record.quarantined for record in strategy.rounds] == [{}, {}]
    assert strategy.attention is not None
