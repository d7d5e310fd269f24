"""Seconds per iteration of the product and of the plain path, side by side in one process, and the memory of each in its own.

    python simulations/benchmarks/speed.py [--cases NAME ...] [--repeats N] [--device cpu] [--threads N] [--machine NAME]

The paths take turns, so that whatever else the machine does meets all; a case's time is the median. On a CPU all of them keep freed memory;
on a GPU the plain path has torch's own settings, and the product those of `Runtime.scope`. The result,
simulations/results/speed/<machine>.json, has the machine's measured peak (the better of a matrix product and a convolution, in the
precision that the product chose), and per case the counted arithmetic and memory traffic of the product's iteration, its fraction of that
peak, synthetic images per second, the hours that the paper's whole schedule (300 epochs of 50 iterations) would take at the case's batch,
the seconds of a student step and of a generator step, and those of the product in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from mfs_plain import PlainMFS
from speed_cases import CASES, Case, engine_path, plain_path
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.methods.cdfkd_mfs import CDFKDMFS, CDFKDMFSConfig
from cdfkd_strategy.precision import convolution_gain, seconds
from cdfkd_strategy.provenance import commit, hardware, peak_memory_mb, versions
from cdfkd_strategy.runtime import Runtime

RESULTS = Path(__file__).resolve().parents[1] / "results" / "speed"
PATHS = ("plain", "engine")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[], help="names; none is all that the device can run")
    parser.add_argument("--repeats", type=int, default=5, help="timed iterations of each path, after one that is not")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--machine", default="", help="the result file's name; none is the device's")
    parser.add_argument("--memory-of", choices=PATHS, help=argparse.SUPPRESS)  # the child that measures one path's memory
    args = parser.parse_args()
    runtime = EngineConfig(device=args.device, threads=args.threads).runtime()
    on_cuda = runtime.device.startswith("cuda")
    chosen = [case for case in CASES if (case.name in args.cases if args.cases else case.cuda == on_cuda)]
    if unknown := set(args.cases) - {case.name for case in CASES}:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in CASES)}")
    if args.memory_of:
        print(json.dumps(peak_memory(args.memory_of, chosen[0], runtime)))
        return
    machine = args.machine or machine_name(runtime)
    peaks = {precision: peak_gflops(runtime, dtype) for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))}
    result: dict[str, Any] = {
        "machine": machine,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "runtime": runtime.to_dict(),
        "bfloat16_gain": round(convolution_gain(runtime.device), 2),
        "repeats": args.repeats,
        "peaks_gflops": peaks,
        "peak_gflops": peaks[runtime.precision],
        "cases": [],
    }
    for case in chosen:
        row = measured(case, runtime, args.repeats, result["peak_gflops"])
        for path in PATHS:
            command = [sys.executable, __file__, "--cases", case.name, "--device", runtime.device, "--threads", str(runtime.threads), "--memory-of", path]
            row[f"{path}_mb"] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603 - this very script
        print(json.dumps(row), flush=True)
        result["cases"].append(row)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{machine}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(file)


def machine_name(runtime: Runtime) -> str:
    """A word for the device: ``NVIDIA-H100``, ``AMD-EPYC-2-threads``. Results of two kinds of processor never share a file."""
    on_cuda = runtime.device.startswith("cuda")
    name = torch.cuda.get_device_name(0) if on_cuda else f"{hardware()['cpu']} {runtime.threads} threads"
    return "-".join(re.findall(r"[\w.]+", name.replace("(R)", "").replace("(TM)", "")))


def measured(case: Case, runtime: Runtime, repeats: int, peak: float) -> dict[str, Any]:
    """Medians of the paths taking turns, phase by phase; GFLOP and GB of the product's iteration."""
    on_cuda = runtime.device.startswith("cuda")
    with ExitStack() as stack:
        stack.enter_context(nullcontext() if on_cuda else runtime.scope())
        engine = stack.enter_context(engine_path(case, runtime))
        full = stack.enter_context(engine_path(case, dataclasses.replace(runtime, precision="float32")))
        plain = plain_path(case, runtime.device)
        paths: dict[str, PlainMFS | CDFKDMFS] = {"plain": plain, "engine": engine} | ({"engine_float32": full} if runtime.precision != "float32" else {})
        steps = {"student_step": plain.config.student_steps, "generator_step": plain.config.generator_steps}
        times: dict[str, dict[str, list[float]]] = {path: {phase: [] for phase in steps} for path in paths}
        for repeat in range(repeats + 1):
            for path, loop in paths.items():
                loop.student.train()
                with runtime.scope() if on_cuda and path != "plain" else nullcontext():
                    for phase, count in steps.items():
                        taken = [seconds(getattr(loop, phase), runtime.device) for _ in range(count)]
                        if repeat > 0:  # the first is not counted
                            times[path][phase].append(sum(taken) / count)
        with runtime.scope() if on_cuda else nullcontext():
            counted = count_work(lambda: engine.run_epoch(0))
    row: dict[str, Any] = {"name": case.name}
    for path, phases in times.items():
        row[f"{path}_s"] = round(statistics.median(sum(steps[phase] * phases[phase][repeat] for phase in steps) for repeat in range(repeats)), 4)
    row["ratio"] = round(row["plain_s"] / row["engine_s"], 3)
    row |= counted | {"peak_fraction": round(counted["gflop"] / row["engine_s"] / peak, 3)}
    images, schedule = sum(steps.values()) * case.batch_size, CDFKDMFSConfig()
    row |= {"images_per_second": round(images / row["engine_s"], 1), "schedule_hours": round(row["engine_s"] * schedule.epochs * schedule.iterations / 3600, 2)}
    row["phases"] = {path: {phase: round(statistics.median(values), 4) for phase, values in phases.items()} for path, phases in times.items()}
    return row


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        return out


def count_work(run: Callable[[], object]) -> dict[str, float]:
    """GFLOP of the convolutions and matrix products of one call, and GB that its operations read and write."""
    with FlopCounterMode(display=False) as flops:
        run()
    with _Traffic() as traffic:
        run()
    return {"gflop": round(flops.get_total_flops() / 1e9, 2), "gbyte": round(traffic.bytes / 1e9, 2)}


def peak_memory(path: str, case: Case, runtime: Runtime) -> float:
    """MB that three iterations of one path need at most, networks and optimisers included: the process's, or the GPU's."""
    with nullcontext() if path == "plain" and runtime.device.startswith("cuda") else runtime.scope():
        if path == "plain":
            plain = plain_path(case, runtime.device)
            for _ in range(3):
                plain.iteration()
        else:
            with engine_path(case, runtime) as engine:
                for _ in range(3):
                    engine.run_epoch(0)
    return peak_memory_mb(runtime.device)


@torch.no_grad()
def peak_gflops(runtime: Runtime, dtype: torch.dtype) -> float:
    """The better of a large matrix product and a 3x3 convolution of 64 channels; on a GPU of ten times as many images, and many calls in a row."""
    with runtime.scope():
        side, batch, calls = (8192, 640, 10) if runtime.device.startswith("cuda") else (2048, 64, 1)
        left, right = torch.randn(2, side, side, device=runtime.device).to(dtype)
        channels_last = dataclasses.replace(runtime, channels_last=True)
        conv = channels_last.place(nn.Conv2d(64, 64, 3, padding=1)).to(dtype)
        maps = channels_last.images(torch.randn(batch, 64, 32, 32)).to(dtype)
        best = 0.0
        for run, flop in ((lambda: left @ right, 2 * side**3), (lambda: conv(maps), 2 * maps.numel() * 64 * 9)):
            run()

            def repeated(run: Callable[[], object] = run) -> None:
                for _ in range(calls):
                    run()

            best = max(best, calls * flop / statistics.median(seconds(repeated, runtime.device) for _ in range(20)) / 1e9)
    return round(best, 1)


if __name__ == "__main__":
    main()
