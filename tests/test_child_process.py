"""A child process ends when its parent is killed, and not before."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time

import pytest

from cdfkd_strategy.child_process import end_with_parent


def child() -> None:
    end_with_parent()
    print("started", flush=True)
    time.sleep(600)


def parent() -> None:
    multiprocessing.get_context("spawn").Process(target=child).start()
    time.sleep(600)


def test_a_child_lives_as_long_as_its_parent() -> None:
    code = "from tests.test_child_process import parent; parent()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.kill()
    assert process.communicate(timeout=20) == ("", None)  # the child has the same standard output, which ends with the last of them
