"""Flower's programs as processes of a test: their environment, free ports, and an end for whatever they leave behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

PROGRAMS = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_of(home: Path) -> dict[str, str]:
    """A Flower home of its own, nobody phoned, nothing installed."""
    home.mkdir(parents=True, exist_ok=True)
    settings = {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": str(PROGRAMS) + os.pathsep + os.environ["PATH"],
    }
    return {**os.environ, **settings}


def processes_with(text: str) -> list[int]:
    """Ids of the processes whose command line or environment has this text (Linux)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                whole = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:  # it has ended, or is not ours
                continue
            if text.encode() in whole:
                found.append(int(folder.name))
    return found


def end_all(homes: Path) -> list[int]:
    """End every process with a Flower home in this folder, and its children; gives those that are still there."""
    text = f"FLWR_HOME={homes}"
    for _ in range(50):  # a process may start another one while it is ended
        left = processes_with(text)
        if not left:
            break
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    return processes_with(text)
