"""A node that was one client and says later that it is another is not sent that other client's teacher."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cdfkd_strategy.teachers import state_hash
from tests.flower.memory_grid import FIRST_NODE, MemoryGrid, echo_app, tiny_strategy


def first_states(grid: MemoryGrid) -> dict[int, str]:
    """Partition of the node -> hash of the weights that it was asked to train."""
    return dict(zip(grid.asked("train"), (state_hash(content["arrays"].to_torch_state_dict()) for content in grid.contents("train")), strict=True))


@pytest.mark.parametrize("first_node", [FIRST_NODE, 7 * FIRST_NODE], ids=["the same node", "a node that is new"])
def test_a_client_goes_on_with_its_teacher_and_another_one_is_not_sent_it(first_node: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Node ids stay where nodes authenticate, and are new after a restart where they do not: only a node that was somebody else is known to be wrong."""
    logging.getLogger("flwr").propagate = True
    apps = [echo_app(teacher={"arch": "lenet"})] * 3
    common = state_hash(tiny_strategy().session.architectures.initial("lenet"))

    def go(grid: MemoryGrid, rounds: int, *, resume: bool) -> dict[int, str]:
        tiny_strategy(run_dir=tmp_path, resume=resume, fraction_evaluate=0.0).start(grid, num_rounds=rounds, timeout=5)
        return first_states(grid)

    assert set(go(MemoryGrid(apps), 1, resume=False).values()) == {common}
    before = {key: json.loads((tmp_path / "uploads" / f"{key}.json").read_text())["sha256"] for key in range(3)}
    grid = MemoryGrid(apps, first_node=first_node)
    _, context = grid.nodes[grid.node(1)]
    grid.dead.add(grid.node(0))
    context.node_config["partition-id"] = 0
    sent = go(grid, 2, resume=True)
    was_another = first_node == FIRST_NODE
    assert sent[1] == (common if was_another else before[0])
    assert sent[2] == before[2]
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["nodes"] == {"0": grid.node(1), **({"1": grid.node(1)} if was_another else {"1": FIRST_NODE + 17}), "2": grid.node(2)}
    assert ("was client 1 and says now that it is client 0" in caplog.text) == was_another
