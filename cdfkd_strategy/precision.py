"""bfloat16 where the device is faster in it, and float32 where digits matter.

Methods run their networks, and nothing else, under torch's autocast (`Runtime.autocast`): convolutions and matrix products
compute in bfloat16, weights, gradients of weights and optimisers stay in float32. What needs more digits raises its inputs with
`full` or computes inside `in_full`: outputs of the networks, losses, and batch statistics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy import seeding

Precision = Literal["float32", "bfloat16"]

LEAST_GAIN = 1.5
"""How much faster a convolution must be in bfloat16. A Xeon with AMX is 4 to 6 times as fast, an EPYC with AVX-512 2 times (`bfloat16_gain` in
simulations/results/speed): far enough from this that noise does not decide on an idle machine. Near it two runs may choose differently:
`engine.runtime_from`."""


def full(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is in half precision; otherwise the tensor itself."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@contextmanager
def all_digits() -> Iterator[None]:
    """Compute inside the block in float32 where float32 is asked for: not in TF32, with 10 of its 23 bits, which torch takes for convolutions on GPUs."""
    parts: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    name, exact = "allow_tf32", cast("bool | str", False)
    if hasattr(torch.backends.cudnn, "conv"):  # of late; reading the old names then fails for callers who set the new ones
        parts[0], name, exact = torch.backends.cudnn.conv, "fp32_precision", "ieee"
    before = [getattr(part, name) for part in parts]
    try:
        for part in parts:
            setattr(part, name, exact)
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            setattr(part, name, value)


def in_full(tensor: Tensor) -> AbstractContextManager[None]:
    """Compute inside the block in the precision of the inputs, on the tensor's kind of device, under autocast too."""
    return torch.autocast(tensor.device.type, enabled=False)  # type: ignore[return-value]


@lru_cache
def measured_precision(device: str) -> Precision:
    """bfloat16 if a typical convolution is at least `LEAST_GAIN` times faster in it on this device, else float32. Measured once per process."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float32"
    return "bfloat16" if convolution_gain(device) >= LEAST_GAIN else "float32"


@torch.no_grad()
def convolution_gain(device: str, repeats: int = 5) -> float:
    """Seconds in float32 over seconds in bfloat16 of a convolution (64 channels, 32 x 32), the best of ``repeats`` that take turns.

    Of 32 images and one by one on a CPU, of 256 and many in a row on a GPU, which would else be waited for longer than it computes.
    On one CPU thread: a team of threads in whatever thread asks would stay, and with more threads than cores OpenMP lets all of
    them sleep between operations, which makes small networks half as fast.
    """
    with seeding.threads(1), all_digits():
        return _convolution_gain(device, repeats)


def _convolution_gain(device: str, repeats: int) -> float:
    batch, calls = (256, 20) if torch.device(device).type == "cuda" else (32, 1)
    images, kernel = (torch.ones(size, device=device).to(memory_format=torch.channels_last) for size in ((batch, 64, 32, 32), (64, 64, 3, 3)))
    pairs = [(images, kernel), (images.bfloat16(), kernel.bfloat16())]

    def convolve(here: Tensor, weight: Tensor) -> None:
        for _ in range(calls):
            F.conv2d(here, weight, padding=1)

    best = [float("inf"), float("inf")]
    for _ in range(repeats + 1):  # the first is slower than those after it, so it never is the best
        for at, (here, weight) in enumerate(pairs):
            best[at] = min(best[at], seconds(partial(convolve, here, weight), device))
    return best[0] / best[1]


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one call, until the device is done with it."""
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if on_cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


class FullConv2d(nn.Conv2d):
    """A convolution that computes in float32 under autocast, too."""

    def forward(self, images: Tensor) -> Tensor:
        """``[B, c_in, H, W]`` to ``[B, c_out, H', W']``."""
        with in_full(images):
            return super().forward(full(images))


def keep_depthwise_full(module: nn.Module) -> list[nn.Module]:
    """Let a network's depthwise convolutions compute in float32, in place: on CPUs their gradients are several times slower in bfloat16.

    Weights, names and whatever else the network is stay as they are.

    Returns:
        The convolutions; `as_it_was` undoes it.
    """
    parts: list[nn.Module] = [part for part in module.modules() if type(part) is nn.Conv2d and part.groups == part.in_channels > 1]
    for part in parts:
        part.__class__ = FullConv2d
    return parts


def as_it_was(parts: Iterable[nn.Module]) -> None:
    """Make ordinary convolutions of those among the modules that `keep_depthwise_full` changed."""
    for part in parts:
        if isinstance(part, FullConv2d):
            part.__class__ = nn.Conv2d  # type: ignore[assignment]
