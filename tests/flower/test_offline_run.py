"""`cdfkd teachers` and `cdfkd distill` are the Flower run without Flower: the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cdfkd_strategy import offline
from cdfkd_strategy.flower.apps import serve
from cdfkd_strategy.models.stages import MAX_STAGES
from cdfkd_strategy.summary import read_summary
from cdfkd_strategy.teacher_directory import load_teachers
from cdfkd_strategy.teachers import state_hash
from tests.flower.memory_grid import project_grid, tiny_config


@pytest.mark.parametrize(("weights", "student"), [("auto", {}), ("label_counts", {"stages": 1})])
def test_offline_and_flower_give_the_same_teachers_and_student(weights: str, student: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(server={"node_wait": 0.2, "weights": weights}, clients={"architectures": ["small_cnn", "lenet_bn"]}, student=student)
    strategy = serve(project_grid(config), config, tmp_path / "flower", resume=False)

    monkeypatch.setattr(offline, "usable_cores", lambda: 1)
    offline.write_teachers(config, tmp_path / "teachers")
    work = offline.plan(tmp_path / "teachers", [])
    distilled = offline.distill_directory(work, tmp_path / "offline")

    teachers = load_teachers(tmp_path / "teachers")
    assert strategy.teachers is not None
    assert strategy.student is not None
    assert strategy.student.spec.stages == student.get("stages", MAX_STAGES)
    assert [spec.sha256 for spec in teachers.specs] == [state_hash(net.state_dict()) for net in strategy.teachers.nets]
    for file in ("student.safetensors", "student.json"):
        assert (tmp_path / "offline" / file).read_bytes() == (tmp_path / "flower" / file).read_bytes()
    flower, alone = (read_summary(tmp_path / name)["rounds"][0]["accuracy"] for name in ("flower", "offline"))
    assert flower["student_attention"] is not None
    assert distilled is not None
    attention = offline.head_attention(work, distilled.result.student)
    assert attention is not None
    assert strategy.attention is not None
    # up to rounding, as the student's memory layout is another; the bias is left out: it shifts all headers alike, so that the softmax takes no notice of it
    torch.testing.assert_close(attention.score.weight, strategy.attention.score.weight, rtol=1e-4, atol=1e-6)
    assert flower == alone
