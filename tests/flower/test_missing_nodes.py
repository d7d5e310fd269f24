"""Nodes that do not come: a round waits for all of them, then goes on with those that its teachers need."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from cdfkd_strategy.errors import ConfigError, TooFewTeachersError
from cdfkd_strategy.flower.apps import make_client_app, serve
from cdfkd_strategy.flower.exchange import Exchange, wait_for_nodes
from cdfkd_strategy.flower.session import Session
from cdfkd_strategy.run_config import from_values
from cdfkd_strategy.summary import read_summary
from tests.flower.memory_grid import Killed, MemoryGrid, echo_app, project_grid, tiny_config, tiny_strategy


@pytest.fixture(autouse=True)
def _heard() -> None:
    logging.getLogger("flwr").propagate = True


def grid_without(*missing: int, nodes: int = 3) -> MemoryGrid:
    grid = MemoryGrid([echo_app(teacher={"arch": "lenet"})] * nodes)
    for node in [grid.node(partition) for partition in missing]:
        del grid.nodes[node]
    return grid


def test_all_nodes_are_waited_for_until_the_deadline_only() -> None:
    grid = grid_without(2)
    started = time.monotonic()
    assert wait_for_nodes(grid, 3, 0.3, 2) == sorted(grid.nodes)
    assert time.monotonic() - started >= 0.3
    started = time.monotonic()
    assert wait_for_nodes(grid, 2, 60, 1) == sorted(grid.nodes)
    assert time.monotonic() - started < 1


class Slow(MemoryGrid):
    """Replies come one by one, at these seconds after the question."""

    def __init__(self, *seconds: float) -> None:
        super().__init__([echo_app(teacher={"arch": "lenet"})] * len(seconds))
        self.seconds = list(seconds)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.pushed = time.monotonic()
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if not self.seconds or time.monotonic() - self.pushed < self.seconds[0]:
            return []
        self.seconds.pop(0)
        return super().pull_messages(message_ids)


def question(grid: MemoryGrid) -> list[Message]:
    return [Message(RecordDict(), dst_node_id=node, message_type="query.hello") for node in grid.nodes]


def test_patience_begins_anew_with_every_reply() -> None:
    grid = Slow(0.0, 0.3, 0.6)
    assert len(list(Exchange().ask(grid, question(grid), 30, lag=0.5))) == 3, "the last one comes more than a lag after the first"
    grid, exchange = Slow(0.0, 20.0), Exchange()
    assert len(list(exchange.ask(grid, question(grid), 30, lag=0.1))) == 1
    assert exchange.silent == [grid.node(1)]


def test_a_node_that_nothing_can_be_sent_to_is_silent() -> None:
    class Full(MemoryGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            first, *_ = messages
            return super().push_messages([first])

    strategy = tiny_strategy(identify=False, fraction_evaluate=0.0)
    grid = Full([echo_app()] * 2)
    strategy.start(grid, num_rounds=1, timeout=5)
    assert strategy.rounds[0].silent == [str(grid.node(1))]


def test_a_round_goes_on_without_missing_nodes_and_says_how_many(caplog: pytest.LogCaptureFixture) -> None:
    strategy = tiny_strategy(expected_nodes=3, min_available_nodes=None, min_teachers=2)
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy.start(grid_without(1), num_rounds=1, timeout=5)
    assert [spec.key for spec in strategy.teachers.specs] == ["0", "2"]  # type: ignore[union-attr]
    assert any("1 of 3 nodes are missing after waiting 0 s; going on without them" in record.message for record in caplog.records)


@pytest.mark.parametrize(("choices", "least"), [({"min_teachers": 2}, 2), ({"min_available_nodes": 3, "min_teachers": 1}, 3), ({"min_train_nodes": 2}, 2)])
def test_too_few_nodes_are_still_an_error(choices: dict[str, Any], least: int) -> None:
    strategy = tiny_strategy(**{"expected_nodes": 3, "min_available_nodes": None, **choices})
    with pytest.raises(TooFewTeachersError, match=rf"1 nodes are connected after waiting 0 s; accepted: at least {least} \(min_available_nodes"):
        strategy.start(grid_without(1, 2), num_rounds=1, timeout=5)


def test_teachers_that_may_be_used_again_need_no_node() -> None:
    grid = grid_without()
    strategy = tiny_strategy(expected_nodes=3, min_available_nodes=None, min_teachers=3, max_teacher_age=1, fraction_evaluate=0.0)

    def evaluate(number: int, arrays: object) -> None:
        for node in list(grid.nodes)[1:]:  # after round 1 only client 0 is left
            del grid.nodes[node]

    with pytest.raises(TooFewTeachersError, match=r"1 nodes are connected .* at least 2"):  # in round 3 those of round 1 are too old
        strategy.start(grid, num_rounds=3, timeout=5, evaluate_fn=evaluate)
    assert strategy.session.state.round == 3
    assert {key: upload.round for key, upload in ((key, strategy.session.uploads[key]) for key in "012")} == {"0": 2, "1": 1, "2": 1}


def test_a_client_counts_once_though_its_last_teacher_may_be_used_again(tmp_path: Path) -> None:
    """Clients 0 and 1 have teachers of round 1, and 0 is there in round 2: with a new one of 0 that makes two, not three."""
    told = r"round 2 would have 2 teachers at most \(clients 0, 1\), with 1 nodes connected; accepted: at least min_teachers=3; start more SuperNodes"
    choices = {"run_dir": tmp_path, "expected_nodes": 3, "min_available_nodes": None, "fraction_evaluate": 0.0}
    tiny_strategy(min_teachers=2, **choices).start(grid_without(2), num_rounds=1, timeout=5)
    for _ in range(2):  # the second start finds what the first one found
        grid = grid_without(1, 2)
        with pytest.raises(TooFewTeachersError, match=told):
            tiny_strategy(min_teachers=3, resume=True, **choices).start(grid, num_rounds=2, timeout=5)
        assert grid.asked("train") == []
    strategy = tiny_strategy(min_teachers=3, resume=True, **choices)
    strategy.start(grid_without(1), num_rounds=2, timeout=5)
    assert [spec.key for spec in strategy.teachers.specs] == ["0", "1", "2"]  # type: ignore[union-attr]


def test_an_interrupted_round_that_has_all_it_needs_distils_without_any_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices: dict[str, Any] = {"run_dir": tmp_path, "expected_nodes": 3, "min_available_nodes": None, "min_train_nodes": 2}

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_close_uploads", killed)
        with pytest.raises(Killed):
            tiny_strategy(min_teachers=2, **choices).start(grid_without(), num_rounds=1, timeout=5)
    nobody = grid_without(0, 1, 2)
    with pytest.raises(TooFewTeachersError, match="0 nodes are connected"):
        tiny_strategy(min_teachers=4, resume=True, **choices).start(nobody, num_rounds=1, timeout=5)
    strategy = tiny_strategy(min_teachers=3, resume=True, **choices)
    strategy.start(nobody, num_rounds=1, timeout=5)
    assert [spec.key for spec in strategy.teachers.specs] == ["0", "1", "2"]  # type: ignore[union-attr]


def test_what_an_error_says_to_lower_may_be_lowered_in_the_same_run(tmp_path: Path) -> None:
    choices: dict[str, Any] = {"run_dir": tmp_path, "min_available_nodes": None}
    with pytest.raises(TooFewTeachersError, match=r"1 nodes are connected .*at least 2 .*min_train_nodes.* lower these"):
        tiny_strategy(min_train_nodes=2, **choices).start(grid_without(0, 1), num_rounds=1, timeout=5)
    strategy = tiny_strategy(min_train_nodes=1, resume=True, **choices)
    strategy.start(grid_without(0, 1), num_rounds=1, timeout=5)
    assert len(strategy.teachers) == 1  # type: ignore[arg-type]


def test_clients_that_are_not_drawn_are_not_counted() -> None:
    grid = grid_without()
    with pytest.raises(TooFewTeachersError, match=r"2 teachers at most .* \(fraction_train is 0\.7, .* Every connected node takes part"):
        tiny_strategy(min_teachers=3, fraction_train=0.7, identify=True).start(grid, num_rounds=1, timeout=5)
    assert grid.asked("train") == []


def test_a_run_of_the_app_goes_on_with_the_clients_that_are_there(tmp_path: Path) -> None:
    config = tiny_config(server={"node_wait": 0.2, "min_teachers": 2})
    grid = MemoryGrid([make_client_app(config)] * 3)
    del grid.nodes[grid.node(0)]
    serve(grid, config, tmp_path / "run", resume=False)
    assert len(read_summary(tmp_path / "run")["rounds"][0]["accuracy"]["teachers"]) == 2
    with pytest.raises(TooFewTeachersError, match="at least 3"):
        serve(grid, tiny_config(server={"node_wait": 0.2, "min_available_nodes": 3}), None, resume=False)


def test_a_run_of_the_app_waits_for_all_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(server={"node_wait": 30.0})
    grid = MemoryGrid([make_client_app(config)] * 3)
    looks = iter(range(100))
    monkeypatch.setattr(grid, "get_node_ids", lambda: list(grid.nodes)[: 1 + next(looks)])  # they come one by one
    strategy = serve(grid, config, None, resume=False)
    assert [spec.key for spec in strategy.teachers.specs] == ["0", "1", "2"]  # type: ignore[union-attr]


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="expected_nodes is 0; accepted: at least 1"):
        tiny_strategy(expected_nodes=0)
    with pytest.raises(ConfigError, match=r"server.min_available_nodes is 0; accepted: at least 1"):
        from_values({"server": {"min_available_nodes": 0}})


def test_a_run_that_goes_on_waits_for_all_nodes_before_clients_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of server and link they come back one by one, and the first is not the federation."""
    config = tiny_config()
    original = Session.evaluate_messages
    monkeypatch.setattr(Session, "evaluate_messages", die)
    with pytest.raises(Killed):
        serve(project_grid(config), config, tmp_path, resume=False)
    monkeypatch.setattr(Session, "evaluate_messages", original)
    grid = project_grid(config)
    nodes, there = list(grid.nodes), itertools.count(1)
    monkeypatch.setattr(grid, "get_node_ids", lambda: nodes[: next(there)])
    serve(grid, config, tmp_path, resume=True)
    assert grid.asked("train") == []
    assert grid.asked("evaluate") == [0, 1, 2]


def die(*_: Any, **__: Any) -> None:
    raise Killed
