"""The harness against plain loops: every accuracy of the contract, the oracle from the partition, one-shot FedAvg by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cdfkd_strategy import seeding
from cdfkd_strategy.averaging import fedavg
from cdfkd_strategy.data.client_share import client_share
from cdfkd_strategy.data.datasets import ImageData
from cdfkd_strategy.harness import Harness, confusion_matrix, partition_of
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.head_fusion import HeadAttention
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.run_config import RunConfig, from_values
from cdfkd_strategy.summary import ACCURACY_KEYS
from cdfkd_strategy.teachers import TeacherEnsemble, TeacherSpec
from cdfkd_strategy.types import ImageSpec

C, CLIENTS = 3, 3
IMAGE = ImageSpec(1, 8, 8, C, (0.4,), (0.3,))


@pytest.fixture(scope="module")
def data() -> ImageData:
    rng = np.random.default_rng(0)
    y_train, y_test = np.arange(180) % C, np.arange(60) % C

    def images(labels: np.ndarray) -> Tensor:
        pixels = rng.integers(0, 120, (len(labels), 1, 8, 8))
        pixels[np.arange(len(labels)), 0, labels * 2, :] += 120
        return torch.from_numpy(pixels.astype(np.uint8))

    return ImageData(images(y_train), torch.from_numpy(y_train), images(y_test), torch.from_numpy(y_test), ("a", "b", "c"), IMAGE)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return from_values({"clients": {"count": CLIENTS}, "data": {"partition": {"name": "dirichlet", "alpha": 0.3, "min_samples": 5}}, "seed": 4})


def fresh(seed: int, arch: str = "small_cnn") -> nn.Module:
    """A classifier whose weights and BatchNorm buffers are all its own."""
    with seeding.seeded_scope("test", seed):
        model = build_classifier(arch, IMAGE)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def fit(model: nn.Module, data: ImageData, logits: Callable[[nn.Module, Tensor], Tensor], classes: tuple[int, ...], steps: int) -> nn.Module:
    """A few steps on some classes, so that the networks are right about different images."""
    chosen = torch.isin(data.y_train, torch.tensor(classes))
    images, labels = IMAGE.normalise(data.x_train[chosen].float() / 255), data.y_train[chosen]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits(model.train(), images), labels).backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def nets(data: ImageData) -> list[nn.Module]:
    with seeding.seeded_scope("nets"):
        return [fit(fresh(0), data, lambda net, x: net(x), (k, (k + 1) % C), 6 + k) for k in range(CLIENTS)]


@pytest.fixture(scope="module")
def teachers(nets: list[nn.Module]) -> TeacherEnsemble:
    weights = torch.tensor([[0.7, 0.1, 0.2], [0.2, 0.1, 0.5], [0.1, 0.8, 0.3]])
    specs = [TeacherSpec(str(k), "small_cnn", 10 * (k + 1)) for k in range(CLIENTS)]
    return TeacherEnsemble(nets, weights, image=IMAGE, specs=specs)


@pytest.fixture(scope="module")
def student(data: ImageData) -> MultiHeaderStudent:
    with seeding.seeded_scope("test student"):
        made = MultiHeaderStudent("small_cnn", CLIENTS, IMAGE)
        for k in range(CLIENTS):
            fit(made, data, lambda net, x, k=k: net(x).logits[k], (k, (k + 2) % C), 4)
    return made


def plain_fuse(logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The argmax of the weighted log-opinion pool ``[K, N, C], [K, C] -> [N]``, in NumPy."""
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return (log_p * weights[:, None, :]).sum(0).argmax(-1)


def test_every_accuracy_equals_a_plain_computation(data: ImageData, config: RunConfig, teachers: TeacherEnsemble, student: MultiHeaderStudent) -> None:
    attention = HeadAttention(C)
    nn.init.normal_(attention.score.weight, generator=torch.Generator().manual_seed(1))
    single = copy.deepcopy(student).with_heads(1)
    found = Harness(config, data).evaluate(teachers, student, single=single, attention=attention)
    assert tuple(found) == ACCURACY_KEYS

    labels = data.y_test.numpy()
    x = (data.x_test.float() / 255 - 0.4) / 0.3
    with torch.no_grad():
        logits = np.stack([net(x).double().numpy() for net in teachers.nets])
        heads = student.eval()(x).logits.double().numpy()
        one = single.eval()(x).logits[0].numpy()
    scores = heads @ attention.score.weight.detach().double().numpy().T
    alpha = np.exp(scores) / np.exp(scores).sum(0)

    counts = np.stack([np.bincount(client_share(data, config.data, CLIENTS, k, config.seed).y_train, minlength=C) for k in range(CLIENTS)]).astype(float)
    counts[:, counts.sum(0) == 0] = 1
    estimated = teachers.weights.numpy()

    def right(classes: np.ndarray) -> float:
        return float((classes == labels).mean())

    expected = {
        "teachers": [right(one_teacher.argmax(-1)) for one_teacher in logits],
        "ensemble_uniform": right(plain_fuse(logits, np.full((CLIENTS, C), 1 / CLIENTS))),
        "ensemble_estimated": right(plain_fuse(logits, estimated)),
        "ensemble_oracle": right(plain_fuse(logits, counts / counts.sum(0))),
        "student_heads": [right(head.argmax(-1)) for head in heads],
        "student_mean": right(heads.mean(0).argmax(-1)),
        "student_merged": right(plain_fuse(heads, estimated)),
        "student_single": right(one.argmax(-1)),
        "student_attention": right((alpha * heads).sum(0).argmax(-1)),
    }
    assert {key: found[key] for key in expected} == expected
    examination = Harness(config, data).examine(teachers, student)
    merged, together = plain_fuse(heads, estimated), plain_fuse(logits, estimated)
    assert examination.agreement == float((merged == together).mean())
    assert examination.agreement != float((merged == plain_fuse(logits, np.full((CLIENTS, C), 1 / CLIENTS))).mean())
    assert examination.confusion is not None
    assert examination.confusion.tolist() == [[int(((labels == true) & (merged == said)).sum()) for said in range(C)] for true in range(C)]
    rows = {found[f"ensemble_{name}"] for name in ("uniform", "estimated", "oracle")}
    assert len(rows) > 1, "the three ensembles are the same here: the test cannot tell them apart"


def test_networks_are_left_as_they_were_and_asked_once(data: ImageData, config: RunConfig, teachers: TeacherEnsemble, student: MultiHeaderStudent) -> None:
    seen = [0] * CLIENTS
    hooks = [
        net.register_forward_hook(lambda module, *_, k=k: seen.__setitem__(k, seen[k] + (module is teachers.nets[k]))) for k, net in enumerate(teachers.nets)
    ]
    student.train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    Harness(config, data).evaluate(teachers, student)
    for hook in hooks:
        hook.remove()
    assert seen == [1] * CLIENTS, "60 test images are one batch: one call per teacher"
    assert student.training
    assert all(part.training for part in student.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_without_data_every_accuracy_is_null(config: RunConfig, teachers: TeacherEnsemble, student: MultiHeaderStudent) -> None:
    harness = Harness(config, None)
    assert harness.evaluate(teachers, student) == dict.fromkeys(ACCURACY_KEYS)
    assert harness.label_counts is None
    assert harness.watch(teachers.weights)(student) == {}


def test_before_there_is_a_student_only_teachers_are_judged(data: ImageData, config: RunConfig, teachers: TeacherEnsemble) -> None:
    found = Harness(config, data).evaluate(teachers, None)
    assert len(found["teachers"]) == CLIENTS
    assert {key for key, value in found.items() if value is None} == {key for key in ACCURACY_KEYS if key.startswith("student")}


def test_the_oracle_comes_from_the_partition_and_follows_the_client_keys(data: ImageData, config: RunConfig) -> None:
    harness = Harness(config, data)
    in_order, permuted = harness.oracle_weights(["0", "1", "2"]), harness.oracle_weights(["2", "0", "1"])
    assert in_order is not None
    assert permuted is not None
    assert torch.equal(in_order[[2, 0, 1]], permuted)
    assert harness.oracle_weights(["0", "98765432109876543", "2"]) is None


def test_the_oracle_ignores_what_clients_say(data: ImageData, config: RunConfig, nets: list[nn.Module]) -> None:
    honest = TeacherEnsemble(nets, None, image=IMAGE, specs=[TeacherSpec(str(k), "small_cnn", 50) for k in range(CLIENTS)])
    boasting = TeacherEnsemble(nets, None, image=IMAGE, specs=[TeacherSpec(str(k), "small_cnn", 10**9 if k == 1 else 1) for k in range(CLIENTS)])
    results = [Harness(config, data).evaluate(ensemble, None) for ensemble in (honest, boasting)]
    assert results[0]["ensemble_oracle"] == results[1]["ensemble_oracle"]
    assert results[0]["fedavg"] != results[1]["fedavg"], "federated averaging does weigh by what clients say"


@pytest.mark.parametrize(("key", "partition"), [("0", 0), ("client-2", 2), ("3", None), ("node", None), ("partition-1", 1), ("", None), ("-1", None)])
def test_partition_of_a_client_key(key: str, partition: int | None) -> None:
    assert partition_of(key, 3) == partition


def test_fedavg_averages_weights_and_buffers_by_samples() -> None:
    models = [fresh(0), fresh(1)]
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    average = fedavg(models, [TeacherSpec("0", "small_cnn", 10), TeacherSpec("1", "small_cnn", 30)])
    assert average is not None
    assert not average.training
    names = [name for name in before[0] if "running_" in name]
    assert names, "the architecture has no BatchNorm buffers: nothing is tested"
    for name, tensor in average.state_dict().items():
        expected = 0.25 * before[0][name].double() + 0.75 * before[1][name].double() if tensor.is_floating_point() else before[0][name]
        assert torch.allclose(tensor.double(), expected.double(), atol=1e-7), name
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), "a teacher was changed"


def test_fedavg_takes_the_largest_group_and_needs_two() -> None:
    models = [fresh(0, "lenet_bn"), fresh(1), fresh(2), fresh(3, "resnet8")]
    specs = [TeacherSpec(str(k), arch, 0) for k, arch in enumerate(["lenet_bn", "small_cnn", "small_cnn", "resnet8"])]
    average = fedavg(models, specs)
    assert average is not None
    key = next(name for name, tensor in models[1].state_dict().items() if tensor.is_floating_point())
    assert torch.allclose(average.state_dict()[key], (models[1].state_dict()[key] + models[2].state_dict()[key]) / 2)
    assert fedavg([models[0], models[1]], [specs[0], specs[1]]) is None


def test_confusion_matrix_has_true_classes_in_rows() -> None:
    matrix = confusion_matrix(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 2]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_the_watch_gives_the_students_accuracies(data: ImageData, config: RunConfig, teachers: TeacherEnsemble, student: MultiHeaderStudent) -> None:
    harness = Harness(config, data)
    seen = harness.watch(teachers.weights)(student)
    found = harness.evaluate(teachers, student)
    assert seen == {"test/student_merged": found["student_merged"], "test/student_mean": found["student_mean"]}
