"""What every method must keep: one suite over the registry, and over a test-only method with another schedule.

A method that is added to ``cdfkd_strategy/methods`` is tested here without a further line; if its ``Config.toy()`` is too
small to learn, `ENOUGH` says what it needs.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cdfkd_strategy import seeding
from cdfkd_strategy.checkpoint import load_state, save_state
from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.engine import DistillResult, distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.errors import ArchitectureError, CheckpointError, ConfigError, NeedsError
from cdfkd_strategy.methods import METHODS, get_method
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.generators import GeneratorConfig
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from cdfkd_strategy.types import Extras, Metrics
from tests.methods.dense_like import DenseLike
from tests.methods.trained_teachers import DIGITS, digits, disagreement, tiny_net, tiny_student, trained_ensemble

CLASSES: dict[str, type[Distiller]] = {**{name: get_method(name) for name in METHODS}, "dense_like": DenseLike}
WARNED = "ignore:.*does not have a deterministic implementation"
"""torch's warning of a kernel that may move the last bit; the tests look at the bits themselves."""
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.filterwarnings(WARNED))] if torch.cuda.is_available() else [])]

ENOUGH: dict[str, dict[str, Any]] = {
    "cdfkd": {
        "epochs": 3,
        "iterations": 30,
        "batch_size": 64,
        "generator_lr": 5e-4,
        "one_hot_weight": 1.0,
        "student_milestones": (2,),
        "generator": GeneratorConfig(latent_dim=64, width=0.25),
    },
    "cdfkd_mfs": {"epochs": 4, "iterations": 14, "batch_size": 64, "student_lr": 0.1},
    "dafl": {
        "epochs": 3,
        "iterations": 40,
        "batch_size": 64,
        "generator_lr": 5e-4,
        "student_milestones": (2,),
        "generator": GeneratorConfig(latent_dim=64, width=0.25),
    },
    "cmi": {
        "pre_rounds": 2,
        "rounds": 3,
        "inversion_steps": 20,
        "synthesis_batch": 64,
        "generator_lr": 0.02,
        "bn_weight": 0.3,
        "bank_size": 320,
        "pool_size": 320,
        "student_steps": 40,
        "batch_size": 50,
        "student_lr": 0.2,
        "student_milestones": (2,),
        "generator": GeneratorConfig(latent_dim=64, width=0.25, output="sigmoid"),
    },
    "deep_inversion": {"image_steps": 15, "image_batch": 100, "pool_size": 200, "iterations": 40, "batch_size": 50, "student_lr": 0.2, "temperature": 3.0},
    "fast_dfkd": {
        "epochs": 8,
        "warm_up": 3,
        "reset_epoch": None,
        "inner_steps": 10,
        "synthesis_batch": 64,
        "generator_lr": 0.01,
        "latent_lr": 0.05,
        "bn_weight": 0.3,
        "statistics_momentum": 0.0,
        "pool_size": 256,
        "student_steps": 30,
        "batch_size": 50,
        "generator": GeneratorConfig(latent_dim=64, width=0.25, output="sigmoid"),
    },
    "mad": {"epochs": 4, "iterations": 14, "student_steps": 3, "batch_size": 32, "student_lr": 0.1},
    "dfad": {
        "epochs": 3,
        "iterations": 14,
        "student_steps": 5,
        "milestones": (2,),
        "student_lr": 0.2,
        "generator_lr": 1e-4,
        "generator": GeneratorConfig(latent_dim=64, width=0.25),
    },
    "dfed": {
        "epochs": 3,
        "iterations": 11,
        "student_steps": 5,
        "milestones": (2,),
        "student_lr": 0.2,
        "generator_lr": 1e-4,
        "generator": GeneratorConfig(latent_dim=64, width=0.25),
    },
    "dfq": {
        "epochs": 2,
        "iterations": 12,
        "student_steps": 5,
        "student_lr": 0.2,
        "generator": GeneratorConfig(latent_dim=64, width=0.25),
    },
    "rdskd": {
        "generator_epochs": 9,
        "student_epochs": 10,
        "student_milestones": (8,),
        "iterations": 14,
        "batch_size": 64,
        "student_lr": 0.02,
        "generator": GeneratorConfig(latent_dim=64, width=0.25),
    },
    "cgdd": {"epochs": 4, "iterations": 12, "student_steps": 4, "batch_size": 64, "student_lr": 0.1},
    "zskt": {"epochs": 3, "iterations": 15, "student_steps": 5, "batch_size": 64, "student_lr": 0.01},
    "kd": {"epochs": 3, "iterations": 20, "batch_size": 50, "student_milestones": (2,)},
    "noise": {"epochs": 5, "iterations": 32, "batch_size": 64, "student_milestones": (4,), "temperature": 4.0},
    "spaceshipnet": {
        "epochs": 4,
        "generator_steps": 20,
        "synthesis_batch": 64,
        "generator_lr": 0.02,
        "bn_weight": 0.3,
        "pool_size": 256,
        "student_steps": 30,
        "batch_size": 50,
        "student_lr": 0.4,
        "cam_weight": 0.05,
        "generator": GeneratorConfig(latent_dim=64, width=0.25, output="sigmoid"),
    },
    "soft_targets": {
        "rounds": 4,
        "image_steps": 40,
        "image_batch": 100,
        "pool_size": 400,
        "epochs": 4,
        "iterations": 30,
        "batch_size": 50,
        "student_lr": 0.02,
    },
    "zskd": {
        "image_steps": 30,
        "image_batch": 100,
        "pool_size": 200,
        "epochs": 3,
        "iterations": 30,
        "batch_size": 50,
        "student_lr": 0.02,
    },
    "dense_like": {
        "epochs": 4,
        "generator_steps": 15,
        "student_steps": 25,
        "batch_size": 64,
        "pool_size": 256,
        "generator": GeneratorConfig(latent_dim=64, width=0.25),
    },
}
"""What to change in ``Config.toy()`` until the student follows its teachers on real digits."""

TOY_OPERATORS, TOY_GFLOP = 40_000, 10.0
"""What a toy run may cost, in PyTorch operators and in arithmetic: about a second of an idle core, counted and not timed, because the
same run takes five times as long on a core that others keep busy."""

ARXIV = re.compile(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}")

every_method = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES.keys())
one_and_three = pytest.mark.parametrize("count", [1, 3], ids=["K=1", "K=3"])
every_device = pytest.mark.parametrize("device", DEVICES)


class Operators(TorchDispatchMode):
    """Counts the operators that PyTorch runs, the backward pass included."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def real_images(cls: type[Distiller]) -> dict[str, Any]:
    """Training digits for a method that declares real images; nothing for the others, which need not take extras."""
    return {"extras": Extras(proxy_data=digits().x_train[:300])} if cls.needs.proxy_data else {}


def run(cls: type[Distiller], teachers: TeacherEnsemble, student: nn.Module, *, device: str = "cpu", seed: int = 0, **options: Any) -> DistillResult:
    """`distill` with the toy configuration, on one thread, in float32: what the device is fastest in is not measured here."""
    engine = EngineConfig(device=device, threads=1, watch_images=0, progress=False, **{"precision": "float32", **options.pop("engine", {})})
    return distill(teachers, student, cls, config=options.pop("config", cls.Config.toy()), seed=seed, engine=engine, **real_images(cls), **options)


def build(cls: type[Distiller], count: int, *, seed: int = 0, config: Any = None, device: str = "cpu") -> Distiller:
    """A distiller as the engine builds it; the seed decides all initial weights and every random number. Run it in `Runtime.scope`."""
    runtime = Runtime(device=device, threads=1)
    student, teachers = runtime.place(tiny_student(count, seed)), runtime.place(trained_ensemble(count))
    with seeding.seeded_scope("distiller", seed):
        return cls(teachers, student, config or cls.Config.toy(), image=DIGITS, rng=seeding.generator("distill", seed), runtime=runtime, **real_images(cls))


def same(first: Any, second: Any) -> bool:
    """Bit for bit, in nested mappings and sequences of tensors and plain values."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return set(first) == set(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def terms(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


@every_method
def test_a_run_in_bfloat16_is_finite_and_leaves_float32(cls: type[Distiller]) -> None:
    result = run(cls, trained_ensemble(3), tiny_student(3), engine={"precision": "bfloat16"})
    assert result.runtime.precision == "bfloat16"
    assert all(math.isfinite(value) for row in result.history for value in row.values())
    assert {tensor.dtype for tensor in result.student.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert torch.isfinite(torch.cat([parameter.flatten() for parameter in result.student.parameters()])).all()


# -- form ----------------------------------------------------------------------------------------------------------


def test_the_suite_covers_the_registry() -> None:
    assert set(METHODS) <= set(CLASSES)
    assert {"cdfkd_mfs", "rdskd", "deep_inversion"} <= set(METHODS)
    assert "dense_like" not in METHODS  # the test-only method must not leak into what users see


@every_method
def test_documents_itself(cls: type[Distiller]) -> None:
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    text = module + (inspect.getdoc(cls) or "")
    assert ARXIV.search(text), "the docstring of the class or its module must link the paper as https://arxiv.org/abs/..."
    assert "disclose" in text, "the docstring must say what a client discloses"
    assert CLASSES[cls.name] is cls, "`name` is the registered name"


@pytest.mark.parametrize("name", METHODS)
def test_what_it_says_of_batch_norm_is_what_the_list_of_disclosures_says(name: str) -> None:
    cls = get_method(name)
    said = "including BatchNorm running statistics" in (inspect.getdoc(inspect.getmodule(cls)) or "")
    assert said is (cls.needs.batch_norm or cls.uses.batch_norm)
    assert not (set(cls.needs.disclosed()) & set(cls.uses.disclosed()))


@every_method
def test_config_is_a_frozen_dataclass_of_plain_values(cls: type[Distiller]) -> None:
    for config in (cls.Config(), cls.Config.toy()):
        assert dataclasses.is_dataclass(config)
        assert bind(cls.Config, to_dict(config)) == config
        field = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, getattr(config, field))


@pytest.mark.parametrize("name", METHODS)
def test_no_number_may_be_negative_or_not_finite(name: str) -> None:
    cls = get_method(name)
    config, hints = cls.Config(), get_type_hints(cls.Config)
    kinds = {field.name: {hints[field.name], *get_args(hints[field.name])} & {int, float} for field in dataclasses.fields(config)}
    values = [(field, value) for field, kind in kinds.items() if kind for value in (-1, *((math.nan, math.inf) if float in kind else ()))]
    assert len(values) > 10
    for field, value in values:
        given = (value,) if get_origin(hints[field]) is tuple else value
        with pytest.raises(ConfigError, match=rf"method\.{field} is {re.escape(str(given))}.*; accepted: "):
            dataclasses.replace(config, **{field: given})


@every_method
def test_no_method_inherits_from_another(cls: type[Distiller]) -> None:
    assert cls.__bases__ == (Distiller,)


@every_method
@one_and_three
def test_builds_from_defaults(cls: type[Distiller], count: int) -> None:
    distiller = build(cls, count, config=cls.Config())
    assert distiller.num_epochs >= 1
    assert build(cls, count).num_epochs < distiller.num_epochs


# -- a toy run -----------------------------------------------------------------------------------------------------


@every_method
@one_and_three
@every_device
def test_toy_run(cls: type[Distiller], count: int, device: str) -> None:
    """Fast, finite, the student moves, and the teachers do not: weights, buffers, gradients and mode."""
    teachers, student = trained_ensemble(count), tiny_student(count)
    teachers_before, student_before = state_hash(teachers.state_dict()), state_hash(student.state_dict())
    with FlopCounterMode(display=False) as arithmetic, Operators() as operators:
        result = run(cls, teachers, student, device=device)
    assert result.epochs_done == len(result.history) >= 2
    assert result.stopped_by == "schedule"
    assert state_hash(student.state_dict()) != student_before
    for row in result.history:
        names = set(row) - {"epoch", "seconds"}
        assert names
        assert all(isinstance(row[name], float) and math.isfinite(row[name]) for name in names)
    assert all(torch.isfinite(tensor).all() for tensor in student.state_dict().values())
    assert state_hash(teachers.state_dict()) == teachers_before
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teachers.parameters())
    assert not any(part.training for part in teachers.nets.modules())
    assert 0 < operators.count < TOY_OPERATORS
    assert 0 < arithmetic.get_total_flops() / 1e9 < TOY_GFLOP


@every_method
@every_device
def test_teachers_stay_frozen_when_something_else_sets_train_mode(cls: type[Distiller], device: str) -> None:
    distiller = build(cls, 1, device=device)
    distiller.teachers.train()
    before = state_hash(distiller.teachers.state_dict())
    with distiller.runtime.scope():
        distiller.run_epoch(0)
    assert state_hash(distiller.teachers.state_dict()) == before


@every_method
def test_teachers_of_several_architectures(cls: type[Distiller]) -> None:
    def teachers() -> TeacherEnsemble:
        with seeding.seeded_scope("mixed"):
            return TeacherEnsemble([build_classifier(arch, DIGITS) for arch in ("lenet_bn", "small_cnn")], image=DIGITS)

    for heads in (1, 2):
        if cls.students and ("single" if heads == 1 else "multi") not in cls.students:
            continue
        student = tiny_student(heads)
        before = {name: value.clone() for name, value in student.state_dict().items()}
        result = run(cls, teachers(), student)
        assert all(math.isfinite(value) for row in result.history for value in row.values())
        assert any(not torch.equal(value, before[name]) for name, value in result.student.state_dict().items())


@every_method
def test_class_weights_of_experts(cls: type[Distiller]) -> None:
    """Label skew at its worst: every class is known to one teacher only, so that weights are 0 and 1."""
    weights = torch.nn.functional.one_hot(torch.arange(DIGITS.num_classes) % 3, 3).T.float()
    student = tiny_student(3)
    result = run(cls, trained_ensemble(3, weights), student)
    assert all(torch.isfinite(tensor).all() for tensor in student.state_dict().values())
    assert all(math.isfinite(value) for row in result.history for value in row.values())


@every_method
@one_and_three
@every_device
def test_disagreement_on_real_digits_is_halved(cls: type[Distiller], count: int, device: str) -> None:
    """The student follows its trained teachers on 500 held-out images; without data, it never saw a real one."""
    teachers, student = trained_ensemble(count), tiny_student(count)
    before = disagreement(student, teachers)
    assert before > 0.6
    config = dataclasses.replace(cls.Config.toy(), **ENOUGH.get(cls.name, {}))
    run(cls, teachers, student, config=config, device=device)
    assert disagreement(student, teachers) <= before / 2


@every_method
@pytest.mark.parametrize(("kind", "heads"), [("single", 1), ("multi", 2)])
def test_it_takes_the_students_that_it_names_and_refuses_the_others(cls: type[Distiller], kind: str, heads: int) -> None:
    teachers, student = trained_ensemble(2), tiny_student(heads)
    if kind in cls.students:
        result = run(cls, teachers, student)
        assert all(math.isfinite(value) for row in result.history for value in row.values())
    elif cls.students:
        with pytest.raises(ArchitectureError, match=f"a student with {heads} header"):
            run(cls, teachers, student)


# -- determinism and resume ----------------------------------------------------------------------------------------


@every_method
@every_device
def test_same_seed_same_result(cls: type[Distiller], device: str) -> None:
    results = [run(cls, trained_ensemble(3), tiny_student(3), seed=seed, device=device) for seed in (4, 4, 5)]
    hashes = [state_hash(result.student.state_dict()) for result in results]
    assert hashes[0] == hashes[1] != hashes[2]
    assert terms(results[0].history) == terms(results[1].history)


@every_method
def test_it_says_whether_an_epoch_depends_on_the_generator_that_it_starts_from(cls: type[Distiller]) -> None:
    if not cls.generator_lasts:
        with pytest.raises(ConfigError, match="has no generator that could start from an earlier one"):
            build(cls, 1).start_generator({})
        return
    after = []
    for seed in (0, 1):
        distiller, other = build(cls, 1), build(cls, 1, seed=seed)
        assert distiller.generator is not None
        assert other.generator is not None
        distiller.start_generator(other.generator.state_dict())
        with distiller.runtime.scope():
            distiller.run_epoch(0)
        after.append(copy.deepcopy(distiller.generator.state_dict()))
    assert not same(*after)


@every_method
def test_an_epoch_trains_in_whatever_mode_it_finds_the_student(cls: type[Distiller]) -> None:
    """An evaluation leaves it in eval mode, and so does the round before."""
    found = []
    for training in (True, False):
        distiller = build(cls, 1)
        with distiller.runtime.scope():
            for epoch in range(distiller.num_epochs):
                distiller.student.train(training)
                distiller.run_epoch(epoch)
        found.append(copy.deepcopy(distiller.student.state_dict()))
    assert same(*found)


@every_method
@every_device
def test_randomness_comes_from_the_passed_generator_only(cls: type[Distiller], device: str) -> None:
    finals = []
    for disturbance in (1, 2):
        distiller = build(cls, 1, device=device)
        for epoch in range(distiller.num_epochs):
            with distiller.runtime.scope(), seeding.seeded_scope("somebody else", disturbance, epoch):
                distiller.run_epoch(epoch)
        finals.append(copy.deepcopy(distiller.state_dict()))
    assert same(*finals)


@every_method
@one_and_three
@every_device
def test_state_dict_at_every_epoch_boundary_continues_exactly(cls: type[Distiller], count: int, device: str) -> None:
    whole = build(cls, count, device=device)
    with whole.runtime.scope():
        states, rows = [copy.deepcopy(whole.state_dict())], []
        for epoch in range(whole.num_epochs):
            rows.append(whole.run_epoch(epoch))
            states.append(copy.deepcopy(whole.state_dict()))
        for start in range(whole.num_epochs):
            other = build(cls, count, seed=99, device=device)  # other weights, other random numbers: everything must come from the state
            other.load_state_dict(copy.deepcopy(states[start]))
            assert [other.run_epoch(epoch) for epoch in range(start, whole.num_epochs)] == rows[start:]
            assert same(other.state_dict(), states[-1])


def strides(state: Any, where: str = "") -> dict[str, tuple[int, ...]]:
    """Where in the state a tensor lies and how its elements follow one another in memory; axes of one element say nothing."""
    if isinstance(state, Tensor):
        return {where: tuple(step for size, step in zip(state.shape, state.stride(), strict=True) if size > 1)}
    parts = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {key: value for name, part in parts for key, value in strides(part, f"{where}/{name}").items()}


@every_method
@every_device
def test_a_state_from_disk_has_the_memory_layout_of_the_one_that_was_saved(cls: type[Distiller], device: str, tmp_path: Path) -> None:
    whole, other = build(cls, 2, device=device), build(cls, 2, seed=99, device=device)
    with whole.runtime.scope():
        for epoch in range(whole.num_epochs):
            whole.run_epoch(epoch)
    save_state(tmp_path / "checkpoint", whole.state_dict())
    other.load_state_dict(load_state(tmp_path / "checkpoint"))
    found = strides(whole.state_dict())
    assert any("optimizer" in name and len(steps) == 4 and steps != tuple(sorted(steps, reverse=True)) for name, steps in found.items())
    assert strides(other.state_dict()) == found


@every_method
@every_device
def test_a_run_stopped_at_every_epoch_and_resumed_from_disk_is_the_uninterrupted_run(cls: type[Distiller], device: str, tmp_path: Path) -> None:
    whole = run(cls, trained_ensemble(2), tiny_student(2), device=device, out=tmp_path / "whole")
    for done in range(1, whole.epochs_done):

        class OneEpochMore(cls):  # type: ignore[misc, valid-type]
            """The same method, in a process that dies after one epoch."""

            last = done

            def run_epoch(self, epoch: int) -> Metrics:
                if epoch == self.last:
                    raise KeyboardInterrupt
                return super().run_epoch(epoch)

        with pytest.raises(KeyboardInterrupt):  # a new process knows nothing but the configuration: its student is another one
            run(OneEpochMore, trained_ensemble(2), tiny_student(2, seed=done - 1), device=device, out=tmp_path / "parts", resume=True)
    result = run(cls, trained_ensemble(2), tiny_student(2, seed=99), device=device, out=tmp_path / "parts", resume=True)
    assert result.epochs_done == whole.epochs_done
    assert state_hash(result.student.state_dict()) == state_hash(whole.student.state_dict())
    assert terms(result.history) == terms(whole.history)


@every_method
def test_the_state_of_another_method_is_refused(cls: type[Distiller]) -> None:
    distiller = build(cls, 1)
    state = {**distiller.state_dict(), "discriminator": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"discriminator.*start a new run directory"):
        distiller.load_state_dict(state)


@every_method
def test_looking_at_samples_changes_nothing(cls: type[Distiller]) -> None:
    distiller = build(cls, 1)
    for epoch in range(distiller.num_epochs):
        distiller.run_epoch(epoch)
        before = copy.deepcopy(distiller.state_dict())
        images = distiller.sample(7, seeding.generator("look"))
        assert same(distiller.state_dict(), before)
        assert (images is None) == cls.needs.proxy_data, "a method shows the images that it makes, and never real ones"
        if images is None:
            continue
        assert images.shape == (7, *DIGITS.shape)
        assert not images.requires_grad
        assert torch.isfinite(images).all()
        again = distiller.sample(7, seeding.generator("look"))
        assert again is not None
        assert torch.equal(again, images)


# -- needs ---------------------------------------------------------------------------------------------------------


def without_linear() -> nn.Module:
    """A BatchNorm classifier without a linear layer, and so without features."""
    return nn.Sequential(*list(tiny_net())[:-2], nn.Conv2d(32, DIGITS.num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def needs_or_runs(cls: type[Distiller], needed: bool, teachers: TeacherEnsemble, message: str, out: Path) -> None:
    student = tiny_student(len(teachers))
    before = state_hash(student.state_dict())
    if not needed:
        result = run(cls, teachers, student, out=out)
        assert all(math.isfinite(value) for row in result.history for value in row.values())
        return
    with pytest.raises(NeedsError, match=message):
        run(cls, teachers, student, out=out)
    assert state_hash(student.state_dict()) == before
    assert not (out / "checkpoint").exists()


@every_method
def test_batch_norm_is_needed_only_if_declared(cls: type[Distiller], tmp_path: Path) -> None:
    nets = [*trained_ensemble(1, group_norm=True).nets]
    if cls.needs.batch_norm:
        nets.insert(0, trained_ensemble(1).nets[0])  # one that lacks it is enough, and is named
    message = rf"'{cls.name}' needs BatchNorm running statistics, which teachers 1 do not have"
    needs_or_runs(cls, cls.needs.batch_norm, TeacherEnsemble(nets, image=DIGITS), message, tmp_path / "run")


@every_method
def test_features_are_needed_only_if_declared(cls: type[Distiller], tmp_path: Path) -> None:
    with seeding.seeded_scope("without linear"):
        teachers = TeacherEnsemble([without_linear()], image=DIGITS)
    needs_or_runs(cls, cls.needs.features, teachers, rf"'{cls.name}' needs features before a last linear layer", tmp_path / "run")
