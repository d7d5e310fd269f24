"""Several processes, one distillation: each computes its rows of every batch, and what a batch says as a whole is asked of all.

``torchrun --nproc-per-node=2 -m cdfkd_strategy distill ...`` starts them, one per GPU (or on CPUs). With batch B and P
processes, rank r computes rows ``r B/P ... (r+1) B/P - 1``. All draw the same random numbers from the same seeds, so the
batch is that of one process. Inside `splitting`:

- `own_rows` takes a process's part of a batch that all have drawn;
- losses that are means over the batch stay as they are: the mean over equal parts is the mean over the batch;
- every other loss asks `batch_mean`, `whole` or `everyone`, which are differentiable;
- every optimiser takes the mean of the gradients of all processes before its step, so that weights stay equal.

Outside, and in one process, all of it does nothing. This is torch.distributed alone: accelerate and Lightning Fabric bring a
launcher, which torchrun is, and average gradients in the ``backward`` of a wrapped module, where a step here trains some
headers of a student, or a generator through `torch.autograd.grad`. They would be a dependency without a use.

Gradients: with ``L = mean_r L_r`` a process computes the gradients of ``sum_r L_r``, since the backward pass of `everyone` adds
up what all processes ask of a value, and the optimisers divide by P.

A network that draws random numbers itself (dropout) draws on every process those of the first, for other rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from cdfkd_strategy.errors import ConfigError

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others: the first one evaluates the student and writes files alone."""

_splitting = False


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Does this process evaluate, log and write files?"""
    return rank() == 0


# -- starting ------------------------------------------------------------------------------------------------------


def launched() -> int:
    """How many processes a launcher such as torchrun started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def check_alone(what: str) -> None:
    """Refuse a job that several processes would do several times.

    Raises:
        ConfigError: a launcher started more than one.
    """
    if launched() > 1:
        raise ConfigError(f"{what} was started {launched()} times by a launcher; accepted: one process (only the distillation, `distill`, takes several)")


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that a launcher started, each with a GPU of its own where there are enough; alone without a launcher.

    An error ends its process with the group as it is: the others wait for it in vain, and the launcher ends them.
    """
    if launched() == 1 or dist.is_initialized():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_cuda = torch.cuda.is_available()
    if on_cuda and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=PATIENCE)
    yield
    dist.destroy_process_group()


def check_device(device: str) -> None:
    """Every process needs a GPU of its own, which is its current one.

    Raises:
        ConfigError: all would compute on the same one.
    """
    if size() == 1 or torch.device(device).type != "cuda":
        return
    if torch.device(device).index is not None:
        raise ConfigError(f"engine.device is {device!r} for {size()} processes; accepted: auto, cpu, or cuda, which is another GPU in each")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here > torch.cuda.device_count():
        raise ConfigError(f"{here} processes on a machine where torch sees {torch.cuda.device_count()} GPUs; accepted: one per GPU, or engine.device=cpu")


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if size() > 1:
        dist.all_reduce(torch.zeros(1))  # a barrier would, in some versions of torch, ask NCCL for a GPU of its own


# -- splitting batches ---------------------------------------------------------------------------------------------


@contextmanager
def splitting() -> Iterator[None]:
    """Split every batch of the block among the processes; all must run the same code in it."""
    global _splitting  # noqa: PLW0603 - as the process group, it is the process's
    if size() == 1:
        yield
        return
    hook = register_optimizer_step_pre_hook(_average_gradients)
    _splitting = True
    try:
        yield
    finally:
        _splitting = False
        hook.remove()


def is_split() -> bool:
    """Is a batch here only a part of one?"""
    return _splitting


@contextmanager
def not_split() -> Iterator[None]:
    """Inside the block a batch is a whole one, although it is inside `splitting`."""
    global _splitting  # noqa: PLW0603
    before, _splitting = _splitting, False
    try:
        yield
    finally:
        _splitting = before


def own_rows(batch: Tensor) -> Tensor:
    """The rows ``[B / P, ...]`` of a batch ``[B, ...]`` that this process computes.

    Raises:
        ConfigError: the batch cannot be split into equal parts.
    """
    if not _splitting:
        return batch
    if len(batch) % size():
        raise ConfigError(f"a batch of {len(batch)} for {size()} processes; accepted: a multiple of their number (method.batch_size)")
    return batch.chunk(size())[rank()]


class _Everyone(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        mine = tensor.detach().contiguous()
        found = [torch.empty_like(mine) for _ in range(size())]
        dist.all_gather(found, mine)
        return torch.stack(found)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        asked = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(asked)
        return asked[rank()]


def everyone(tensor: Tensor) -> Tensor:
    """What every process has, ``[P, ...]`` in the order of their ranks; differentiable in each one's own."""
    found: Tensor = _Everyone.apply(tensor) if size() > 1 else tensor.unsqueeze(0)  # type: ignore[no-untyped-call]
    return found


def batch_mean(mean: Tensor) -> Tensor:
    """The mean over the whole batch of what is a mean over a process's rows; differentiable."""
    return everyone(mean).mean(0) if _splitting else mean


def whole(rows: Tensor, dim: int = 0) -> Tensor:
    """The whole batch of rows along ``dim``; differentiable."""
    return torch.cat(list(everyone(rows)), dim) if _splitting else rows


def _average_gradients(optimizer: Optimizer, _: Any, __: Any) -> None:
    """Before a step: the mean over the processes, in one message."""
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))
