"""Does a step stay as cheap and as small when there are more teachers? m of K teachers per step, against all of them.

    python simulations/benchmarks/many_teachers.py [--teachers 5 20 100] [--iterations 112] [--per-step 5] [--seed 0]

The images of the study's cell dir0.5 go to K clients (Dirichlet 0.5), and are distilled with the settings for a short budget (`QUICK`).
For every K: all teachers per step, m per step with as many iterations, and m per step with as many iterations as take about the time of
all (K / m times as many). Accuracy is that of the merged student after the last iteration. Memory is what the process has of its own at
most (not pages of files) above what it had before it read the teachers, without the student, its gradients and the optimiser's state,
which are counted by themselves; m per step keeps `RESIDENT` working copies and the weights of all in their files. All is computed on the CPU,
whose memory it is. Every row runs in a process of its own; finished rows are kept: simulations/results/speed/<machine>-many-teachers.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

from speed import RESULTS, machine_name
from time_to_accuracy import QUICK
from torch import nn

from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.engine import distill
from cdfkd_strategy.harness import Harness
from cdfkd_strategy.metrics.accuracy import accuracy, predict
from cdfkd_strategy.models.head_fusion import fuse
from cdfkd_strategy.offline import teacher_weights, write_teachers
from cdfkd_strategy.provenance import commit, hardware, versions
from cdfkd_strategy.run_config import resolve
from cdfkd_strategy.teacher_directory import load_teachers
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.warm_start import first_student

CELL = "fashion_mnist/dir0.5"
RUNS = Path("runs/many_teachers")
ON_CPU = "engine.device=cpu"
RESIDENT = 10
"""Working copies on the device: each teacher of a step may have two, one to imitate and one whose BatchNorm layers are looked at."""


def main() -> None:
    """Run what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", type=int, default=[5, 20, 100], help="K")
    parser.add_argument("--iterations", type=int, default=112)
    parser.add_argument("--per-step", type=int, default=5, help="m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", nargs=2, type=int, metavar=("M", "ITERATIONS"), help=argparse.SUPPRESS)  # the child that measures one row
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measured(args.teachers[0], args.seed, *args.row)))
        return
    path = RESULTS / f"{machine_name(resolve(CELL, [ON_CPU]).engine.runtime())}-many-teachers.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cell": CELL, "hardware": hardware(), "rows": []}
    for count in args.teachers:
        directory = RUNS / f"{count}-{args.seed}"
        if not (directory / "teachers.json").exists():
            write_teachers(resolve(CELL, [f"clients.count={count}", f"seed={args.seed}"]), directory)
        rows = {(count, args.iterations)}
        if count > args.per_step:
            rows |= {(args.per_step, args.iterations), (args.per_step, args.iterations * count // args.per_step)}
        for per_step, iterations in sorted(rows):
            key = {"teachers": count, "per_step": per_step, "iterations": iterations, "seed": args.seed}
            if any(key.items() <= row.items() for row in result["rows"]):
                continue
            command = [sys.executable, __file__, "--teachers", str(count), "--seed", str(args.seed), "--row", str(per_step), str(iterations)]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this very script
            row = {**key, **json.loads(child.stdout.splitlines()[-1]), "commit": commit(), "versions": versions()}
            result["rows"].append(row)
            RESULTS.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=2) + "\n")
            print(json.dumps(row), flush=True)


def measured(count: int, seed: int, per_step: int, iterations: int) -> dict[str, Any]:
    """Distil once: seconds per iteration, megabytes, accuracies."""
    drawn = per_step < count
    engine = [ON_CPU, "engine.progress=false", "engine.watch_images=0", f"engine.resident_teachers={RESIDENT if drawn else 0}"]
    draw = [f"method.teachers_per_step={per_step if drawn else 0}", "method.epochs=1", f"method.iterations={iterations}"]
    config = resolve(CELL, [f"clients.count={count}", f"seed={seed}", *engine, *QUICK, *draw])
    data = load_data(config.data, seed)
    runtime = config.engine.runtime()
    before = own_memory()
    stored = load_teachers(RUNS / f"{count}-{seed}", mapped=drawn)
    teachers = TeacherEnsemble(stored.models, image=stored.image, specs=stored.specs)
    teachers.weights.copy_(teacher_weights(config, stored, teachers))
    student = first_student(config.student.backbone, teachers, seed=seed)
    name, settings = config.method_config()
    with Peak() as peak:
        result = distill(teachers, student, name, config=settings, seed=seed, engine=config.engine, runtime=runtime)
    own = learner_bytes(student)

    def merged() -> float:
        logits = predict(lambda images: result.student(images).logits, data.x_test, data.image)
        return accuracy(fuse(logits, teachers.weights.cpu()), data.y_test)

    return {
        "seconds_per_iteration": round(result.history[0]["seconds"] / iterations, 3),
        "accuracy": merged(),
        "ensemble_estimated": Harness(config, data).evaluate(teachers, None)["ensemble_estimated"],
        "teachers_and_activations_mb": round((peak.most - before - sum(own)) / 2**20, 1),
        "teacher_files_mb": round(sum(path.stat().st_size for path in (RUNS / f"{count}-{seed}").glob("*.safetensors")) / 2**20, 1),
        "student_mb": round(own.weights / 2**20, 1),
        "gradients_and_optimiser_mb": round((own.gradients + own.moments) / 2**20, 1),
        "runtime": result.runtime.to_dict(),
    }


class LearnerBytes(NamedTuple):
    """What a student takes while it learns."""

    weights: int
    gradients: int
    moments: int


def learner_bytes(student: nn.Module) -> LearnerBytes:
    """Of a student after its last step with Adam. Headers that take no part in a step have no gradients."""
    parameters = list(student.parameters())
    weights = sum(parameter.nbytes for parameter in parameters)
    return LearnerBytes(weights, sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None), 2 * weights)


def own_memory() -> int:
    """Bytes in memory that are this process's own: no pages of files."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")) * 2**10


class Peak:
    """The most memory of its own that this process had inside the block, looked at a few times per step."""

    def __enter__(self) -> Peak:
        self.most, self._over = own_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, own_memory())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


if __name__ == "__main__":
    main()
