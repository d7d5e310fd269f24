"""How long until the student is nearly as good as the ensemble: the product against the plain loop, on the study's cell dir0.5.

    python simulations/benchmarks/time_to_accuracy.py [--seeds 0 1 2] [--plain [150 300 600]] [--recipe [KEY=VALUE ...]] [--name NAME] [--again TEXT]

The target is 0.95 times the accuracy of the ensemble with estimated weights. Plain: the loop of `mfs_plain`, five student steps and
one generator step per iteration, both rates divided by 10 after one and two thirds; the shortest of the given lengths that reaches
the target with all seeds counts. Product: `distill` with the cell's configuration and the recipe, from the call to the student.
Teachers are trained once, outside the time, and evaluation is outside it too. Finished rows are kept and not repeated, unless
``--again`` gives those of this start another name: simulations/results/speed/<machine>-time-to-accuracy.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mfs_plain import PlainMFS
from speed import RESULTS, machine_name
from torch import Tensor, nn

from cdfkd_strategy import seeding
from cdfkd_strategy.competence import estimate
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.data.image_data import ImageData
from cdfkd_strategy.engine import distill
from cdfkd_strategy.methods.cdfkd_mfs import CDFKDMFSConfig
from cdfkd_strategy.metrics.accuracy import accuracy, predict
from cdfkd_strategy.models.generators import build_generator
from cdfkd_strategy.models.head_fusion import fuse
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.models.stages import MAX_STAGES
from cdfkd_strategy.offline import write_teachers
from cdfkd_strategy.precision import seconds
from cdfkd_strategy.provenance import commit, hardware, versions
from cdfkd_strategy.run_config import RunConfig, resolve
from cdfkd_strategy.schedules import multistep, set_rate
from cdfkd_strategy.teacher_directory import load_teachers
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.warm_start import first_student

CELL = "fashion_mnist/dir0.5"
SHARE = 0.95
RUNS = Path("runs/time_to_accuracy")
QUICK = ("method.student_optimizer=adam", "method.student_lr=0.003", "method.feature_weight=0", "method.schedule=one_cycle")
"""What suits a short budget, by `calibration/recipes.yaml`."""
SHORT = (*QUICK, "method.teachers_per_step=3", "method.epochs=5", "method.iterations=53")


def main() -> None:
    """Run what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--plain", nargs="*", type=int, default=[150, 300, 600])
    parser.add_argument("--recipe", nargs="*", default=list(SHORT), help="overrides of the cell's configuration; without any, the product does not run")
    parser.add_argument("--name", default="product", help="of the recipe, in the result")
    parser.add_argument("--again", default="", metavar="TEXT", help="put behind the names of these rows, which are run although others have their settings")
    args = parser.parse_args()
    config = resolve(CELL)
    runtime = config.engine.runtime()
    path = RESULTS / f"{machine_name(runtime)}-time-to-accuracy.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cell": CELL, "share": SHARE, "hardware": hardware(), "rows": []}
    known = {(row["path"], row["seed"]) for row in result["rows"]}

    def row(name: str, seed: int, run: Callable[[Federation], tuple[nn.Module, float]], **more: Any) -> dict[str, Any]:
        name += args.again
        if (name, seed) in known:
            return next(item for item in result["rows"] if (item["path"], item["seed"]) == (name, seed))
        federation = Federation(resolve(CELL, [f"seed={seed}"]))
        student, taken = run(federation)
        found = {"path": name, "seed": seed, "seconds": round(taken, 1), "accuracy": federation.merged(student), "target": federation.target, **more}
        found |= {"commit": commit(), "versions": versions()}
        result["rows"].append(found)
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(found), flush=True)
        return found

    for seed in args.seeds if args.recipe else []:
        row(args.name, seed, lambda federation: product(federation, args.recipe), recipe=args.recipe, runtime=runtime.to_dict())
    for length in args.plain:
        reached = True
        for seed in args.seeds:
            found = row(f"plain {length}", seed, lambda federation, length=length: plain(federation, length, runtime.device))  # type: ignore[misc]
            if found["accuracy"] < found["target"]:
                reached = False
                break
        if reached:
            break


class Federation:
    """The teachers of one seed, with their weights, and the images that judge."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.data: ImageData = load_data(config.data, config.seed)
        directory = RUNS / f"teachers-{config.seed}"
        if not (directory / "teachers.json").exists():
            write_teachers(config, directory)
        stored = load_teachers(directory)
        self.teachers = TeacherEnsemble(stored.models, image=stored.image, specs=stored.specs)
        self.teachers.weights = estimate(self.teachers, stored.image, seeding.generator("competence", config.seed), "auto")
        together = fuse(predict(self.teachers, self.data.x_test, stored.image), self.teachers.weights)
        self.target = SHARE * accuracy(together, self.data.y_test)

    def student(self, stages: int = MAX_STAGES) -> MultiHeaderStudent:
        """The same initial student every time, but for the stages that its headers see."""
        return first_student(self.config.student.backbone, self.teachers, stages=stages, seed=self.config.seed)

    def merged(self, student: nn.Module) -> float:
        """Accuracy of the headers fused with the estimated weights, on the test images."""

        def logits(images: Tensor) -> Tensor:
            return student(images).logits

        device = str(next(student.parameters()).device)
        return accuracy(fuse(predict(logits, self.data.x_test, self.data.image, device=device), self.teachers.weights.cpu()), self.data.y_test)


def product(federation: Federation, recipe: list[str]) -> tuple[nn.Module, float]:
    """`distill` with a recipe; seconds of the whole call."""
    config = resolve(CELL, [f"seed={federation.config.seed}", "engine.progress=false", "engine.watch_images=0", *recipe])
    name, settings = config.method_config()
    student = federation.student(config.student.stages)
    started = time.perf_counter()
    result = distill(federation.teachers, student, name, config=settings, seed=config.seed, engine=config.engine)
    return result.student.eval(), time.perf_counter() - started


def plain(federation: Federation, iterations: int, device: str) -> tuple[nn.Module, float]:
    """The plain loop with the cell's settings, on the device that the product takes; seconds of its iterations."""
    settings: CDFKDMFSConfig = dataclasses.replace(federation.config.method_config()[1], mode="fused")
    seed, student = federation.config.seed, federation.student()
    with seeding.seeded_scope("distiller", seed):
        generator = build_generator(federation.teachers.image, settings.generator)
    nets, weights = [net.to(device) for net in federation.teachers.nets], federation.teachers.weights.to(device)
    loop = PlainMFS(nets, student.to(device), generator.to(device), settings, seeding.generator("distill", seed), weights)
    milestones = (iterations // 3, 2 * iterations // 3)

    def run() -> None:
        for iteration in range(iterations):
            factor = multistep(iteration, milestones)
            set_rate(loop.student_optimizer, settings.student_lr * factor)
            set_rate(loop.generator_optimizer, settings.generator_lr * factor)
            loop.iteration()

    taken = seconds(run, device)
    return student.eval(), taken


if __name__ == "__main__":
    main()
