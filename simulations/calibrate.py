"""Try settings of a study on held-out training images, so that its test images stay unseen.

    python simulations/calibrate.py simulations/calibration/fashion_mnist.yaml {competence,distillation} [--only SUBSTRING ...] [--threads N] [--runs DIR]
        [--results DIR]

Every federation (a base and a seed; the plan's seeds are a list, or a mapping from bases to lists) is trained once.
``competence`` compares the scores of a grid with the oracle's weights, ``distillation`` distils every candidate. Runs are
kept and not repeated; an interrupted one goes on. The tables are <results>/<name>-{competence,distillation}.csv, with the
commit in every row. A row of distillation that the table has, from this machine or another, and whose settings are still the
plan's (threads aside), stays and is not run again; to run it anew, delete it and its directory.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from cdfkd_strategy import seeding
from cdfkd_strategy.competence import norm_feature_score, row_norms, weights_of
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.metrics.accuracy import accuracy, predict
from cdfkd_strategy.models.head_fusion import class_weights, fuse
from cdfkd_strategy.offline import distill_directory, plan, write_teachers
from cdfkd_strategy.provenance import commit
from cdfkd_strategy.run_config import resolve
from cdfkd_strategy.summary import origins, read_summary
from cdfkd_strategy.teacher_directory import load_teachers
from cdfkd_strategy.teachers import TeacherEnsemble

FEATURE_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROW_POWERS = (0.0, 1.0, 2.0, 3.0, 4.0)
COUNT_POWERS = (0.0, 0.5, 0.75, 1.0)
"""Scores tried: ``F_kc^a ||W_c||^b N_k^d`` (see `cdfkd_strategy.competence`); with a = 0, row norms alone."""

THREADS = "engine.threads="
"""The last override of every run; bits depend on it, and nothing else."""


def main() -> None:
    """Train, compare, distil, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("what", choices=["competence", "distillation"])
    parser.add_argument("--only", nargs="*", default=[""], help="distil only candidates whose federation/candidate contains one of these")
    parser.add_argument("--threads", type=int, default=0, help="of torch; two runs of one thread side by side finish sooner than two in turn")
    parser.add_argument("--runs", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "calibration")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    todo = yaml.safe_load(args.plan.read_text())
    seeds = todo[f"{args.what}_seeds"]  # of all federations, or a mapping with those of each
    federations = {
        (base, seed): args.runs / f"{base.strip('/').replace('/', '-')}-seed{seed}"
        for base in todo[args.what]
        for seed in (seeds[base] if isinstance(seeds, dict) else seeds)
    }
    table = args.results / f"{todo['name']}-{args.what}.csv"
    if args.what == "competence":
        for (base, seed), directory in federations.items():
            train(directory, base, seed, todo["validation_size"])
        write_table(table, list(competence_rows(federations)))
        return
    settings = {name: [*todo["common"], *own, THREADS] for name, own in todo["candidates"].items()}
    wanted = {name: " ".join(overrides) for name, overrides in settings.items()}
    kept = [row for row in read_table(table) if row["overrides"].rstrip("0123456789") == wanted.get(row["candidate"])]
    known = {(row["federation"], int(row["seed"]), row["candidate"]) for row in kept}
    for ((base, seed), directory), (candidate, overrides) in itertools.product(federations.items(), settings.items()):
        if (base, seed, candidate) not in known and any(part in f"{base}/{candidate}" for part in args.only):
            train(directory, base, seed, todo["validation_size"])
            distil(directory, candidate, [*overrides[:-1], f"{THREADS}{args.threads}"])
    # another plan's candidates may lie beside them, distilled from the same teachers
    found = [row for row in distillation_rows(federations) if row["overrides"].rstrip("0123456789") == wanted.get(row["candidate"])]
    new = [row for row in found if (row["federation"], row["seed"], row["candidate"]) not in known]
    write_table(table, sorted([*kept, *new], key=lambda row: (row["federation"], int(row["seed"]), row["candidate"])))


def train(directory: Path, base: str, seed: int, validation_size: int) -> None:
    """The teachers of a federation, unless they are there."""
    if not (directory / "teachers.json").exists():
        write_teachers(resolve(base, [f"seed={seed}", f"data.validation_size={validation_size}"]), directory)


def competence_rows(federations: dict[tuple[str, int], Path]) -> Iterator[dict[str, Any]]:
    """One row per federation and score: the accuracy of the ensemble with these weights, and of its oracle."""
    for (base, seed), directory in federations.items():
        found = load_teachers(directory)
        data = load_data(resolve(base, [f"data.validation_size={found.config['data']['validation_size']}"]).data, seed)
        ensemble = TeacherEnsemble(found.models, image=found.image, specs=found.specs)
        logits = predict(ensemble, data.x_test, data.image)
        rng = seeding.generator("competence", seed)
        rows = torch.stack([row for net in ensemble.nets if (row := row_norms(net)) is not None])
        scores = [norm_feature_score(net, 1, rng) for net in ensemble.nets]
        uniform = torch.full((data.image.num_classes,), 1 / data.image.num_classes)
        features = torch.stack([uniform if score is None else score for score in scores]).double().clamp_min(1e-30)
        counts = torch.tensor([[spec.num_samples] for spec in found.specs]).double()
        oracle = weights_of(torch.tensor(found.oracle_label_counts))
        best = accuracy(fuse(logits, oracle), data.y_test)
        for a, b, d in itertools.product(FEATURE_POWERS, ROW_POWERS, COUNT_POWERS):
            table = class_weights(features**a * rows**b * counts**d, len(ensemble), data.image.num_classes).float()
            estimated = accuracy(fuse(logits, table), data.y_test)
            yield {"federation": base, "seed": seed, "feature_power": a, "row_power": b, "count_power": d, "estimated": estimated, "oracle": best}


def distil(teachers: Path, candidate: str, overrides: list[str]) -> None:
    """Distil one candidate, unless its run is finished; an interrupted one goes on."""
    out = teachers / "distilled" / candidate.replace(" ", "_")
    about = out / "candidate.json"
    if about.exists():
        if json.loads(about.read_text())["overrides"][:-1] != overrides[:-1]:
            sys.exit(f"{out} has a candidate of this name with other settings; give it another name, or remove that directory")
        return
    print(f"== {out}: {' '.join(overrides)}", flush=True)
    todo = plan(teachers, overrides)
    if todo.data is None:
        sys.exit("without the images there is nothing to judge by; put them where data.path or CDFKD_DATA says, and start again")
    out.mkdir(parents=True, exist_ok=True)
    distill_directory(todo, out, resume=True)
    about.write_text(json.dumps({"candidate": candidate, "overrides": overrides}))


def distillation_rows(federations: dict[tuple[str, int], Path]) -> Iterator[dict[str, Any]]:
    """One row per federation and finished candidate."""
    for (base, seed), directory in federations.items():
        for file in sorted(directory.glob("distilled/*/candidate.json")):
            about, summary = json.loads(file.read_text()), read_summary(file.parent)
            last = summary["rounds"][-1]
            row = {"federation": base, "seed": seed, "candidate": about["candidate"], "overrides": " ".join(about["overrides"])}
            row |= {key: last["accuracy"][key] for key in ("ensemble_uniform", "ensemble_estimated", "ensemble_oracle", "student_mean", "student_merged")}
            yield row | {"commit_of_run": " ".join(dict.fromkeys(str(origin["commit"]) for origin in origins(summary)))}


def read_table(file: Path) -> list[dict[str, Any]]:
    """What `write_table` wrote before; nothing if it did not."""
    if not file.exists():
        return []
    with file.open(newline="") as found:
        return list(csv.DictReader(found))


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as CSV; accuracies are fractions. A row that was read keeps its commit."""
    if not rows:
        raise SystemExit("there is nothing to write: --only matches no candidate, and there is no table yet")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0] | {"commit": ""}), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({"commit": commit()} | {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()
