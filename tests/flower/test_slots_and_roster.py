"""Header slots, ages, client keys, sampling, averages: the pure parts."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from cdfkd_strategy.errors import UploadError
from cdfkd_strategy.flower.averages import mean_metrics
from cdfkd_strategy.flower.payload import Identity
from cdfkd_strategy.flower.roster import Client, Roster, sample
from cdfkd_strategy.flower.slots import assign_slots, client_order, live_clients
from cdfkd_strategy.local_training.attention import AttentionFit, attention_from, attention_parameters, mean_attention


def test_partition_ids_are_ordered_by_number() -> None:
    assert sorted(["10", "9", "node", "2"], key=client_order) == ["2", "9", "10", "node"]


def test_a_slot_stays_with_its_client() -> None:
    first = assign_slots({}, ["2", "0", "10"])
    assert first == {"0": 0, "2": 1, "10": 2}
    assert assign_slots(first, ["10", "0", "2"]) == first
    assert assign_slots(first, ["10", "1", "0", "2"]) == {**first, "1": 3}


def test_an_expired_slot_is_kept_until_a_new_client_takes_it() -> None:
    slots = {"0": 0, "1": 1, "2": 2}
    assert assign_slots(slots, ["0", "2"]) == slots  # nobody needs it: it would be client 1's again
    assert assign_slots(slots, ["0", "2", "7"]) == {"0": 0, "7": 1, "2": 2}
    assert assign_slots(slots, ["2", "8", "7", "9"]) == {"7": 0, "8": 1, "2": 2, "9": 3}


def test_teachers_live_as_long_as_they_may() -> None:
    trained = {"0": 3, "1": 2, "2": 1}
    assert live_clients(trained, 3, 0) == ["0"]
    assert live_clients(trained, 3, 1) == ["0", "1"]
    assert live_clients(trained, 3, 5) == ["0", "1", "2"]


def test_a_client_is_known_by_its_partition_and_keeps_its_key() -> None:
    roster = Roster(10)
    assert roster.enter(77, Identity("lenet", 3)) == Client(77, "3", "lenet", True)
    assert roster.enter(78, None) == Client(78, "78")
    assert roster.enter(78, Identity(None, 1)) == Client(78, "1", None, True)  # its reply said more than its silence
    with pytest.raises(UploadError, match="which is node 77"):
        roster.enter(79, Identity("lenet", 3))
    with pytest.raises(UploadError, match="was client 3 when it was asked to train"):
        roster.enter(77, Identity("lenet", 4))
    assert roster.unknown([77]) == [77]  # the next round knows it by the new key
    roster.enter(77, Identity("lenet", 3))
    roster.forget([78, 79])  # node 77 is gone: it restarted as 79
    assert roster.enter(79, Identity("lenet", 3)).key == "3"
    assert [client.key for client in roster.clients([79, 78])] == ["1", "3"]
    assert roster.unknown([77, 78]) == [77]


def test_who_does_not_know_the_question_is_a_client_and_who_fails_at_it_is_refused() -> None:
    roster = Roster(10)

    def answer(node: int, code: int, reason: str) -> None:
        roster.hear(node, Message(Error(code, reason), reply_to=Message(RecordDict(), dst_node_id=node, message_type="query.hello")))

    with pytest.raises(ValueError, match="hello") as unknown:
        ClientApp()(Message(RecordDict(), dst_node_id=5, message_type="query.hello"), Context(1, 5, {}, RecordDict(), {}))
    answer(5, 2, f"<class 'ValueError'>:<'{unknown.value}'>")  # as a SuperNode says it
    answer(6, 2, f"<class 'ClientAppException'>:<'\nException ClientAppException occurred. Message: {unknown.value}'>")  # as the simulation says it
    answer(7, 2, "<class 'ConfigError'>:<'this node names no images; start the SuperNode with data-path'>")
    answer(8, 1, "An exception was raised when attempting to load `ClientApp`")
    answer(9, 5, "Node Unavailable")
    assert roster.clients(range(5, 10)) == [Client(5, "5"), Client(6, "6")]
    refused = roster.refused(range(5, 10))
    assert list(refused) == ["7", "8"]
    assert "could not say who it is (code 2)" in refused["7"]
    assert "start the SuperNode with data-path" in refused["7"]
    assert roster.unknown(range(5, 10)) == [9]  # it is asked again
    answer(9, 8, "ClientApp stopped responding.")
    assert roster.unknown(range(5, 10)) == [9]
    roster.pardon()
    assert roster.unknown(range(5, 10)) == [7, 8, 9]  # in the next round: whoever was put right takes part
    assert roster.refused(range(5, 10)) == {}


def test_sampling_is_seeded_and_depends_on_keys_only() -> None:
    clients = [Client(1000 - k, str(k)) for k in range(10)]
    others = [Client(5000 + k, str(k)) for k in range(10)]
    chosen = [client.key for client in sample(clients, 0.5, 1, "train", 0, 1)]
    assert len(chosen) == 5
    assert chosen == sorted(chosen, key=client_order) == [client.key for client in sample(others, 0.5, 1, "train", 0, 1)]
    assert chosen != [client.key for client in sample(clients, 0.5, 1, "train", 0, 2)]
    assert len(sample(clients, 0.05, 2, 0)) == 2
    assert len(sample(clients[:1], 0.5, 2, 0)) == 1
    assert sample([], 1.0, 1, 0) == []


def test_metrics_are_averaged_over_those_who_report_them() -> None:
    contents = [
        RecordDict({"metrics": MetricRecord({"n": 1, "loss": 2.0, "list": [1.0, 3.0]})}),
        RecordDict({"metrics": MetricRecord({"n": 3, "loss": 6.0, "extra": 5})}),
        RecordDict({"metrics": MetricRecord({"n": 100, "loss": float("nan")})}),
    ]
    assert dict(mean_metrics(contents, "n")) == {"extra": 5.0, "list": [1.0, 3.0], "loss": 5.0}


def test_attention_is_averaged_by_samples() -> None:
    attention = mean_attention([AttentionFit((1.0, 0.0), 4.0, 1), AttentionFit((0.0, 2.0), 0.0, 3)], 2)
    assert attention is not None
    assert torch.equal(attention.score.weight, torch.tensor([[0.25, 1.5]]))
    assert float(attention.score.bias) == 1.0
    again = attention_from(attention_parameters(attention))
    assert torch.equal(again.score.weight, attention.score.weight)
    assert mean_attention([], 2) is None
