"""When ``--resume`` finds a finished run, and when ``engine.max_seconds`` lets it go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdfkd_strategy.cli import running
from cdfkd_strategy.errors import CheckpointError
from cdfkd_strategy.run_config import resolve
from cdfkd_strategy.summary import SummaryWriter


def stopped_run(out: Path, stopped_by: list[str], seconds: float) -> None:
    """What a run of several rounds leaves, with ``engine.max_seconds=100``."""
    writer = SummaryWriter(out, resolve("digits", [f"server.rounds={len(stopped_by)}", "engine.max_seconds=100"]))
    for number in range(1, len(stopped_by) + 1):
        writer.round(number, None, seconds={"distill": seconds})
    writer.finish("max_seconds")
    rounds = [{"round": number, "stopped_by": reason} for number, reason in enumerate(stopped_by, 1)]
    (out / "state.json").write_text(json.dumps({"format": 1, "rounds": rounds}), encoding="utf-8")


@pytest.mark.parametrize(
    ("stopped_by", "limit", "goes_on"),
    [
        (["schedule", "max_seconds"], 200, True),
        (["schedule", "max_seconds"], 104, False),  # an epoch ended at 105 s
        (["max_seconds", "schedule"], 200, False),  # an earlier round is over
    ],
)
def test_a_raised_limit_matters_only_where_it_stopped_the_last_round(stopped_by: list[str], limit: float, goes_on: bool, tmp_path: Path) -> None:
    stopped_run(tmp_path, stopped_by, 105.0)
    before = (tmp_path / "summary.json").read_bytes()
    config = resolve("digits", ["server.rounds=2", f"engine.max_seconds={limit}"])
    assert running.is_finished(tmp_path, config) != goes_on
    assert (tmp_path / "summary.json").read_bytes() == before
    (tmp_path / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot read .*state\.json .*start a new run directory"):
        running.is_finished(tmp_path, config)
