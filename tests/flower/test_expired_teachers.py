"""A teacher that is too old keeps its header, and nothing else: no loss term, no vote, no row in the results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from cdfkd_strategy.averaging import fedavg
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.flower import client, distillation
from cdfkd_strategy.flower.apps import serve
from cdfkd_strategy.flower.arrays import to_record
from cdfkd_strategy.flower.payload import Broadcast
from cdfkd_strategy.flower.strategy import CDFKDStrategy
from cdfkd_strategy.harness import Harness
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.head_fusion import HeadAttention
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.student_io import load_student
from cdfkd_strategy.summary import SummaryWriter, read_summary
from cdfkd_strategy.teachers import TeacherEnsemble, TeacherSpec
from tests.flower.memory_grid import IMAGE, Killed, MemoryGrid, echo_app, project_grid, tiny_config, tiny_strategy

GONE = 1
"""The client that gives a teacher in rounds 1 and 3 only."""


def start(
    strategy: CDFKDStrategy, rounds: int, states: list[dict[str, Tensor]] | None = None, factor: float = 1.0, counts: list[int] | None = None
) -> MemoryGrid:
    """Three clients, one of them away in round 2; ``factor`` scales what its teacher knows."""

    def change(state: dict[str, Tensor]) -> None:
        state["classifier.weight" if "classifier.weight" in state else list(state)[-2]] *= factor

    teacher = {"arch": "lenet"} if counts is None else {"arch": "lenet", "label-counts": counts}
    apps = [echo_app(change if partition == GONE else None, teacher=teacher) for partition in range(3)]
    grid = MemoryGrid(apps)

    def edit(node: int, reply: Message) -> Message:
        if reply.metadata.message_type == "train" and node == grid.node(GONE) and strategy.session.state.round == 2:
            raise RuntimeError("away")
        return reply

    def evaluate(number: int, arrays: ArrayRecord) -> None:
        if states is not None:
            states.append({name: tensor.clone() for name, tensor in strategy.student.state_dict().items()})  # type: ignore[union-attr]

    grid.edit = edit
    strategy.start(grid, num_rounds=rounds, timeout=5, evaluate_fn=evaluate)
    return grid


def header(state: dict[str, Tensor], number: int) -> list[Tensor]:
    return [tensor for name, tensor in state.items() if name.startswith(f"headers.{number}.")]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, two, strict=True))


def choices(**more: Any) -> dict[str, Any]:
    return {"max_teacher_age": 0, "fraction_evaluate": 0.0, "weights": "uniform", **more}


def test_the_header_of_an_expired_teacher_rests_and_comes_back_to_its_client() -> None:
    states: list[dict[str, Tensor]] = []
    strategy = tiny_strategy(**choices())
    start(strategy, 3, states)
    first, second, third = states
    assert same(header(first, GONE), header(second, GONE))  # weights and BatchNorm statistics, bit for bit
    assert not same(header(second, GONE), header(third, GONE))
    for number in (0, 2):
        assert not same(header(first, number), header(second, number))
    assert strategy.session.state.slots == {"0": 0, "1": 1, "2": 2}


def test_an_expired_teacher_does_not_change_what_the_method_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = distillation.distill

    def recording(teachers: TeacherEnsemble, student: MultiHeaderStudent, *rest: Any, **more: Any) -> Any:
        seen.append(([spec.key for spec in teachers.specs], student.heads, teachers.is_uniform))
        return original(teachers, student, *rest, **more)

    monkeypatch.setattr(distillation, "distill", recording)
    start(tiny_strategy(run_dir=tmp_path / "run", **choices()), 2)
    assert seen == [(["0", "1", "2"], 3, True), (["0", "2"], 2, True)]
    for name in ("losses-round1.csv", "losses.csv"):  # uniform weights of those that count: "auto" is the paper's mode in both rounds
        with (tmp_path / "run" / name).open() as file:
            columns = next(csv.reader(file))
        assert "student/ensemble_l1" in columns
        assert "student/fused_kl" not in columns


def test_the_student_does_not_depend_on_what_an_expired_teacher_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for factor in (1.0, 50.0):
        states: list[dict[str, Tensor]] = []
        strategy = tiny_strategy(**choices())

        def second_round_alone(options: Any, teachers: TeacherEnsemble, previous: Any, number: int, *rest: Any) -> Any:
            if number == 2:  # what round 1 made of the teacher is not the question: both start from the same student
                torch.manual_seed(7)
                previous = distillation.Distilled(MultiHeaderStudent("lenet_bn", 3, IMAGE))
            return distillation.distil_round(options, teachers, previous, number, *rest)

        monkeypatch.setattr("cdfkd_strategy.flower.session.distil_round", second_round_alone)
        start(strategy, 2, states, factor)
        found.append(states[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_disclosed_counts_are_those_of_the_teachers_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = distillation.distill, []
    monkeypatch.setattr(distillation, "distill", lambda *rest, **more: (seen.append(more["extras"].label_counts.tolist()), original(*rest, **more))[1])
    counts = list(range(10))
    start(tiny_strategy(**choices(weights="label_counts")), 2, counts=counts)
    assert seen == [[counts] * 3, [counts] * 2]


@pytest.mark.parametrize("broadcast", ["heads", "single"])
def test_a_run_with_an_expired_teacher_is_continued(broadcast: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = choices(broadcast=broadcast, single_steps=2)
    start(tiny_strategy(run_dir=tmp_path / "whole", **settings), 2)
    steps = [0]
    method = tiny_strategy().options.distiller
    original = method.student_step

    def dying(self: Any, *batch: Any) -> Any:
        steps[0] += 1
        if steps[0] == 7:  # round 2, epoch 2: two epochs of two steps are a round
            raise Killed
        return original(self, *batch)

    monkeypatch.setattr(method, "student_step", dying)
    with pytest.raises(Killed):
        start(tiny_strategy(run_dir=tmp_path / "run", **settings), 2)
    resumed = tiny_strategy(run_dir=tmp_path / "run", resume=True, **settings)
    start(resumed, 2)
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == (tmp_path / "whole" / "student.safetensors").read_bytes()
    again = tiny_strategy(run_dir=tmp_path / "run", resume=True, **settings)  # and a finished one is read back
    start(again, 2)
    assert again.student is not None
    assert again.student.heads == 3
    assert again.generator is not None
    assert load_student(tmp_path / "run").weights[GONE].tolist() == [0.0] * 10


def test_the_app_writes_null_for_an_expired_teacher_and_its_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(
        data={"train_size": 90}, clients={"augment": "none"}, server={"rounds": 2, "max_teacher_age": 0, "fraction_evaluate": 0.0, "node_wait": 0.2}
    )
    out, results = tmp_path / "run", list[Any]()
    original = CDFKDStrategy.start
    monkeypatch.setattr(CDFKDStrategy, "start", lambda *rest, **more: results.append(original(*rest, **more)))

    def run(*, resume: bool) -> MemoryGrid:
        grid = project_grid(config)

        def edit(node: int, reply: Message) -> Message:
            if reply.metadata.message_type == "train" and node == grid.node(GONE) and reply.metadata.group_id == "2":
                raise RuntimeError("away")
            return reply

        grid.edit = edit
        serve(grid, config, out, resume=resume)
        return grid

    finish, dying = SummaryWriter.finish, [True]

    def killed(self: SummaryWriter, stopped_by: Any) -> None:
        if dying:
            raise Killed(dying.pop())
        finish(self, stopped_by)

    monkeypatch.setattr(SummaryWriter, "finish", killed)
    with pytest.raises(Killed):
        run(resume=False)
    assert run(resume=True).log == []  # both rounds are over: they are read back
    summary = read_summary(out)
    assert summary["finished"]
    for name in ("teachers", "student_heads"):
        first, second = (record["accuracy"][name] for record in summary["rounds"])
        assert None not in first
        assert [value is None for value in second] == [False, True, False]
        for result in results:
            assert np.array_equal(result.evaluate_metrics_serverapp[2][name], [second[0], float("nan"), second[2]], equal_nan=True)
    assert len(results) == 2
    assert json.loads((out / "state.json").read_text())["rounds"][1]["evaluate_server"]["teachers"] == summary["rounds"][1]["accuracy"]["teachers"]


def ensemble_with_an_expired_one() -> tuple[TeacherEnsemble, MultiHeaderStudent]:
    torch.manual_seed(0)
    nets = [build_classifier("lenet", IMAGE) for _ in range(3)]
    teachers = TeacherEnsemble(nets, image=IMAGE, specs=[TeacherSpec(str(k), "lenet", 10 + k) for k in range(3)])
    teachers.weights.copy_(torch.tensor([[0.25], [0.0], [0.75]]).expand(3, 10))
    return teachers, MultiHeaderStudent("lenet_bn", 3, IMAGE).eval()


def test_the_rows_of_the_results_leave_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    averaged = []
    monkeypatch.setattr("cdfkd_strategy.harness.fedavg", lambda nets, specs: (averaged.append([spec.key for spec in specs]), fedavg(nets, specs))[1])
    config = tiny_config()
    harness = Harness(config, load_data(config.data, config.seed))
    teachers, student = ensemble_with_an_expired_one()
    attention = HeadAttention(10)
    torch.nn.init.normal_(attention.score.weight, generator=torch.Generator().manual_seed(0))
    found = harness.evaluate(teachers, student, attention=attention)
    alone = TeacherEnsemble([teachers.nets[k] for k in (0, 2)], image=IMAGE, specs=[teachers.specs[k] for k in (0, 2)])
    alone.weights.copy_(teachers.weights[[0, 2]])
    expected = harness.evaluate(alone, student.only([0, 2]), attention=attention)
    for name in ("teachers", "student_heads"):
        assert found[name] == [expected[name][0], None, expected[name][1]]
    assert {**found, **{name: expected[name] for name in ("teachers", "student_heads")}} == expected
    assert averaged == [["0", "2"]] * 2


def test_clients_fit_attention_over_the_headers_that_count() -> None:
    teachers, student = ensemble_with_an_expired_one()
    rows = json.loads(json.dumps(teachers.weights.tolist()))
    built, weights = client._build(Broadcast(student.spec, rows), to_record(student.state_dict()))
    assert built.heads == 2
    assert torch.allclose(weights, torch.tensor([[0.25], [0.75]]).expand(2, 10))
    images = torch.randn(4, *IMAGE.shape)
    assert torch.equal(built(images).logits, student(images).logits[[0, 2]])
    whole, _ = client._build(Broadcast(student.spec, None), to_record(student.state_dict()))
    assert whole.heads == 3
