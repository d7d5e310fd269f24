"""The tables of speed in simulations/README.md, from the result files: python simulations/benchmarks/speed_table.py"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cdfkd_strategy.provenance import short_commit

SIMULATIONS = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- (?P<kind>[\w ]+): (?P<name>[\w.-]+) -->\n).*?(<!-- end of (?P=kind) -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def speed(result: Mapping[str, Any]) -> str:
    """Seconds per iteration on one machine."""
    head = ["case", "plain", "product", "**ratio**", "product in float32", "GFLOP", "of the peak", "plain, MB", "product, MB"]
    rows = []
    for case in result["cases"]:
        full = case.get("engine_float32_s")
        cells = [
            case["name"],
            f"{case['plain_s']:.2f} s",
            f"{case['engine_s']:.2f} s",
            f"**{case['ratio']:.1f}**",
            "-" if full is None else f"{full:.2f} s",
            f"{case['gflop']:.0f}",
            f"{case['peak_fraction']:.0%}",
            f"{case['plain_mb']:.0f}",
            f"{case['engine_mb']:.0f}",
        ]
        rows.append(cells)
    hardware, runtime = result["hardware"], result["runtime"]
    where = hardware["gpu"] if runtime["device"].startswith("cuda") else f"{hardware['cpu']}, {runtime['threads']} threads"
    note = (
        f"Seconds per iteration (five student steps and one generator step), medians of {result['repeats']}; {where}; the product computes in "
        f"{runtime['precision']}, in which a convolution is {result['bfloat16_gain']:.1f} times as fast there as in float32 (one thread); "
        f"peak {result['peak_gflops']:.0f} GFLOP/s. Commit {result['commit'][:10]}."
    )
    return "\n".join([*markdown(head, rows), "", note, ""])


def time_to_accuracy(result: Mapping[str, Any]) -> str:
    """Paths in the order in which they were measured; a path's row is the mean over its seeds."""
    paths: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        paths.setdefault(row["path"], []).append(row)
    rows = []
    for path, found in paths.items():
        seeds = ", ".join(str(row["seed"]) for row in found)
        reached = sum(row["accuracy"] >= row["target"] for row in found)
        accuracies, targets = ([100 * row[key] for row in found] for key in ("accuracy", "target"))
        rows.append([path, seeds, spread([row["seconds"] for row in found], 0) + " s", spread(accuracies), spread(targets), f"{reached} of {len(found)}"])
    hardware = result["hardware"]
    commits = ", ".join(dict.fromkeys(row["commit"][:10] for row in result["rows"]))
    note = f"Merged student on the test images, last iteration, %; {hardware['cpu']}, {hardware['cores']} cores. Commit {commits}."
    return "\n".join([*markdown(["path", "seeds", "seconds", "accuracy", "target", "reached"], rows), "", note, ""])


def many_teachers(result: Mapping[str, Any]) -> str:
    """One row per number of teachers and per draw."""
    head = ["K", "per step", "iterations", "s per iteration", "accuracy", "teachers and activations", "student", "gradients and optimiser", "files"]
    rows = []
    for row in sorted(result["rows"], key=lambda row: (row["teachers"], row["iterations"], row["per_step"])):
        sizes = [f"{row[key]:.0f} MB" for key in ("teachers_and_activations_mb", "student_mb", "gradients_and_optimiser_mb", "teacher_files_mb")]
        counts = [str(row[key]) for key in ("teachers", "per_step", "iterations")]
        rows.append([*counts, f"{row['seconds_per_iteration']:.2f}", f"{100 * row['accuracy']:.1f} (ensemble {100 * row['ensemble_estimated']:.1f})", *sizes])
    hardware = result["hardware"]
    commits = ", ".join(dict.fromkeys(row["commit"][:10] for row in result["rows"]))
    note = f"Merged student on the test images, last iteration, %; one seed; {hardware['cpu']}, {hardware['cores']} cores. Commit {commits}."
    return "\n".join([*markdown(head, rows), "", note, ""])


def local_epochs(result: Mapping[str, Any]) -> str:
    """A client, and all clients."""
    seconds = result["seconds_per_epoch"]
    one = ["one client", result["images_of_the_client"], seconds["client_bare_one_thread"], seconds["client_bare_all_threads"], seconds["client_product"]]
    everybody = ["all clients", result["images_of_all"], "-", seconds["all_bare_all_threads"], seconds["all_product"]]
    rows = [[f"{cell:.2f} s" if isinstance(cell, float) else str(cell) for cell in row] for row in (one, everybody)]
    head = ["", "images", "bare loop, one thread", f"bare loop, {result['cores']} threads", "product"]
    note = (
        f"Seconds per local epoch ({result['epochs']} epochs, medians of {result['repeats']}) of `{result['architecture']}`, cell `{result['cell']}`; "
        f"{result['hardware']['cpu']}. Commit {result['commit'][:10]}."
    )
    return "\n".join([*markdown(head, rows), "", note, ""])


def recipes(rows: Sequence[Mapping[str, str]]) -> str:
    """Candidates with a column per federation, in the order of the first one: not every candidate has been run on every federation."""
    candidates: dict[str, dict[int, float]] = {}
    for row in rows:
        candidates.setdefault(row["candidate"], {})[int(row["seed"])] = 100 * float(row["student_merged"])
    seeds = sorted({seed for found in candidates.values() for seed in found})
    ordered = sorted(candidates, key=lambda name: [-candidates[name].get(seed, 0.0) for seed in seeds])
    cells = [[name, *(f"{candidates[name][seed]:.1f}" if seed in candidates[name] else "-" for seed in seeds)] for name in ordered]
    table = markdown(["recipe", *(f"federation {seed}" for seed in seeds)], cells)
    commits = ", ".join(dict.fromkeys(short_commit(row["commit_of_run"]) for row in rows))
    note = f"Merged student on held-out training images, %, last iteration; one run per cell. Commit {commits}."
    return "\n".join([*table, "", note, ""])


KINDS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "speed": ("speed/{}.json", speed),
    "time to accuracy": ("speed/{}-time-to-accuracy.json", time_to_accuracy),
    "many teachers": ("speed/{}-many-teachers.json", many_teachers),
    "local epochs": ("speed/{}-local-epochs.json", local_epochs),
    "recipes": ("calibration/{}-distillation.csv", recipes),
}
"""Per kind of table: its result file below simulations/results, and what makes Markdown of it."""


def read(path: Path) -> Any:
    """A result: JSON, or the rows of a CSV."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_tables(text: str, results: Path) -> str:
    """Markdown with the tables between its markers replaced; what has no result file keeps what is there."""

    def replaced(match: re.Match[str]) -> str:
        if match["kind"] not in KINDS:
            return match[0]
        file, table = KINDS[match["kind"]]
        path = results / file.format(match["name"])
        return f"{match[1]}{table(read(path))}{match[4]}" if path.exists() else match[0]

    return MARKED.sub(replaced, text)


if __name__ == "__main__":
    readme = SIMULATIONS / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8"), SIMULATIONS / "results"), encoding="utf-8")
