"""A server that dies at any moment continues to the same student, and asks nobody twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import nn

from cdfkd_strategy import cli, seeding
from cdfkd_strategy.checkpoint import load_state, save_state
from cdfkd_strategy.errors import CheckpointError
from cdfkd_strategy.flower import distillation, session
from cdfkd_strategy.flower.apps import serve
from cdfkd_strategy.flower.run_state import RunDirectory
from cdfkd_strategy.flower.strategy import CDFKDStrategy
from cdfkd_strategy.flower.uploads import Upload, Uploads
from cdfkd_strategy.methods.cdfkd_mfs import CDFKDMFS
from cdfkd_strategy.offline import distill_directory, plan
from cdfkd_strategy.student_io import load_student
from cdfkd_strategy.summary import read_summary
from cdfkd_strategy.teachers import state_hash
from tests.flower.memory_grid import FIRST_NODE, TINY, Killed, MemoryGrid, echo_app, project_grid, tiny_config, tiny_strategy

ROUNDS = 2
APPS = [echo_app(teacher={"arch": "lenet"})] * 2 + [echo_app(teacher={"arch": "lenet_bn"})]


def start(
    run_dir: Path | None, *, resume: bool = False, first_node: int = FIRST_NODE, rounds: int = ROUNDS, **choices: Any
) -> tuple[CDFKDStrategy, MemoryGrid, Any]:
    grid = MemoryGrid(APPS, first_node=first_node)
    strategy = tiny_strategy(run_dir=run_dir, resume=resume, architectures=["lenet", "lenet_bn"], **choices)
    result = strategy.start(grid, num_rounds=rounds, timeout=5, evaluate_fn=lambda number, arrays: MetricRecord({"arrays": float(len(arrays)) + number}))
    return strategy, grid, result


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "student.safetensors").read_bytes()).hexdigest()


class Own(nn.Sequential):
    """A user's own network."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 10))


class Moments:
    """Counts the moments at which state or files change, and kills the server at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed: list[str] = []
        self.fatal: int | None = None
        for owner, name in (
            (Uploads, "put"),
            (Uploads, "remove"),
            (RunDirectory, "save"),
            (RunDirectory, "clear_distillation"),
            (CDFKDMFS, "student_step"),
            (CDFKDMFS, "generator_step"),
            (distillation, "save_student"),
        ):
            monkeypatch.setattr(owner, name, self._around(name, getattr(owner, name)))
        engine = sys.modules["cdfkd_strategy.engine"]
        monkeypatch.setattr(engine, "save_state", self._around("checkpoint", engine.save_state))

    def _around(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._pass(f"before {name}")
            result = original(*args, **kwargs)
            self._pass(f"after {name}")
            return result

        return wrapped

    def _pass(self, moment: str) -> None:
        self.passed.append(moment)
        if len(self.passed) == self.fatal:
            raise Killed(moment)

    def arm(self, number: int | None) -> None:
        self.passed.clear()
        self.fatal = number


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Moments:
    return Moments(monkeypatch)


def test_killed_at_seeded_moments_the_resumed_run_gives_the_same_student_and_asks_nobody_twice(tmp_path: Path, moments: Moments) -> None:
    whole, _, expected = start(tmp_path / "whole")
    total = len(moments.passed)
    kinds = {moment.split()[1] for moment in moments.passed}
    assert kinds == {"put", "save", "clear_distillation", "student_step", "generator_step", "save_student", "checkpoint"}
    for number in sorted(random.Random(0).sample(range(1, total + 1), 10)):
        run_dir = tmp_path / str(number)
        moments.arm(number)
        with pytest.raises(Killed):
            start(run_dir)
        moments.arm(None)
        stored = {path.stem: json.loads(path.read_text())["round"] for path in run_dir.glob("uploads/[0-9]*.json")}
        strategy, grid, result = start(run_dir, resume=True, first_node=FIRST_NODE * 3)
        assert digest(run_dir) == digest(tmp_path / "whole"), number
        asked = [(content["config"]["server-round"], str(partition)) for content, partition in zip(grid.contents("train"), grid.asked("train"), strict=True)]
        assert len(asked) == len(set(asked))
        assert not {(last, key) for key, last in stored.items()} & set(asked), number
        assert {key: array.data for key, array in result.arrays.items()} == {key: array.data for key, array in expected.arrays.items()}
        assert result.evaluate_metrics_serverapp == expected.evaluate_metrics_serverapp
        assert result.train_metrics_clientapp == expected.train_metrics_clientapp
        assert strategy.generator is not None
        assert [record.bytes["up"] for record in strategy.rounds] == [record.bytes["up"] for record in whole.rounds]


def test_a_kept_generator_survives_a_restart(tmp_path: Path, moments: Moments, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[bool] = []
    original = CDFKDMFS.start_generator
    monkeypatch.setattr(CDFKDMFS, "start_generator", lambda self, state: (starts.append(True), original(self, state))[1])
    start(tmp_path / "new")
    assert starts == []
    start(tmp_path / "whole", keep_generator=True)
    start(None, keep_generator=True)
    assert starts == [True] * 2, "in round 2 alone, with files and without"
    assert digest(tmp_path / "whole") != digest(tmp_path / "new")
    moments.arm(None)
    start(tmp_path / "again", keep_generator=True)
    steps = [number for number, moment in enumerate(moments.passed, 1) if moment == "after student_step"]
    second = steps[len(steps) // 2]  # before the second round's first checkpoint
    last = len(moments.passed) - moments.passed[::-1].index("before save_student")
    checkpoints = [number for number, moment in enumerate(moments.passed, 1) if moment == "after checkpoint"]
    between = checkpoints[len(checkpoints) // 2]  # the second round's first one
    assert second < between < checkpoints[-1] < last
    for number in (second, between, last):
        moments.arm(number)
        with pytest.raises(Killed):
            start(tmp_path / str(number), keep_generator=True)
        moments.arm(None)
        start(tmp_path / str(number), resume=True, keep_generator=True)
        assert digest(tmp_path / str(number)) == digest(tmp_path / "whole")


@pytest.mark.parametrize(("moment", "train"), [("after put", [1, 2]), ("before save_student", []), ("after save_student", [])])
def test_each_phase_continues_where_it_stopped(moment: str, train: list[int], tmp_path: Path, moments: Moments) -> None:
    start(tmp_path / "whole", rounds=1)
    number = moments.passed.index(moment) + 1
    moments.arm(number)
    with pytest.raises(Killed):
        start(tmp_path / "run", rounds=1)
    moments.arm(None)
    _, grid, _ = start(tmp_path / "run", resume=True, rounds=1)
    assert grid.asked("train") == train
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_killed_between_distillation_and_evaluation_only_evaluates(tmp_path: Path, moments: Moments) -> None:
    class Mourning(Exception): ...

    def failing(number: int, arrays: ArrayRecord) -> MetricRecord:
        raise Mourning

    start(tmp_path / "whole", rounds=1)
    with pytest.raises(Mourning):
        tiny_strategy(run_dir=tmp_path / "run", architectures=["lenet", "lenet_bn"]).start(MemoryGrid(APPS), num_rounds=1, timeout=5, evaluate_fn=failing)
    moments.arm(None)
    strategy, grid, result = start(tmp_path / "run", resume=True, rounds=1)
    assert grid.asked("train") == []
    assert "before student_step" not in moments.passed
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert result.evaluate_metrics_serverapp[1]["arrays"] == len(result.arrays) + 1
    assert strategy.teachers is not None
    assert strategy.generator is not None


def test_a_finished_run_is_read_back_and_can_be_prolonged(tmp_path: Path, moments: Moments) -> None:
    start(tmp_path / "long", rounds=3)
    start(tmp_path / "run", rounds=2)
    moments.arm(None)
    strategy, grid, result = start(tmp_path / "run", resume=True, rounds=2)
    assert grid.log == []
    assert "before student_step" not in moments.passed
    assert sorted(result.evaluate_metrics_serverapp) == [1, 2]
    assert strategy.student is not None
    _, grid, _ = start(tmp_path / "run", resume=True, rounds=3, first_node=7 * FIRST_NODE)
    assert grid.asked("train") == [0, 1, 2]
    assert digest(tmp_path / "run") == digest(tmp_path / "long")
    assert [path.name for path in sorted((tmp_path / "run").glob("losses*"))] == ["losses-round1.csv", "losses-round2.csv", "losses.csv"]


def test_a_run_stopped_by_max_seconds_goes_on_with_its_last_round_when_that_is_raised(tmp_path: Path, moments: Moments) -> None:
    short, long = (tiny_config(engine={"max_seconds": limit}).engine for limit in (0.0, 1000.0))
    start(tmp_path / "whole", rounds=1)
    stopped, _, _ = start(tmp_path / "run", rounds=1, engine=short)
    assert stopped.rounds[0].stopped_by == "max_seconds"
    assert digest(tmp_path / "run") != digest(tmp_path / "whole")
    moments.arm(None)
    _, grid, _ = start(tmp_path / "run", rounds=1, engine=short, resume=True)
    assert grid.log == []
    strategy, grid, result = start(tmp_path / "run", rounds=1, engine=long, resume=True)
    assert grid.asked("train") == []
    assert grid.asked("evaluate") == [0, 1, 2]
    assert moments.passed.count("before student_step") == 2  # the second epoch alone
    assert strategy.rounds[0].stopped_by == "schedule"
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert result.evaluate_metrics_serverapp[1]["arrays"] == len(result.arrays) + 1


def test_an_earlier_round_stays_as_max_seconds_left_it(tmp_path: Path, moments: Moments) -> None:
    short, long = (tiny_config(engine={"max_seconds": limit}).engine for limit in (0.0, None))
    start(tmp_path, engine=short)
    moments.arm(3)  # dies in the epoch that it goes on with, after the state was saved
    with pytest.raises(Killed, match="before student_step"):
        start(tmp_path, engine=long, resume=True)
    moments.arm(None)
    strategy, grid, _ = start(tmp_path, engine=short, resume=True)
    assert [record.stopped_by for record in strategy.rounds] == ["max_seconds", "max_seconds"]
    strategy, grid, _ = start(tmp_path, engine=long, resume=True)
    assert [record.stopped_by for record in strategy.rounds] == ["max_seconds", "schedule"]
    assert grid.asked("train") == []


def test_reading_a_stopped_run_back_distils_nothing(tmp_path: Path, moments: Moments) -> None:
    engine = tiny_config(engine={"max_seconds": 0.0}).engine
    start(tmp_path, rounds=1, engine=engine)
    before = digest(tmp_path)
    rounds = json.loads((tmp_path / "state.json").read_text())["rounds"]
    rounds[0]["seconds"]["distill"] = 50.0  # the epoch and what came after it: more than the epoch that the checkpoint knows of
    edit_state(tmp_path, rounds=rounds)
    moments.arm(None)
    strategy, grid, _ = start(tmp_path, rounds=1, engine=dataclasses.replace(engine, max_seconds=40.0), resume=True)
    assert (grid.log, moments.passed) == ([], [])
    assert len(strategy.session.distilled.history) == 1
    assert (strategy.rounds[0].stopped_by, strategy.session.distilled.stopped_by) == ("max_seconds", "max_seconds")
    assert digest(tmp_path) == before


# -- the runtime of a run ------------------------------------------------------------------------------------------

AUTO = tiny_config(engine={"device": "auto", "threads": 0}).engine


@pytest.mark.parametrize("moment", ["after put", "after clear_distillation", "before student_step"])
@pytest.mark.parametrize("again", [0, -1], ids=["first", "last"])
def test_a_resumed_run_keeps_the_threads_it_began_with(moment: str, again: int, tmp_path: Path, moments: Moments, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            seen.add(torch.get_num_threads())
            return original(*args, **kwargs)

        return wrapped

    for owner, name in ((CDFKDMFS, "run_epoch"), (session, "teacher_weights"), (distillation, "student_for")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    start(tmp_path / "whole", engine=AUTO)
    number = [index for index, passed in enumerate(moments.passed) if passed == moment][again] + 1
    moments.arm(number)
    with pytest.raises(Killed):
        start(tmp_path / "run", engine=AUTO)
    moments.arm(None)
    with seeding.threads(2):
        strategy, _, _ = start(tmp_path / "run", engine=AUTO, resume=True)
    assert seen == {1}
    assert strategy.session.runtime.threads == 1
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def edit_state(run_dir: Path, **values: Any) -> None:
    state = json.loads((run_dir / "state.json").read_text())
    (run_dir / "state.json").write_text(json.dumps({key: value for key, value in {**state, **values}.items() if value is not ...}))


def test_a_run_whose_device_is_gone_says_so_before_it_asks_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    start(tmp_path, engine=AUTO, rounds=1)
    edit_state(tmp_path, runtime={"device": "cuda", "channels_last": True, "threads": 1})
    grid = MemoryGrid(APPS)
    with pytest.raises(CheckpointError, match=r"was started on 'cuda', which torch does not see here.*engine.device=cpu"):
        tiny_strategy(run_dir=tmp_path, resume=True, architectures=["lenet", "lenet_bn"], engine=AUTO).start(grid, num_rounds=2, timeout=5)
    assert grid.log == []
    strategy, _, _ = start(tmp_path, engine=dataclasses.replace(AUTO, device="cpu"), resume=True, rounds=2)
    assert strategy.session.runtime.device == "cpu"
    assert "the run was started on cuda, which is gone; it goes on on cpu" in caplog.text
    assert json.loads((tmp_path / "state.json").read_text())["runtime"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("values", "message"), [({"runtime": {"device": 3}}, "runtime.device is 3"), ({"runtime": ...}, "'runtime'"), ({"tempo": 1}, ".*'tempo'")]
)
def test_a_broken_state_is_an_error(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    strategy = tiny_strategy(run_dir=tmp_path)
    strategy.session.open(ArrayRecord(), ConfigRecord())
    edit_state(tmp_path, **values)
    with pytest.raises(CheckpointError, match=rf"state.json \({message}"):
        tiny_strategy(run_dir=tmp_path, resume=True).session.open(ArrayRecord(), ConfigRecord())


def test_metrics_that_are_not_numbers_come_back_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client or an evaluate_fn may report NaN, in a list too; strict JSON has none, and a MetricRecord has no null."""
    nan = float("nan")

    def aggregate(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"loss": nan, "list": [1.5, nan], "count": 3})

    def begin(*, resume: bool) -> Any:
        strategy = tiny_strategy(run_dir=tmp_path, resume=resume, train_metrics_aggr_fn=aggregate)
        evaluate = MetricRecord({"teachers": [nan, 0.25], "mean": nan})
        return strategy.start(MemoryGrid(APPS[:2]), num_rounds=1, timeout=5, evaluate_fn=lambda number, arrays: evaluate)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(session, "distil_round", killed)
        with pytest.raises(Killed):
            begin(resume=False)
    for result in (begin(resume=True), begin(resume=True)):  # the second one reads the finished run back
        train, evaluated = result.train_metrics_clientapp[1], result.evaluate_metrics_serverapp[1]
        assert np.array_equal(train["list"], [1.5, nan], equal_nan=True)
        assert math.isnan(train["loss"])
        assert train["count"] == 3
        assert np.array_equal(evaluated["teachers"], [nan, 0.25], equal_nan=True)
        assert math.isnan(evaluated["mean"])
    record = json.loads((tmp_path / "state.json").read_text())["rounds"][0]
    assert (record["train"]["list"], record["evaluate_server"]["teachers"]) == ([1.5, None], [None, 0.25])


def test_a_single_header_is_restored(tmp_path: Path, moments: Moments) -> None:
    choices = {"broadcast": "single", "single_steps": 2}
    start(tmp_path / "whole", **choices)
    whole = (tmp_path / "whole" / "student-single.safetensors").read_bytes()
    moments.arm(len(moments.passed) - 30)
    with pytest.raises(Killed):
        start(tmp_path / "run", **choices)
    moments.arm(None)
    strategy, _, _ = start(tmp_path / "run", resume=True, **choices)
    assert strategy.single is not None
    assert (tmp_path / "run" / "student-single.safetensors").read_bytes() == whole


def test_the_run_directory_holds_a_loadable_student_and_nothing_unbounded(tmp_path: Path) -> None:
    strategy, _, _ = start(tmp_path, rounds=3)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        *(f"uploads/{key}.{kind}" for key in "012" for kind in ("json", "safetensors")),
        *(f"checkpoint{kind}/state.{end}" for kind in ("", ".previous") for end in ("json", "safetensors")),
        *("state.json", "student.json", "student.safetensors", "generator.safetensors", "synthetic.safetensors", "uploads/teachers.json"),
        *("losses.csv", "losses-round1.csv", "losses-round2.csv"),
    }
    assert strategy.teachers is not None
    assert load_student(tmp_path).weights.numpy() == pytest.approx(strategy.teachers.weights.numpy(), abs=1e-6)


def test_a_run_directory_belongs_to_one_process(repository: Path, tmp_path: Path) -> None:
    start(tmp_path / "run")
    (tmp_path / "run" / ".state.json.tmp").write_text("half")
    script = (
        "import sys\nfrom pathlib import Path\nfrom cdfkd_strategy.errors import CheckpointError\nfrom cdfkd_strategy.flower.run_state import RunDirectory\n"
        "try:\n    RunDirectory(Path(sys.argv[1]), resume=True)\nexcept CheckpointError as error:\n    print(error)\n"
    )
    other = subprocess.run([sys.executable, "-c", script, tmp_path / "run"], cwd=repository, capture_output=True, text=True, check=True)
    assert "another process works in the directory" in other.stdout
    assert (tmp_path / "run" / ".state.json.tmp").exists(), "it has deleted a file of the process that works there"


def test_the_teachers_of_a_run_can_be_distilled_again_with_other_settings(tmp_path: Path) -> None:
    config = tiny_config(server={"rounds": 2, "weights": "label_counts", "node_wait": 0.2})
    strategy = serve(project_grid(config), config, tmp_path / "run", resume=False)
    work = plan(tmp_path / "run" / "uploads", ["method.student_lr=0.01", "method.epochs=1"])
    assert (work.config.method["student_lr"], work.config.data, work.config.clients) == (0.01, config.data, config.clients)
    assert work.teachers.specs == strategy.teachers.specs  # type: ignore[union-attr]
    assert work.teachers.label_counts == [list(strategy.session.uploads[key].label_counts or ()) for key in "012"]
    distill_directory(work, tmp_path / "again")
    (first, second), (again,) = (read_summary(tmp_path / name)["rounds"] for name in ("run", "again"))
    assert again["accuracy"]["teachers"] == second["accuracy"]["teachers"] != first["accuracy"]["teachers"]
    assert again["accuracy"]["ensemble_oracle"] == second["accuracy"]["ensemble_oracle"]
    upload = strategy.session.uploads["0"]
    strategy.session.uploads.put(upload, strategy.session.uploads.load("0"))  # the next round has begun
    with pytest.raises(CheckpointError, match=r"holds no teachers\.json"):
        plan(tmp_path / "run" / "uploads", [])


def test_a_run_goes_on_with_other_places_for_the_same_things(tmp_path: Path) -> None:
    config = tiny_config(server={"node_wait": 0.2})
    serve(project_grid(config), config, tmp_path / "run", resume=False)
    moved = tiny_config(server={"node_wait": 0.2, "rounds": 1}, clients={"num_cpus": 2}, data={"path": str(tmp_path)})
    strategy = serve(project_grid(moved), moved, tmp_path / "run", resume=True)
    assert [record.round for record in strategy.rounds] == [1]
    other = tiny_config(server={"node_wait": 0.2}, clients={"epochs": 2})
    with pytest.raises(CheckpointError, match=r"started with clients\.epochs=1, not 2"):
        serve(project_grid(other), other, tmp_path / "run", resume=True)


@pytest.mark.parametrize("architecture", ["lenet", Own])
def test_the_uploads_of_a_strategy_that_was_made_by_hand_say_what_it_was(architecture: Any, tmp_path: Path) -> None:
    grid = MemoryGrid([echo_app()] * 2)
    strategy = tiny_strategy(architecture=architecture, run_dir=tmp_path / "run", seed=3, weights="uniform", student_stages=2)
    strategy.start(grid, num_rounds=1, timeout=5)
    if architecture is Own:
        with pytest.raises(CheckpointError, match=r"is a 'Own', which is no registered architecture; a network of your own can be distilled by `distill`"):
            plan(tmp_path / "run" / "uploads", [])
        return
    work = plan(tmp_path / "run" / "uploads", [])
    name, settings = work.config.method_config()
    assert (name, settings) == ("cdfkd_mfs", strategy.options.method_config)
    assert (work.config.seed, work.config.student.backbone, work.config.student.stages, work.config.server.weights) == (3, "lenet_bn", 2, "uniform")
    assert work.data is None, "nobody named a data set"
    distill_directory(work, tmp_path / "again")
    assert read_summary(tmp_path / "again")["finished"]


def test_a_run_with_flower_and_a_distillation_without_do_not_continue_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(server={"node_wait": 0.2})
    serve(project_grid(config), config, tmp_path / "run", resume=False)
    uploads = tmp_path / "run" / "uploads"
    assert cli.main(["distill", "--teachers", str(uploads), "--out", str(tmp_path / "run"), "--resume"]) == cli.ERROR
    assert "holds a run with Flower; continue it with `cdfkd run`" in capsys.readouterr().err
    distill_directory(plan(uploads, []), tmp_path / "again")
    kept = (tmp_path / "again" / "student.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="holds a distillation without Flower; continue it with `cdfkd distill`"):
        serve(project_grid(config), config, tmp_path / "again", resume=True)
    assert (tmp_path / "again" / "student.safetensors").read_bytes() == kept
    assert not (tmp_path / "again" / "state.json").exists()


def test_a_directory_that_is_not_empty_needs_resume(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty; continue it with resume=True"):
        tiny_strategy(run_dir=tmp_path)


@pytest.mark.parametrize(
    ("choices", "name"),
    [({"seed": 1}, "seed"), ({"weights": "uniform"}, "weights"), ({"method_config": {"epochs": 3}}, "method_config"), ({"student": "lenet"}, "student")],
)
def test_other_settings_cannot_continue_a_run(choices: dict[str, Any], name: str, tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    with pytest.raises(CheckpointError, match=f"was started with another {name}"):
        start(tmp_path, resume=True, rounds=2, **choices)


def test_another_train_configuration_or_initialisation_cannot_continue_a_run(tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    strategy = tiny_strategy(run_dir=tmp_path, resume=True, architectures=["lenet", "lenet_bn"])
    with pytest.raises(CheckpointError, match="train_config"):
        strategy.start(MemoryGrid(APPS), num_rounds=2, train_config=ConfigRecord({"lr": 1.0}))


def test_a_changed_upload_is_noticed(tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    first, second = tmp_path / "uploads" / "0.safetensors", tmp_path / "uploads" / "1.safetensors"
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="not those that were uploaded"):
        start(tmp_path, resume=True, rounds=2)
    first.write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"0.safetensors is not an upload of this run"):
        start(tmp_path, resume=True, rounds=2)
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError):
        start(tmp_path, resume=True, rounds=2)


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import tests.flower.conftest
from tests.flower import test_resume
where, module, owner, name, count = sys.argv[1:]
target = getattr(__import__(module, fromlist=["x"]), owner)
original, left = getattr(target, name), [int(count)]
def dying(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(target, name, dying)
test_resume.start(Path(where), rounds=1)
"""


DICE = random.Random(13)
UPLOAD = DICE.randint(1, len(APPS))
EPOCH = DICE.randint(1, TINY["epochs"])
STAGE = DICE.choice(["evaluate_messages", "finish_round"])
STEPS = TINY["iterations"] * TINY["student_steps"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "owner", "name", "count", "asked"),
    [
        pytest.param("cdfkd_strategy.flower.uploads", "Uploads", "put", UPLOAD, list(range(UPLOAD - 1, len(APPS))), id="during uploads"),
        pytest.param("cdfkd_strategy.methods.cdfkd_mfs", "CDFKDMFS", "student_step", EPOCH * STEPS, [], id="mid-epoch"),  # the epoch's last step
        pytest.param("cdfkd_strategy.flower.session", "Session", STAGE, 1, [], id="between distillation and evaluation"),
    ],
)
def test_sigkill_at_seeded_moments(module: str, owner: str, name: str, count: int, asked: list[int], repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), module, owner, name, str(count)]
    died = subprocess.run(command, cwd=repository, env=os.environ | {"PYTHONPATH": str(repository)}, capture_output=True, text=True, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    _, grid, _ = start(tmp_path / "run", resume=True, rounds=1)
    start(tmp_path / "whole", rounds=1)
    assert grid.asked("train") == asked
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_an_upload_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses its power may keep a new name and lose the bytes behind it, unless they were synced first."""
    synced: set[int] = set()
    fsync, rename = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        assert self.stat().st_ino in synced, f"{target} is renamed before it is synced"
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    uploads = Uploads(tmp_path)
    state = {"weight": torch.arange(6.0).reshape(2, 3).t()}
    uploads.put(Upload("0", "lenet", 5, 1, state_hash(state), 24, True, True), state)
    assert synced
    assert torch.equal(Uploads(tmp_path).load("0")["weight"], state["weight"])


def test_every_round_has_a_seed_of_its_own_and_the_first_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    original = distillation.distill
    monkeypatch.setattr(distillation, "distill", lambda *given, **named: (seeds.append(named["seed"]), original(*given, **named))[1])
    start(None, seed=5, rounds=3)
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


def test_seconds_of_epochs_before_a_restart_are_counted(tmp_path: Path, moments: Moments) -> None:
    moments.passed.clear()
    start(tmp_path / "whole", rounds=1)
    moments.arm(moments.passed.index("after checkpoint") + 1)
    with pytest.raises(Killed):
        start(tmp_path / "run", rounds=1)
    moments.arm(None)
    state = load_state(tmp_path / "run" / "checkpoint")
    state["history"][0]["seconds"] = 1000.0
    save_state(tmp_path / "run" / "checkpoint", state)
    strategy, _, _ = start(tmp_path / "run", resume=True, rounds=1)
    assert strategy.rounds[0].seconds["distill"] > 1000.0


def test_a_client_that_has_a_teacher_in_this_round_cannot_replace_it_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes are not asked who they are here, so that only the reply says that it is client 0 once more."""
    put = Uploads.put

    def put_and_die(self: Uploads, upload: Upload, state: dict[str, torch.Tensor]) -> None:
        put(self, upload, state)
        raise Killed

    choices = {"run_dir": tmp_path, "identify": False, "fraction_evaluate": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(Uploads, "put", put_and_die)
        with pytest.raises(Killed):
            tiny_strategy(**choices).start(MemoryGrid([echo_app(teacher={"arch": "lenet"})] * 2), num_rounds=1, timeout=5)
    stored = json.loads((tmp_path / "uploads" / "0.json").read_text())["sha256"]
    strategy = tiny_strategy(**choices, resume=True)
    strategy.start(MemoryGrid([echo_app(teacher={"arch": "lenet"}, noise=0.2)] * 2, first_node=5 * FIRST_NODE), num_rounds=1, timeout=5)
    assert json.loads((tmp_path / "uploads" / "0.json").read_text())["sha256"] == stored
    assert list(strategy.rounds[0].quarantined.values()) == ["it has uploaded a teacher in this round already"]
    assert [spec.key for spec in strategy.teachers.specs] == ["0", "1"]  # type: ignore[union-attr]
