"""Two processes with half a batch each are one process with all of it, in float64; and every mistake that would break it is found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer

from cdfkd_strategy import cli, engine_config, parallel, seeding
from cdfkd_strategy import engine as engine_module
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.engine import distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.losses import class_balance, statistics
from cdfkd_strategy.methods import cdfkd_mfs, deep_inversion, rdskd
from cdfkd_strategy.models import shared_batch_norm
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.generators import GeneratorConfig, build_generator
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.run_config import from_values
from cdfkd_strategy.student_io import load_student
from cdfkd_strategy.summary import read_summary
from cdfkd_strategy.teacher_directory import TeacherSet, save_teachers
from cdfkd_strategy.teacher_forms import Form, TeacherForms
from cdfkd_strategy.teachers import TeacherEnsemble, TeacherSpec, state_hash
from cdfkd_strategy.types import ImageSpec
from tests.two_processes import in_two_processes

IMAGE = ImageSpec(1, 8, 8, 3)
TOLERANCE = 1e-8
GENERATOR = GeneratorConfig(latent_dim=6, width=0.05)
MFS = {
    "epochs": 1, "iterations": 2, "student_steps": 2, "batch_size": 12, "schedule": "constant", "generator_lr": 0.02, "mode": "fused", "generator": GENERATOR,
}  # fmt: skip
RDSKD = {"generator_epochs": 1, "student_epochs": 1, "iterations": 3, "batch_size": 12, "student_milestones": (), "generator": GENERATOR}


class Outcome(NamedTuple):
    """What a distillation in one process ended with; weights with buffers, in one vector."""

    terms: dict[str, Tensor]
    student: Tensor
    generator: Tensor
    sha256: str
    computed: set[int]
    """The teachers that this process computed where batches were split."""


class Case(NamedTuple):
    """A distillation, and which of the product's parts are left out of it."""

    method: type[Distiller] = cdfkd_mfs.CDFKDMFS
    config: dict[str, Any] = MFS
    teachers: int = 2
    group_norm: bool = False
    engine: dict[str, Any] = {}  # noqa: RUF012 - never changed
    without: str = ""


SAME = {
    "group_norm": Case(config={**MFS, "epochs": 2, "student_steps": 5}, group_norm=True),
    "batch_norm": Case(),
    "recomputed": Case(engine={"recompute_teachers": True, "channels_last": False, "fold": False}, group_norm=True),
    "some_teachers": Case(config={**MFS, "teachers_per_step": 2, "mode": "paper"}, teachers=3, group_norm=True),
    "rdskd": Case(rdskd.RDSKD, RDSKD),
    "sharded": Case(teachers=3, engine={"shard_teachers": True}, group_norm=True),
    "sharded_recomputed": Case(
        config={**MFS, "teachers_per_step": 2}, teachers=3, engine={"shard_teachers": True, "recompute_teachers": True}, group_norm=True
    ),
}
OTHER = {
    "moments": Case(group_norm=True, without="moments"),
    "balance": Case(group_norm=True, without="balance"),
    "gradients": Case(group_norm=True, without="gradients"),
    "local": Case(engine={"batch_norm": "local"}),
}


def net() -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 4), *block(4, 8), nn.Flatten(), nn.Linear(8 * 4, 8), nn.ReLU(), nn.Linear(8, IMAGE.num_classes))


def teacher() -> nn.Module:
    """Not trained, but it has statistics to be distant from, and is sure of its answers."""
    made = net()
    for parameter in made[-1].parameters():  # type: ignore[index]
        parameter.data *= 20
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return made


def with_group_norm(module: nn.Module) -> nn.Module:
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, part.num_features))
        else:
            with_group_norm(part)
    return module


@contextmanager
def in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def missing(part: str) -> Iterator[None]:
    """A product without one of the things that make processes agree."""
    with pytest.MonkeyPatch.context() as patch:
        if part == "moments":
            patch.setattr(statistics, "batch_moments", statistics._moments_about)
        elif part == "balance":
            patch.setattr(class_balance, "parallel", SimpleNamespace(is_split=lambda: False))
        elif part == "gradients":
            patch.setattr(parallel, "_average_gradients", lambda *_: None)
        yield


def run(case: Case, **options: Any) -> Outcome:
    with in_float64(), missing(case.without), seeding.seeded_scope("two processes"):
        teachers = TeacherEnsemble([teacher() for _ in range(case.teachers)], torch.rand(case.teachers, IMAGE.num_classes) + 0.1, image=IMAGE)
        student = MultiHeaderStudent(net(), case.teachers, IMAGE)
        engine = EngineConfig(**{"device": "cpu", "threads": 1, "precision": "float32", "progress": False, **case.engine, **options.pop("engine", {})})
        computed: set[int] = set()
        get = TeacherForms.get

        def seen(self: TeacherForms, net: nn.Module, *, observed: bool) -> Form:
            computed.update([list(teachers.nets).index(net)] if splitting() else [])
            return get(self, net, observed=observed)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TeacherForms, "get", seen)
            if case.group_norm:
                with_group_norm(student)
                for module in (cdfkd_mfs, rdskd):
                    patch.setattr(module, "build_generator", lambda *arguments: with_group_norm(build_generator(*arguments)))
            result = distill(teachers, student, case.method, config=case.method.Config(**case.config), engine=engine, **options)
    assert result.generator is not None
    assert {part.__class__ for part in student.modules() if "BatchNorm" in type(part).__name__} <= {nn.BatchNorm2d}
    names = result.history[0].keys() | result.history[-1].keys()
    terms = {name: torch.tensor([row.get(name, 0.0) for row in result.history], dtype=torch.float64) for name in names - {"seconds"}}
    return Outcome(terms, vector(student), vector(result.generator), state_hash(student.state_dict()), computed)


def splitting() -> bool:
    """Are the batches of the running step split? (`is_split` says no where a teacher computes those of all processes.)"""
    return bool(optimizer._global_optimizer_pre_hooks)


def vector(module: nn.Module) -> Tensor:
    assert {tensor.dtype for tensor in module.state_dict().values()} <= {torch.float64, torch.int64}
    return torch.cat([tensor.double().flatten() for tensor in module.state_dict().values()])


def run_all() -> dict[str, Outcome]:
    return {name: run(case) for name, case in {**SAME, **OTHER}.items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """Of every case, in both processes."""
    return in_two_processes(run_all, tmp_path_factory.mktemp("two"), types=[Outcome])


def difference(one: Outcome, two: Outcome) -> dict[str, float]:
    """The largest difference of each term, and of each network."""
    assert one.terms.keys() == two.terms.keys()
    found = {name: (values - two.terms[name]).abs().max().item() for name, values in one.terms.items()}
    return {**found, "student": (one.student - two.student).abs().max().item(), "generator": (one.generator - two.generator).abs().max().item()}


@pytest.mark.parametrize("name", SAME)
def test_two_processes_are_one(name: str, outcomes: list[dict[str, Outcome]]) -> None:
    expected = run(SAME[name])
    if name == "group_norm":
        terms = ("generator/bn", "generator/balance", "generator/fused_adversarial", "student/fused_kl", "student/feature_l1", "student/head_l1")
        assert all(expected.terms[name].abs().min() > 1e-6 for name in terms)
    found = difference(expected, outcomes[0][name])
    assert max(found.values()) < TOLERANCE, found
    assert outcomes[0][name].sha256 == outcomes[1][name].sha256
    computed, every = [outcome[name].computed for outcome in outcomes], set(range(SAME[name].teachers))
    assert computed == ([{0, 2}, {1}] if "sharded" in name else [every, every]), "whoever is drawn, a teacher is always the same process's"


@pytest.mark.parametrize("name", OTHER)
def test_without_any_part_of_it_they_are_not(name: str, outcomes: list[dict[str, Outcome]]) -> None:
    expected = run(OTHER[name]._replace(without=""))
    found = difference(expected, outcomes[0][name])
    assert found["generator"] > 10_000 * TOLERANCE, found
    assert (outcomes[0][name].sha256 == outcomes[1][name].sha256) == (name != "gradients")


# -- resuming, files, refusals -------------------------------------------------------------------------------------


def cut_and_resume(folder: Path) -> tuple[Outcome, Outcome, list[str]]:
    """A run of two epochs, and one that is stopped after the first and continued; only the first process may write."""
    case = Case(config={**MFS, "epochs": 2}, engine={"batch_norm": "local"})
    with pytest.MonkeyPatch.context() as patch:
        if not parallel.is_first():
            for name in ("save_state", "save_tensors", "write_text"):
                patch.setattr(engine_module, name, lambda *_: pytest.fail("this process wrote"))
        whole = run(case, out=folder / "whole")
        run(case, out=folder / "cut", engine={"max_seconds": 0.0})
        parallel.wait_for_all()
        resumed = run(case, out=folder / "cut", resume=True)
    return whole, resumed, sorted(path.name for path in (folder / "cut").iterdir()) if parallel.is_first() else []


def refusals() -> list[str]:
    """What distillations that cannot be split say."""
    cases = [
        (Case(deep_inversion.DeepInversion, {"rounds": 1}), 0),
        (Case(config={**MFS, "batch_size": 13}), 0),
        (Case(), parallel.rank()),
        (Case(engine={"device": "cuda:0"}), 0),
    ]
    said = []
    for case, seed in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_config.Runtime, "is_available", True)
            with pytest.raises(ConfigError) as caught:
                run(case, seed=seed)
        said.append(str(caught.value))
    assert not parallel.is_split()
    return said


def the_rest(folder: Path) -> tuple[Any, ...]:
    return cut_and_resume(folder), refusals()


@pytest.mark.slow
def test_a_run_is_resumed_by_all_and_written_by_one_and_what_cannot_be_split_is_refused_by_all(tmp_path: Path) -> None:
    found = in_two_processes(the_rest, tmp_path, tmp_path, types=[Outcome])
    for (whole, resumed, _), said in found:
        assert max(difference(whole, resumed).values()) == 0
        assert whole.sha256 == resumed.sha256 == found[0][0][0].sha256
        assert len(said) == 4
        for text, expected in zip(
            said,
            [
                "method 'deep_inversion' does not split its batches among 2 processes; start one, or choose another: ",
                "a batch of 13 for 2 processes; accepted: a multiple of their number",
                "processes [1] begin with another configuration, teachers, checkpoint or first student than process 0",
                "engine.device is 'cuda:0' for 2 processes; accepted: auto, cpu, or cuda",
            ],
            strict=True,
        ):
            assert expected in text
    assert found[0][0][2] == ["checkpoint", "checkpoint.previous", "generator.safetensors", "losses.csv", "synthetic.safetensors"]
    assert "rdskd" in found[0][1][0]


def test_a_rank_computes_its_rows_and_nothing_happens_in_one_process() -> None:
    batch = torch.arange(6.0)
    assert parallel.size() == 1
    with parallel.joined(), parallel.splitting():
        assert not parallel.is_split()
        for same in (parallel.own_rows(batch), parallel.whole(batch), parallel.batch_mean(batch), parallel.everyone(batch)[0]):
            assert same.data_ptr() == batch.data_ptr()


def test_torchs_own_batch_norm_takes_the_place_on_a_gpu_and_gives_it_back() -> None:
    norm, images = nn.BatchNorm2d(2).eval(), torch.randn(3, 2, 2, 2)
    expected = norm(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_batch_norm, "SharedBatchNorm", shared_batch_norm._SyncBatchNorm)
        with shared_batch_norm.shared_batch_norm([nn.Sequential(norm)]):
            assert isinstance(norm, nn.SyncBatchNorm)
            assert torch.equal(norm(images), expected)
    assert type(norm) is nn.BatchNorm2d


# -- the command ---------------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "data": {"name": "digits", "train_size": 200, "test_size": 60},
    "clients": {"count": 2, "architectures": ["lenet_bn"], "epochs": 1},
    "student": {"backbone": "lenet_bn"},
    "method": {"name": "cdfkd_mfs", "epochs": 2, "iterations": 1, "student_steps": 2, "batch_size": 8, "generator": {"latent_dim": 4, "width": 0.05}},
    "engine": {"device": "cpu", "threads": 1, "precision": "float32"},
}


@pytest.mark.slow
def test_torchrun_distils_into_one_run_directory(tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = from_values(VALUES)
    with seeding.seeded_scope("torchrun"):
        models = [build_classifier("lenet_bn", load_data(config.data, 0).image) for _ in range(2)]
    image = load_data(config.data, 0).image
    save_teachers(tmp_path / "teachers", TeacherSet((TeacherSpec("0", "lenet_bn", 80), TeacherSpec("1", "lenet_bn", 120)), models, image, 0, to_dict(config)))
    command = ["distill", "--teachers", str(tmp_path / "teachers"), "--out"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cdfkd_strategy"]
    done = subprocess.run([*launcher, *command, str(tmp_path / "two")], cwd=repository, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("student, merged") == 1
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    one, two = read_summary(tmp_path / "one"), read_summary(tmp_path / "two")
    assert (one["runtime"]["processes"], two["runtime"]["processes"], two["finished"]) == (1, 2, True)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    for name, expected in load_student(tmp_path / "one").state_dict().items():
        torch.testing.assert_close(load_student(tmp_path / "two").state_dict()[name], expected, rtol=1e-3, atol=1e-4)
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "two")]) == 0
    assert "student, merged" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["run", "digits"], ["teachers", "digits"], ["bench", "mnist_methods"]])
def test_other_commands_are_for_one_process(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "was started 2 times by a launcher" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
