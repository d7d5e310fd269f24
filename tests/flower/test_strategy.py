"""`CDFKDStrategy` on an in-memory grid: bad uploads, dead nodes, slots, several rounds, what is disclosed."""

from __future__ import annotations

import inspect
import itertools
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn

from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.errors import ArchitectureError, ConfigError, NeedsError, TooFewTeachersError
from cdfkd_strategy.flower.apps import serve
from cdfkd_strategy.flower.distillation import student_for
from cdfkd_strategy.flower.strategy import CDFKDStrategy
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.student_io import load_student
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from cdfkd_strategy.types import Needs
from tests.flower.memory_grid import FIRST_NODE, IMAGE, TINY, MemoryGrid, echo_app, project_grid, tiny_config, tiny_strategy


def nan(state: dict[str, torch.Tensor]) -> None:
    next(iter(state.values())).view(-1)[0] = float("nan")


def misshapen(state: dict[str, torch.Tensor]) -> None:
    name = next(iter(state))
    state[name] = state[name][..., :1]


def raising(state: dict[str, torch.Tensor]) -> None:
    raise RuntimeError("no such disk")


def run(
    apps: list[ClientApp], rounds: int = 1, grid: dict[str, Any] | None = None, evaluate_fn: Any = None, **choices: Any
) -> tuple[CDFKDStrategy, MemoryGrid, Any]:
    strategy, nodes = tiny_strategy(**choices), MemoryGrid(apps, **(grid or {}))
    result = strategy.start(nodes, ArrayRecord(), num_rounds=rounds, timeout=5, evaluate_fn=evaluate_fn)
    return strategy, nodes, result


def test_one_round_gives_a_student_with_a_header_per_client() -> None:
    strategy, grid, result = run([echo_app()] * 3)
    assert strategy.student is not None
    assert strategy.student.heads == 3
    assert {key: array.numpy().shape for key, array in result.arrays.items()} == {key: tuple(t.shape) for key, t in strategy.student.state_dict().items()}
    assert strategy.teachers is not None
    assert torch.allclose(strategy.teachers.weights.sum(0), torch.ones(10))
    assert strategy.generator is not None
    assert result.train_metrics_clientapp[1] == MetricRecord({"train_loss": 1.0})
    assert grid.asked("train") == [0, 1, 2]


def test_start_has_the_signature_of_flowers_strategies_and_the_constructor_their_names() -> None:
    assert list(inspect.signature(CDFKDStrategy.start).parameters) == list(inspect.signature(Strategy.start).parameters)
    fedavg, ours = inspect.signature(FedAvg.__init__).parameters, inspect.signature(CDFKDStrategy.__init__).parameters
    assert set(fedavg) <= set(ours)
    numbers = [name for name in fedavg if isinstance(fedavg[name].default, int | float)]
    assert {name: ours[name].default for name in numbers} == {name: fedavg[name].default for name in numbers}


def test_the_same_seed_gives_the_same_student_whatever_the_order_of_replies() -> None:
    apps = [echo_app(teacher={"arch": "lenet"})] * 3
    first, _, one = run(apps, grid={"order": sorted})
    second, _, two = run(apps, grid={"order": lambda ids: sorted(ids, reverse=True)})
    assert {key: array.data for key, array in one.arrays.items()} == {key: array.data for key, array in two.arrays.items()}
    assert [spec.key for spec in first.teachers.specs] == [spec.key for spec in second.teachers.specs] == ["0", "1", "2"]  # type: ignore[union-attr]
    _, _, other = run(apps, seed=1)
    assert {key: array.data for key, array in one.arrays.items()} != {key: array.data for key, array in other.arrays.items()}


@pytest.mark.parametrize(("change", "reason"), [(nan, "NaN"), (misshapen, "shape|bytes"), (raising, "code 2.*no such disk")])
def test_a_bad_upload_is_quarantined_and_the_round_goes_on(change: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    apps = [echo_app(), echo_app(change), echo_app()]
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy, _, _ = run(apps)
    assert strategy.student is not None
    assert strategy.student.heads == 2
    quarantined = strategy.rounds[0].quarantined
    assert list(quarantined) == [str(FIRST_NODE + 17)]
    assert re.search(reason, quarantined[str(FIRST_NODE + 17)])
    assert any("gives no teacher" in record.message for record in caplog.records)


def test_one_client_is_enough() -> None:
    strategy, _, _ = run([echo_app()])
    assert strategy.student is not None
    assert strategy.student.heads == 1


def test_no_good_upload_is_a_clear_error() -> None:
    with pytest.raises(TooFewTeachersError, match=r"round 1 has 0 usable teachers; accepted: at least min_teachers=1.*NaN"):
        run([echo_app(nan)] * 2)
    with pytest.raises(TooFewTeachersError, match="1 usable teachers; accepted: at least min_teachers=2"):
        run([echo_app(), echo_app(nan)], min_teachers=2)


def test_too_few_nodes_are_an_error_after_the_deadline() -> None:
    with pytest.raises(TooFewTeachersError, match=r"2 nodes are connected after waiting 0 s; accepted: at least 3 \(min_available_nodes"):
        run([echo_app()] * 2, min_available_nodes=3)


def test_a_dead_node_is_named_though_the_superlink_answers_for_it() -> None:
    strategy, grid = tiny_strategy(), MemoryGrid([echo_app()] * 3)
    grid.dead.add(grid.node(1))
    strategy.start(grid, num_rounds=1, timeout=5)
    assert list(strategy.rounds[0].quarantined) == [str(grid.node(1))]
    assert "code 5" in strategy.rounds[0].quarantined[str(grid.node(1))]


def test_a_node_that_does_not_answer_is_not_waited_for() -> None:
    strategy, grid = tiny_strategy(), MemoryGrid([echo_app()] * 3)
    grid.mute.add(grid.node(2))
    strategy.start(grid, num_rounds=1, timeout=0.2)
    assert strategy.rounds[0].silent == [str(grid.node(2))]
    assert strategy.student is not None
    assert strategy.student.heads == 2


def test_a_client_that_may_still_be_training_is_not_asked_to_evaluate() -> None:
    strategy, grid = tiny_strategy(identify=True), MemoryGrid([echo_app(teacher={"arch": "lenet"})] * 3)

    def falls_silent(node: int, reply: Message) -> Message:
        if reply.metadata.message_type == "query.hello" and node == grid.node(2):
            grid.mute.add(node)
        return reply

    grid.edit = falls_silent
    strategy.start(grid, num_rounds=1, timeout=0.2)
    assert grid.asked("train") == [0, 1, 2]
    assert strategy.rounds[0].silent == ["2"]
    assert grid.asked("evaluate") == [0, 1]


def test_evaluations_that_fail_are_on_record(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    grid = project_grid(tiny_config())

    def breaks(node: int, reply: Message) -> Message:
        if reply.metadata.message_type == "evaluate":
            if node == grid.node(0):
                raise RuntimeError("out of memory")
            grid.mute.add(grid.node(2))
        return reply

    grid.edit = breaks
    with caplog.at_level(logging.INFO, "flwr"):
        strategy = serve(grid, tiny_config(server={"node_wait": 0.2, "timeout": 1.0}), None, resume=False)
    assert list(strategy.rounds[0].unevaluated) == ["0", "2"]
    assert "out of memory" in strategy.rounds[0].unevaluated["0"]
    assert strategy.rounds[0].unevaluated["2"] == "no reply"
    assert not strategy.rounds[0].quarantined
    said = [record.getMessage() for record in caplog.records if "server's evaluation" in record.getMessage()]
    assert len(said) == 1, "a run without a directory says what it measured"
    assert f"student_merged {strategy.rounds[0].evaluate_server['student_merged']:.4g}" in said[0]  # type: ignore[index]


def test_a_node_that_never_says_who_it_is_is_left_out() -> None:
    strategy, grid = tiny_strategy(identify=True, node_wait=0.1), MemoryGrid([echo_app(teacher={"arch": "lenet"})] * 2)
    grid.mute.add(grid.node(1))
    strategy.start(grid, num_rounds=1, timeout=60)
    assert grid.asked("train") == [0]
    assert strategy.rounds[0].silent == [str(grid.node(1))]
    grid.mute.add(grid.node(0))
    with pytest.raises(TooFewTeachersError, match=f"client {grid.node(0)}: no reply; client {grid.node(1)}: no reply"):
        tiny_strategy(identify=True).start(grid, num_rounds=1, timeout=0.1)


def test_two_nodes_with_one_partition_id_are_not_two_clients() -> None:
    strategy, grid = tiny_strategy(), MemoryGrid([echo_app(teacher={"arch": "lenet"})] * 2)
    grid.nodes[grid.node(1)][1].node_config["partition-id"] = 0
    strategy.start(grid, num_rounds=1, timeout=5)
    assert [spec.key for spec in strategy.teachers.specs] == ["0"]  # type: ignore[union-attr]
    assert "give every node its own partition-id" in next(iter(strategy.rounds[0].quarantined.values()))


def test_slots_ages_and_reuse_over_rounds() -> None:
    failing: set[tuple[int, int]] = {(2, 1), (3, 1), (4, 1)}  # (round, partition): client 1 is good in round 1 only

    apps = [echo_app(teacher={"arch": "lenet"})] * 4
    grid = MemoryGrid(apps)
    nodes, late = dict(grid.nodes), grid.node(3)
    del grid.nodes[late]  # client 3 joins in round 3

    def edit(node: int, reply: Message) -> Message:
        number = strategy.session.state.round
        if reply.metadata.message_type == "train" and (number, list(nodes).index(node)) in failing:
            raise RuntimeError("away")
        return reply

    grid.edit = edit
    seen: list[tuple[list[str], list[bool], dict[str, int]]] = []

    def evaluate(number: int, arrays: ArrayRecord) -> None:
        assert strategy.teachers is not None
        weighted = [bool(row.any()) for row in strategy.teachers.weights]
        seen.append(([spec.key for spec in strategy.teachers.specs], weighted, dict(strategy.session.state.slots)))
        assert torch.allclose(strategy.teachers.weights.sum(0), torch.ones(10))
        if number == 2:
            grid.nodes[late] = nodes[late]

    strategy = tiny_strategy(max_teacher_age=1, fraction_evaluate=0.0)
    strategy.start(grid, num_rounds=4, timeout=5, evaluate_fn=evaluate)
    assert seen[0] == (["0", "1", "2"], [True, True, True], {"0": 0, "1": 1, "2": 2})
    assert seen[1] == seen[0]  # client 1's teacher of round 1 is reused
    assert seen[2] == (["0", "3", "2"], [True, True, True], {"0": 0, "3": 1, "2": 2})  # too old: its slot goes to client 3
    assert seen[3] == seen[2]
    assert strategy.student is not None
    assert strategy.student.heads == 3


def test_a_client_that_joins_later_gets_a_new_header_and_the_others_keep_theirs() -> None:
    grid = MemoryGrid([echo_app(teacher={"arch": "lenet"})] * 3)
    late = grid.nodes.pop(grid.node(0))
    heads = []

    def evaluate(number: int, arrays: ArrayRecord) -> None:
        heads.append([spec.key for spec in strategy.teachers.specs])  # type: ignore[union-attr]
        grid.nodes[FIRST_NODE] = late

    strategy = tiny_strategy(fraction_evaluate=0.0)
    strategy.start(grid, num_rounds=2, timeout=5, evaluate_fn=evaluate)
    assert heads == [["1", "2"], ["1", "2", "0"]]
    assert strategy.student is not None
    assert strategy.student.heads == 3


def test_a_student_that_grows_is_the_one_of_the_round_before() -> None:
    strategy, _, _ = run([echo_app(teacher={"arch": "lenet"})] * 2)
    previous, teachers = strategy.student, strategy.teachers
    assert previous is not None
    assert teachers is not None
    three = TeacherEnsemble([*teachers.nets, teachers.nets[0]], image=IMAGE)
    assert student_for(strategy.options, previous, teachers, 2) is previous
    grown = student_for(strategy.options, previous, three, 2)
    assert grown.heads == 3
    kept = grown.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in previous.state_dict().items())
    assert {name.split(".")[1] for name in kept.keys() - previous.state_dict().keys()} == {"2"}


def test_an_expired_slot_that_nobody_needs_has_no_weight() -> None:
    strategy, grid = tiny_strategy(max_teacher_age=0, fraction_evaluate=0.0), MemoryGrid([echo_app(teacher={"arch": "lenet"})] * 2)
    weights = []

    def evaluate(number: int, arrays: ArrayRecord) -> None:
        weights.append(strategy.teachers.weights.clone())  # type: ignore[union-attr]
        grid.dead = {grid.node(0)} if number == 1 else set()

    strategy.start(grid, num_rounds=3, timeout=5, evaluate_fn=evaluate)
    assert [bool(table[0].any()) for table in weights] == [True, False, True]
    assert torch.equal(weights[1][1], torch.ones(10))


def test_later_rounds_start_from_each_clients_own_teacher_and_bring_the_student() -> None:
    students: list[dict[str, bytes]] = []

    def evaluate(number: int, arrays: ArrayRecord) -> None:
        students.append({key: array.data for key, array in arrays.items()})

    apps = [echo_app(teacher={"arch": "lenet"})] * 2 + [echo_app(teacher={"arch": "lenet_bn"})]
    strategy, grid, _ = run(apps, rounds=2, architectures=("lenet", "lenet_bn"), evaluate_fn=evaluate)
    first, second = grid.contents("train")[:3], grid.contents("train")[3:]
    assert first[0]["arrays"] == first[1]["arrays"]  # the common initialisation
    assert set(first[2]["arrays"]) > set(first[0]["arrays"])  # another architecture
    assert second[0]["arrays"] != second[1]["arrays"]
    assert all("student" not in content for content in first)
    assert all({key: array.data for key, array in content["student"].items()} == students[0] for content in second)
    assert [content["config"]["server-round"] for content in first + second] == [1, 1, 1, 2, 2, 2]
    assert all('"heads": 3' in content["config"]["student-spec"] for content in second)
    assert strategy.session.uploads["2"].arch == "lenet_bn"


def test_initial_arrays_are_the_common_initialisation() -> None:
    torch.manual_seed(5)
    mine = ArrayRecord(build_classifier("lenet", IMAGE).state_dict())
    strategy, grid = tiny_strategy(), MemoryGrid([echo_app()] * 2)
    strategy.start(grid, mine, num_rounds=1, timeout=5)
    for content in grid.contents("train"):
        assert {key: array.data for key, array in content["arrays"].items()} == {key: array.data for key, array in mine.items()}
    other = ArrayRecord(build_classifier("lenet_bn", IMAGE).state_dict())
    with pytest.raises(ArchitectureError, match="initial_arrays do not fit the default architecture 'lenet'"):
        tiny_strategy().start(MemoryGrid([echo_app()]), other, num_rounds=1)


def test_unaccepted_architectures_take_no_part() -> None:
    strategy, _, _ = run([echo_app(teacher={"arch": "lenet"}), echo_app(teacher={"arch": "resnet8"})], architectures=("lenet",), identify=True)
    assert [spec.key for spec in strategy.teachers.specs] == ["0"]  # type: ignore[union-attr]
    assert "architecture is 'resnet8'; accepted: lenet" in strategy.rounds[0].quarantined["1"]


def test_evaluation_starts_in_round_1_and_gets_the_student() -> None:
    calls = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        calls.append((number, len(arrays)))
        return MetricRecord({"accuracy": number / 10})

    strategy, grid = tiny_strategy(), MemoryGrid([echo_app()])
    result = strategy.start(grid, num_rounds=2, timeout=5, evaluate_fn=evaluate)
    assert calls == [(1, len(result.arrays)), (2, len(result.arrays))]
    assert result.evaluate_metrics_serverapp == {1: MetricRecord({"accuracy": 0.1}), 2: MetricRecord({"accuracy": 0.2})}


def test_record_keys_can_be_renamed_as_in_fedavg() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        content = message.content
        assert content["settings"]["lr"] == 0.5
        content["metrics"] = MetricRecord({"n": 4})
        del content["settings"]
        return Message(content, reply_to=message)

    strategy = tiny_strategy(arrayrecord_key="weights", configrecord_key="settings", weighted_by_key="n")
    strategy.start(MemoryGrid([app]), num_rounds=1, timeout=5, train_config=ConfigRecord({"lr": 0.5}))
    assert strategy.teachers is not None
    assert strategy.teachers.specs[0].num_samples == 4


def test_single_broadcast_sends_one_header() -> None:
    strategy, grid, _ = run([echo_app(teacher={"arch": "lenet"})] * 2, rounds=2, broadcast="single", single_steps=2)
    assert strategy.single is not None
    assert strategy.single.heads == 1
    assert strategy.student is not None
    assert strategy.student.heads == 2
    config = grid.contents("train")[-1]["config"]["student-spec"]
    assert '"heads": 1' in config
    assert '"weights": null' in config
    trunk = {name: tensor for name, tensor in strategy.student.state_dict().items() if not name.startswith("headers.")}
    assert all(torch.equal(strategy.single.state_dict()[name], tensor) for name, tensor in trunk.items())


@pytest.mark.parametrize("method", ["deep_inversion", "rdskd"])
def test_a_single_header_learns_from_the_methods_own_images(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = METHODS[method]
    drawn, sample = [], cls.sample
    monkeypatch.setattr(cls, "sample", lambda self, count, rng: drawn.append(count) or sample(self, count, rng))
    strategy, _, _ = run(
        [echo_app(teacher={"arch": "lenet_bn"})] * 2,
        architecture="lenet_bn", method=method, method_config=cls.Config.toy(), broadcast="single", single_steps=2,
    )  # fmt: skip
    assert strategy.single is not None
    assert drawn == [128, 128]


class Blind(METHODS["cdfkd_mfs"]):  # type: ignore[misc]
    """A method without synthetic images to show."""

    name = "blind"

    def sample(self, count: int, rng: torch.Generator) -> None:
        return None


def test_without_images_there_is_no_single_header_and_the_student_is_kept(tmp_path: Path) -> None:
    strategy = tiny_strategy(method=Blind, broadcast="single", run_dir=tmp_path)
    with pytest.raises(ConfigError, match="'blind' has no synthetic images to distil it with; accepted with it: broadcast='heads'"):
        strategy.start(MemoryGrid([echo_app(teacher={"arch": "lenet"})] * 2), num_rounds=1, timeout=5)
    assert load_student(tmp_path).student.heads == 2


def test_a_client_that_was_not_drawn_goes_on_from_its_own_teacher() -> None:
    """Two of four clients train in a round, and teachers are used in their round only: in time others take all slots."""
    grid = MemoryGrid([echo_app(teacher={"arch": "lenet"})] * 4)
    strategy = tiny_strategy(fraction_train=0.5, max_teacher_age=0, fraction_evaluate=0.0, weights="uniform")
    started: dict[int, list[tuple[int, bool]]] = {}
    uploaded: dict[int, str] = {}

    def edit(node: int, reply: Message) -> Message:
        if reply.metadata.message_type == "train":
            received = next(content for kind, to, content in reversed(grid.log) if (kind, to) == ("train", node))["arrays"]
            its_own = state_hash(received.to_torch_state_dict()) == uploaded.get(node)  # type: ignore[union-attr]
            started.setdefault(node, []).append((strategy.session.state.round, its_own))
            uploaded[node] = state_hash(reply.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        return reply

    grid.edit = edit
    strategy.start(grid, num_rounds=6, timeout=5)
    assert len(strategy.session.state.slots) == 2, "slots were given away"
    again = [(now - before, own) for rounds in started.values() for (before, _), (now, own) in itertools.pairwise(rounds)]
    assert any(gap > 1 for gap, _ in again)
    assert all(own for _, own in again)


def test_fractions_sample_clients() -> None:
    _, grid, _ = run([echo_app(teacher={"arch": "lenet"})] * 4, rounds=2, fraction_train=0.5, fraction_evaluate=0.0)
    first, second = grid.asked("train")[:2], grid.asked("train")[2:]
    assert len(first) == len(second) == 2
    assert grid.asked("evaluate") == []


class Wanting(Distiller):
    """Needs label counts."""

    name = "wanting"
    Config = METHODS["cdfkd_mfs"].Config
    needs = Needs(label_counts=True)


class AuxiliaryLogits(nn.Linear):
    """Gives two outputs, as torchvision's Inception does while it trains."""

    def __init__(self) -> None:
        super().__init__(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x.flatten(1))
        return logits, logits


class OnlyColour(nn.Linear):
    """Checks its input as foreign code does."""

    def __init__(self) -> None:
        super().__init__(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3, "colour only"
        return super().forward(x.flatten(1))


class Hungry(Wanting):
    """Needs real data at the server."""

    name = "hungry"
    needs = Needs(proxy_data=True)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"weights": "psychic"}, ConfigError, "unknown weights 'psychic'; accepted: .*label_counts"),
        ({"architecture": "nonesuch"}, ConfigError, "unknown architecture"),
        ({"architectures": ("lenet", "nonesuch")}, ConfigError, "unknown architecture"),
        ({"architecture": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9))}, ArchitectureError, r"gives \(9,\) for one image; accepted: \(10,\)"),
        ({"architecture": lambda: nn.Linear(3, 10)}, ArchitectureError, "cannot take images"),
        ({"architecture": AuxiliaryLogits}, ArchitectureError, r"gives a tuple for one image; accepted: \(10,\)"),
        ({"architecture": OnlyColour}, ArchitectureError, "cannot take images of .*: AssertionError: colour only"),
        ({"architecture": nn.Linear(64, 10)}, ArchitectureError, "is a network, a Linear; accepted: a registered name, or what makes a network"),
        ({"architecture": nn.Conv2d}, ArchitectureError, "'Conv2d' cannot be made, or used: .*missing 3 required .*; accepted: a class or function without"),
        ({"broadcast": "both"}, ConfigError, "broadcast is 'both'"),
        ({"keep_generator": True, "method": "cmi", "method_config": None}, ConfigError, "'cmi' has no generator that outlives a round; accepted.*mfs"),
        ({"fraction_train": 0.0}, ConfigError, "fraction_train is 0.0"),
        ({"min_teachers": 0}, ConfigError, "min_teachers is 0; accepted: at least 1"),
        ({"student_stages": 0}, ConfigError, "student_stages is 0; accepted: at least 1"),
        ({"student_stages": "all"}, ConfigError, "student_stages is 'all'; accepted: a number, at least 1"),
        ({"student_stages": 1.5}, ConfigError, "see 1.5 stages; accepted: at least 1, a whole number"),
        ({"student_max_width": 0}, ConfigError, "max_width is 0; accepted: 'auto', None, or at least 1"),
        ({"student_init": "zero"}, ConfigError, "student init is 'zero'; accepted: 'average', 'random'"),
        ({"student": "nonesuch"}, ConfigError, "unknown architecture 'nonesuch'; accepted: .*small_cnn"),
        ({"method_config": {"epoch": 3}}, ConfigError, "unknown key method_config.epoch"),
        ({"method_config": 3}, ConfigError, "method_config is a int"),
        ({"method": Wanting}, NeedsError, "weights='label_counts'"),
        ({"method": Hungry}, NeedsError, "proxy_data"),
    ],
)
def test_settings_are_checked_when_the_strategy_is_made(choices: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny_strategy(**choices)


def test_disclosures_are_listed(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    plain = tiny_strategy(fraction_evaluate=0.0)
    assert len(plain.disclosures) == 2
    assert not any("label counts" in line for line in tiny_strategy().disclosures)
    opted = tiny_strategy(weights="label_counts")
    assert any("label counts" in line for line in opted.disclosures)
    with caplog.at_level(logging.INFO, "flwr"):
        opted.summary()
    assert any("label counts per class" in record.message for record in caplog.records)
    assert any("single header" in line for line in tiny_strategy(broadcast="single").disclosures)


def test_five_lines_in_anybodys_server_app_are_enough() -> None:
    grid = MemoryGrid([echo_app()] * 2)
    strategy = CDFKDStrategy(IMAGE, architecture="lenet", method_config=TINY)
    result = strategy.start(grid, num_rounds=1)
    assert len(result.arrays) == len(strategy.student.state_dict())  # type: ignore[union-attr]
