"""No label counts reach the strategy or the distiller unless they were opted in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from cdfkd_strategy.competence import weights_of
from cdfkd_strategy.data.client_share import train_label_counts
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.errors import TooFewTeachersError
from cdfkd_strategy.flower import apps, payload
from cdfkd_strategy.flower.apps import make_client_app, serve
from cdfkd_strategy.flower.arrays import to_record
from cdfkd_strategy.flower.strategy import CDFKDStrategy
from cdfkd_strategy.flower.uploads import Upload
from cdfkd_strategy.local_training import initial_model
from tests.flower.memory_grid import IMAGE, MemoryGrid, echo_app, project_grid, tiny_config, tiny_strategy

COUNTS = [5, 0, 1, 2, 0, 0, 9, 0, 0, 3]


class Guarded(ConfigRecord):
    """A ``teacher`` record that notices when its label counts are looked at."""

    looked: list[str] = []  # noqa: RUF012 - shared on purpose

    def __getitem__(self, key: str) -> Any:
        if key == "label-counts":
            Guarded.looked.append(key)
        return super().__getitem__(key)


def guard(_: int, reply: Message) -> Message:
    if "teacher" in reply.content:
        reply.content["teacher"] = Guarded(dict(reply.content["teacher"]))
    return reply


def spied_run(tmp_path: Path, **choices: Any) -> tuple[CDFKDStrategy, list[RecordDict]]:
    """A run with clients that send label counts, asked or not."""
    Guarded.looked.clear()
    seen: list[RecordDict] = []

    def aggregate(contents: list[RecordDict], key: str) -> MetricRecord:
        seen.extend(contents)
        return MetricRecord()

    grid = MemoryGrid([echo_app(teacher={"arch": "lenet", "label-counts": COUNTS})] * 2)
    grid.edit = guard
    strategy = tiny_strategy(run_dir=tmp_path / "run", train_metrics_aggr_fn=aggregate, fraction_evaluate=0.0, **choices)
    strategy.start(grid, num_rounds=1, timeout=5)
    return strategy, seen


def test_counts_that_nobody_asked_for_are_not_even_read(tmp_path: Path) -> None:
    strategy, seen = spied_run(tmp_path)
    assert Guarded.looked == []
    uploads = [strategy.session.uploads[key] for key in ("0", "1")]
    assert [upload.label_counts for upload in uploads] == [None, None]
    assert len(seen) == 2
    assert all(set(content) == {"metrics"} for content in seen)
    kept = [path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(str(COUNTS) in text.replace("\n", "").replace("    ", "") or "label-counts" in text for text in kept)


def test_counts_are_used_when_they_are_opted_in(tmp_path: Path) -> None:
    strategy, _ = spied_run(tmp_path, weights="label_counts")
    assert Guarded.looked
    assert strategy.session.uploads["0"].label_counts == tuple(COUNTS)
    assert strategy.teachers is not None
    assert torch.allclose(strategy.teachers.weights, torch.full((2, 10), 0.5))


@pytest.mark.parametrize("opted", [False, True])
def test_this_projects_client_sends_counts_only_when_opted_in(opted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(server={"weights": "label_counts" if opted else "auto", "node_wait": 0.2})
    put: list[Upload] = []
    monkeypatch.setattr("cdfkd_strategy.flower.uploads.Uploads.put", _recording(put))
    grid = project_grid(config)
    replies: list[Message] = []
    grid.edit = lambda _, reply: (replies.append(reply), reply)[1]
    strategy = serve(grid, config, None, resume=False)
    sent = [reply.content["teacher"].get("label-counts") for reply in replies if "teacher" in reply.content and "arrays" in reply.content]
    hellos = [reply.content["teacher"] for reply in replies if reply.metadata.message_type == "query.hello"]
    assert len(hellos) == 3
    assert not any("label-counts" in record for record in hellos)
    truth = train_label_counts(load_data(config.data, config.seed), config.data, 3, config.seed)
    assert strategy.teachers is not None
    if opted:
        assert sent == truth.tolist()
        assert torch.equal(strategy.teachers.weights, weights_of(torch.as_tensor(truth)))
    else:
        assert sent == [None] * 3
        assert all(upload.label_counts is None for upload in put)
        assert not torch.equal(strategy.teachers.weights, weights_of(torch.as_tensor(truth)))


def test_a_node_can_refuse_to_disclose_them() -> None:
    config = tiny_config(server={"weights": "label_counts", "node_wait": 0.2})
    grid = project_grid(config)
    grid.nodes[grid.node(1)][1].node_config["label-counts"] = False
    strategy = serve(grid, config, None, resume=False)
    assert [spec.key for spec in strategy.teachers.specs] == ["0", "2"]  # type: ignore[union-attr]
    assert "label-counts are None" in strategy.rounds[0].quarantined["1"]


@pytest.mark.parametrize("said", ["false", "true", 1, 0, ""])
def test_consent_is_true_and_nothing_that_looks_like_it(said: Any) -> None:
    config = tiny_config(server={"weights": "label_counts"})
    grid = MemoryGrid([make_client_app()])
    grid.nodes[grid.node(0)][1].node_config["label-counts"] = said
    sent, initial = apps._for_clients(config, IMAGE, None), initial_model("lenet_bn", IMAGE, config.seed)
    for kind, arrays in (("query.hello", None), ("train", to_record(initial.state_dict()))):
        ids = grid.push_messages([Message(payload.request(arrays, sent, 1, keys=payload.Keys()), grid.node(0), kind)])
        (reply,) = grid.pull_messages(ids)
        assert reply.has_error(), "nothing is sent"
        assert f"ConfigError: the node's configuration has label-counts={said!r}; accepted: true or false" in reply.error.reason  # type: ignore[operator]


def _recording(put: list[Upload]) -> Any:
    from cdfkd_strategy.flower.uploads import Uploads

    original = Uploads.put

    def recorded(self: Uploads, upload: Upload, state: Any) -> None:
        put.append(upload)
        original(self, upload, state)

    return recorded


@pytest.mark.parametrize(("consent", "sent"), [(None, False), (True, True), (False, False)])
def test_a_servers_configuration_alone_is_no_consent(consent: bool | None, sent: bool) -> None:
    config = tiny_config(server={"weights": "label_counts"})
    grid = MemoryGrid([make_client_app()] * config.clients.count)
    replies: list[Message] = []

    def keep(_: int, reply: Message) -> Message:
        replies.append(reply)
        return reply

    grid.edit = keep
    for node in list(grid.nodes):
        if consent is not None:
            grid.nodes[node][1].node_config["label-counts"] = consent
    if sent:
        serve(grid, config, None, resume=False)
    else:
        with pytest.raises(TooFewTeachersError, match="label-counts are None"):
            serve(grid, config, None, resume=False)
    trained = [reply for reply in replies if not reply.has_error() and "arrays" in reply.content]
    assert trained
    assert all(("label-counts" in reply.content["teacher"]) == sent for reply in trained)
