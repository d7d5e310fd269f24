"""Where a result came from: commit, hardware, versions, and the memory it took."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SOURCES = ("cdfkd_strategy", "server", "clients", "simulations/configs", "simulations/calibration", "simulations/calibrate.py", "pyproject.toml")
"""Paths of the repository on which a result depends: a change there that is not committed marks the commit "-dirty"."""

DISTRIBUTIONS = ("torch", "torchvision", "flwr", "numpy", "cdfkd-strategy")


def commit(tree: Path | None = None) -> str | None:
    """The commit of the source tree this package runs from, with "-dirty" after local changes; None outside a checkout."""
    tree = Path(__file__).resolve().parents[1] if tree is None else tree
    if not (tree / ".git").exists():
        return None
    head = _git(tree, "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _git(tree, "status", "--porcelain", "--", *(name for name in SOURCES if (tree / name).exists()))
    return head if changes == "" else f"{head}-dirty"


def _git(tree: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True, timeout=20, check=False)  # noqa: S603, S607
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """``cpu`` model, usable ``cores``, ``memory_gb``, ``gpu`` name or None, ``os``."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.machine()}",
    }


def machine_words(machine: Mapping[str, Any], runtime: Mapping[str, Any] | None) -> str:
    """What of the ``hardware`` of a result a table names: the GPU if it was computed there, else the processor, and the cores."""
    device = machine.get("gpu") if str((runtime or {}).get("device", "")).startswith("cuda") else None
    return f"{device or machine.get('cpu')}, {machine.get('cores')} cores"


def short_commit(commit: str | None) -> str:
    """A commit as a table names it."""
    if commit is None:
        return "unknown"
    head, dirty, _ = commit.partition("-dirty")
    return head[:10] + dirty


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    """Its name, and the matrix unit where it has one: two processors of one name can be six times apart in bfloat16."""
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        about = ""
    name = re.search(r"^model name\s*:(.*)$", about, re.MULTILINE)
    if name is None:
        return platform.processor() or platform.machine() or "unknown"
    return name[1].strip() + (" with AMX" if re.search(r"^flags\s*:.*\bamx_bf16\b", about, re.MULTILINE) else "")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the distributions a result depends on; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def peak_memory_mb(device: str = "cpu") -> float:
    """Peak memory in MiB so far: of the CUDA allocator for a CUDA device, else the resident set of this process."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    status = Path("/proc/self/status")
    if status.exists():  # the kernel's other figure (ru_maxrss) counts what the parent had before it started this process
        return round(next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")) / 2**10, 1)
    scale = 2**20 if sys.platform == "darwin" else 2**10  # macOS reports bytes, Linux kibibytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1)
