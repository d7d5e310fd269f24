"""Runs a function in two processes of one gloo group, as torchrun would, and gives back what each returned."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 240.0


def in_two_processes(function: Callable[..., Any], folder: Path, *arguments: Any, types: Sequence[type] = ()) -> list[Any]:
    """``[function(*arguments), function(*arguments)]`` of ranks 0 and 1, made of tensors, plain values and ``types``; an error in one ends both."""
    context = mp.spawn(_run, (str(folder), function, arguments), nprocs=2, join=False)
    assert context is not None
    deadline = time.monotonic() + PATIENCE
    try:
        while not context.join(max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, f"not done after {PATIENCE:.0f} s"
    finally:
        for process in context.processes:
            process.kill()
    with torch.serialization.safe_globals(list(types)):
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _run(rank: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.pop("RANK", None)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
