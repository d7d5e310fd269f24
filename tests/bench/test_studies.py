"""The studies that are shipped: one teacher set per cell, budgets in steps, and rows that differ in what they say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cdfkd_strategy import seeding
from cdfkd_strategy.bench.config import BenchConfig, resolve_bench
from cdfkd_strategy.bench.record import record_of
from cdfkd_strategy.bench.running import _check_teachers
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.engine import distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.methods import METHODS, get_method
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.report import find_results
from cdfkd_strategy.run_config import bench_names
from cdfkd_strategy.summary import check_same_config, read_summary
from cdfkd_strategy.teacher_directory import load_teachers
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import Extras, ImageSpec
from cdfkd_strategy.warm_start import chosen_student
from tests.test_paper_configs import shortened

STUDIES = ("ablation", "cgdd_images", "cifar10_methods", "mnist_budget", "mnist_methods", "mnist_tuning", "rdskd_robustness")
IMAGES = {"mnist": ImageSpec(1, 28, 28, 10), "fashion_mnist": ImageSpec(1, 28, 28, 10), "cifar10": ImageSpec(3, 32, 32, 10)}
REFERENCES = ("kd", "noise")
SIMULATIONS = Path(__file__).parents[2] / "simulations"


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


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "mnist_tuning"])
def test_every_row_runs_on_the_networks_of_its_cell(name: str) -> None:
    """Untrained teachers of the cell's architectures, images of the right size, one iteration of four images: needs are met and networks fit together."""
    bench = resolve_bench(name)
    for run in (run for run in bench.runs if run.seed == bench.seeds[0]):
        config, image = run.config, IMAGES[str(run.config.data.name)]
        method, settings = config.method_config()
        with seeding.seeded_scope("study"):
            teachers = TeacherEnsemble([build_classifier(config.clients.architecture(k), image) for k in range(config.clients.count)], image=image)
        want = config.student
        student = chosen_student(want.heads, want.backbone, teachers, max_width=want.max_width, init=want.init, stages=want.stages, seed=0)
        real = Extras(proxy_data=torch.randn(8, *image.shape)) if get_method(method).needs.proxy_data else None
        engine = EngineConfig(device="cpu", threads=1, precision="float32", watch_images=0, progress=False)
        result = distill(teachers, student, method, config=shortened(settings, 4), image=image, engine=engine, extras=real)
        assert all(math.isfinite(value) for row in result.history for value in row.values()), run.path


def test_committed_teachers_are_those_of_their_study_and_of_its_results() -> None:
    homes = sorted(path.parent for path in (SIMULATIONS / "teachers").glob("*/*/teachers.json"))
    assert homes
    assert sum(path.stat().st_size for home in homes for path in home.iterdir()) < 8e6, "a repository is not for large files"
    for home in homes:
        run = next(run for run in resolve_bench(home.parent.name).runs if run.teachers == home.name)
        _check_teachers(run, home, [])
        hashes = [spec.sha256 for spec in load_teachers(home).specs]
        for path in (SIMULATIONS / "results" / home.parent.name / run.cell).glob(f"*-seed{run.seed}"):
            assert read_summary(path)["bench"]["teachers"] == hashes, path


@pytest.mark.parametrize("name", STUDIES)
def test_committed_results_are_of_the_settings_that_their_study_names(name: str) -> None:
    """A table must not say of a row what another row was made with; a changed row is run again."""
    runs = {(run.cell, run.row, run.seed): run.config for run in resolve_bench(name).runs}
    for summary in find_results(SIMULATIONS / "results" / name) if (SIMULATIONS / "results" / name).is_dir() else ():
        record = record_of(summary)
        assert record is not None
        where = (summary["cell"], record.row, summary["seed"])
        assert where in runs, where
        check_same_config(summary["config"], runs[where])


@pytest.mark.parametrize("name", ["cifar10_methods", "mnist_methods"])
def test_every_method_has_a_row(name: str) -> None:
    bench = resolve_bench(name)
    own = {method for method in METHODS if get_method(method).__module__.startswith("cdfkd_strategy.")}
    assert {str(run.config.method["name"]) for run in bench.runs} == own
    adaptive = [run.row for run in bench.runs if run.config.method.get("adaptive_weight", 0.0) > 0]
    assert set(adaptive) == {"adaptive_deep_inversion"}


def test_every_method_has_the_same_number_of_settings_to_choose_from() -> None:
    methods, tuning = resolve_bench("mnist_methods"), resolve_bench("mnist_tuning")
    found = {run.row: run.config.method for run in tuning.runs}
    settings: dict[str, int] = {}
    for row, values in found.items():
        start = row.partition("-")[0]
        assert start in methods.methods, row
        different = [key for key, value in values.items() if value != found[start][key]]
        assert bool(different) == (row != start), f"{row} says what it changes"
        if start not in REFERENCES:
            settings[start] = settings.get(start, 0) + 1
    assert set(settings) == set(methods.methods) - set(REFERENCES)
    assert set(settings.values()) <= {3, 4}


def test_the_grid_of_rdskd_is_the_grid_of_dafl() -> None:
    bench = resolve_bench("rdskd_robustness")
    rows = {run.row: run.config.method for run in bench.runs if run.seed == 0}
    terms = {
        "one_hot": ("one_hot_weight", "one_hot_factor"),
        "entropy": ("entropy_weight", "entropy_factor"),
        "third": ("activation_weight", "diversity_factor"),
    }
    assert len(rows) == 2 * (1 + 2 * len(terms))
    for term, keys in terms.items():
        for word, scale in (("tenth", 0.1), ("tenfold", 10.0)):
            for method, key in zip(("dafl", "rdskd"), keys, strict=True):
                mine = rows[f"{method}-{term}_{word}"]
                assert mine[key] == pytest.approx(scale * rows[method][key])
                assert {**mine, key: rows[method][key]} == rows[method]
    assert all(rows["rdskd"][key] == 1.0 for _, key in terms.values())


def test_the_columns_of_cgdd_are_terms_of_its_epochs() -> None:
    bench = resolve_bench("cgdd_images")
    assert bench.metrics == ("images/label_agreement", "images/class_balance")
    assert all(run.metrics == bench.metrics for run in bench.runs)
    same, mine = ({run.row: run.config for run in resolve_bench(name).runs} for name in ("mnist_methods", "cgdd_images"))
    for row in ("cgdd", "dfq", "dfad"):
        assert {**mine[row].method, "epochs": 2 * mine[row].method["epochs"]} == same[row].method, "the file says so"
    assert mine["cgdd"].student == same["cgdd"].student
    image = IMAGES["mnist"]
    with seeding.seeded_scope("study"):
        teachers = TeacherEnsemble([build_classifier("lenet_bn", image)], image=image)
    student = chosen_student("plain", "lenet_half_bn", teachers, max_width=None, init="random", seed=0)
    settings = shortened(get_method("cgdd").Config(), 4)
    engine = EngineConfig(device="cpu", threads=1, precision="float32", watch_images=0, progress=False)
    (row,) = distill(teachers, student, "cgdd", config=settings, image=image, engine=engine).history
    assert set(bench.metrics) <= set(row)


def test_mnist_has_the_classical_networks_and_tuning_looks_at_no_test_image() -> None:
    methods, tuning = resolve_bench("mnist_methods"), resolve_bench("mnist_tuning")
    assert methods.seeds == (0, 1, 2)
    for run in methods.runs:
        half = {"lenet": "lenet_half", "lenet_bn": "lenet_half_bn"}[run.cell]
        assert (run.config.student.backbone, run.config.student.heads, run.config.clients.count) == (half, "plain", 1)
        assert run.config.clients.architectures == (run.cell,)
        assert run.config.data.validation_size is None
    assert set(methods.methods) <= set(tuning.methods)
    assert tuning.seeds == (100,)
    assert all(run.config.data.validation_size == 10_000 for run in tuning.runs)
    settings = [(run.cell, run.row.partition("-")[0]) for run in tuning.runs]
    assert max(settings.count(row) for row in settings) <= 4


def test_the_papers_budget_is_tried_on_the_same_teachers_and_student() -> None:
    same, mine = ({run.row: run for run in resolve_bench(name).runs if run.seed == 0} for name in ("mnist_methods", "mnist_budget"))
    for row, run in mine.items():
        assert run.teachers == same[row].teachers
        assert (run.config.data, run.config.clients, run.config.student) == (same[row].config.data, same[row].config.clients, same[row].config.student)
        assert run.config.method["generator"] == same[row].config.method["generator"]
        assert run.published == same[row].published


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
    full, dfed = ({run.row: run.config for run in bench.runs}[row] for row in ("full", "dfed"))
    assert (dfed.method["name"], dfed.student.heads, dfed.student.stages) == ("dfed", "per_teacher", 1)
    shared = set(dfed.method) & set(full.method) - {"name"}
    assert len(shared) > 8
    assert {key: dfed.method[key] for key in shared if key != "milestones"} == {key: full.method[key] for key in shared if key != "milestones"}
    assert full.method["iterations"] * (5 + 1) == int(str(expected["one_to_one"]["method.iterations"])) * (1 + 1)
    assert not [run for run in bench.runs if run.row == "uniform_weights" and run.cell == "same"]
