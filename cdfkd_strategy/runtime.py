"""Where and how a distillation computes: device, memory layout, precision, threads, and drawing z. Methods ask it and hold no fast-path code.

What is reproducible, with the same library versions:

- on the CPU: every bit, on the same model of processor with the same number of threads;
- on CUDA: every bit, on the same model of GPU with the same driver, as far as torch has deterministic kernels, which `Runtime.scope`
  turns on. Where it has none (the gradients of bilinear upsampling, or of average pooling to a size that does not divide the
  map's) it warns and names the operation, and the last bits may differ from run to run. The methods' contract tests hold this
  wherever they find a GPU;
- between devices, processors, thread counts or versions: nothing to the bit.

A run that is continued keeps the runtime it began with, so that an interruption does not move a bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from cdfkd_strategy import freed_memory, parallel, seeding
from cdfkd_strategy.compiled_networks import compiled
from cdfkd_strategy.config import bind
from cdfkd_strategy.precision import Precision, all_digits, as_it_was, keep_depthwise_full, measured_precision

M = TypeVar("M", bound=nn.Module)

BatchNorm = Literal["synchronised", "local"]


@dataclass(frozen=True)
class Runtime:
    """The resolved choices of one run; they travel with its summary and checkpoints.

    Args:
        device: torch device string ("cpu", "cuda", "cuda:1").
        channels_last: keep 4-D weights and images channels-last (NHWC), the layout that convolutions prefer.
        threads: intra-op CPU threads; 0 leaves torch's choice.
        precision: of convolutions and matrix products; statistics, losses, weights and optimisers are in float32 anyway.
        fold: compute teachers in inference form, with their BatchNorm folded into convolutions, where nothing looks at the BatchNorm layers.
        recompute: keep no activations of teachers for the backward pass, and compute every teacher once more in it, one at a time:
            memory then does not grow with their number.
        processes: among how many every batch is split (`parallel`).
        batch_norm: of student and generator over several processes: "synchronised" is that of the whole batch, as in one process, "local" that of each
            process's rows.
        compile: compile the student's trunk and the generator (`compiled_networks`), where torch can.
    """

    device: str = "cpu"
    channels_last: bool = True
    threads: int = 0
    precision: Precision = "float32"
    fold: bool = False
    recompute: bool = False
    processes: int = 1
    batch_norm: BatchNorm = "synchronised"
    compile: bool = False

    @classmethod
    def auto(cls, device: str = "auto", precision: Precision | Literal["auto"] = "auto", **choices: Any) -> Runtime:
        """Resolve what is left open.

        Args:
            device: "auto" is the first CUDA device, or the CPU.
            precision: "auto" is what `measured_precision` finds.
            choices: the other values; without one, the thread count is recorded as it is.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        runtime = cls(device=device, **{"threads": torch.get_num_threads(), **choices})
        if precision != "auto":
            return replace(runtime, precision=precision)
        return replace(runtime, precision=measured_precision(device)) if runtime.is_available else runtime

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Runtime:
        """The inverse of `to_dict`."""
        return bind(cls, values, "runtime")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for summaries and checkpoints."""
        return asdict(self)

    @property
    def is_available(self) -> bool:
        """Does this machine have the device?"""
        device = torch.device(self.device)
        return device.type != "cuda" or (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count())

    @property
    def keeps_depthwise_full(self) -> bool:
        """Are depthwise convolutions better off in float32 here?"""
        return self.precision == "bfloat16" and torch.device(self.device).type == "cpu"

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Compute inside the block with this runtime's threads.

        On CUDA with deterministic kernels, and in the precision of this runtime, never in TF32; on the CPU freed memory is kept. Settings are restored
        afterwards.
        """
        with ExitStack() as stack:
            stack.enter_context(seeding.threads(self.threads or torch.get_num_threads()))
            if torch.device(self.device).type == "cuda":
                stack.enter_context(seeding.deterministic_kernels())
                stack.enter_context(all_digits())
            else:
                stack.enter_context(freed_memory.kept())
            yield

    def autocast(self) -> torch.autocast:
        """Run networks inside the block in this runtime's precision. Losses and backward passes stay outside.

        Nothing is cached: a block may hold many optimiser steps, and weights that were cast before one are old after it.
        """
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bfloat16", cache_enabled=False)

    def place(self, module: M) -> M:
        """Move a module to the device, in the layout of this runtime, in place."""
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.to(self.device)

    @contextmanager
    def computing(self, module: M) -> Iterator[M]:
        """`place` a module, and let it compute as fast as it can inside the block; afterwards it is an ordinary module on the device."""
        changed = keep_depthwise_full(module) if self.keeps_depthwise_full else []
        trunk = getattr(module, "trunk", None)  # what headers and copies with some of them share
        try:
            with self.compiling([trunk] if isinstance(trunk, nn.Module) else []):
                yield self.place(module)
        finally:
            as_it_was(changed)

    @contextmanager
    def compiling(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Compute modules compiled inside the block, if this runtime is to."""
        with compiled(modules, self.device) if self.compile and modules else nullcontext():
            yield

    def images(self, batch: Tensor) -> Tensor:
        """Move a batch of images ``[B, channels, H, W]`` to the device, in the layout of this runtime."""
        if self.channels_last:
            return batch.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return batch.to(self.device, non_blocking=True)

    def normal(self, *shape: int, rng: torch.Generator) -> Tensor:
        """Standard normal numbers on the device, drawn from ``rng`` (a CPU generator: the same z on every device).

        Where batches are split among processes, all draw the whole batch (the first of ``shape``), and each gets its rows.
        """
        return parallel.own_rows(torch.randn(shape, generator=rng)).to(self.device, non_blocking=True)
