"""The studies that are shipped: one teacher set per cell, budgets in steps, and rows that differ in what they say."""

from __future__ import annotations

import pytest

from cdfkd_strategy.bench.config import BenchConfig, resolve_bench
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.run_config import bench_names

STUDIES = ("ablation", "cifar10_methods", "mnist_methods", "mnist_tuning")


def changed(bench: BenchConfig, row: str, cell: str) -> dict[str, object]:
    """What a row has and ``full`` has not, as dotted keys."""
    found = {run.row: to_dict(run.config) for run in bench.runs if run.cell == cell and run.seed == bench.seeds[0]}
    full, mine = found["full"], found[row]
    return {f"{part}.{key}": value for part in ("method", "student", "server") for key, value in mine[part].items() if full[part][key] != value}


def test_all_studies_are_there() -> None:
    assert set(STUDIES) <= set(bench_names())


@pytest.mark.parametrize("name", STUDIES)
def test_rows_of_a_cell_are_made_on_the_same_teachers(name: str) -> None:
    bench = resolve_bench(name)
    homes: dict[str, object] = {}
    for run in bench.runs:
        config = to_dict(run.config)
        assert homes.setdefault(run.teachers, (config["data"], config["clients"])) == (config["data"], config["clients"]), run.path
        assert run.config.engine.precision != "auto", "what one row finds fastest, another might not"
        assert run.config.engine.max_seconds is None, "budgets are in steps"
    assert len(homes) == len(bench.seeds) * len(bench.cells)


def test_mnist_has_the_classical_networks_and_tuning_looks_at_no_test_image() -> None:
    methods, tuning = resolve_bench("mnist_methods"), resolve_bench("mnist_tuning")
    assert methods.seeds == (0, 1, 2)
    for run in methods.runs:
        assert (run.config.student.backbone, run.config.student.heads, run.config.clients.count) == ("lenet_half", "plain", 1)
        assert run.config.clients.architectures == (run.cell,)
        assert run.config.data.validation_size is None
    assert set(methods.methods) <= set(tuning.methods)
    assert tuning.seeds == (100,)
    assert all(run.config.data.validation_size == 10_000 for run in tuning.runs)
    per_method = [run.config.method["name"] for run in tuning.runs]
    assert max(per_method.count(name) for name in per_method) <= 4


def test_every_row_of_the_ablation_changes_what_its_name_says() -> None:
    bench = resolve_bench("ablation")
    expected = {
        "no_multi_level": {"student.stages": 1},
        "one_to_one": {"method.student_steps": 1, "method.iterations": 168},
        "no_bn": {"method.bn_weight": 0.0},
        "no_ensemble": {"method.ensemble_weight": 0.0, "method.fused_weight": 0.0},
        "no_features": {"method.feature_weight": 0.0},
    }
    for cell in ("same", "skewed"):
        assert {row: changed(bench, row, cell) for row in expected} == expected
    assert changed(bench, "uniform_weights", "skewed") == {"server.weights": "uniform"}
    full = bench.methods["full"]
    assert full["iterations"] * (5 + 1) == expected["one_to_one"]["method.iterations"] * (1 + 1)  # type: ignore[operator]
    assert not [run for run in bench.runs if run.row == "uniform_weights" and run.cell == "same"]
