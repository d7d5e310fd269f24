"""Freed memory is kept inside the block, and only there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cdfkd_strategy import freed_memory
from cdfkd_strategy.runtime import Runtime

FAULTS = """
import resource, torch
from contextlib import nullcontext
from cdfkd_strategy.freed_memory import kept
torch.set_num_threads(1)
def faults():
    for _ in range(20):
        torch.ones(2**23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**23)  # 32 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024
with {block}:
    print(faults())
print(resident())
"""


@pytest.mark.skipif(freed_memory._glibc() is None, reason="needs glibc")
def test_a_step_does_not_pay_for_its_pages_again_and_the_end_gives_them_back() -> None:
    def run(block: str) -> list[int]:
        command = [sys.executable, "-c", FAULTS.format(block=block)]
        environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PATH": ""}
        return [int(word) for word in subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()]

    (many, before), (few, after) = run("nullcontext()"), run("kept()")
    assert many >= 20 * 2**25 / 2**21  # 20 times 32 MB, in pages, or in huge pages where the kernel gives them
    assert few < many / 5
    assert after < before + 20


SMALL = """
import resource, torch
from cdfkd_strategy.freed_memory import kept
torch.set_num_threads(1)
def step():
    blocks = [torch.ones(2**20) for _ in range(2)]  # 4 MB each
with kept():
    pass  # no blocks: those that come to lie between small ones stay with the heap whatever the thresholds
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(freed_memory._glibc() is None, reason="needs glibc")
def test_afterwards_a_step_does_not_pay_for_blocks_of_ordinary_size() -> None:
    """glibc adapts to a process with large blocks until somebody sets its thresholds; those of its start would make every later step pay."""
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PATH": ""}
    faults = int(subprocess.run([sys.executable, "-c", SMALL], env=environment, check=True, capture_output=True, text=True).stdout)
    assert faults <= 20 * 2 * 1024 / 10  # paid in full, 40 blocks of 1,024 pages; a few may come to lie elsewhere once


class Library:
    """A C library that notes what it is told, and refuses thresholds above its limit."""

    def __init__(self, limit: int = 2**40) -> None:
        self.told: list[Any] = []
        self.limit = limit

    def mallopt(self, name: int, value: int) -> int:
        if name == freed_memory.M_MMAP_THRESHOLD and value > self.limit:
            return 0
        self.told.append((name, value))
        return 1

    def malloc_trim(self, pad: int) -> None:
        self.told.append(("trim", pad))


def test_blocks_nest_and_the_outermost_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(freed_memory, "_glibc", lambda: library)
    kept, ordinary = list(freed_memory.KEPT.items()), list(freed_memory.ORDINARY.items())
    with freed_memory.kept(), Runtime().scope():
        assert library.told == kept
    assert library.told == [*kept, *ordinary, ("trim", 0)]
    library.told.clear()
    with pytest.raises(KeyboardInterrupt), freed_memory.kept():
        raise KeyboardInterrupt
    assert library.told == [*kept, *ordinary, ("trim", 0)]
    library.told.clear()
    with Runtime(device="cuda").scope():
        assert library.told == []


@pytest.mark.parametrize(("limit", "inside"), [(2**25, freed_memory.KEPT_BEFORE_2_35), (2**10, {})])
def test_without_its_threshold_no_other_setting_is_made(limit: int, inside: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As glibc before 2.35 refuses one above 32 MB; the others alone would freeze it at its first value, and make every large block slow."""
    library = Library(limit)
    monkeypatch.setattr(freed_memory, "_glibc", lambda: library)
    with freed_memory.kept():
        assert library.told == list(inside.items())
    assert library.told[len(inside) :] == [*(freed_memory.ORDINARY.items() if inside else ()), ("trim", 0)]


def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_glibc", lambda: None)
    with freed_memory.kept():
        assert freed_memory._depth == 0
