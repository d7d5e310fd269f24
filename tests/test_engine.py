"""`distill()`: history, files, resume, guards and refusals, on a method small enough to follow by hand."""

from __future__ import annotations

import csv
import itertools
import logging
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from cdfkd_strategy import seeding
from cdfkd_strategy.checkpoint import load_state, load_tensors
from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.engine import KEPT_IMAGES, SYNTHETIC_FILE, DistillResult, distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.errors import CDFKDError, CheckpointError, ConfigError, NeedsError, UnknownNameError
from cdfkd_strategy.methods.rdskd import RDSKDConfig
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.seeding import generator, seeded_scope
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, Needs

IMAGE = ImageSpec(1, 8, 8, 3)


@dataclass(frozen=True)
class NoiseConfig:
    epochs: int = 4
    broken_at: int = -1


class NoiseDistiller(Distiller):
    """Distils on Gaussian noise; uses both its own generator of random numbers and the global one."""

    name = "noise_test"
    Config = NoiseConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)
        self.mean_loss = torch.zeros(())
        self.steps = 0

    @property
    def num_epochs(self) -> int:
        return int(self.config.epochs)

    def run_epoch(self, epoch: int) -> Mapping[str, float]:
        self.student.train()
        for _ in range(2):
            images = torch.randn(8, 1, 8, 8, generator=self.rng) + torch.rand(8, 1, 8, 8)
            loss = (self.student(images).logits - self.teachers(images)).abs().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.mean_loss.mul_(0.5).add_(loss.detach(), alpha=0.5)
            self.steps += 1
        return {"student/l1": float("nan") if epoch == self.config.broken_at else float(self.mean_loss), "steps": self.steps}


class LayerwiseSGD(torch.optim.Optimizer):
    """Momentum, divided by its norm: a sum over the buffer, whose bits depend on the order of its memory."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].mul_(0.9).add_(parameter.grad)
            parameter.add_(state["momentum"] / (state["momentum"].norm() + 1e-6), alpha=-0.05)


class LayerwiseDistiller(NoiseDistiller):
    name = "layerwise_test"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer = LayerwiseSGD(self.student.parameters())


class ListDistiller(NoiseDistiller):
    """Keeps an optimiser where no checkpoint sees it."""

    name = "list_test"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizers = [torch.optim.SGD(self.student.parameters())]


class LosingDistiller(NoiseDistiller):
    """Keeps something that changes in place and that no checkpoint holds."""

    name = "losing_test"
    kept: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queue = type(self).kept


class ChangingDistiller(NoiseDistiller):
    """Has values that are nothing at first, a tuple and a word, which change from epoch to epoch."""

    name = "changing_test"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.best: float | None = None
        self.mean: torch.Tensor | None = None
        self.span, self.stage = (0.0, 0.0), "first"

    def run_epoch(self, epoch: int) -> Mapping[str, float]:
        terms = super().run_epoch(epoch)
        self.best, self.mean = float(epoch), torch.full((2,), float(epoch))
        self.span, self.stage = (self.span[1], float(epoch)), f"stage {epoch}"
        return {**terms, "span": self.span[0]}


class NeedsBatchNorm(NoiseDistiller):
    name = "needs_test"
    needs = Needs(batch_norm=True)


def parts(arch: str = "small_cnn", seed: int = 0) -> tuple[TeacherEnsemble, MultiHeaderStudent]:
    with seeded_scope("engine", seed):
        return TeacherEnsemble([build_classifier(arch, IMAGE) for _ in range(2)], image=IMAGE), MultiHeaderStudent("small_cnn", 2, IMAGE)


def run(
    out: Path | None = None, *, config: NoiseConfig | None = None, cls: type[Distiller] = NoiseDistiller, arch: str = "small_cnn", seed: int = 0, **options: Any
) -> DistillResult:
    teachers, student = parts(arch)
    engine = EngineConfig(device="cpu", progress=False, **options.pop("engine", {}))
    return distill(teachers, student, cls, config=config, seed=seed, out=out, engine=engine, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_history_and_csv_have_one_row_per_epoch(tmp_path: Path) -> None:
    result = run(tmp_path, evaluate=lambda student: {"accuracy": float(not student.training)}, engine={"evaluate_every": 2})
    assert (result.epochs_done, result.stopped_by) == (4, "schedule")
    assert [row["steps"] for row in result.history] == [2, 4, 6, 8]
    assert [row.get("accuracy") for row in result.history] == [None, 1.0, None, 1.0]
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    assert float(rows[3]["student/l1"]) == pytest.approx(result.history[3]["student/l1"], rel=1e-5)
    assert not result.student.training


def test_the_same_seed_gives_the_same_student_and_another_seed_another() -> None:
    first = run()
    assert same(first.student, run().student)
    assert not same(first.student, run(seed=1).student)


def test_evaluation_does_not_change_the_run() -> None:
    def evaluate(student: nn.Module) -> dict[str, float]:
        student(torch.randn(4, 1, 8, 8))
        return {"random": float(torch.rand(()))}

    assert same(run().student, run(evaluate=evaluate, engine={"evaluate_every": 1}).student)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resume_at_every_boundary_equals_an_uninterrupted_run(tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run()
    original = NoiseDistiller.run_epoch

    def interrupted(self: NoiseDistiller, epoch: int) -> Mapping[str, float]:
        if epoch == stop_after:
            raise KeyboardInterrupt
        return original(self, epoch)

    monkeypatch.setattr(NoiseDistiller, "run_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(NoiseDistiller, "run_epoch", original)
    resumed = run(tmp_path, resume=True)
    assert same(whole.student, resumed.student)
    strip = [{key: value for key, value in row.items() if key != "seconds"} for row in resumed.history]
    assert strip == [{key: value for key, value in row.items() if key != "seconds"} for row in whole.history]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resume_keeps_the_memory_layout_of_optimiser_buffers(tmp_path: Path, stop_after: int) -> None:
    whole = run(cls=LayerwiseDistiller)

    class Interrupted(LayerwiseDistiller):
        def run_epoch(self, epoch: int) -> Mapping[str, float]:
            if epoch == stop_after:
                raise KeyboardInterrupt
            return super().run_epoch(epoch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, cls=Interrupted)
    resumed = run(tmp_path, cls=LayerwiseDistiller, resume=True)
    assert any(weight.dim() == 4 and not weight.is_contiguous() for weight in resumed.student.parameters())
    assert same(whole.student, resumed.student)


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    done = run(tmp_path)
    again = run(tmp_path, resume=True)
    assert again.epochs_done == 4
    assert same(done.student, again.student)


@pytest.mark.parametrize("change", [{"config": NoiseConfig(epochs=5)}, {"seed": 1}])
def test_resume_with_another_configuration_or_seed_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError, match=r"was written with another (config|seed)"):
        run(tmp_path, resume=True, **change)


def test_resume_with_other_teachers_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    teachers, student = parts(seed=9)
    with pytest.raises(CheckpointError, match="another teachers"):
        distill(teachers, student, NoiseDistiller, out=tmp_path, resume=True, engine=EngineConfig(device="cpu", progress=False))


def test_max_seconds_stops_at_an_epoch_boundary_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path, engine={"max_seconds": 0.0}, evaluate=lambda student: {"accuracy": 0.5})
    assert (result.epochs_done, result.stopped_by) == (1, "max_seconds")
    assert "stopped after epoch 1 of 4" in caplog.text
    assert result.history[0]["accuracy"] == 0.5
    stopped = run(tmp_path, resume=True, engine={"max_seconds": 0.0})
    assert (stopped.epochs_done, stopped.stopped_by) == (1, "max_seconds")
    assert same(run().student, run(tmp_path, resume=True).student)


def test_a_loss_that_is_not_finite_is_a_clear_error_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CDFKDError, match="student/l1 became NaN or infinite in epoch 3"):
        run(tmp_path, config=NoiseConfig(broken_at=2))
    with (tmp_path / "losses.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2


def test_state_that_a_checkpoint_would_lose_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'list_test' keeps a list in 'optimizers', which a checkpoint would lose; accepted: .*nn.ModuleList"):
        run(tmp_path, cls=ListDistiller)


@pytest.mark.parametrize("lost", [deque([1.0]), np.zeros(2), np.random.default_rng(0), random.Random(0)], ids=lambda lost: type(lost).__name__)
def test_whatever_changes_in_place_and_would_be_lost_is_an_error(lost: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LosingDistiller, "kept", lost)
    with pytest.raises(CheckpointError, match=rf"'losing_test' keeps a {type(lost).__name__} in 'queue', which a checkpoint would lose"):
        run(tmp_path, cls=LosingDistiller)


def test_values_that_begin_as_nothing_tuples_and_words_are_restored(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", cls=ChangingDistiller)
    run(tmp_path / "part", cls=ChangingDistiller, engine={"max_seconds": 0.0})
    resumed = run(tmp_path / "part", cls=ChangingDistiller, resume=True)
    assert [row["span"] for row in resumed.history] == [row["span"] for row in whole.history] == [0.0, 0.0, 1.0, 2.0]
    states = [load_state(tmp_path / name / "checkpoint")["distiller"] for name in ("whole", "part")]
    assert [(state["best"], state["mean"].tolist(), state["span"], state["stage"]) for state in states] == [(3.0, [3.0, 3.0], (2.0, 3.0), "stage 3")] * 2


def test_some_images_are_kept_as_the_method_shows_them(tmp_path: Path) -> None:
    teachers, student = parts()
    result = distill(teachers, student, "rdskd", config=RDSKDConfig.toy(), out=tmp_path, seed=3, engine=EngineConfig(device="cpu", progress=False))
    pixels = load_tensors(tmp_path / SYNTHETIC_FILE)["pixels"]
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (KEPT_IMAGES, *IMAGE.shape))
    shown = result.sample(KEPT_IMAGES, generator("pictures", 3))
    assert shown is not None
    assert torch.equal(pixels, IMAGE.to_pixels(shown).mul(255).round().to(torch.uint8))
    assert not (run(tmp_path / "noise") and (tmp_path / "noise" / SYNTHETIC_FILE).exists()), "a method without images keeps none"


def test_needs_are_checked_before_training() -> None:
    with pytest.raises(NeedsError, match="'needs_test' needs BatchNorm running statistics, which teachers 0, 1 do not have"):
        run(cls=NeedsBatchNorm, arch="small_cnn_gn")


def test_unknown_methods_and_devices_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"accepted: .*cdfkd_mfs"):
        run(cls="no_such_method")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="accepted: auto, cpu"):
        EngineConfig(device="tpu-7")
    with pytest.raises(ConfigError, match="accepted: auto, cpu"):
        EngineConfig(device="mps")


class Flattening(nn.Module):
    """A teacher that flattens with ``view``, which fails on maps in the channels-last layout."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.convolution(images).view(len(images), -1))


def test_a_teacher_that_cannot_take_channels_last_turns_it_off() -> None:
    torch.manual_seed(0)
    teachers = TeacherEnsemble([Flattening()], image=IMAGE)
    assert not teachers.accepts_channels_last()
    result = distill(teachers, MultiHeaderStudent("small_cnn", 1, IMAGE), NoiseDistiller, engine=EngineConfig(device="cpu", progress=False))
    assert not result.runtime.channels_last
    assert run().runtime.channels_last


def test_checkpoints_stay_two(tmp_path: Path) -> None:
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "checkpoint.previous", "losses.csv"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_configuration_for_a_gpu_can_be_read_anywhere_and_run_only_there() -> None:
    engine = EngineConfig(device="cuda:0")
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        engine.runtime()


# -- what bits depend on -------------------------------------------------------------------------------------------


class Watching(NoiseDistiller):
    """Notes the settings under which its epochs are computed."""

    name = "watching_test"
    seen: ClassVar[list[tuple[int, bool]]] = []

    def run_epoch(self, epoch: int) -> Mapping[str, float]:
        self.seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
        return super().run_epoch(epoch)


@pytest.mark.parametrize(("device", "deterministic"), [("cpu", False), ("cuda", True)])
def test_epochs_run_in_the_scope_of_their_runtime(device: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "place", lambda self, module: module)  # so that a test of the settings needs no GPU
    monkeypatch.setattr(Watching, "seen", [])
    run(cls=Watching, runtime=Runtime(device=device, threads=2))
    assert Watching.seen == [(2, deterministic)] * 4
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_runtime_says_that_nothing_is_folded_where_not_all_teachers_stay(tmp_path: Path) -> None:
    runs = {resident: run(tmp_path / str(resident), engine={"resident_teachers": resident}) for resident in (0, 1, 3, 4)}
    assert {resident: result.runtime.fold for resident, result in runs.items()} == {0: True, 1: False, 3: False, 4: True}, "two teachers, each in two forms"
    saved = [load_state(tmp_path / str(resident) / "checkpoint")["runtime"]["fold"] for resident in runs]
    assert saved == [True, False, False, True]


def test_a_resumed_run_keeps_the_runtime_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(Watching, "seen", [])
    run(tmp_path, cls=Watching, engine={"threads": 1, "max_seconds": 0.0})
    with caplog.at_level(logging.INFO), seeding.threads(2):
        resumed = run(tmp_path, cls=Watching, engine={"threads": 3, "fold": False}, resume=True)
    assert Watching.seen == [(1, False)] * 4
    assert resumed.runtime.threads == 1
    assert "engine.threads=3, engine.fold=false: not used, the run goes on as it began, Runtime(device='cpu', channels_last=True, threads=1" in caplog.text


def test_a_device_that_is_gone_can_only_be_replaced_by_a_named_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    began = Runtime(device="cuda:1", channels_last=False, threads=7)
    for device in ("auto", "cuda:1"):
        with pytest.raises(CheckpointError, match=r"was started on 'cuda:1', which torch does not see here; .* \(engine.device=cpu\)"):
            EngineConfig(device=device).continued(began)
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        EngineConfig(device="cuda:0").continued(began)
    assert EngineConfig(device="cpu", precision="bfloat16").continued(began) == Runtime(device="cpu", channels_last=False, threads=7, precision="bfloat16")
    assert "the run was started on cuda:1, which is gone; it goes on on cpu" in caplog.text
    here = Runtime(device="cpu", threads=5)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert EngineConfig(threads=5).continued(here) is here
    assert not caplog.text


def test_resume_with_other_class_weights_another_student_or_method_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    teachers, student = parts()
    engine = EngineConfig(device="cpu", progress=False)
    skewed = TeacherEnsemble(list(teachers.nets), torch.tensor([[1.0, 2, 3], [4.0, 3, 2]]), image=IMAGE)
    with pytest.raises(CheckpointError, match="with another weights"):
        distill(skewed, student, NoiseDistiller, out=tmp_path, resume=True, engine=engine)
    with pytest.raises(CheckpointError, match="with another student"):
        distill(teachers, MultiHeaderStudent("lenet", 2, IMAGE), NoiseDistiller, out=tmp_path, resume=True, engine=engine)
    with pytest.raises(CheckpointError, match="with another method"):
        run(tmp_path, cls=ChangingDistiller, resume=True)


def test_checkpoints_come_as_often_as_they_should_and_a_resumed_run_repeats_what_they_do_not_have(tmp_path: Path) -> None:
    """Dead in the fourth epoch with a checkpoint every two: the third is computed again."""
    every_other = {"checkpoint_every": 2}
    whole = run(tmp_path / "whole", config=NoiseConfig(epochs=5), engine=every_other)
    deaths = iter([False, False, False, True])

    def die(*_: object) -> dict[str, float]:
        if next(deaths, False):
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", config=NoiseConfig(epochs=5), engine={**every_other, "evaluate_every": 1}, evaluate=die)
    assert len(load_state(tmp_path / "run" / "checkpoint")["history"]) == 2
    resumed = run(tmp_path / "run", config=NoiseConfig(epochs=5), engine=every_other, resume=True)
    assert same(resumed.student, whole.student)
    assert [row["student/l1"] for row in resumed.history] == [row["student/l1"] for row in whole.history]
    with (tmp_path / "run" / "losses.csv").open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [0, 1, 2, 3, 4]


def test_max_seconds_counts_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("cdfkd_strategy.engine.time.perf_counter", lambda: float(next(clock)))
    result = run(config=NoiseConfig(epochs=6), engine={"max_seconds": 2.5})
    assert [row["seconds"] for row in result.history] == [1.0] * 3
    assert result.stopped_by == "max_seconds"
