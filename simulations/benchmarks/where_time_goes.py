"""Where the time of one iteration of the product goes, by kind of operation: a table and a picture.

    python simulations/benchmarks/where_time_goes.py [--case NAME] [--iterations N] [--device cpu] [--threads N]

Writes simulations/results/speed/<machine>-<case>-profile.{csv,json,png}, from torch's profiler; seconds are those that an operation
itself takes, without what it calls.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
from speed import RESULTS, machine_name
from speed_cases import CASES, engine_path
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cdfkd_strategy.checkpoint import write_json
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.provenance import commit, hardware, versions

KINDS = {
    "batch norm, gradients": ("batch_norm_backward",),
    "batch norm": ("batch_norm",),
    "convolution, gradients": ("convolution_backward",),
    "convolution": ("convolution", "conv2d", "cudnn"),
    "casts and copies": ("copy_", "_to_copy", "::to", "contiguous", "clone"),
    "matrix products": ("mm", "linear", "dot"),
    "activations and pooling": ("threshold", "relu", "clamp", "pool", "tanh", "upsample"),
    "joining maps": ("cat", "stack", "narrow", "slice"),
    "optimisers": ("Optimizer", "sgd", "adam", "_foreach", "addcdiv", "addcmul", "lerp"),
    "elementwise and sums": ("add", "sub", "mul", "div", "sum", "mean", "abs", "square", "pow", "sqrt", "norm", "sgn", "softmax", "neg", "exp"),
    "filling new tensors": ("zero", "fill", "ones", "empty", "randn", "normal"),
}
"""The first kind with a word in the operation's name takes it."""


def main() -> None:
    """Profile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="wrn16_1_k3_b128", choices=[case.name for case in CASES])
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    runtime = EngineConfig(device=args.device, threads=args.threads).runtime()
    case = next(case for case in CASES if case.name == args.case)
    on_cuda = runtime.device.startswith("cuda")
    with runtime.scope(), engine_path(case, runtime) as engine:
        engine.run_epoch(0)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
            for _ in range(args.iterations):
                engine.run_epoch(0)
    seconds = {kind: value / args.iterations for kind, value in seconds_by_kind(profiler.key_averages(), on_cuda=on_cuda).items()}
    rows = sorted(seconds.items(), key=lambda row: -row[1])
    total = sum(seconds.values())
    RESULTS.mkdir(parents=True, exist_ok=True)
    base = RESULTS / f"{machine_name(runtime)}-{case.name}-profile"
    with base.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "seconds_per_iteration", "share"])
        writer.writerows([kind, f"{value:.4f}", f"{value / total:.3f}"] for kind, value in rows)
    about = {"case": case.name, "iterations": args.iterations, "commit": commit(), "hardware": hardware(), "runtime": runtime.to_dict(), "versions": versions()}
    write_json(base.with_suffix(".json"), about)
    for kind, value in rows:
        print(f"{kind:28} {value:8.4f} s  {value / total:6.1%}")
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.barh([kind for kind, _ in reversed(rows)], [value for _, value in reversed(rows)], color="tab:blue")
    axes.set_xlabel("seconds per iteration")
    axes.set_title(f"{case.name} on {machine_name(runtime)}, {runtime.precision}")
    figure.savefig(base.with_suffix(".png"), dpi=110)
    print(base.with_suffix(".csv"))


def seconds_by_kind(events: Iterable[Any], *, on_cuda: bool) -> dict[str, float]:
    """What operations take themselves, together by kind. On a GPU it is the time of their kernels; a kernel's own row says the same once more."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "everything else")
        seconds[kind] += (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6
    return seconds


if __name__ == "__main__":
    main()
