"""Flower's in-process simulation of one configuration: the only file that starts Ray."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cdfkd_strategy.data.partition import OWN
from cdfkd_strategy.errors import ConfigError, MissingExtraError
from cdfkd_strategy.flower.apps import check_federated, make_client_app, make_server_app
from cdfkd_strategy.provenance import usable_cores
from cdfkd_strategy.run_config import RunConfig


def simulate(config: RunConfig, out: Path, *, resume: bool = False) -> None:
    """Run a configuration with all its clients on this machine, in Flower's simulation.

    Clients run in Ray actors, as many at a time as there are cores for; the server runs in a thread of this process. A
    script that calls this needs the usual ``if __name__ == "__main__":`` guard.

    Args:
        config: of the run; it travels to server and clients in closures.
        out: run directory.
        resume: continue the run that was interrupted there.

    Raises:
        ConfigError: the configuration names no data set, so that the simulated clients would have no images, or a device that is not there.
        MissingExtraError: Ray is not installed.
        CDFKDError: whatever keeps the run from going on.
    """
    if config.data.name is None or config.data.partition.name == OWN:
        raise ConfigError(
            f"data.name is {config.data.name!r} and data.partition.name {config.data.partition.name!r}: the clients of a simulation have no images "
            "of their own; name a data set and a partition, or run the configuration on SuperNodes with `flwr run`"
        )
    check_federated(config)
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("Flower's simulation (cdfkd run)", "simulation")
    if not resume:
        config.engine.runtime()  # a device that is not there is said before Ray takes its time to start
    from flwr.simulation import run_simulation

    server_app, client_app = make_server_app(config, out=out, resume=resume), make_client_app(config)
    before = set(threading.enumerate())
    try:
        with _quiet():
            run_simulation(server_app, client_app, config.clients.count, backend_config=backend(config))
    except KeyboardInterrupt:
        _interrupt(set(threading.enumerate()) - before)
        raise


def backend(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Ray's settings: all usable cores, ``clients.num_cpus`` of them per client.

    Raises:
        ConfigError: a client is to have more cores than there are.
    """
    cores = usable_cores()
    if config.clients.num_cpus > cores:
        raise ConfigError(f"clients.num_cpus is {config.clients.num_cpus}; accepted on this machine: at most {cores}")
    return {
        "init_args": {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False},
        "client_resources": {"num_cpus": config.clients.num_cpus, "num_gpus": 0.0},
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Flower's advice to use `flwr run` instead of its Python API (that needs a daemon and an app directory), and a tip of Ray's."""

    def relevant(record: logging.LogRecord) -> bool:
        return "`run_simulation` function is deprecated" not in record.getMessage()

    logger = logging.getLogger("flwr")
    logger.addFilter(relevant)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Tip: In future versions of Ray")
            yield
    finally:
        logger.removeFilter(relevant)


def _interrupt(threads: set[threading.Thread]) -> None:
    """End the server's thread, which Flower would leave running to the end of the distillation; `SystemExit` does so without a traceback."""
    for thread in threads:
        if thread.ident is not None and not thread.daemon:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
