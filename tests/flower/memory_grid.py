"""An in-memory `Grid` that calls ClientApps directly, and the one private thing it needs from Flower."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from cdfkd_strategy.flower.apps import make_client_app
from cdfkd_strategy.flower.strategy import CDFKDStrategy
from cdfkd_strategy.run_config import RunConfig, from_values
from cdfkd_strategy.types import ImageSpec

SUPERLINK = 1
FIRST_NODE = 1_000_003


class Killed(BaseException):
    """The server dies here: nothing in the library may catch it."""


class MemoryGrid(Grid):
    """Runs every message when its reply is pulled, one reply per pull.

    Args:
        apps: one per node.
        order: how waiting message ids are ordered before the next one is run.
    """

    def __init__(self, apps: list[ClientApp], order: Callable[[list[str]], list[str]] = sorted, first_node: int = FIRST_NODE) -> None:
        self.nodes = {
            first_node + 17 * index: (app, Context(1, first_node + 17 * index, {"partition-id": index, "num-partitions": len(apps)}, RecordDict(), {}))
            for index, app in enumerate(apps)
        }
        self.order = order
        self.log: list[tuple[str, int, RecordDict]] = []
        self.dead: set[int] = set()
        self.mute: set[int] = set()
        self.edit: Callable[[int, Message], Message] = lambda _, reply: reply
        self._waiting: dict[str, Message] = {}
        self._ids = itertools.count(1)

    def node(self, partition: int) -> int:
        return list(self.nodes)[partition]

    def asked(self, message_type: str) -> list[int]:
        """Partition ids of the nodes that got such a message, in order."""
        return [list(self.nodes).index(node) for kind, node, _ in self.log if kind == message_type]

    def contents(self, message_type: str) -> list[RecordDict]:
        return [content for kind, _, content in self.log if kind == message_type]

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"{next(self._ids):06d}"
            self._waiting[message.metadata.message_id] = message
            self.log.append((message.metadata.message_type, message.metadata.dst_node_id, message.content))
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = [key for key in message_ids if self._waiting[key].metadata.dst_node_id not in self.mute]
        if not ids:
            return []
        return [self._run(self._waiting.pop(self.order(ids)[0]))]

    def _run(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node in self.dead:
            reply = Message(Error(code=5, reason="Node Unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK
            return reply
        app, context = self.nodes[node]
        try:
            return self.edit(node, app(message, context))
        except Exception as error:
            return Message(Error(code=2, reason=f"{type(error).__name__}: {error}"), reply_to=message)

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("the strategy takes replies one by one")


IMAGE = ImageSpec(1, 8, 8, 10)

TINY: dict[str, Any] = {
    "epochs": 2,
    "iterations": 2,
    "student_steps": 1,
    "batch_size": 8,
    "schedule": "cosine",
    "generator": {"latent_dim": 4, "width": 0.05},
}

VALUES: dict[str, Any] = {
    "data": {"name": "digits", "train_size": 150, "test_size": 60, "partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 20}, "local_test": 0.2},
    "clients": {"count": 3, "architectures": ["lenet_bn"], "epochs": 1, "batch_size": 32, "attention_samples": 20},
    "student": {"backbone": "lenet_bn"},
    "method": {"name": "cdfkd_mfs", **TINY},
    "server": {"node_wait": 0.2, "timeout": 5.0},
    "engine": {"device": "cpu", "threads": 1, "precision": "float32", "watch_images": 0, "progress": False},  # measured, it may differ between processes
}


def tiny_config(**parts: dict[str, Any]) -> RunConfig:
    """A run of seconds; ``parts`` update the groups of `VALUES`."""
    values = copy.deepcopy(VALUES)
    for name, part in parts.items():
        values[name] = {**values.get(name, {}), **part}
    return from_values(values)


def project_grid(config: RunConfig, **choices: Any) -> MemoryGrid:
    """Nodes that run this project's client."""
    app = make_client_app(config)
    return MemoryGrid([app] * config.clients.count, **choices)


def tiny_strategy(**choices: Any) -> CDFKDStrategy:
    """A strategy on 8x8 images that distils in a fraction of a second."""
    given = {
        "architecture": "lenet",
        "student": "lenet_bn",
        "method_config": TINY,
        "engine": VALUES["engine"] and from_values(VALUES).engine,
        "node_wait": 0.1,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
    }
    return CDFKDStrategy(IMAGE, **{**given, **choices})


def echo_app(
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
    *,
    examples: float = 20,
    teacher: dict[str, Any] | None = None,
    noise: float = 0.05,
) -> ClientApp:
    """A foreign client: adds seeded noise to what it got, and replies; knows hello only if it has a ``teacher`` record.

    Args:
        change: edits the state dict before it is sent.
        examples: of the metrics.
        teacher: content of a ``teacher`` record; ``partition-id`` is filled in from the node.
        noise: standard deviation.
    """
    app = ClientApp()

    def record(context: Context) -> ConfigRecord:
        return ConfigRecord({"partition-id": context.node_config["partition-id"], **(teacher or {})})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        rng = torch.Generator().manual_seed(int(context.node_config["partition-id"]) + 100 * int(message.content["config"]["server-round"]))
        for name, tensor in state.items():
            if tensor.is_floating_point() and "running" not in name:
                state[name] = tensor + noise * torch.randn(tensor.shape, generator=rng)
        if change is not None:
            change(state)
        content = RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": examples, "train_loss": 1.0})})
        if teacher is not None:
            content["teacher"] = record(context)
        return Message(content, reply_to=message)

    if teacher is not None:

        @app.query("hello")
        def hello(message: Message, context: Context) -> Message:
            return Message(RecordDict({"teacher": record(context)}), reply_to=message)

    return app
