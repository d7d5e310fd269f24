"""What comes over the network is checked field by field, and nothing in it can crash or fool the server."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import nn

from cdfkd_strategy.errors import ConfigError, UploadError
from cdfkd_strategy.flower import payload
from cdfkd_strategy.flower.arrays import from_record, to_record
from cdfkd_strategy.flower.payload import Broadcast, Identity, Keys
from cdfkd_strategy.local_training.attention import AttentionFit
from cdfkd_strategy.models.multi_header import StudentSpec
from cdfkd_strategy.types import ImageSpec


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def edited(net: nn.Module, **changes: Any) -> ArrayRecord:
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return to_record(state)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def test_a_state_dict_survives_the_round_trip_with_its_bits_order_and_dtypes(net: nn.Module) -> None:
    net = net.to(memory_format=torch.channels_last)
    state = net.state_dict()
    shuffled = ArrayRecord(dict(reversed(to_record(state).items())))
    back = from_record(shuffled, state)
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    back["0.weight"].add_(1)  # writable, and a copy
    assert not torch.equal(back["0.weight"], net.state_dict()["0.weight"])


def test_fortran_order_is_read_as_it_was_meant(net: nn.Module) -> None:
    record = edited(net)
    weight = net.state_dict()["3.weight"].numpy()
    record["3.weight"] = Array(np.asfortranarray(weight))
    assert np.array_equal(from_record(record, net.state_dict())["3.weight"].numpy(), weight)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"3__bias": None}, "'3.bias' missing"),
        ({"extra": torch.zeros(1)}, "'extra' unexpected"),
        ({"3__weight": torch.zeros(3, 9)}, r"\d+ bytes|shape"),
        ({"3__weight": torch.zeros(8, 3)}, r"the shape \(8, 3\); accepted: \(3, 8\)"),
        ({"3__weight": torch.zeros(3, 4, dtype=torch.float64)}, "shape"),
        ({"3__bias": torch.zeros(3, dtype=torch.int32)}, "is int32; accepted: float32"),
        ({"3__bias": torch.tensor([0.0, float("nan"), 0.0])}, "1 NaN or infinite"),
        ({"3__bias": torch.tensor([float("inf"), 0.0, 0.0])}, "1 NaN or infinite"),
        ({"1__running_var": torch.tensor([1.0, -1e-9])}, "BatchNorm variance"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_reason(net: nn.Module, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UploadError, match=reason):
        from_record(edited(net, **changes), net.state_dict())


def test_a_channel_that_never_changes_is_accepted(net: nn.Module) -> None:
    """Its variance comes to exactly 0, and BatchNorm adds epsilon to it."""
    variance = torch.tensor([1.0, 0.0])
    assert torch.equal(from_record(edited(net, **{"1__running_var": variance}), net.state_dict())["1.running_var"], variance)


class Explosive:
    """Unpickling it would raise something that no test expects."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("1/0",))


def lying_header(shape: str, data: bytes) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (3,), "numpy.ndarray", npy(np.array([Explosive()] * 3, dtype=object))),
        Array("float32", (3,), "numpy.ndarray", pickle.dumps(Explosive())),
        Array("float32", (3,), "torch.save", npy(np.zeros(3, np.float32))),
        Array("float32", (3,), "numpy.ndarray", b""),
        Array("float32", (3,), "numpy.ndarray", b"\x93NUMPY\x01\x00\xff\xff"),
        Array("float32", (3,), "numpy.ndarray", b"\x93NUMPY\x03\x00" + b"x" * 200),
        Array("float32", (3,), "numpy.ndarray", npy(np.zeros(3, np.float32))[:-1]),
        Array("float32", (3,), "numpy.ndarray", npy(np.zeros(3, np.float32)) + b"\0" * 4),
        Array("float32", (3,), "numpy.ndarray", npy(np.zeros(10_000_000, np.float32))),
        Array("float32", (3,), "numpy.ndarray", lying_header("(1000000000000,)", b"\0" * 12)),
        Array("float32", (3,), "numpy.ndarray", lying_header("(3, 'x')", b"\0" * 12)),
        Array("float32", (3,), "numpy.ndarray", lying_header("(-3,)", b"\0" * 12)),
        Array("float32", (3,), "numpy.ndarray", npy(np.zeros(3, ">f4"))),
        Array("float32", (3,), "numpy.ndarray", npy(np.zeros(3, [("a", "<f4")]))),
    ],
)
def test_malformed_arrays_are_an_upload_error_and_never_unpickled(net: nn.Module, array: Array) -> None:
    record = edited(net)
    record["3.bias"] = array
    with pytest.raises(UploadError):
        from_record(record, net.state_dict())


def reply(net: nn.Module, teacher: dict[str, Any] | None = None, **metrics: Any) -> RecordDict:
    content = RecordDict({"arrays": to_record(net.state_dict()), "metrics": MetricRecord({"num-examples": 7, **metrics})})
    if teacher is not None:
        content["teacher"] = ConfigRecord(teacher)
    return content


def read(net: nn.Module, content: RecordDict, *, counts: bool = False, keys: Keys = Keys()) -> payload.TeacherReply:  # noqa: B008
    return payload.read_train_reply(content, lambda identity: net.state_dict(), num_classes=3, with_label_counts=counts, keys=keys)


def test_a_good_reply_is_read(net: nn.Module) -> None:
    good = read(net, reply(net, {"arch": "small_cnn", "partition-id": 2, "num-classes": 3}, loss=0.5))
    assert (good.identity, good.num_examples, good.label_counts) == (Identity("small_cnn", 2), 7, None)
    assert good.num_bytes > sum(tensor.nbytes for tensor in net.state_dict().values())
    assert read(net, reply(net)).identity is None


@pytest.mark.parametrize("value", [0, -1, 2.5, float("nan"), float("inf"), 10**13, [1, 2]])
def test_absurd_sample_numbers_are_refused(net: nn.Module, value: Any) -> None:
    with pytest.raises(UploadError, match="num-examples"):
        read(net, reply(net, **{"num-examples": value}))


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ({"num-classes": 4}, "num-classes=4; accepted: 3"),
        ({"partition-id": -1}, "partition-id"),
        ({"partition-id": "0"}, "partition-id"),
        ({"partition-id": True}, "partition-id"),
        ({"arch": 3}, "arch is 3"),
        ({"arch": b"x"}, "arch is"),
    ],
)
def test_a_malformed_identity_is_refused(net: nn.Module, teacher: dict[str, Any], reason: str) -> None:
    with pytest.raises(UploadError, match=reason):
        read(net, reply(net, teacher))


def test_records_are_found_by_name_or_because_they_are_alone(net: nn.Module) -> None:
    content = RecordDict({"weights": to_record(net.state_dict()), "m": MetricRecord({"n": 3})})
    assert read(net, content, keys=Keys(weight="n")).num_examples == 3
    content["more"] = ArrayRecord()
    with pytest.raises(UploadError, match="2 records of type ArrayRecord and none under 'arrays'"):
        read(net, content, keys=Keys(weight="n"))
    with pytest.raises(UploadError, match="0 records of type ArrayRecord"):
        read(net, RecordDict({"metrics": MetricRecord({"num-examples": 3})}))


def test_label_counts_are_read_only_when_opted_in(net: nn.Module) -> None:
    content = reply(net, {"label-counts": [1, 2, 4]})
    assert read(net, content).label_counts is None
    assert read(net, content, counts=True).label_counts == (1, 2, 4)


@pytest.mark.parametrize("counts", [None, [1, 2], [1, 2, -3], [0, 0, 0], [1.0, 2.0, 3.0], [True, True, True], 5])
def test_malformed_label_counts_are_refused_when_they_are_needed(net: nn.Module, counts: Any) -> None:
    content = reply(net, {} if counts is None else {"label-counts": counts})
    with pytest.raises(UploadError, match="label-counts"):
        read(net, content, counts=True)


def test_attention_round_trips_and_malformed_parameters_are_refused() -> None:
    fit = AttentionFit((0.5, -1.0, 2.0), 0.25, 30)
    content = payload.evaluate_reply({"student-accuracy": 0.5}, 9, fit)
    assert payload.read_attention(content, 3) == fit
    assert payload.read_metrics(content, Keys()) == RecordDict({"metrics": MetricRecord({"student-accuracy": 0.5, "num-examples": 9})})
    assert payload.read_attention(payload.evaluate_reply({}, 9, None), 3) is None
    for broken in (
        {"weight": [1.0, 2.0]},
        {"weight": [1.0, 2.0, float("nan")]},
        {"weight": 1.0},
        {"bias": float("inf")},
        {"bias": "x"},
        {"bias": 1e300},
        {"weight": [1.0, 1e39, 1.0]},
        {"num-examples": -1},
    ):
        content["attention"] = ConfigRecord({"weight": [1.0, 1.0, 1.0], "bias": 0.0, "num-examples": 3, **broken})
        with pytest.raises(UploadError):
            payload.read_attention(content, 3)


def test_metrics_are_capped_and_the_clients_weight_always_stays() -> None:
    many = MetricRecord({**{f"accuracy-{c}": 0.5 for c in range(100)}, "long": [0.0] * 1000, "x" * 1000: 1.0, "nan": float("nan"), "num-examples": 5000})
    for kept in (payload.kept_metrics(many, "num-examples", 5000), dict(payload.read_metrics(RecordDict({"metrics": many}), Keys())["metrics"])):  # type: ignore[index]
        assert kept["num-examples"] == 5000
        assert len(kept) == payload.MAX_METRICS + 1
        assert set(kept) == {"num-examples", *(f"accuracy-{c}" for c in range(payload.MAX_METRICS))}


def test_a_refusal_does_not_repeat_what_a_client_says_at_any_length() -> None:
    content = RecordDict({"teacher": ConfigRecord({"num-classes": "9" * 10**6})})
    with pytest.raises(UploadError) as error:
        payload.read_identity(content, 10)
    assert len(str(error.value)) < 200


def test_a_client_without_test_samples_reports_none() -> None:
    assert payload.read_metrics(payload.evaluate_reply({}, 0, None), Keys()) is None


def test_requests_carry_round_student_and_configuration() -> None:
    broadcast = Broadcast(StudentSpec("small_cnn", 2, ImageSpec(1, 8, 8, 3), 256), [[0.25, 1.0, 0.0], [0.75, 0.0, 1.0]])
    arrays, student = to_record({"a": torch.ones(1)}), to_record({"b": torch.ones(2)})
    content = payload.request(arrays, {"lr": 0.1}, 3, student=student, broadcast=broadcast, keys=Keys())
    config = payload.config_of(content)
    assert (config["lr"], payload.server_round(config)) == (0.1, 3)
    assert payload.read_broadcast(config) == broadcast
    assert payload.arrays_of(content) == arrays
    assert payload.arrays_of(content, payload.STUDENT) == student
    bare = payload.request(None, {}, 1, keys=Keys())
    assert payload.read_broadcast(payload.config_of(bare)) is None
    with pytest.raises(ConfigError, match="no ArrayRecord under 'arrays'"):
        payload.arrays_of(bare)
    config["student-spec"] = '{"spec": {"heads": "many"}, "weights": null}'
    with pytest.raises(ConfigError, match="student-spec is malformed"):
        payload.read_broadcast(config)
