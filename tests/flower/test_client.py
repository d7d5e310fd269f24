"""This project's client: parity with training without Flower, later rounds, evaluation, attention, errors."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict

from cdfkd_strategy import seeding
from cdfkd_strategy.data.client_share import client_share
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.flower import payload
from cdfkd_strategy.flower.apps import make_client_app, serve
from cdfkd_strategy.flower.strategy import CDFKDStrategy
from cdfkd_strategy.local_training import initial_model, train_all, train_teacher
from cdfkd_strategy.local_training.attention import fit_attention
from cdfkd_strategy.metrics.accuracy import accuracy, predict
from cdfkd_strategy.models.head_fusion import FusedStudent, fit_head_attention
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.teachers import state_hash
from tests.flower.memory_grid import MemoryGrid, project_grid, tiny_config


def test_teachers_are_those_of_training_without_flower_bit_for_bit() -> None:
    config = tiny_config(clients={"architectures": ["lenet_bn", "lenet"], "augment": "crop_flip"})
    strategy = serve(project_grid(config), config, None, resume=False)
    data = load_data(config.data, config.seed)
    trained = train_all(config.clients, data, config.data, data.image, config.seed, workers=1)
    assert strategy.teachers is not None
    assert [spec.sha256 for spec in strategy.teachers.specs] == [state_hash(one.model.state_dict()) for one in trained]
    assert [spec.arch for spec in strategy.teachers.specs] == ["lenet_bn", "lenet", "lenet_bn"]
    assert [spec.num_samples for spec in strategy.teachers.specs] == [int(one.stats["num_examples"]) for one in trained]


def test_the_broadcast_student_changes_training_and_its_weight_can_be_zero() -> None:
    hashes = {}
    for weight in (0.0, 1.0):
        config = tiny_config(clients={"student_weight": weight}, server={"rounds": 2, "node_wait": 0.2, "fraction_evaluate": 0.0})
        strategy = serve(project_grid(config), config, None, resume=False)
        hashes[weight] = [spec.sha256 for spec in strategy.teachers.specs]  # type: ignore[union-attr]
        assert ("train-student_kl" in strategy.rounds[1].train) == (weight > 0)  # type: ignore[operator]
        assert "train-student_kl" not in strategy.rounds[0].train  # type: ignore[operator]
    assert set(hashes[0.0]).isdisjoint(hashes[1.0])


@pytest.mark.parametrize("broadcast", ["heads", "single"])
def test_clients_evaluate_student_and_own_teacher_and_fit_attention(broadcast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CDFKDStrategy.__init__.__kwdefaults__, "single_steps", 2)
    config = tiny_config(server={"node_wait": 0.2, "broadcast": broadcast})
    grid = project_grid(config)
    replies: list[Message] = []
    grid.edit = lambda _, reply: (replies.append(reply), reply)[1]
    strategy = serve(grid, config, None, resume=False)
    data = load_data(config.data, config.seed)
    measured = [reply.content for reply in replies if reply.metadata.message_type == "evaluate"]
    assert len(measured) == 3
    shown = strategy.single if broadcast == "single" else strategy.student
    assert shown is not None
    assert strategy.teachers is not None
    fused = FusedStudent(shown, None if broadcast == "single" else strategy.teachers.weights)
    for k, content in enumerate(measured):
        share = client_share(data, config.data, 3, k, config.seed)
        assert content["metrics"]["num-examples"] == len(share.x_test)
        assert content["metrics"]["student-accuracy"] == accuracy(fused(share.x_test.float() / 255), share.y_test)
        assert content["metrics"]["teacher-accuracy"] == accuracy(predict(strategy.teachers.nets[k], share.x_test, data.image), share.y_test)
        assert ("attention" in content) == (broadcast == "heads")
    if broadcast == "single":
        assert strategy.attention is None
        return
    assert strategy.attention is not None
    weights = torch.tensor([content["attention"]["weight"] for content in measured])
    samples = torch.tensor([float(content["attention"]["num-examples"]) for content in measured])
    assert torch.allclose(strategy.attention.score.weight[0], (weights * samples[:, None]).sum(0) / samples.sum(), atol=1e-6)
    assert samples.tolist() == [20.0] * 3


def test_malformed_attention_is_left_out() -> None:
    config = tiny_config()
    grid = project_grid(config)

    def edit(node: int, reply: Message) -> Message:
        if "attention" in reply.content and node == grid.node(0):
            reply.content["attention"]["bias"] = float("nan")
        return reply

    grid.edit = edit
    strategy = serve(grid, config, None, resume=False)
    assert strategy.attention is not None
    assert torch.isfinite(strategy.attention.score.weight).all()
    assert strategy.rounds[0].evaluate_clients is not None


def test_without_local_test_data_or_own_teacher_the_metrics_are_omitted() -> None:
    config = tiny_config(data={"local_test": 0.0})
    strategy = serve(project_grid(config), config, None, resume=False)
    assert strategy.rounds[0].evaluate_clients is None
    assert strategy.attention is not None
    config = tiny_config()
    grid = project_grid(config)
    app = make_client_app()

    def forgetful(message: Message, context: object) -> Message:
        context.state = RecordDict()  # type: ignore[attr-defined]
        return app(message, context)  # type: ignore[arg-type]

    grid.nodes = {node: (forgetful, context) for node, (_, context) in grid.nodes.items()}  # type: ignore[misc]
    strategy = serve(grid, config, None, resume=False)
    assert set(strategy.rounds[0].evaluate_clients) == {"student-accuracy"}  # type: ignore[arg-type]


def test_a_client_takes_its_configuration_from_the_message() -> None:
    config = tiny_config(clients={"lr": 0.02})
    one = serve(project_grid(config), config, None, resume=False)
    two = serve(MemoryGrid([make_client_app()] * 3), config, None, resume=False)
    assert [spec.sha256 for spec in one.teachers.specs] == [spec.sha256 for spec in two.teachers.specs]  # type: ignore[union-attr]


def ask(content: RecordDict, *, partition: object = 0, configured: bool = True, kind: str = "train") -> str:
    """The error of a client's answer to a message."""
    grid = MemoryGrid([make_client_app(tiny_config() if configured else None)])
    context = grid.nodes[grid.node(0)][1]
    del context.node_config["partition-id"]
    if partition is not None:
        context.node_config["partition-id"] = partition  # type: ignore[assignment]
    ids = grid.push_messages([Message(content, dst_node_id=grid.node(0), message_type=kind)])
    (reply,) = grid.pull_messages(ids)
    return reply.error.reason or ""


def test_errors_say_what_to_do() -> None:
    assert "partition-id=None; accepted: an integer from 0; start the SuperNode with --node-config" in ask(RecordDict(), partition=None)
    assert "partition-id='0'" in ask(RecordDict(), partition="0")
    assert "partition id 3; accepted: 0..2" in ask(RecordDict({"arrays": good_arrays()}), partition=3)
    assert "brings no run configuration" in ask(RecordDict(), configured=False)
    assert "no ArrayRecord under 'arrays'" in ask(RecordDict())
    assert "do not fit the architecture 'lenet_bn' of client 0" in ask(RecordDict({"arrays": ArrayRecord()}))
    assert "has no student-spec" in ask(RecordDict({"arrays": ArrayRecord()}), kind="evaluate")


def good_arrays() -> ArrayRecord:
    from cdfkd_strategy.local_training import initial_model

    config = tiny_config()
    return ArrayRecord(initial_model("lenet_bn", load_data(config.data, config.seed).image, config.seed).state_dict())


def test_what_clients_train_in_a_later_round_is_what_they_were_sent_and_no_more() -> None:
    """The weights, the student fused with its class weights, and the order and augmentation of that round."""
    config = tiny_config(clients={"augment": "crop_flip"}, server={"rounds": 2, "node_wait": 0.2, "fraction_evaluate": 0.0})
    grid = project_grid(config)
    strategy = serve(grid, config, None, resume=False)
    assert strategy.teachers is not None
    data = load_data(config.data, config.seed)
    for k, content in enumerate(grid.contents("train")[3:]):
        model = initial_model("lenet_bn", data.image, config.seed)
        model.load_state_dict(content["arrays"].to_torch_state_dict())
        broadcast = payload.read_broadcast(payload.config_of(content))
        assert broadcast is not None
        student = broadcast.spec.build()
        student.load_state_dict(content["student"].to_torch_state_dict())
        fused = FusedStudent(student, torch.tensor(broadcast.weights))
        share = client_share(data, config.data, 3, k, config.seed)
        train_teacher(model, share, image=data.image, config=config.clients, seed=config.seed, partition_id=k, round=2, student=fused)
        assert state_hash(model.state_dict()) == strategy.teachers.specs[k].sha256


def test_attention_is_fitted_on_images_with_their_own_labels() -> None:
    config = tiny_config()
    data = load_data(config.data, config.seed)
    share, seed = client_share(data, config.data, 3, 1, config.seed), (0, 1, 2)
    with seeding.seeded_scope("attention test"):
        student = MultiHeaderStudent("lenet_bn", 2, data.image).eval()
    found = fit_attention(student, share, image=data.image, samples=20, seed=0, partition_id=1, round=2)
    rows = seeding.numpy_rng("attention", *seed).permutation(len(share.x_train))[:20]
    images, labels = data.image.normalise(share.x_train[rows].float() / 255), share.y_train[rows]
    with seeding.threads(1):
        expected = fit_head_attention(student, images, labels, rng=seeding.generator("attention", *seed))
    assert found is not None
    assert found.num_examples == 20
    assert found.weight == tuple(expected.score.weight.double().flatten().tolist())
