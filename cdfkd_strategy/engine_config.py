"""How a distillation is run: what the user asks for, and what it becomes on this machine."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cdfkd_strategy import parallel
from cdfkd_strategy.config import require
from cdfkd_strategy.errors import CheckpointError, ConfigError
from cdfkd_strategy.precision import Precision
from cdfkd_strategy.runtime import BatchNorm, Runtime

logger = logging.getLogger(__name__)

RECOMPUTE_FROM = 9
"""Teachers from which on their activations are not kept: few fit into any memory, and computing them twice costs time."""


@dataclass(frozen=True)
class EngineConfig:
    """How a distillation is run; none of it changes the mathematics of an epoch, except ``batch_norm="local"`` over several processes.

    What bits depend on is resolved once, recorded, and kept by later starts of the same run (`continued`).

    Args:
        device: "auto" (the first CUDA device, else the CPU) or a torch device string. Bits depend on it.
        threads: intra-op CPU threads; 0 leaves torch's choice. Bits depend on it.
        channels_last: memory layout of images and weights. Bits depend on it.
        precision: of convolutions and matrix products in the distillation, "auto" (bfloat16 if the device is at least 1.5 times as fast in it),
            "float32" or "bfloat16". Bits depend on it. Everything else, evaluation too, is in float32.
        fold: compute teachers with their BatchNorm folded into convolutions where nothing looks at it. Bits depend on it.
        recompute_teachers: compute teachers a second time in the backward pass instead of keeping the activations of all: "auto" is from
            `RECOMPUTE_FROM` teachers on.
        batch_norm: of student and generator over several processes: "synchronised" is that of the whole batch, as in one process; "local" is that of
            each process's rows, which is other mathematics, and faster: on GPUs the former waits for the device at every layer. Distances from the
            teachers' statistics are always those of the whole batch.
        compile: compile the student's trunk and the generator in place, half a minute or more at every start (`compiled_networks`); where torch cannot, it
            says so and goes on without. Bits depend on it.
        resident_teachers: teachers that have working copies on the device at a time; the weights of all stay in their files, where there are files. 0 is all.
        shard_teachers: several processes share the teachers out, for those that do not fit on one device: each keeps some, which compute the batches of
            all. A step needs at least one for each. Last bits depend on it.
        runtime_from: a ``summary.json`` whose runtime is used instead of all of the above except ``resident_teachers`` and ``shard_teachers``; None
            resolves them.
        max_seconds: a guard, not a budget: the run stops at the first epoch boundary after it, and says so. A run that is
            resumed with a higher one goes on.
        checkpoint_every: epochs between checkpoints (the last epoch always has one).
        evaluate_every: epochs between calls of ``evaluate`` (the last epoch always has one); 0 is only the last.
        watch_images: synthetic images of the collapse watch, once per epoch; 0 turns it off.
        transfer_images: synthetic images that the run directory keeps as a transfer set at the end, for `cdfkd distill --transfer-set`; 0 is none. A method
            with a pool gives what is in it and no more.
        progress: show a progress bar when standard error is a terminal.
    """

    device: str = "auto"
    threads: int = 0
    channels_last: bool = True
    precision: Precision | Literal["auto"] = "auto"
    fold: bool = True
    recompute_teachers: bool | Literal["auto"] = "auto"
    batch_norm: BatchNorm = "synchronised"
    compile: bool = False
    resident_teachers: int = 0
    shard_teachers: bool = False
    runtime_from: str | None = None
    max_seconds: float | None = None
    checkpoint_every: int = 1
    evaluate_every: int = 0
    watch_images: int = 64
    transfer_images: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        require(self, "engine", "checkpoint_every", least=1)
        require(self, "engine", "threads", "max_seconds", "evaluate_every", "watch_images", least=0)
        require(self, "engine", "resident_teachers", least=0, why="0 keeps all")
        require(self, "engine", "transfer_images", least=0, why="0 saves none")
        if self.device != "auto":
            try:
                known = torch.device(self.device).type in ("cpu", "cuda")
            except RuntimeError:
                known = False
            if not known:
                raise ConfigError(f"engine.device is {self.device!r}; accepted: auto, cpu, cuda, cuda:<n>")

    def is_over(self, seconds: float) -> bool:
        """Has a distillation that took so many seconds reached ``max_seconds``?"""
        return self.max_seconds is not None and seconds >= self.max_seconds

    def runtime(self) -> Runtime:
        """The resolved choices for this machine; how many teachers there will be is not known yet.

        Raises:
            ConfigError: a CUDA device is asked for, and torch sees none (reading a configuration needs no device), or ``runtime_from`` has no runtime for
                this machine.
        """
        if self.runtime_from is not None:
            return self._read_runtime(Path(self.runtime_from))
        choices = {name: getattr(self, name) for name in ("channels_last", "fold", "batch_norm", "compile")} | {"recompute": self.recompute_teachers is True}
        runtime = Runtime.auto(self.device, self.precision, **choices, **({"threads": self.threads} if self.threads else {}))
        if not runtime.is_available:
            raise ConfigError(f"engine.device is {self.device!r}, but torch sees {torch.cuda.device_count() or 'no'} CUDA device(s); use auto or cpu")
        return runtime

    def continued(self, began: Runtime) -> Runtime:
        """The runtime of a run that is continued: the one it began with, because another one would change its bits.

        Only where that one's device is gone, a device that this configuration names (not "auto") takes its place.

        Args:
            began: what the run's first start resolved.

        Raises:
            CheckpointError: the device is gone, and this configuration names no other.
            ConfigError: it names one that is not there either.
        """
        if began.processes != parallel.size():
            logger.warning("the run was started by %d processes and goes on with %d: its last bits will be others", began.processes, parallel.size())
        if began.is_available:
            asked = {"device": self.device, "threads": self.threads or "auto", "precision": self.precision, "batch_norm": self.batch_norm}
            asked |= {name: "auto" if getattr(self, name) else "false" for name in ("fold", "channels_last")}  # the default asks for nothing
            asked |= {"compile": "true" if self.compile else "auto"}
            found = {name: str(getattr(began, name)).lower() for name in asked}
            unused = [f"engine.{name}={value}" for name, value in asked.items() if str(value) not in ("auto", found[name])]
            if unused:
                logger.info("%s: not used, the run goes on as it began, %s", ", ".join(unused), began)
            return began
        if self.device in ("auto", began.device):
            raise CheckpointError(
                f"the run was started on {began.device!r}, which torch does not see here; continue it on a machine that has it, "
                "or accept another result and name a device that is here (engine.device=cpu)"
            )
        here = self.runtime()
        runtime = dataclasses.replace(began, device=here.device, precision=here.precision)
        logger.warning("the run was started on %s, which is gone; it goes on on %s, to another result than without interruption", began.device, runtime.device)
        return runtime

    @staticmethod
    def shared(runtime: Runtime) -> Runtime:
        """The runtime among the processes that there are: the first one's precision, which is measured, for all.

        Raises:
            ConfigError: a GPU would have to serve several processes.
        """
        if parallel.size() == 1:
            return dataclasses.replace(runtime, processes=1)
        parallel.check_device(runtime.device)
        half = parallel.everyone(torch.tensor(runtime.precision == "bfloat16", device=runtime.device))[0]
        return dataclasses.replace(runtime, processes=parallel.size(), precision="bfloat16" if half else "float32")

    def recomputing(self, runtime: Runtime, teachers: int) -> Runtime:
        """The runtime for so many teachers per step: ``recompute_teachers="auto"`` is resolved."""
        return dataclasses.replace(runtime, recompute=True) if self.recompute_teachers == "auto" and teachers >= RECOMPUTE_FROM else runtime

    def _read_runtime(self, path: Path) -> Runtime:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))["runtime"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"engine.runtime_from is {self.runtime_from!r}, which cannot be used ({error}); accepted: the summary.json of a run") from error
        runtime = Runtime.from_dict(values)
        if not runtime.is_available:
            raise ConfigError(f"engine.runtime_from is {self.runtime_from!r}, of a run on {runtime.device}, which torch does not see here; choose another")
        return runtime
