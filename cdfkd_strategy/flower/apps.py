"""The two Flower apps: what `flwr run`, SuperNodes and the in-process simulation start."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from cdfkd_strategy.checkpoint import STATE_FILE
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.data.datasets import DataConfig, ImageData, load_data
from cdfkd_strategy.errors import ConfigError, MissingExtraError
from cdfkd_strategy.flower import client, payload
from cdfkd_strategy.flower.strategy import CDFKDStrategy
from cdfkd_strategy.harness import Harness
from cdfkd_strategy.provenance import peak_memory_mb
from cdfkd_strategy.run_config import PATIENCE, RunConfig, resolve
from cdfkd_strategy.summary import SummaryWriter
from cdfkd_strategy.types import ImageSpec

logger = logging.getLogger("flwr")

_SERVER_ONLY = ("engine", "method")
"""Parts of a configuration that clients do not need, and that may name what only the server has."""


def make_client_app(config: RunConfig | None = None, *, data: DataConfig | None = None) -> ClientApp:
    """A ClientApp that trains, evaluates and says who it is.

    A client trains on its share of the run's data set, or on all of a set of its own: ``data``, or what its node's
    configuration names (``data-path``, ``data-name``).

    Args:
        config: of the run; None takes what the server sends with every message.
        data: this client's own data set; image size, normalisation and class numbers are the run's.
    """
    app = ClientApp()

    @app.query(payload.HELLO_ACTION)
    def hello(message: Message, context: Context) -> Message:
        return client.hello(message, context, config, data)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return client.train(message, context, config, data)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return client.evaluate(message, context, config, data)

    return app


def make_server_app(config: RunConfig | None = None, *, out: Path | None = None, resume: bool = False) -> ServerApp:
    """A ServerApp that runs one configuration and writes its run directory.

    Args:
        config: of the run; None reads ``config``, ``overrides`` and ``out`` of ``[tool.flwr.app.config]`` when it starts
            (an interrupted run in ``out`` is then continued).
        out: run directory; None keeps the run in memory.
        resume: continue the run in ``out``.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        if config is not None:
            serve(grid, config, out, resume=resume)
            return
        found, directory = from_run_config(context.run_config)
        serve(grid, found, directory, resume=directory is not None and (directory / STATE_FILE).exists())
        _draw(found, directory)

    return app


def from_run_config(values: UserConfig) -> tuple[RunConfig, Path | None]:
    """Configuration and run directory from the app's ``config``, ``overrides`` (space-separated key=value) and ``out``.

    Raises:
        ConfigError: ``out`` is not absolute (the server's working directory is not the app's), or the configuration is not accepted.
    """
    config = resolve(str(values.get("config", "digits")), shlex.split(str(values.get("overrides", ""))))
    out = str(values.get("out", ""))
    if out and not Path(out).is_absolute():
        raise ConfigError(f"out is {out!r}; accepted: an absolute path, since the server does not run in your working directory, or an empty string")
    return config, Path(out) if out else None


def check_federated(config: RunConfig) -> None:
    """Some settings are for the comparison of methods on the same teachers, and have no meaning between server and clients.

    Raises:
        ConfigError: the configuration has one of them.
    """
    settings: tuple[tuple[str, object, object], ...] = (
        ("student.heads", config.student.heads, "per_teacher"),
        ("clients.init", config.clients.init, "common"),
        ("clients.device", config.clients.device, "cpu"),
        ("server.transfer_set", config.server.transfer_set, None),
    )
    for name, value, accepted in settings:
        if value != accepted:
            hint = '; a SuperNode\'s is in its --node-config, device="cuda"' if name == "clients.device" else ""
            raise ConfigError(
                f"{name} is {value!r}; accepted with Flower: {accepted!r}{hint} (`cdfkd teachers`, `cdfkd distill` and `cdfkd bench` take the others)"
            )


def make_strategy(config: RunConfig, image: ImageSpec, harness: Harness, out: Path | None, *, resume: bool) -> CDFKDStrategy:
    """The strategy of a configuration.

    Raises:
        ConfigError: it has settings that are for a distillation without Flower.
    """
    check_federated(config)
    method, method_config = config.method_config()
    return CDFKDStrategy(
        image,
        architecture=config.clients.architectures[0],
        architectures=config.clients.architectures,
        student=config.student.backbone,
        student_max_width=config.student.max_width,
        student_init=config.student.init,
        student_stages=config.student.stages,
        method=method,
        method_config=method_config,
        weights=config.server.weights,
        engine=config.engine,
        seed=config.seed,
        watch=harness.watch,
        run_dir=out,
        resume=resume,
        min_teachers=config.server.min_teachers,
        max_teacher_age=config.server.max_teacher_age,
        broadcast=config.server.broadcast,
        keep_generator=config.server.keep_generator,
        identify=True,
        node_wait=config.server.node_wait,
        fraction_train=config.server.fraction_train,
        fraction_evaluate=config.server.fraction_evaluate,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=config.server.min_available_nodes,
        expected_nodes=config.clients.count,
    )


def serve(grid: Grid, config: RunConfig, out: Path | None, *, resume: bool) -> CDFKDStrategy:
    """Run one configuration on a grid, keeping ``summary.json`` up to date after every round.

    The order of files on disk lets a killed run continue from any moment. ``state.json`` is the first file, since without
    it the next start finds a directory that is not empty and no run in it. A run that is continued is unfinished in its
    summary before its state changes; a round is in the summary before the state calls it over; ``"finished"`` comes last.
    """
    data = None if config.data.name is None else load_data(config.data, config.seed)
    image = config.data.image if data is None else data.image
    assert image is not None
    harness = Harness(config, data)
    strategy = make_strategy(config, image, harness, out, resume=resume)
    strategy.session.run_config = to_dict(config)
    settings = _for_clients(config, image, data)
    if not resume or (out is not None and not (out / STATE_FILE).exists()):  # an earlier start may have died before its first file
        strategy.session.open(ArrayRecord(), settings)
    summary = None if out is None else SummaryWriter(out, config, resume=resume)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:  # noqa: ARG001 - Flower's signature
        return _examine(strategy, harness, summary, server_round)

    strategy.start(grid, None, config.server.rounds, config.server.timeout, settings, settings, evaluate)
    if summary is not None:
        summary.finish("max_seconds" if any(record.stopped_by == "max_seconds" for record in strategy.rounds) else "schedule")
    return strategy


def _for_clients(config: RunConfig, image: ImageSpec, data: ImageData | None) -> ConfigRecord:
    """What clients need of the configuration; what the networks take and the names of the classes as the server knows them."""
    sent = {key: value for key, value in to_dict(config).items() if key not in _SERVER_ONLY}
    sent["server"] = {key: value for key, value in sent["server"].items() if key not in PATIENCE}
    sent["data"]["image"] = to_dict(image)
    if data is not None:
        sent["data"]["class_names"] = list(data.class_names)
    return ConfigRecord({payload.RUN_CONFIG: json.dumps(sent)})


def _examine(strategy: CDFKDStrategy, harness: Harness, summary: SummaryWriter | None, server_round: int) -> MetricRecord | None:
    """Measure everything on the global test set, and record the round."""
    started = time.perf_counter()
    assert strategy.teachers is not None
    accuracy = harness.evaluate(strategy.teachers, strategy.student, single=strategy.single, attention=strategy.attention)
    if summary is not None:
        record, runtime = strategy.rounds[-1], strategy.session.distilled.runtime
        seconds = {**record.seconds, "evaluate": record.seconds["evaluate"] + time.perf_counter() - started}
        memory = peak_memory_mb("cpu" if runtime is None else runtime.device)
        summary.round(
            server_round, accuracy, seconds=seconds, traffic=record.bytes, peak_memory_mb=memory, runtime=None if runtime is None else runtime.to_dict()
        )
    return _metric_record(accuracy)


def _metric_record(accuracy: Mapping[str, Any]) -> MetricRecord | None:
    """What there is of the accuracies; a record has no null, so teachers and headers that do not count are NaN in their lists."""
    found = {
        name: [float("nan") if item is None else item for item in value] if isinstance(value, list) else value
        for name, value in accuracy.items()
        if value is not None
    }
    return MetricRecord(found) if found else None


def _draw(config: RunConfig, out: Path | None) -> None:
    if out is None:
        return
    try:
        from cdfkd_strategy.pictures import draw_pictures, images_of

        draw_pictures(out, config, images_of(config))
    except MissingExtraError as error:
        logger.info("no pictures: %s", error)
