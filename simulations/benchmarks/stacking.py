"""Are teachers of one architecture faster when they are stacked? One after the other, against torch.func's vmap over their weights.

    python simulations/benchmarks/stacking.py [--repeats N]

Both ways take the same images in the layout and precision that the product chooses, without folding BatchNorm (a folded network is of a
class of its own, and vmap stacks one class): a pass forward, and one that gives the gradient at the images. Result:
simulations/results/speed/<machine>-stacking.json, medians of milliseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from speed import RESULTS, machine_name
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from cdfkd_strategy import seeding
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.precision import seconds
from cdfkd_strategy.provenance import commit, hardware, versions
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec

CASES = {"small_cnn_k5_b32": ("small_cnn", 5, 32, ImageSpec(1, 28, 28, 10)), "wrn16_1_k3_b128": ("wrn16_1", 3, 128, ImageSpec(3, 32, 32, 10))}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    runtime = EngineConfig().runtime()
    result: dict[str, Any] = {"commit": commit(), "hardware": hardware(), "versions": versions(), "runtime": runtime.to_dict(), "cases": []}
    with runtime.scope():
        for name, case in CASES.items():
            row = {"name": name, **measured(*case, runtime, args.repeats)}
            print(json.dumps(row), flush=True)
            result["cases"].append(row)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{machine_name(runtime)}-stacking.json").write_text(json.dumps(result, indent=2) + "\n")


def measured(arch: str, count: int, batch: int, image: ImageSpec, runtime: Runtime, repeats: int) -> dict[str, float]:
    """Median milliseconds of both ways, which take turns."""
    with seeding.seeded_scope("stacking"):
        teachers = TeacherEnsemble([build_classifier(arch, image) for _ in range(count)], image=image)
        images = runtime.images(torch.randn(batch, *image.shape))
    plain = dataclasses.replace(runtime, fold=False)
    with teachers.prepared(plain):
        together = stacked(list(teachers.nets))

        def in_turn(given: Tensor) -> Tensor:
            return teachers(given)

        def at_once(given: Tensor) -> Tensor:
            with plain.autocast():
                return together(given).float()

        off = (in_turn(images) - at_once(images)).abs().max() / in_turn(images).abs().max()
        taken: dict[str, list[float]] = {}
        for _ in range(repeats + 2):
            for way, run in (("in_turn", in_turn), ("at_once", at_once)):
                taken.setdefault(f"{way}_forward_ms", []).append(1000 * seconds(partial(forward, run, images), runtime.device))
                taken.setdefault(f"{way}_gradient_ms", []).append(1000 * seconds(partial(gradient, run, images), runtime.device))
    return {name: round(statistics.median(values[2:]), 2) for name, values in taken.items()} | {"largest_difference": float(off)}


def stacked(nets: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """All networks as one function: images ``[B, channels, H, W]`` to logits ``[K, B, C]``."""
    parameters, buffers = stack_module_state(nets)  # type: ignore[arg-type]
    first = nets[0]

    def one(weights: Any, others: Any, images: Tensor) -> Tensor:
        return functional_call(first, (weights, others), (images,))  # type: ignore[no-any-return]

    return lambda images: vmap(one, in_dims=(0, 0, None))(parameters, buffers, images)  # type: ignore[no-any-return]


@torch.no_grad()
def forward(run: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Logits alone."""
    run(images)


def gradient(run: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Logits, and the gradient at the images."""
    given = images.detach().requires_grad_()
    torch.autograd.grad(run(given).sum(), given)


if __name__ == "__main__":
    main()
